"""KV on a simulated network: flows share links max-min fairly, each arrival or end changes rates.

Knows bytes, routes and virtual time. Must not know requests' content, steps or policy. Completion
is decided by identity: the flow whose end was computed to be next is the one that ends, whatever
its remaining bytes have been rounded to.

A flow's bytes are brought up to date when its rate changes, and only then is its end computed anew.
Ends wait in a heap; an entry is void once its flow has a newer one. Changes of one instant are
solved together. A transfer whose pairs take several paths is a bundle of flows, one for each path
with its pairs' part of the bytes, and over when the last of them is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

from kvasir.core.messages import Location
from kvasir.core.specs.topology import TIERS
from kvasir.net.maxmin import Flow, FlowSet, flows_of
from kvasir.net.topology import Route, Topology
from kvasir.world.sim.heat import LinkHeat


class Schedule(Protocol):
    """The heap: call `action` at virtual time `at`."""

    def __call__(self, at: float, action: Callable[[], None]) -> None: ...


def _never() -> None:
    raise AssertionError("a flow without an end ended")


class _Bundle:
    """One transfer: flows `names`, of which `left` are not over."""

    __slots__ = ("done", "left", "names")

    def __init__(self, names: range, done: Callable[[], None]) -> None:
        self.names = names
        self.left = len(names)
        self.done = done


class _Flow:
    """`remaining` bytes as of `since`; at `rate` ever since, so it is over at `ends_at`.

    `version` counts changes of `ends_at`; `awaited` is the one that the world's heap waits for.
    """

    __slots__ = (
        "awaited", "bundle", "ends_at", "links", "rate", "remaining", "since", "tiers", "version",
    )  # fmt: skip

    def __init__(
        self, nbytes: float, links: tuple[int, ...], tiers: tuple[int, ...], now: float,
        bundle: _Bundle,
    ) -> None:  # fmt: skip
        self.remaining = nbytes
        self.links = links
        self.tiers = tiers  # of the links that it crosses
        self.bundle = bundle
        self.since = now
        self.rate = 0.0
        self.ends_at = math.inf
        self.version = 0
        self.awaited = 0


class SimNetwork:
    """Flows by number; a bundle goes by its first. `now` is passed in by whoever calls."""

    def __init__(self, topology: Topology, schedule: Schedule) -> None:
        self.topology = topology
        self.bytes_by_tier = [0] * len(TIERS)
        self.heat: LinkHeat | None = None  # who wants bytes by link and time sets it before the run
        self._schedule = schedule
        self._bundles: dict[int, _Bundle] = {}
        self._flows: dict[int, _Flow] = {}
        self._shares: FlowSet[int] = FlowSet(topology.capacities)
        self._ends: list[tuple[float, int, int]] = []  # when, flow, version
        self._next = 1
        self._unsolved = False
        self._moved = [0.0] * len(TIERS)
        self._window_started = 0.0

    def route(self, src: Location, dst: Location, transfer_id: str | None = None) -> Route:
        return self.topology.route(src, dst, transfer_id)

    def start(self, now: float, route: Route, nbytes: int, done: Callable[[], None]) -> int:
        """Begin to send `nbytes` > 0; `done` is called at their end, unless they are stopped."""
        self.bytes_by_tier[route.tier] += nbytes
        return self._begin(now, route, flows_of(route), float(nbytes), done)

    def background(self, now: float, route: Route, bandwidth: float) -> int:
        """Begin a flow of others that has no end: at most `bandwidth` bytes per second in all."""
        cap = bandwidth / route.multiplicity
        flows = [flow._replace(cap=min(cap, flow.cap or cap)) for flow in flows_of(route)]
        return self._begin(now, route, flows, math.inf, _never)

    def set_capacity(self, now: float, link: int, capacity: float) -> None:
        """From now on a link carries `capacity` bytes per second; 0: what crosses it stalls."""
        self.topology.capacities[link] = capacity
        self._shares.changed([link])
        self._solve_soon(now)

    def _begin(
        self, now: float, route: Route, flows: list[Flow], nbytes: float,
        done: Callable[[], None],
    ) -> int:  # fmt: skip
        first, self._next = self._next, self._next + len(flows)
        bundle = self._bundles[first] = _Bundle(range(first, self._next), done)
        links = self.topology.links
        for name, flow in zip(bundle.names, flows, strict=True):
            tiers = tuple(links[link].tier for link in flow.links)
            part = nbytes * flow.multiplicity / route.multiplicity
            self._flows[name] = _Flow(part, flow.links, tiers, now, bundle)
            self._shares.add(name, flow)
        self._solve_soon(now)
        return first

    def stop(self, now: float, first: int) -> None:
        """End what `start` began early; unknown or over: nothing happens."""
        bundle = self._bundles.pop(first, None)
        if bundle is None:
            return
        for name in bundle.names:
            flow = self._flows.pop(name, None)
            if flow is not None:
                self._move(flow, now)
                self._shares.remove(name)
        self._solve_soon(now)

    def utilisation(self, now: float) -> tuple[float, ...]:
        """Share of each tier's capacity used since the last call; the window starts anew."""
        for flow in self._flows.values():
            self._move(flow, now)
        seconds = now - self._window_started
        used = []
        for tier, moved in enumerate(self._moved):
            capacity = self.topology.tier_capacity(tier) * seconds
            used.append(min(moved / capacity, 1.0) if capacity > 0 else 0.0)
        self._moved = [0.0] * len(TIERS)
        self._window_started = now
        return tuple(used)

    def _move(self, flow: _Flow, now: float) -> None:
        """What has gone since the flow was last looked at."""
        sent = min(flow.rate * (now - flow.since), flow.remaining)
        if self.heat is not None and sent > 0:
            self.heat.add(flow.links, flow.since, now, sent)
        flow.since = now
        if sent > 0:
            flow.remaining -= sent
            for tier in flow.tiers:
                self._moved[tier] += sent

    def _solve_soon(self, now: float) -> None:
        """At this instant, after whatever else happens in it."""
        if not self._unsolved:
            self._unsolved = True
            self._schedule(now, partial(self._solve, now))

    def _solve(self, now: float) -> None:
        """New rates, and new ends for the flows that have one."""
        self._unsolved = False
        for name, rate in self._shares.settle().items():
            flow = self._flows[name]
            self._move(flow, now)
            flow.rate = rate
            flow.ends_at = now + flow.remaining / rate if rate > 0 else math.inf
            flow.version += 1
            if flow.ends_at < math.inf:
                heapq.heappush(self._ends, (flow.ends_at, name, flow.version))
        if len(self._ends) > 2 * len(self._flows) + 64:
            self._ends = [end for end in self._ends if self._valid(end[1], end[2])]
            heapq.heapify(self._ends)
        self._await_next()

    def _valid(self, name: int, version: int) -> bool:
        flow = self._flows.get(name)
        return flow is not None and flow.version == version

    def _await_next(self) -> None:
        """Have the world's heap wait for the flow that ends next, unless it does already."""
        while self._ends:
            at, name, version = self._ends[0]
            if self._valid(name, version):
                flow = self._flows[name]
                if flow.awaited != version:
                    flow.awaited = version
                    self._schedule(at, partial(self._end, name, version))
                return
            heapq.heappop(self._ends)

    def _end(self, name: int, version: int) -> None:
        """The flow is over, unless its end has moved since."""
        if not self._valid(name, version):
            return
        flow = self._flows.pop(name)
        if self.heat is not None:
            self.heat.add(flow.links, flow.since, flow.ends_at, flow.remaining)
        for tier in flow.tiers:
            self._moved[tier] += flow.remaining
        self._shares.remove(name)
        self._solve_soon(flow.ends_at)
        bundle = flow.bundle
        bundle.left -= 1
        if not bundle.left:
            del self._bundles[bundle.names[0]]
            bundle.done()

    def check(self) -> None:
        assert len(self._flows) == len(self._shares)
        assert sum(bundle.left for bundle in self._bundles.values()) == len(self._flows)
        for name, flow in self._flows.items():
            assert flow.remaining >= 0
            assert self._unsolved or flow.rate == self._shares.rates()[name], name
