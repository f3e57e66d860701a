"""Rails and explicit topologies: paths, tiers, hashing, placement, and what is refused."""

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.messages import Location, NetReading
from kvasir.core.specs import Deployment, ModelSpec, PoolSpec, TopologySpec
from kvasir.core.specs.parse import parse_deployment, resolved
from kvasir.net.maxmin import flows_of, solve
from kvasir.net.oracle import Oracle
from kvasir.net.topology import Route, Topology

GB = 1e9
# a and b on leaf 0, c on leaf 1; two spines; d beyond a router
LEAF_SPINE = {
    "preset": "explicit",
    "nodes": [{"name": n, "gpus": 4} for n in "abc"] + [{"name": "d", "gpus": 8}],
    "switches": ["leaf0", "leaf1", "spine0", "spine1", "edge", "far"],
    "links": [
        {"between": ["a", "leaf0"], "bandwidth": 50 * GB},
        {"between": ["b", "leaf0"], "bandwidth": 50 * GB},
        {"between": ["c", "leaf1"], "bandwidth": 50 * GB},
        *({"between": [leaf, spine], "bandwidth": 20 * GB}
          for leaf in ("leaf0", "leaf1") for spine in ("spine0", "spine1")),
        {"between": ["spine0", "edge"], "bandwidth": 10 * GB, "latency_s": 0.001},
        {"between": ["edge", "far"], "bandwidth": 10 * GB, "latency_s": 0.02},
        {"between": ["far", "d"], "bandwidth": 100 * GB},
    ],
}  # fmt: skip


def place(first: int, count: int = 4) -> Location:
    return Location(tuple(range(first, first + count)))


def explicit(**more: object) -> Topology:
    return Topology(TopologySpec.model_validate(LEAF_SPINE | more))


def paths(topology: Topology, route: Route) -> list[list[str]]:
    return [[topology.links[link].name for link in way.links] for way in route.parts()]


# --- explicit -------------------------------------------------------------------------------------


def test_shortest_paths_and_tiers_by_what_is_between() -> None:
    topology = explicit()
    a, b, c, d = place(0), place(4), place(8), place(12)
    assert [topology.tier(a, x) for x in (place(0, 2), b, c, d)] == [0, 1, 2, 3]
    assert paths(topology, topology.route(a, b)) == [["a>leaf0", "leaf0>b"]]
    assert sorted(paths(topology, topology.route(a, c))) == [
        ["a>leaf0", f"leaf0>spine{s}", f"spine{s}>leaf1", "leaf1>c"] for s in (0, 1)
    ]
    assert paths(topology, topology.route(c, d)) == [
        ["c>leaf1", "leaf1>spine0", "spine0>edge", "edge>far", "far>d"]
    ], "one of the spines is on the way"


def test_links_latencies_add_to_the_tiers() -> None:
    topology = explicit()
    assert topology.route(place(0), place(4)).latency_s == 10e-6
    assert topology.route(place(0), place(12)).latency_s == pytest.approx(0.021 + 10e-6)


def test_instances_on_a_node_share_its_link_and_nothing_has_a_cap() -> None:
    topology = explicit()
    one, other = (topology.route(place(first, 2), place(4)) for first in (0, 2))
    flows = [*flows_of(one), *flows_of(other)]
    assert {flow.cap for flow in flows} == {None}
    assert solve(topology.capacities, flows) == [25 * GB, 25 * GB]


def test_pairs_are_hashed_over_equal_paths_and_dealt_out_without_an_id() -> None:
    """4 pairs over two spines of 20 GB/s: 2 + 2 when nobody knows the hash."""
    topology = explicit()
    even = topology.route(place(0), place(8))
    assert [way.pairs for way in even.parts()] == [2, 2]
    split = {
        tuple(sorted(way.pairs for way in topology.route(place(0), place(8), f"r{i}/1").parts()))
        for i in range(40)
    }
    assert {(2, 2), (1, 3)} <= split <= {(2, 2), (1, 3), (4,)}
    again = explicit().route(place(0), place(8), "r7/1")
    assert again == topology.route(place(0), place(8), "r7/1")


