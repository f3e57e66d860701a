"""What befalls the simulated network: links that fail, slow down and flap, and others' traffic.

Knows links, rates and virtual time. Must not know requests, workers or policy; the conductor does
not learn of it, except by telemetry and by how long its transfers take. Random durations come from
the seed that is passed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import partial

from kvasir.core.messages import Location
from kvasir.core.specs.faults import CrossTraffic, LinkFault
from kvasir.world.sim.faults import turns
from kvasir.world.sim.network import Schedule, SimNetwork


def befall(
    network: SimNetwork, schedule: Schedule, links: Iterable[LinkFault],
    traffic: Iterable[CrossTraffic], seed: int,
) -> None:  # fmt: skip
    """Put everything into the heap. Every fault names one `link`, and links and accelerators are
    there: see `faults.resolve`; links of instances are once a route of theirs was asked for."""
    known = {link.name: i for i, link in enumerate(network.topology.links)}
    for fault in links:
        _fault(network, schedule, fault, known[fault.link])
    for i, cross in enumerate(traffic):
        _Cross(network, schedule, cross, random.Random(f"{seed} cross traffic {i}"))


def _fault(network: SimNetwork, schedule: Schedule, fault: LinkFault, link: int) -> None:
    full = network.topology.links[link].capacity
    for from_s, until_s in turns(fault):
        schedule(from_s, partial(network.set_capacity, from_s, link, full * fault.scale))
        if until_s < math.inf:
            schedule(until_s, partial(network.set_capacity, until_s, link, full))


class _Cross:
    """One source of traffic, on or off."""

    def __init__(
        self, network: SimNetwork, schedule: Schedule, cross: CrossTraffic, draws: random.Random
    ) -> None:
        self._network = network
        self._schedule = schedule
        self._cross = cross
        self._on_s = math.inf if cross.on_s is None else cross.on_s
        self._until_s = math.inf if cross.until_s is None else cross.until_s
        self._draws = draws
        there = Location((cross.target,))
        self._routes = [network.route(Location((gpu,)), there) for gpu in cross.sources]
        schedule(cross.from_s, lambda: self._on(cross.from_s))

    def _on(self, now: float) -> None:
        cross = self._cross
        if now >= self._until_s:
            return
        flows = [self._network.background(now, r, cross.bandwidth) for r in self._routes]
        ends = min(now + self._seconds(self._on_s), self._until_s)
        if ends < math.inf:
            self._schedule(ends, lambda: self._off(ends, flows))

    def _off(self, now: float, flows: list[int]) -> None:
        for flow in flows:
            self._network.stop(now, flow)
        again = now + self._seconds(self._cross.off_s)
        if again < self._until_s:
            self._schedule(again, lambda: self._on(again))

    def _seconds(self, mean: float) -> float:
        if self._cross.random and 0 < mean < math.inf:
            return self._draws.expovariate(1 / mean)
        return mean
