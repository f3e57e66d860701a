"""The simulated network against times worked out by hand."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest

from kvasir.core.messages import Location
from kvasir.core.specs import TopologySpec
from kvasir.core.specs.faults import CrossTraffic, LinkFault
from kvasir.net.topology import Topology
from kvasir.world.sim.network import SimNetwork
from kvasir.world.sim.traffic import befall

GB = 10**9


class World:
    """A heap and a network on it."""

    def __init__(self, **topology: object) -> None:
        self.now = 0.0
        self.turns = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self.topology = Topology(TopologySpec.model_validate({"preset": "fabric"} | topology))
        self.network = SimNetwork(self.topology, self.schedule)
        self.over: list[tuple[str, float]] = []

    def schedule(self, at: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (at, self._serial, action))

    def send(self, name: str, src: int, dst: int, nbytes: int, gpus: int = 4) -> int:
        route = self.network.route(place(src, gpus), place(dst, gpus), name)
        return self.network.start(
            self.now, route, nbytes, lambda: self.over.append((name, self.now))
        )

    def run(self, until: float = float("inf")) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
            self.turns += 1
            self.network.check()
        if until < float("inf"):
            self.now = until


def place(first: int, gpus: int = 4) -> Location:
    return Location(tuple(range(first, first + gpus)))


def test_a_flow_that_joins_halves_the_other_and_gives_back() -> None:
    """NICs of 50 GB/s into gpus 8..11. a: 1 s alone, then 100 GB left at 25 GB/s beside b."""
    world = World()
    world.send("a", 0, 8, 150 * GB)
    world.schedule(1.0, lambda: world.send("b", 4, 8, 50 * GB))
    world.run()
    assert world.over == [("b", pytest.approx(3.0)), ("a", pytest.approx(4.0))]


def test_flows_of_other_links_are_left_alone() -> None:
    world = World()
    world.send("far", 16, 24, 50 * GB)
    for i in range(5):
        world.schedule(i / 10, lambda i=i: world.send(f"near-{i}", 0, 8, 5 * GB))
    world.run()
    assert world.over[-1] == ("far", 1.0), "not one rounding: its rate never changed"


def test_a_stopped_flow_leaves_its_share_and_never_ends() -> None:
    world = World()
    world.send("a", 0, 8, 100 * GB)
    b = world.send("b", 4, 8, 100 * GB)
    world.schedule(2.0, lambda: world.network.stop(world.now, b))
    world.run()
    assert world.over == [("a", pytest.approx(3.0))]
    world.network.stop(world.now, b)


def test_ends_of_one_instant_all_come_and_time_never_runs_back() -> None:
    world = World()
    for i in range(7):
        world.send(f"f{i}", 0, 8, 10**9 // 7)
    world.run()
    assert [name for name, _ in world.over] == [f"f{i}" for i in range(7)]
    times = [at for _, at in world.over]
    assert times == sorted(times) and times[-1] == pytest.approx(10**9 / 50e9, rel=1e-6)


def test_counters_hold_what_has_moved_so_far() -> None:
    """50 GB/s over two NIC links; 16 instances' NICs are not counted until they are routed."""
    world = World()
    world.send("a", 0, 8, 100 * GB)
    world.run(until=0.5)
    used = world.network.utilisation(0.5)
    assert used == (0.0, pytest.approx(2 * 50e9 / world.topology.tier_capacity(1)), 0.0, 0.0)
    world.run(until=4.0)
    rest = world.network.utilisation(4.0)[1] * 3.5 * world.topology.tier_capacity(1)
    assert rest == pytest.approx(2 * 75 * GB), "1.5 s more, over two links"
    assert world.network.utilisation(5.0) == (0.0,) * 4
    assert world.network.bytes_by_tier == [0, 100 * GB, 0, 0]


def test_a_bundle_over_several_uplinks_ends_with_its_slowest_pair() -> None:
    """4 pairs of 25 GB each over two uplinks of 12.5 GB/s: 2 + 2 take 4 s, 1 + 3 take 6, 4 take 8;
    the rest of 1 + 3 goes on at 12.5 when the one is over."""
    seconds = set()
    for i in range(24):
        world = World(uplinks=2, rack_oversubscription=8)
        world.send(f"r{i}/1", 0, 16, 100 * GB)
        world.run()
        ((_, at),) = world.over
        pairs = world.network.route(place(0), place(16), f"r{i}/1").parts()
        assert at == pytest.approx(2.0 * max(way.pairs for way in pairs))
        seconds.add(round(at))
    assert seconds == {4, 6, 8}


def test_stopping_a_bundle_stops_all_of_its_flows() -> None:
    world = World(uplinks=2, rack_oversubscription=8)
    names = [f"r{i}/1" for i in range(8)]
    started = [world.send(name, 0, 16, 10 * GB) for name in names]
    world.schedule(0.1, lambda: [world.network.stop(world.now, flow) for flow in started])
    world.run()
    assert world.over == []