def test_parallel_links_are_equal_paths() -> None:
    spec = {
        "preset": "explicit", "switches": ["s"],
        "nodes": [{"name": "a", "gpus": 1}, {"name": "b", "gpus": 1}],
        "links": [{"between": ["a", "s"], "bandwidth": 1, "count": 3},
                  {"between": ["s", "b"], "bandwidth": 1}],
    }  # fmt: skip
    topology = Topology(TopologySpec.model_validate(spec))
    used = {topology.links[topology.route(place(0, 1), place(1, 1), f"r{i}").links[0]].name
            for i in range(64)}  # fmt: skip
    assert used == {"a>s.0", "a>s.1", "a>s.2"}


def test_an_instance_of_two_nodes_sends_from_both() -> None:
    topology = explicit()
    route = topology.route(place(0, 8), place(12, 8))
    assert {names[0] for names in paths(topology, route)} == {"a>leaf0", "b>leaf0"}
    assert route.multiplicity == 8 and sum(way.pairs for way in route.parts()) == 8


def deployment(topology: object, *pools: PoolSpec) -> Deployment:
    return Deployment.model_validate(
        {"models": (ModelSpec(name="m"),), "pools": pools, "topology": topology}
    )


def pool(name: str, count: int, tp: int, **more: object) -> PoolSpec:
    return PoolSpec.model_validate(
        {"name": name, "role": "mixed", "count": count, "tp": tp, **more}
    )


def test_instances_go_on_named_nodes_and_racks_are_common_switches() -> None:
    d = deployment(
        LEAF_SPINE, pool("x", 1, 8, racks=(0,)), pool("y", 1, 4, nodes=("c",)), pool("z", 2, 4)
    )
    placed = Topology(d.topology).place(d)
    assert placed["x-0"].gpus == tuple(range(8)), "a and b share leaf0"
    assert placed["y-0"].gpus == tuple(range(8, 12))
    assert [placed[f"z-{i}"].gpus[0] for i in (0, 1)] == [12, 16]
    with pytest.raises(ConfigError, match="no node 'e'"):
        wrong = deployment(LEAF_SPINE, pool("y", 1, 4, nodes=("e",)))
        Topology(wrong.topology).place(wrong)
    with pytest.raises(ConfigError, match="rack 3, the topology has 3"):
        wrong = deployment(LEAF_SPINE, pool("y", 1, 4, racks=(3,)))
        Topology(wrong.topology).place(wrong)
    with pytest.raises(ValueError, match="racks or nodes"):
        pool("y", 1, 4, racks=(0,), nodes=("a",))


def test_nodes_of_a_fat_tree_have_names_too() -> None:
    d = deployment({}, pool("x", 1, 8, nodes=("node-5",)))
    assert Topology(d.topology).place(d)["x-0"].gpus == tuple(range(40, 48))


YAML = """\
models: [{name: m, shape: llama-3-8b}]
pools: [{name: w, role: mixed, count: 1}]
topology:
  preset: explicit
  nodes:
    - {name: a, gpus: 4}
    - {name: b, gpus: 4}
  switches: [s0]
  links:
    - {between: [a, s0], bandwidth: 400 Gb/s}
    - {between: [b, s0], bandwidth: 50 GB/s}
"""
REFUSED = {  # what replaces what: line and part of the message
    ("[b, s0]", "[b, s00]"): (11, "topology.links[1].between: no node or switch 's00'", "s0"),
    ("[b, s0]", "[b, b]"): (11, "a link from 'b' to itself", ""),
    ("name: b,", "name: a,"): (7, "'a' is there twice", ""),
    ("switches: [s0]", "switches: [s0, a]"): (8, "'a' is there twice", ""),
    ("preset: explicit", "preset: fabric"): (5, "nodes belong to preset explicit", ""),
    ("  switches", "  pods: 3\n  switches"): (8, "pods describes a fat-tree", ""),
    ("    - {between: [b, s0], bandwidth: 50 GB/s}\n", ""): (9, "no path between 'a' and 'b'", ""),
}


