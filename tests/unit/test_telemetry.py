"""Counters on their way: when a reading comes, how far off it is, and how many are lost."""

import heapq
from collections.abc import Callable

import pytest

from kvasir.core.messages import Location, NetReading
from kvasir.core.specs import TopologySpec
from kvasir.core.specs.topology import TelemetrySpec
from kvasir.net.topology import Topology
from kvasir.world.sim.network import SimNetwork
from kvasir.world.sim.telemetry import Telemetry


class World:
    """One flow of 25 GB/s over two NIC links of 50 all the time, and who listens."""

    def __init__(self, seed: int = 0, **spec: float) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self.heard: list[tuple[float, NetReading]] = []
        topology = Topology(TopologySpec(preset="fabric"))
        self.network = SimNetwork(topology, self.schedule)
        a, b = Location((0, 1, 2, 3)), Location((8, 9, 10, 11))
        self.network.background(0.0, topology.route(a, b), 25e9)
        self.true = 2 * 25e9 / topology.tier_capacity(1)
        Telemetry(TelemetrySpec(**spec), self.network, self.schedule,
                  lambda r: self.heard.append((self.now, r)), seed)  # fmt: skip

    def schedule(self, at: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (at, self._serial, action))

    def run(self, until: float) -> list[tuple[float, NetReading]]:
        while self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        return self.heard


def test_by_default_a_reading_is_there_at_once_and_exact() -> None:
    world = World(period_s=0.5)
    heard = world.run(2.0)
    assert [(at, r.measured_at) for at, r in heard] == [(t, t) for t in (0.5, 1.0, 1.5, 2.0)]
    assert all(r.utilisation == (0.0, pytest.approx(world.true), 0.0, 0.0) for _, r in heard)


def test_a_late_reading_says_what_was_and_when() -> None:
    """The flow's counters as of 1 s arrive at 1.75 s."""
    heard = World(period_s=1.0, delay_s=0.75).run(4.0)
    assert [(at, r.measured_at) for at, r in heard] == [(1.75, 1.0), (2.75, 2.0), (3.75, 3.0)]


def test_readings_may_be_more_periods_late_than_one() -> None:
    heard = World(period_s=1.0, delay_s=2.5).run(6.0)
    assert [(at, r.measured_at) for at, r in heard] == [(3.5, 1.0), (4.5, 2.0), (5.5, 3.0)]


def test_the_error_stays_in_its_bounds_and_uses_them() -> None:
    world = World(period_s=0.01, error=0.05, bias=0.1)
    off = [r.utilisation[1] - world.true for _, r in world.run(10.0)]
    assert len(off) == 1000
    assert 0.05 <= min(off) < 0.053 and 0.147 < max(off) <= 0.15
    assert sum(off) / len(off) == pytest.approx(0.1, abs=0.005)
    assert all(0.0 <= c <= 1.0 for _, r in world.heard for c in r.utilisation)


def test_some_are_lost_by_the_seed() -> None:
    def heard(seed: int) -> list[float]:
        return [r.measured_at for _, r in World(seed, period_s=0.01, loss=0.3).run(10.0)]

    assert 640 < len(heard(1)) < 760
    assert heard(1) == heard(1) != heard(2)
    assert World(0, period_s=1.0, loss=1.0).run(10.0) == []