def test_void_ends_do_not_pile_up() -> None:
    """1,000 changes of two long flows' rates leave a handful of events, not thousands."""
    world = World()
    world.send("a", 0, 8, 10**15)
    world.send("b", 4, 8, 10**15)
    for i in range(1000):
        world.schedule(i / 10, lambda: world.send("c", 12, 8, 10**6))
    world.run(until=200.0)
    assert len(world.network._ends) < 80


# --- a bad network --------------------------------------------------------------------------------


def befallen(
    *, links: tuple[LinkFault, ...] = (), traffic: tuple[CrossTraffic, ...] = (), seed: int = 0,
    **topology: object,
) -> World:  # fmt: skip
    world = World(**topology)
    for gpu in (0, 8, 16):
        world.network.route(place(gpu), place(gpu))
    befall(world.network, world.schedule, links, traffic, seed)
    return world


def test_a_dead_link_stalls_its_flows_and_they_go_on_when_it_is_back() -> None:
    """100 GB at 50 GB/s: 1 s of sending, 3 s of nothing, 1 s more; the other NIC never notices."""
    world = befallen(links=(LinkFault(link="gpus-8..11-nic-in", at_s=1.0, for_s=3.0),))
    world.send("dead", 0, 8, 100 * GB)
    world.send("other", 4, 16, 100 * GB)
    world.run()
    assert world.over == [("other", 2.0), ("dead", pytest.approx(5.0))]


def test_a_slow_nic_slows_and_a_flapping_one_counts_its_ups() -> None:
    """Slow: 50 GB, then at 5 GB/s 50 GB more: 1 + 10 s. Flapping: up 1 s, down 1 s, in turn."""
    world = befallen(links=(LinkFault(link="gpus-8..11-nic-in", at_s=1.0, scale=0.1),))
    world.send("slow", 0, 8, 100 * GB)
    world.run()
    assert world.over == [("slow", pytest.approx(11.0))]
    fault = LinkFault(link="gpus-8..11-nic-in", at_s=1.0, for_s=1.0, times=3, every_s=2.0)
    world = befallen(links=(fault,))
    world.send("flaps", 0, 8, 125 * GB)
    world.run()
    assert world.over == [("flaps", pytest.approx(4.5))]


def test_a_link_that_never_comes_back_holds_its_flow_for_ever() -> None:
    world = befallen(links=(LinkFault(link="rack-1-down", at_s=0.5),))
    stuck = world.send("stuck", 0, 16, 100 * GB)
    world.run(until=100.0)
    assert world.over == []
    world.network.stop(world.now, stuck)
    world.network.check()


def test_constant_traffic_takes_its_share_of_an_uplink() -> None:
    """Rack uplink of 50 GB/s. Others want 10: they get them, 40 are left for 50 GB. Then three of
    20 each: fair shares are per pair, 4 of ours and 3 of theirs, 50 / 7 each, 4 / 7 of it ours."""
    traffic = (CrossTraffic(sources=(12,), target=28, bandwidth=10e9),)
    world = befallen(traffic=traffic, rack_oversubscription=4)
    world.send("a", 0, 16, 40 * GB)
    world.run(until=10.0)
    assert world.over == [("a", pytest.approx(1.0))]
    burst = (CrossTraffic(sources=(12, 13, 14), target=28, bandwidth=20e9),)
    world = befallen(traffic=burst, rack_oversubscription=4, nic_bandwidth=12.5e9)
    world.send("a", 0, 16, 40 * GB)
    world.run(until=10.0)
    # They end in one NIC of 12.5 GB/s: 12.5 / 3 each, less than 50 / 7; 37.5 are left.
    assert world.over == [("a", pytest.approx(40 / 37.5))]


def test_traffic_that_is_on_and_off_in_turn() -> None:
    """On 1 s, off 1 s: 40 GB/s beside it, else 50. 130 GB: 40 + 50 + 40 in 3 s."""
    cross = CrossTraffic(sources=(12,), target=28, bandwidth=10e9, on_s=1.0, off_s=1.0)
    world = befallen(traffic=(cross,), rack_oversubscription=4)
    world.send("a", 0, 16, 130 * GB)
    world.run(until=10.0)
    assert world.over == [("a", pytest.approx(3.0))]


def test_random_traffic_is_the_same_for_a_seed_and_ends_when_it_should() -> None:
    cross = CrossTraffic(
        sources=(12,), target=28, bandwidth=10e9, on_s=0.1, off_s=0.1, random=True, until_s=5.0
    )

    def end(seed: int) -> float:
        world = befallen(traffic=(cross,), seed=seed, rack_oversubscription=4)
        world.send("a", 0, 16, 200 * GB)
        world.run()
        assert len(world.network._flows) == 0, "nothing of others is left after until_s"
        return world.over[0][1]

    assert end(1) == end(1) != end(2)
    assert 4.0 < end(1) < 5.0, "between all of the time without and with it"