def test_an_explicit_topology_reads_back_equal() -> None:
    d = parse_deployment(YAML, "x.yaml")
    assert [link.bandwidth for link in d.topology.links] == [50e9, 50e9]
    assert parse_deployment(resolved(d), "y.yaml") == d


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_wrong_with_it_is_said_with_its_line(change: tuple[str, str]) -> None:
    line, what, near = REFUSED[change]
    with pytest.raises(ConfigError) as error:
        parse_deployment(YAML.replace(*change), "x.yaml")
    assert f"at: x.yaml:{line}" in str(error.value) and what in str(error.value)
    assert f"nearest: {near}" in str(error.value) or not near


def test_nodes_do_not_forward() -> None:
    """a and c both hang on b, which is no switch."""
    spec = {
        "preset": "explicit", "nodes": [{"name": n, "gpus": 1} for n in "abc"],
        "links": [{"between": ["a", "b"], "bandwidth": 1}, {"between": ["b", "c"], "bandwidth": 1}],
    }  # fmt: skip
    with pytest.raises(ValueError, match="no path between 'a' and 'c'"):
        TopologySpec.model_validate(spec)
    joined = spec | {"links": [*spec["links"], {"between": ["c", "a"], "bandwidth": 1}]}  # type: ignore[misc]
    topology = Topology(TopologySpec.model_validate(joined))
    assert paths(topology, topology.route(place(0, 1), place(2, 1))) == [["a>c"]]


def test_a_node_between_two_switches_is_no_short_cut() -> None:
    """s and t are three hops apart over switches, two over the node h."""
    pairs = (["a", "s"], ["s", "m"], ["m", "n"], ["n", "t"], ["t", "b"], ["h", "s"], ["h", "t"])
    spec = {
        "preset": "explicit", "nodes": [{"name": n, "gpus": 1} for n in "abh"],
        "switches": list("stmn"), "links": [{"between": p, "bandwidth": 1} for p in pairs],
    }  # fmt: skip
    topology = Topology(TopologySpec.model_validate(spec))
    assert paths(topology, topology.route(place(0, 1), place(1, 1))) == [
        ["a>s", "s>m", "m>n", "n>t", "t>b"]
    ]
    assert topology.tier(place(0, 1), place(1, 1)) == 3


def test_nodes_on_two_fabrics_that_meet_nowhere_need_one_in_common() -> None:
    spec = {
        "preset": "explicit", "nodes": [{"name": n, "gpus": 1} for n in "abc"],
        "switches": ["s", "t"],
        "links": [{"between": pair, "bandwidth": 1}
                  for pair in (["a", "s"], ["a", "t"], ["b", "s"], ["c", "t"])],
    }  # fmt: skip
    with pytest.raises(ValueError, match="no path between 'b' and 'c'"):
        TopologySpec.model_validate(spec)


# --- rails ----------------------------------------------------------------------------------------


def rails(count: int = 8, **more: object) -> Topology:
    return Topology(TopologySpec.model_validate({"preset": "fabric", "rails": count} | more))


def test_a_pair_of_one_rail_goes_over_the_rails_switch() -> None:
    topology = rails()
    assert paths(topology, topology.route(place(0, 2), place(8, 2))) == [
        [f"node-0-nic-{r}-out", f"node-1-nic-{r}-in"] for r in (0, 1)
    ]
    assert paths(topology, topology.route(place(1, 1), place(17, 1))) == [
        ["node-0-nic-1-out", "rack-0-rail-1-up", "rack-1-rail-1-down", "node-2-nic-1-in"]
    ]


