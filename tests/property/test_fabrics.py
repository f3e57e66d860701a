"""Any network that can be described: paths hold together, and shares on them are max-min fair."""

import math
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.messages import Location
from kvasir.core.specs import TopologySpec
from kvasir.net.maxmin import Flow, FlowSet, flows_of, solve
from kvasir.net.topology import Route, Topology

REL = 1e-9
GPUS = 4  # of a node

rates = st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0, 40.0])


@st.composite
def explicit(draw: st.DrawFn) -> TopologySpec:
    """A tree of switches with links across it, parallel ones too, and nodes on one or two of them;
    two nodes may have a link of their own."""
    switches = [f"s{i}" for i in range(draw(st.integers(1, 5)))]
    nodes = [f"n{i}" for i in range(draw(st.integers(2, 6)))]
    pairs = [(switches[draw(st.integers(0, i - 1))], switches[i]) for i in range(1, len(switches))]
    pairs += [(node, draw(st.sampled_from(switches))) for node in nodes]
    every = st.sampled_from([*switches, *nodes])
    more = st.tuples(every, every).filter(lambda pair: pair[0] != pair[1])
    pairs += draw(st.lists(more, max_size=5))
    links = [
        {"between": pair, "bandwidth": draw(rates), "count": draw(st.sampled_from([1, 1, 2]))}
        for pair in pairs
    ]
    return TopologySpec.model_validate({
        "preset": "explicit", "nodes": [{"name": n, "gpus": GPUS} for n in nodes],
        "switches": switches, "links": links, "nvlink_bandwidth": draw(rates),
    })  # fmt: skip


rail_trees = st.builds(
    lambda rails, nodes, uplinks, up, pods: TopologySpec(
        preset="fabric", gpus_per_node=GPUS, nodes_per_rack=nodes, racks_per_pod=2, pods=pods,
        rails=rails, uplinks=uplinks, rack_oversubscription=up, nic_bandwidth=2.0,
        nvlink_bandwidth=9.0,
    ),
    st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1.0, 2.5]),
    st.integers(1, 2),
)  # fmt: skip
specs = st.one_of(explicit(), rail_trees)
Row = tuple[tuple[int, int], tuple[int, int]]  # two instances: which, and of how many
instances = st.tuples(st.integers(0, 99), st.sampled_from([1, 2, 4, 8]))
transfers = st.lists(st.tuples(instances, instances), min_size=1, max_size=10)


def place(topology: Topology, instance: tuple[int, int]) -> Location:
    """`count` accelerators from a multiple of it on; as many as there are."""
    which, count = instance
    total = topology.spec.gpus
    count = min(count, total)
    first = which % (total // count) * count
    return Location(tuple(range(first, first + count)))


def routes_of(topology: Topology, rows: list[Row]) -> list[Route]:
    return [
        topology.route(place(topology, a), place(topology, b), f"r{i}/1")
        for i, (a, b) in enumerate(rows)
    ]


@settings(max_examples=40)
@given(specs, transfers)
def test_no_link_is_overfilled_and_every_share_has_a_bottleneck(
    spec: TopologySpec, rows: list[Row]
) -> None:
    """A bottleneck: a full link on which no share is larger. With conservation, that is it."""
    topology = Topology(spec)
    flows = [flow for route in routes_of(topology, rows) for flow in flows_of(route)]
    found = solve(topology.capacities, flows)
    shares = [rate / flow.multiplicity for rate, flow in zip(found, flows, strict=True)]
    load, most = dict[int, float](), dict[int, float]()
    for flow, rate, share in zip(flows, found, shares, strict=True):
        for link in flow.links:
            load[link] = load.get(link, 0.0) + rate
            most[link] = max(most.get(link, 0.0), share)
    for link, used in load.items():
        assert used <= topology.capacities[link] * (1 + REL), topology.links[link]
    full = {link for link, used in load.items() if used >= topology.capacities[link] * (1 - REL)}
    for flow, share in zip(flows, shares, strict=True):
        assert any(link in full and most[link] <= share * (1 + REL) for link in flow.links)


@settings(max_examples=40)
@given(specs, transfers)
def test_what_comes_and_goes_leaves_the_rates_of_a_whole_solve(
    spec: TopologySpec, rows: list[Row]
) -> None:
    topology = Topology(spec)
    shares: FlowSet[tuple[int, int]] = FlowSet(topology.capacities)
    there: dict[tuple[int, int], Flow] = {}
    for i, route in enumerate(routes_of(topology, rows)):
        for at, flow in enumerate(flows_of(route)):
            there[i, at] = flow
            shares.add((i, at), flow)
        if i % 3 == 2:
            for name in [name for name in there if name[0] == i - 1]:
                del there[name]
                shares.remove(name)
        shares.check()
        whole = solve(topology.capacities, there.values())
        for rate, expected in zip(shares.rates().values(), whole, strict=True):
            assert math.isclose(rate, expected, rel_tol=REL)


@settings(max_examples=40)
@given(explicit(), transfers)
def test_explicit_paths_run_from_node_to_node_over_switches_by_the_fewest_hops(
    spec: TopologySpec, rows: list[Row]
) -> None:
    topology = Topology(spec)
    hosts = {node.name for node in spec.nodes}
    lengths: dict[tuple[str, str], set[int]] = {}
    for route in routes_of(topology, rows):
        for way in route.parts():
            names = [topology.links[link].name for link in way.links]
            if "nvlink" in names[0]:
                assert len(names) == 2 and names[1].endswith("nvlink-in")
                continue
            hops = [name.split(".")[0].split(">") for name in names]
            assert all(a[1] == b[0] for a, b in pairwise(hops)), "no gap"
            assert {hops[0][0], hops[-1][1]} <= hosts
            assert not {hop[1] for hop in hops[:-1]} & hosts, "nodes do not forward"
            lengths.setdefault((hops[0][0], hops[-1][1]), set()).add(len(hops))
    assert all(len(found) == 1 for found in lengths.values()), "equal paths"
    for (a, b), found in lengths.items():
        assert lengths.get((b, a), found) == found


@settings(max_examples=40)
@given(specs, instances, instances)
def test_pairs_are_all_there_and_a_nearer_tier_is_the_same_seen_from_both_ends(
    spec: TopologySpec, one: tuple[int, int], other: tuple[int, int]
) -> None:
    topology = Topology(spec)
    a, b = place(topology, one), place(topology, other)
    assert topology.tier(a, b) == topology.tier(b, a)
    for route in (topology.route(a, b), topology.route(a, b, "r1/1")):
        assert sum(way.pairs for way in route.parts()) == max(len(a.gpus), len(b.gpus))
        assert set(route.links) == {link for way in route.parts() for link in way.links}
        assert dict(route.pairs_by_link()).keys() == set(route.links)
