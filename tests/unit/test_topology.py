"""Places, distances and links of the bundled 64-GPU layout and of odd ones."""

import pytest

from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.messages import Location
from kvasir.core.specs import Deployment, ModelSpec, PoolSpec, TierSpec, TopologySpec
from kvasir.net.maxmin import flow_of, solve
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
