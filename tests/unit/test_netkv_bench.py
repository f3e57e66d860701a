"""bench/netkv.py: its parts by hand, a run of a few requests, and a page that tells its results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.netkv import RESULTS, main, oversubscribed
from bench.netkv_doc import DOCS, charts, filled
from bench.netkv_packets import max_min, packets
from bench.netkv_runs import (
    Flow,
    Setting,
    alike,
    arrivals,
    background,
    cluster,
    run,
    shuffled,
    simulated,
    study_file,
)
from kvasir.cli.overrides import changed
from kvasir.core.messages import Location
from kvasir.net.topology import Topology
from tests.route_views import FakeView, workers

GB = 10**9
HERE, THERE, AWAY = Location((0, 1, 2, 3)), Location((8, 9, 10, 11)), Location((24, 25, 26, 27))


def paper() -> Topology:
    return Topology(cluster("paper").topology)


# --- the study's parts ----------------------------------------------------------------------------


def test_control_moves_places_and_keeps_bytes() -> None:
    """Transfers are asked for another worker's place, with the blocks that this one lacks."""
    asked = []

    class Asked(FakeView):
        def transfer(self, target, source="", blocks=None, arm=None):
            asked.append((target, blocks))
            return super().transfer(target, source, blocks, arm)

    pool = workers(a={}, b={}, c={}, d={})
    view = Asked(pool, "decode", {"a": 4}, source="p")  # 10 blocks of 100 tokens
    for name in "abcd":
        shuffled(view).transfer(name)
    assert sorted(target for target, _ in asked) == list("abcd"), "a permutation"
    assert [blocks for _, blocks in asked] == [6, 10, 10, 10]
    orders = {
        tuple(shuffled(replace(view, source=f"p{i}"))._where.values()) for i in range(12)
    }
    assert len(orders) > 4, "each source has an order of its own"
    asked.clear()
    for name in "abcd":
        alike(view).transfer(name)
    assert {target for target, _ in asked} == {"d"}


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_background_takes_its_share_of_every_uplink(ratio: int) -> None:
    """At 1:1 a rack has half of its pod's uplink, so that of a pod is taken to half of it."""
    d = changed(cluster("paper"), dict(oversubscribed(ratio)), "test")
    topology = Topology(d.topology)
    load = dict.fromkeys(range(len(topology.links)), 0.0)
    for cross in background(d, 0.4):
        (source,) = cross.sources
        for link in topology.route(Location((source,)), Location((cross.target,))).links:
            load[link] = load.get(link, 0.0) + cross.bandwidth
    ways = {"up": (0, 2, 4, 6), "down": (1, 3, 5, 7)}
    names = [f"pod-{p}-{way}" for p in range(4) for way in ways]
    names += [f"rack-{rack}-{way}" for way, racks in ways.items() for rack in racks]
    links = {link.name: i for i, link in enumerate(topology.links)}
    for name in names:
        share = 0.2 if ratio == 1 and name.startswith("pod") else 0.4
        assert load[links[name]] == pytest.approx(share * topology.capacities[links[name]]), name


def test_slices_share_no_request_and_have_the_rate() -> None:
    d = cluster("paper")
    for profile, (more, most) in study_file()["study"]["profiles"].items():
        traces = [
            arrivals(Setting("paper", "netkv", n, 6.8, 300, profile), d) for n in range(6)
        ]
        for trace in traces:
            assert all(more < a.input_tokens <= most for a in trace.arrivals)
            assert len(trace.arrivals) / trace.duration_s == pytest.approx(6.8)
        assert len({t.arrivals[0].hash_ids for t in traces}) == 6


def test_clairvoyant_sees_what_others_do() -> None:
    """Pods of 12.5 GB/s with eight flows of others, 1.25 GB/s each: four pairs more get 12.5 / 12.
    Own transfers are over by then, so all other arms would say 12.5 GB/s."""
    narrow = (("topology.pod_oversubscription", 16.0),)
    setting = Setting("paper", "clairvoyant", 1, 6.8, 20, background=0.8, changes=narrow)
    world, _ = simulated(setting, 1.0)
    oracle = world.conductor.oracle
    told = oracle.estimate("prefill-0", "decode-7", 4 * GB, world.now, "exact_maxmin")
    assert told.source == "truth"
    assert told.seconds == pytest.approx(4 / (4 * 12.5 / 12), rel=1e-3)
    blind = type(oracle).estimate(
        oracle, "prefill-0", "decode-7", 4 * GB, world.now, "exact_maxmin"
    )
    assert blind.seconds == pytest.approx(4 / 12.5, rel=1e-3)


# --- packets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [THERE, AWAY], ids=["pod", "core"])
def test_one_transfer_alone_takes_its_bytes_over_the_cap(there: Location) -> None:
    """A flow model and packets agree but for filling the path with a window of cells."""
    topology = paper()
    flow = Flow(1.0, topology.route(HERE, there), 8 * GB)
    assert flow.route.flow_cap is not None
    alone_s = 2 * GB / flow.route.flow_cap
    assert max_min(topology, [flow]) == [pytest.approx(alone_s)]
    assert packets(topology, [flow]) == [pytest.approx(alone_s, rel=0.05)]


def test_transfers_over_one_narrow_link_share_it_in_both() -> None:
    spec = cluster("paper").topology.model_copy(update={"pod_oversubscription": 32.0})
    topology = Topology(spec)  # 6.25 GB/s out of the pod
    flows = [Flow(0.0, topology.route(HERE, AWAY), 3 * GB)] * 4
    fluid, cells = max_min(topology, flows), packets(topology, flows)
    assert fluid == [pytest.approx(12 / 6.25)] * 4
    assert cells == [pytest.approx(12 / 6.25, rel=0.05)] * 4


# --- all of it ------------------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_setting() -> None:
    setting = Setting("honest", "netkv_joint", 2, 5.1, 30)
    assert run(setting, 1.0) == run(setting, 1.0)


def test_a_few_requests_of_each_policy(tmp_path: Path) -> None:
    file = tmp_path / "netkv.json"
    main(["--quick", "--tables", "main", "--jobs", "1", "--json", str(file)])
    found = json.loads(file.read_text())
    assert set(found) == {"tuning", "load_weight", "main"}
    for arm, figures in found["main"]["100 %"].items():
        assert figures["failed"] == [0, 0], arm
        assert all(sum(tiers) == pytest.approx(1.0, abs=1e-3) for tiers in figures["tiers"])
        assert all(0.9 < seconds < 10 for seconds in figures["ttft_s"]), "0.9 s are the client's"


def test_the_page_and_its_charts_are_of_the_results() -> None:
    found = json.loads(RESULTS.read_text("utf-8"))
    page = (DOCS / "netkv.md").read_text("utf-8")
    assert filled(page, found) == page
    for chart in charts(found):
        assert (DOCS / f"{chart.name}.svg").read_text("utf-8") == chart.document()
