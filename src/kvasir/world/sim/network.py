"""KV on a simulated network: flows share links max-min fairly, each arrival or end changes rates.

Knows bytes, routes and virtual time. Must not know requests' content, steps or policy. Completion
is decided by identity: the flow whose end was computed to be next is the one that ends, whatever
its remaining bytes have been rounded to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvasir.core.messages import Location
from kvasir.core.specs.topology import TIERS
from kvasir.net.maxmin import FlowSet, flow_of
from kvasir.net.topology import Route, Topology


class Schedule(Protocol):
    """The heap: call `action` at virtual time `at`."""

    def __call__(self, at: float, action: Callable[[], None]) -> None: ...


class _Flow:
    __slots__ = ("done", "remaining", "tiers")

    def __init__(self, nbytes: float, tiers: tuple[int, ...], done: Callable[[], None]) -> None:
        self.remaining = nbytes
        self.tiers = tiers  # of the links that it crosses
        self.done = done


class SimNetwork:
    """Flows by number. `now` is passed in by whoever calls."""

    def __init__(self, topology: Topology, schedule: Schedule) -> None:
        self.topology = topology
        self.bytes_by_tier = [0] * len(TIERS)
        self._schedule = schedule
        self._flows: dict[int, _Flow] = {}
        self._shares: FlowSet[int] = FlowSet(topology.capacities)
        self._next = 1
        self._version = 0
        self._now = 0.0
        self._moved = [0.0] * len(TIERS)
        self._window_started = 0.0

    def route(self, src: Location, dst: Location) -> Route:
        return self.topology.route(src, dst)

    def start(self, now: float, route: Route, nbytes: int, done: Callable[[], None]) -> int:
        """Begin a flow of `nbytes` > 0; `done` is called at its end, unless it is stopped."""
        self._advance(now)
        name, self._next = self._next, self._next + 1
        tiers = tuple(self.topology.links[link].tier for link in route.links)
        self._flows[name] = _Flow(float(nbytes), tiers, done)
        self._shares.add(name, flow_of(route))
        self.bytes_by_tier[route.tier] += nbytes
        self._plan()
        return name

    def stop(self, now: float, name: int) -> None:
        """End a flow early; unknown or over: nothing happens."""
        if name in self._flows:
            self._advance(now)
            del self._flows[name]
            self._shares.remove(name)
            self._plan()

    def utilisation(self, now: float) -> tuple[float, ...]:
        """Share of each tier's capacity used since the last call; the window starts anew."""
        self._advance(now)
        seconds = now - self._window_started
        used = []
        for tier, moved in enumerate(self._moved):
            capacity = self.topology.tier_capacity(tier) * seconds
            used.append(min(moved / capacity, 1.0) if capacity > 0 else 0.0)
        self._moved = [0.0] * len(TIERS)
        self._window_started = now
        return tuple(used)

    def _advance(self, now: float) -> None:
        seconds = now - self._now
        self._now = now
        if seconds <= 0 or not self._flows:
            return
        rates = self._shares.rates()
        for name, flow in self._flows.items():
            sent = min(rates[name] * seconds, flow.remaining)
            flow.remaining -= sent
            for tier in flow.tiers:
                self._moved[tier] += sent

    def _plan(self) -> None:
        """Find the flow that ends next and wait for it; any change makes the plan void."""
        self._version += 1
        best, best_s = 0, float("inf")
        rates = self._shares.rates()
        for name, flow in self._flows.items():
            rate = rates[name]
            seconds = flow.remaining / rate if rate > 0 else float("inf")
            if seconds < best_s:
                best, best_s = name, seconds
        if best:
            version = self._version
            self._schedule(self._now + best_s, lambda: self._end(version, best))

    def _end(self, version: int, name: int) -> None:
        if version != self._version:
            return
        seconds = self._flows[name].remaining / self._shares.rates()[name]
        self._advance(self._now + seconds)
        flow = self._flows.pop(name)
        self._shares.remove(name)
        self._plan()
        flow.done()

    def check(self) -> None:
        assert len(self._flows) == len(self._shares)
        assert all(flow.remaining >= 0 for flow in self._flows.values())
