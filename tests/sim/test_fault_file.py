"""`faults:` in a deployment: a run meets them, its result says what they cost, byte for byte."""

import json

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.specs import Deployment
from kvasir.core.specs.faults import FaultSpec
from kvasir.world.sim.run import Result, simulate
from tests.sims import cluster, trace


def faulty(faults: dict[str, object] | None, **more: object) -> Deployment:
    found = None if faults is None else FaultSpec.model_validate(faults)
    return cluster(
        count=2, shape="llama-3-8b", pool={"kv_blocks": 400}, faults=found,
        topology={"nic_bandwidth": 1e9, "gpus_per_node": 1, "nodes_per_rack": 1} | more,
    )  # fmt: skip


def run(faults: dict[str, object] | None, seed: int = 0, **more: object) -> Result:
    return simulate(faulty(faults, **more), trace(60), seed=seed)


OUTAGE = {"outages": [{"worker": "decode-0", "at_s": 0.4, "for_s": 1.0}]}
SLOW = {"links": [{"worker": "decode-0", "at_s": 0.2, "scale": 0.01, "for_s": 2.0}]}
INCAST = {"traffic": [{"sources": [1, 2], "target": 3, "bandwidth": 1e9, "until_s": 2.0}]}


def test_an_outage_costs_attempts_and_the_result_says_whose() -> None:
    found = run(OUTAGE)
    cost = found.recovery
    assert cost is not None and found.summary.completed == 60
    assert cost.retried > 0 and cost.attempts > cost.requests == 60
    assert cost.recomputed_tokens == found.counts["Recomputed.tokens"] > 0
    (met,) = cost.windows
    assert met.name == "decode-0 down" and met.bad_s == pytest.approx(1.0)
    assert met.requests + cost.calm.requests == 60 and met.requests > 0
    assert any("needed another attempt" in note for note in found.notes)
    assert json.loads(found.to_json())["recovery"]["retried"] == cost.retried


def test_a_slow_nic_makes_transfers_slow_and_nobody_is_retried() -> None:
    plain, slow = (run(faults, nic_bandwidth=2e10) for faults in (None, SLOW))
    assert plain.summary.split is not None and slow.summary.split is not None
    assert slow.summary.split.transfer_s > 1.5 * plain.summary.split.transfer_s
    assert slow.recovery is not None and slow.recovery.retried == 0
    assert slow.recovery.windows[0].requests > 0


def test_traffic_is_on_the_uplinks_of_others_too() -> None:
    """One node a rack: 0.5 GB/s an uplink, of which others now have their share."""
    assert run(INCAST).summary.split.transfer_s > run(None).summary.split.transfer_s  # type: ignore[union-attr]


def test_a_node_that_fails_is_its_workers() -> None:
    """Two workers on the node of two accelerators."""
    d = faulty({"outages": [{"node": "node-0", "at_s": 0.4, "for_s": 0.5}]}, gpus_per_node=2)
    found = simulate(d, trace(60))
    assert found.counts["WorkerLeft"] == 2 and found.summary.completed == 60


@pytest.mark.parametrize("faults", [OUTAGE, SLOW, INCAST], ids=["outage", "slow", "incast"])
def test_the_same_file_and_seed_give_the_same_bytes(faults: dict[str, object]) -> None:
    assert run(faults, 3).to_json() == run(faults, 3).to_json()


def test_without_faults_nothing_is_said_of_them() -> None:
    found = run(None)
    assert found.recovery is None and "recovery" not in json.loads(found.to_json())


def test_a_name_that_is_not_there_stops_it_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="no worker 'decode-7'"):
        run({"outages": [{"worker": "decode-7", "at_s": 1}]})