def test_a_pair_of_two_rails_changes_over_nvlink_first() -> None:
    """Rail 0 to rail 5: not up to the spine and down again, but next door and out by NIC 5."""
    topology = rails()
    assert paths(topology, topology.route(place(0, 1), place(13, 1))) == [
        ["gpus-0-nvlink-out", "node-0-nic-5-out", "node-1-nic-5-in"]
    ]


def test_capacity_is_a_nics_and_a_rails_share_of_the_rack() -> None:
    topology = rails(4, nic_bandwidth=50 * GB)
    named = {link.name: link.capacity for link in topology.links}
    assert named["node-7-nic-3-in"] == 50 * GB
    assert named["rack-0-rail-0-up"] == 2 * 50 * GB / 2, "two nodes, 2:1"
    assert named["pod-0-up"] == 4 * 4 * 50 * GB / 4, "four nodes of four NICs, 4:1"


def test_neighbours_share_a_nic_where_there_are_fewer_than_accelerators() -> None:
    topology = rails(4)
    route = topology.route(place(0, 4), place(8, 4))
    assert [(names[0], way.pairs) for names, way in zip(
        paths(topology, route), route.parts(), strict=True)] == [
        ("node-0-nic-0-out", 2), ("node-0-nic-1-out", 2),
    ]  # fmt: skip
    assert sum(solve(topology.capacities, flows_of(route))) == pytest.approx(25 * GB)


def test_instances_on_other_rails_do_not_meet_and_those_on_the_same_do() -> None:
    """Two instances of a node send to two of another: on rails of their own 50 GB/s each; both to
    the first one's rails half of it."""
    topology = rails()
    own = [topology.route(place(0), place(8)), topology.route(place(4), place(12))]
    each = [solve(topology.capacities, [f for r in own for f in flows_of(r)])]
    assert sum(each[0]) == pytest.approx(100 * GB)
    same = [topology.route(place(0), place(8)), topology.route(place(4), place(24))]
    assert sum(solve(topology.capacities, [f for r in same for f in flows_of(r)])) < 100 * GB


def test_rails_divide_a_nodes_accelerators() -> None:
    with pytest.raises(ValueError, match="rails 3 does not divide gpus_per_node 8"):
        TopologySpec(rails=3)


# --- the oracle on all of them --------------------------------------------------------------------


@pytest.mark.parametrize("topology", [explicit(), rails()], ids=["explicit", "rails"])
@pytest.mark.parametrize("arm", ["static", "self", "tier", "path", "exact_maxmin"])
def test_every_arm_answers_and_own_transfers_slow_the_next(topology: Topology, arm: str) -> None:
    oracle = Oracle(topology)
    for name, first in (("a", 0), ("b", 4), ("c", 8)):
        oracle.add_worker(name, place(first))
    oracle.reading(NetReading(0.0, (0.0, 0.0, 0.0, 0.0)))
    idle = oracle.estimate("a", "c", 10**9, 0.0, arm)  # type: ignore[arg-type]
    assert 0 < idle.lo <= idle.seconds <= idle.hi
    oracle.begin("t", "a", "c", 10**9, 0.0)
    busy = oracle.estimate("a", "c", 10**9, 0.0, arm)  # type: ignore[arg-type]
    assert busy.seconds > idle.seconds if arm != "static" else busy == idle
    oracle.end("t")
    oracle.check()


def test_own_bytes_are_taken_off_the_counters_that_they_cross() -> None:
    """1 GB in 1 s over a>leaf0>b is all that the NIC counters saw: nothing of others is left."""
    topology = explicit()
    oracle = Oracle(topology)
    for name, first in (("a", 0), ("b", 4)):
        oracle.add_worker(name, place(first))
    oracle.begin("t", "a", "b", 10**9, 0.0)
    seen = 2 * 10**9 / topology.tier_capacity(1)
    oracle.reading(NetReading(1.0, (0.0, seen, 0.0, 0.0)))
    oracle.end("t")
    assert oracle.estimate("a", "b", 10**9, 1.0, "tier").seconds == pytest.approx(
        oracle.estimate("a", "b", 10**9, 1.0, "static").seconds
    )
