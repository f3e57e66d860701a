"""Places, distances and links of the bundled 64-GPU layout and of odd ones."""

import pytest

from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.messages import Location
from kvasir.core.specs import Deployment, ModelSpec, PoolSpec, TierSpec, TopologySpec
from kvasir.net.maxmin import flow_of, flows_of, solve
from kvasir.net.topology import Topology


def location(first: int, count: int = 4) -> Location:
    return Location(tuple(range(first, first + count)))


def deployment(*pools: PoolSpec, **topology: object) -> Deployment:
    return Deployment(
        models=(ModelSpec(name="llama-3-70b"),), pools=pools, topology=TopologySpec(**topology)
    )


def pool(name: str, count: int, tp: int, racks: tuple[int, ...] | None = None, **more) -> PoolSpec:
    role = "prefill" if name.startswith("p") else "decode"
    return PoolSpec(name=name, role=role, count=count, tp=tp, racks=racks, **more)


NETKV = deployment(pool("prefill", 8, 4, (0, 2)), pool("decode", 8, 4, (1, 3)))


def capacity(topology: Topology, name: str) -> float:
    return next(link.capacity for link in topology.links if link.name == name)


# --- placement ------------------------------------------------------------------------------------


def test_the_64_gpu_layout_fills_its_racks() -> None:
    topology = Topology(NETKV.topology)
    placed = topology.place(NETKV)
    assert list(placed) == NETKV.worker_ids()
    gpus = [gpu for place in placed.values() for gpu in place.gpus]
    assert sorted(gpus) == list(range(64)), "every accelerator once"
    for worker, place in placed.items():
        assert len(place.gpus) == 4
        assert len({gpu // 8 for gpu in place.gpus}) == 1, "in one node"
        racks = (0, 2) if worker.startswith("prefill") else (1, 3)
        assert place.gpus[0] // 16 in racks


def test_prefill_and_decode_are_never_nearer_than_a_pod() -> None:
    """As in NetKV's evaluation: tiers 0 and 1 do not occur (netkv reference, 1.4)."""
    topology = Topology(NETKV.topology)
    placed = topology.place(NETKV)
    tiers = [
        topology.tier(placed[f"prefill-{p}"], placed[f"decode-{d}"])
        for p in range(8)
        for d in range(8)
    ]
    assert tiers.count(2) == 32 and tiers.count(3) == 32


def test_placement_is_the_same_every_time() -> None:
    assert Topology(NETKV.topology).place(NETKV) == Topology(NETKV.topology).place(NETKV)


def test_a_pool_bound_to_racks_goes_before_one_that_is_free() -> None:
    free_first = deployment(pool("p", 4, 8), pool("d", 4, 8, (0, 1)))
    placed = Topology(free_first.topology).place(free_first)
    assert list(placed) == free_first.worker_ids(), "named in the deployment's order all the same"
    assert {placed[f"d-{i}"].gpus[0] // 16 for i in range(4)} == {0, 1}
    assert {placed[f"p-{i}"].gpus[0] // 16 for i in range(4)} == {2, 3}


def test_small_instances_do_not_split_the_room_of_large_ones() -> None:
    mixed = deployment(pool("p", 1, 1), pool("d", 8, 4), pods=1, racks_per_pod=2, nodes_per_rack=3)
    placed = Topology(mixed.topology).place(mixed)
    assert placed["p-0"].gpus == (32,)


def test_an_instance_larger_than_a_node_takes_whole_nodes_of_one_rack() -> None:
    """`d2` may only stand in rack 0 and takes its first node; `d` then finds rack 1 whole."""
    large = deployment(pool("p", 1, 8), pool("d", 1, 8, (0, 1), pp=2), pool("d2", 1, 8, (0,)))
    placed = Topology(large.topology).place(large)
    assert placed["d2-0"].gpus == tuple(range(8))
    assert placed["d-0"].gpus == tuple(range(16, 32))
    assert placed["p-0"].gpus == tuple(range(8, 16))


def test_an_instance_larger_than_a_rack_takes_what_there_is() -> None:
    huge = deployment(pool("p", 1, 8), pool("d", 1, 8, pp=3))
    placed = Topology(huge.topology).place(huge)
    assert placed["d-0"].gpus == tuple(range(24)) and placed["p-0"].gpus == tuple(range(24, 32))
    too_large = deployment(pool("p", 1, 8), pool("d", 1, 8, pp=9))
    with pytest.raises(ConfigError, match="'d' wants 1 x 72"):
        Topology(too_large.topology).place(too_large)


def test_a_pool_that_does_not_fit_says_by_how_much() -> None:
    crowded = deployment(pool("p", 1, 4), pool("d", 9, 4, (1, 3)))
    with pytest.raises(ConfigError) as error:
        Topology(crowded.topology).place(crowded)
    assert "(36)" in str(error.value) and "32 free" in str(error.value)
    assert len(str(error.value).splitlines()) <= LINES_MAX


def test_a_rack_that_does_not_exist_is_named() -> None:
    wrong = deployment(pool("p", 1, 4), pool("d", 1, 4, (4,)))
    with pytest.raises(ConfigError, match="rack 4, the topology has 4"):
        Topology(wrong.topology).place(wrong)


# --- distances and routes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "tier"), [(4, 0), (8, 1), (12, 1), (16, 2), (24, 2), (32, 3), (60, 3)]
)
def test_tiers(first: int, tier: int) -> None:
    topology = Topology(TopologySpec())
    assert topology.tier(location(0), location(first)) == tier
    assert topology.tier(location(first), location(0)) == tier


def names(topology: Topology, a: Location, b: Location) -> list[str]:
    return [topology.links[link].name for link in topology.route(a, b).links]


def test_links_on_the_way() -> None:
    topology = Topology(TopologySpec())
    here = location(0)
    assert names(topology, here, location(4)) == ["gpus-0..3-nvlink-out", "gpus-4..7-nvlink-in"]
    assert names(topology, here, location(8)) == ["gpus-0..3-nic-out", "gpus-8..11-nic-in"]
    assert names(topology, here, location(16)) == [
        "gpus-0..3-nic-out", "rack-0-up", "rack-1-down", "gpus-16..19-nic-in",
    ]  # fmt: skip
    assert names(topology, location(16), location(32)) == [
        "gpus-16..19-nic-out", "rack-1-up", "pod-0-up", "pod-1-down", "rack-2-down",
        "gpus-32..35-nic-in",
    ]  # fmt: skip


def test_capacities_are_members_over_oversubscription() -> None:
    topology = Topology(TopologySpec())
    topology.route(location(0), location(32))
    assert capacity(topology, "gpus-0..3-nic-out") == 4 * 12.5e9
    assert capacity(topology, "gpus-0..3-nvlink-in") == 4 * 450e9
    assert capacity(topology, "rack-0-up") == 16 * 12.5e9 / 2
    assert capacity(topology, "pod-1-down") == 32 * 12.5e9 / 4, "end to end"
    assert topology.capacities == [link.capacity for link in topology.links]
    assert topology.tier_capacity(3) == 4 * 100e9
    assert [link.tier for link in topology.links if "rack" in link.name] == [2] * 8
    assert {link.tier for link in topology.links if "nic" in link.name} == {1}


def test_paper_caps_each_pair_and_fabric_does_not() -> None:
    paper, fabric = Topology(TopologySpec()), Topology(TopologySpec(preset="fabric"))
    others = [location(g) for g in (4, 8, 16, 32)]
    assert [paper.route(location(0), o).flow_cap for o in others] == [
        450e9,
        12.5e9,
        6.25e9,
        3.125e9,
    ]
    assert {fabric.route(location(0), o).flow_cap for o in others} == {None}
    own = TopologySpec(tiers=(TierSpec(latency_s=0.5),) * 4)
    assert Topology(own).route(location(0), location(8)).latency_s == 0.5


def test_a_bundle_gets_no_more_than_the_nics_of_its_smaller_side() -> None:
    """8 shard pairs into 4 GPUs: 50 GB/s in all, and half of it each for two such bundles."""
    topology = Topology(TopologySpec(preset="fabric", rack_oversubscription=1))
    wide, narrow = location(0, 8), location(8, 4)
    route = topology.route(wide, narrow)
    assert route.multiplicity == 8 and topology.route(narrow, wide).multiplicity == 8
    assert solve(topology.capacities, [flow_of(route)]) == [50e9]
    second = topology.route(location(16, 8), narrow)
    assert solve(topology.capacities, [flow_of(route), flow_of(second)]) == [25e9, 25e9]
    back = topology.route(narrow, wide)
    assert solve(topology.capacities, [flow_of(route), flow_of(back)]) == [50e9, 50e9], "both ways"


def test_indices_keep_their_meaning_as_places_appear() -> None:
    topology = Topology(TopologySpec())
    before = topology.route(location(0), location(16))
    known = list(topology.links)
    topology.route(location(4), location(60))
    assert topology.links[: len(known)] == known
    assert topology.route(location(0), location(16)) == before


def test_one_accelerator_is_a_topology() -> None:
    laptop = TopologySpec(gpus_per_node=1, nodes_per_rack=1, racks_per_pod=1, pods=1)
    topology = Topology(laptop)
    route = topology.route(Location(), Location())
    assert (route.tier, route.multiplicity) == (0, 1)
    assert solve(topology.capacities, [flow_of(route)]) == [450e9]


@pytest.mark.parametrize("gpus", [(), (64,), (-1,)])
def test_a_place_outside_is_refused(gpus: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="the topology has 64"):
        Topology(TopologySpec()).route(Location(gpus), Location((0,)))


# --- several uplinks ------------------------------------------------------------------------------


def test_uplinks_share_a_trunks_capacity_and_a_pair_keeps_to_its_plane() -> None:
    """A 4-ary fat-tree's counts: 2 uplinks of a rack, 4 of a pod; plane p mod 2 below p mod 4."""
    topology = Topology(TopologySpec(uplinks=2, pod_uplinks=4))
    assert capacity(topology, "rack-0.1-up") == 16 * 12.5e9 / 2 / 2
    assert capacity(topology, "pod-1.3-down") == 32 * 12.5e9 / 4 / 4
    route = topology.route(location(16), location(32))
    paths = sorted([topology.links[link].name for link in way.links] for way in route.ways)
    assert paths == [
        [
            "gpus-16..19-nic-out", f"rack-1.{p % 2}-up", f"pod-0.{p}-up", f"pod-1.{p}-down",
            f"rack-2.{p % 2}-down", "gpus-32..35-nic-in",
        ]
        for p in (0, 2, 1, 3)
    ]  # fmt: skip
    assert [way.pairs for way in route.ways] == [1, 1, 1, 1], "dealt evenly without an id"
    assert dict(route.pairs_by_link())[route.ways[0].links[0]] == 4, "all pairs share the NICs"


def test_pairs_that_collide_on_an_uplink_share_it_and_the_bundle_waits_for_them() -> None:
    """2 pairs, 2 uplinks of 6.25 GB/s: by some ids one each, 12.5 in all; by others both on one."""
    spec = TopologySpec(preset="fabric", uplinks=2, rack_oversubscription=16)
    topology = Topology(spec)
    here, there = location(0, 2), location(16, 2)
    routes = [topology.route(here, there, f"r{i}/1") for i in range(64)]
    rates = {len(r.ways): solve(topology.capacities, flows_of(r)) for r in routes}
    assert rates == {0: [6.25e9], 2: [6.25e9, 6.25e9]}
    collided = sum(not route.ways for route in routes)
    assert 16 < collided < 48, "half of 64, by the hash"
    assert {route.multiplicity for route in routes} == {2}


def test_a_path_depends_on_ends_and_id_alone() -> None:
    spec = TopologySpec(uplinks=4)
    one, other = Topology(spec), Topology(spec)
    other.route(location(16), location(48))
    for i in range(8):
        assert names_of(one, f"r{i}/1") == names_of(other, f"r{i}/1")
    assert len({tuple(map(tuple, names_of(one, f"r{i}/1"))) for i in range(8)}) > 1


def names_of(topology: Topology, transfer_id: str) -> list[list[str]]:
    route = topology.route(location(0), location(32), transfer_id)
    return [[topology.links[link].name for link in way.links] for way in route.parts()]


def test_one_trunk_and_near_tiers_have_one_way() -> None:
    trunk, planes = Topology(TopologySpec()), Topology(TopologySpec(uplinks=4))
    assert trunk.route(location(0), location(32), "r0/1") == trunk.route(location(0), location(32))
    for near in (4, 8):
        assert planes.route(location(0), location(near), "r0/1").ways == ()


# --- NVLink domains and data centres --------------------------------------------------------------

NVL72 = {
    "gpus_per_node": 4, "nodes_per_rack": 18, "nvlink_nodes": 18, "racks_per_pod": 2, "pods": 1,
    "nvlink_bandwidth": 900e9,
}  # fmt: skip


def test_nodes_of_an_nvlink_domain_are_one_tier() -> None:
    topology = Topology(TopologySpec(**NVL72))
    assert topology.tier(location(0), location(68)) == 0
    assert names(topology, location(0), location(68)) == [
        "gpus-0..3-nvlink-out", "gpus-68..71-nvlink-in",
    ]  # fmt: skip
    assert topology.tier(location(0), location(72)) == 2, "the next domain is another rack"
    halves = Topology(TopologySpec(nodes_per_rack=4, nvlink_nodes=2))
    assert [halves.tier(location(0), location(g)) for g in (12, 16, 28, 32)] == [0, 1, 1, 2]


def test_an_instance_of_several_nodes_stays_in_a_domain_if_it_can() -> None:
    """Node 0 is taken; 1 and 2 are neighbours of two domains, 2 and 3 are one domain."""
    small = deployment(
        pool("p", 1, 8, (0,)), pool("d", 1, 8, (0, 1), pp=2), pods=1, racks_per_pod=2,
        nodes_per_rack=4, nvlink_nodes=2,
    )  # fmt: skip
    placed = Topology(small.topology).place(small)
    assert placed["p-0"].gpus == tuple(range(8)) and placed["d-0"].gpus == tuple(range(16, 32))


def test_between_data_centres_there_is_one_more_link_and_its_latency() -> None:
    """Four pods in two centres, 2 GB/s between them: two bundles from one to the other get 1 each,
    the way back and a pod of the same centre are not touched by them."""
    spec = TopologySpec(
        preset="fabric", pods=4, datacenters=2, wan_bandwidth=2e9, wan_latency_s=0.01
    )
    topology = Topology(spec)
    far = topology.route(location(0), location(64))
    assert names(topology, location(0), location(64)) == [
        "gpus-0..3-nic-out", "rack-0-up", "pod-0-up", "wan-0-1", "pod-2-down", "rack-4-down",
        "gpus-64..67-nic-in",
    ]  # fmt: skip
    assert far.tier == 3 and far.latency_s == pytest.approx(0.01 + 10e-6)
    near = topology.route(location(4), location(32))
    assert near.tier == 3 and near.latency_s == 10e-6
    assert not any("wan" in name for name in names(topology, location(4), location(32)))
    second, back = (topology.route(location(a), location(b)) for a, b in ((32, 96), (100, 8)))
    rates = solve(topology.capacities, map(flow_of, (far, second, back, near)))
    assert rates == [1e9, 1e9, 2e9, 50e9]


@pytest.mark.parametrize(
    "wrong", [{"nvlink_nodes": 3, "nodes_per_rack": 4}, {"pods": 4, "datacenters": 3}]
)
def test_parts_that_do_not_divide_the_whole_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        TopologySpec(**wrong)
