"""What befalls the simulated network: links that fail, slow down and flap, and others' traffic.

Knows links, rates and virtual time. Must not know requests, workers or policy; the conductor does
not learn of it, except by telemetry and by how long its transfers take. Random durations come from
the seed that is passed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import msgspec

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.messages import Location
from kvasir.world.sim.network import Schedule, SimNetwork


class LinkFault(msgspec.Struct, frozen=True):
    """From `at_s` a link has `scale` of its capacity, for `for_s`; 0 is down, 0.1 a slow NIC.

    It flaps `times` times, every `every_s`. Links go by the topology's names (`rack-0-up`,
    `gpus-0..3-nic-in`); what crosses a dead link stalls until it is back or somebody gives up.
    Where faults of one link overlap, the last word counts.
    """

    link: str
    at_s: float
    scale: float = 0.0
    for_s: float = math.inf
    times: int = 1
    every_s: float = 0.0


class CrossTraffic(msgspec.Struct, frozen=True):
    """Others' flows from each of `sources` to `target`, each of at most `bandwidth` bytes a second.

    Accelerators by index; each has a NIC of its own, so they meet our transfers on uplinks only.
    Constant, or `on_s` on and `off_s` off in turn: means of exponential durations with `random`.
    All sources are on together: several make an incast burst.
    """

    sources: tuple[int, ...]
    target: int
    bandwidth: float
    from_s: float = 0.0
    until_s: float = math.inf
    on_s: float = math.inf
    off_s: float = 0.0
    random: bool = False


def befall(
    network: SimNetwork, schedule: Schedule, links: Iterable[LinkFault],
    traffic: Iterable[CrossTraffic], seed: int,
) -> None:  # fmt: skip
    """Put everything into the heap. Raises ConfigError for a link or accelerator that is not
    there; links of instances are there once a route of theirs has been asked for."""
    known = {link.name: i for i, link in enumerate(network.topology.links)}
    for fault in links:
        _fault(network, schedule, fault, known)
    for i, cross in enumerate(traffic):
        _Cross(network, schedule, cross, random.Random(f"{seed} cross traffic {i}"))


def _fault(
    network: SimNetwork, schedule: Schedule, fault: LinkFault, known: dict[str, int]
) -> None:
    if fault.link not in known:
        raise ConfigError(
            f"no link {fault.link!r} to fail",
            where="faults.links",
            nearest=nearest(fault.link, known),
            next_step="name a link of the topology",
        )
    link = known[fault.link]
    full = network.topology.links[link].capacity
    for turn in range(fault.times):
        at = fault.at_s + turn * fault.every_s
        schedule(at, lambda at=at: network.set_capacity(at, link, full * fault.scale))  # type: ignore[misc]
        if fault.for_s < math.inf:
            back = at + fault.for_s
            schedule(back, lambda back=back: network.set_capacity(back, link, full))  # type: ignore[misc]


class _Cross:
    """One source of traffic, on or off."""

    def __init__(
        self, network: SimNetwork, schedule: Schedule, cross: CrossTraffic, draws: random.Random
    ) -> None:
        assert cross.on_s + cross.off_s > 0, "neither on nor off takes any time"
        self._network = network
        self._schedule = schedule
        self._cross = cross
        self._draws = draws
        there = Location((cross.target,))
        self._routes = [network.route(Location((gpu,)), there) for gpu in cross.sources]
        schedule(cross.from_s, lambda: self._on(cross.from_s))

    def _on(self, now: float) -> None:
        cross = self._cross
        if now >= cross.until_s:
            return
        flows = [self._network.background(now, r, cross.bandwidth) for r in self._routes]
        ends = min(now + self._seconds(cross.on_s), cross.until_s)
        if ends < math.inf:
            self._schedule(ends, lambda: self._off(ends, flows))

    def _off(self, now: float, flows: list[int]) -> None:
        for flow in flows:
            self._network.stop(now, flow)
        again = now + self._seconds(self._cross.off_s)
        if again < self._cross.until_s:
            self._schedule(again, lambda: self._on(again))

    def _seconds(self, mean: float) -> float:
        if self._cross.random and 0 < mean < math.inf:
            return self._draws.expovariate(1 / mean)
        return mean
