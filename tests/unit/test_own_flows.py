"""What one more transfer would get: the narrowest share on its path, and the exact rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.messages import Location, NetReading
from kvasir.core.specs import TierSpec, TopologySpec
from kvasir.net.maxmin import flow_of, solve
from kvasir.net.oracle import Oracle
from kvasir.net.own import OwnFlows
from kvasir.net.topology import Topology

L, GB = 10e-6, 10**9
PLACES = {"a": 0, "a2": 4, "b": 16, "c": 32, "c2": 36, "d": 48}  # racks 0, 0, 1, 2, 2, 3 in 2 pods


def oracle(**topology) -> Oracle:
    """Four GPUs a worker: NICs of 50 GB/s, rack uplinks of 100, pod uplinks of 100."""
    made = Oracle(Topology(TopologySpec(**{"preset": "fabric"} | topology)))
    for name, first in PLACES.items():
        made.add_worker(name, Location(tuple(range(first, first + 4))))
    return made


def rate(o: Oracle, src: str, dst: str, arm: str = "path", now: float = 0.0) -> float:
    return 50 * GB / (o.estimate(src, dst, 50 * GB, now, arm).seconds - L)


ARMS = pytest.mark.parametrize("arm", ["path", "exact_maxmin"])


@ARMS
def test_an_idle_network_gives_the_narrowest_link(arm: str) -> None:
    assert rate(oracle(), "a", "c", arm) == pytest.approx(50 * GB)
    assert rate(oracle(pod_oversubscription=16), "a", "c", arm) == pytest.approx(25 * GB)
    capped = tuple(TierSpec(flow_bandwidth=3 * GB) for _ in range(4))
    assert rate(oracle(tiers=capped), "a", "c", arm) == pytest.approx(12 * GB), "4 pairs of 3"


@ARMS
def test_a_shared_uplink_is_seen_where_a_tier_cannot(arm: str) -> None:
    """a2 -> c2 and a -> c share pod uplinks of 25 GB/s but neither source nor destination."""
    o = oracle(pod_oversubscription=16)
    o.begin("x", "a2", "c2", GB, 0.0)
    assert rate(o, "a", "c", arm) == pytest.approx(12.5 * GB)
    assert rate(o, "a", "c", "self") == pytest.approx(25 * GB)
    assert rate(o, "a", "b", arm) == pytest.approx(50 * GB), "no uplink of a pod"
    o.end("x")
    assert rate(o, "a", "c", arm) == pytest.approx(25 * GB)


def test_a_neighbour_held_back_elsewhere_leaves_more_than_its_share() -> None:
    """x gets 12.5 GB/s of its pod's uplink, and so only that of the NIC of 50 that it shares."""
    o = oracle(pod_oversubscription=32)
    o.begin("x", "a", "c", GB, 0.0)
    assert rate(o, "a", "b", "path") == pytest.approx(25 * GB)
    assert rate(o, "a", "b", "exact_maxmin") == pytest.approx(37.5 * GB)


def test_readings_take_from_each_link_of_their_tier() -> None:
    o = oracle(pod_oversubscription=16)
    assert o.estimate("a", "c", GB, 0.0, "path").source == "path(unknown)"
    o.reading(NetReading(measured_at=0.0, utilisation=(0.0, 0.8, 0.0, 0.5)))
    assert o.estimate("a", "c", GB, 0.0, "path").source == "path"
    assert rate(o, "a", "c") == pytest.approx(10 * GB), "a fifth of the NIC"
    assert rate(o, "a", "a2") == pytest.approx(4 * 450 * GB), "NVLink is not read here"
    o.reading(NetReading(measured_at=1.0, utilisation=(0.0, 0.0, 0.0, 0.5)))
    assert rate(o, "a", "c", now=1.0) == pytest.approx(12.5 * GB), "half of the uplink"
    assert o.estimate("a", "c", GB, 99.0, "path").source == "path(stale)"
    assert rate(o, "a", "c", now=99.0) == pytest.approx(25 * GB)


@ARMS
def test_no_bytes_take_the_latency(arm: str) -> None:
    assert oracle().estimate("a", "c", 0, 0.0, arm).seconds == L


pairs = st.tuples(st.sampled_from(sorted(PLACES)), st.sampled_from(sorted(PLACES)))


@given(
    steps=st.lists(st.tuples(st.integers(0, 7), pairs, st.booleans()), max_size=30), ask=pairs,
    rack=st.sampled_from([1.0, 4.0, 16.0]), pod=st.sampled_from([1.0, 8.0, 64.0]),
    early=st.booleans(),
)  # fmt: skip
def test_counts_and_rates_follow_what_comes_and_goes(steps, ask, rack, pod, early) -> None:
    """Exact is what a solve from nothing says, whenever it was first asked; the share never says
    more."""
    topology = Topology(
        TopologySpec(preset="fabric", rack_oversubscription=rack, pod_oversubscription=pod)
    )
    places = {n: Location(tuple(range(g, g + 4))) for n, g in PLACES.items()}
    flows, inside = OwnFlows(topology), dict[str, tuple]()
    wanted = topology.route(*(places[n] for n in ask))
    if early:
        flows.exact_rate(wanted)
    for number, (src, dst), comes in steps:
        name = str(number)
        if name in inside and not comes:
            flows.remove(name)
            del inside[name]
        elif name not in inside and comes:
            inside[name] = topology.route(places[src], places[dst])
            flows.add(name, inside[name])
        flows.check(inside)
    every = [*map(flow_of, inside.values()), flow_of(wanted)]
    truth = solve(topology.capacities, every)[-1]
    assert flows.exact_rate(wanted) == pytest.approx(truth, rel=1e-9)
    assert flows.bottleneck_rate(wanted) <= truth * (1 + 1e-9)
