"""Every policy by name, in the simulator: requests end, recordings verify, no hash of a string
decides, and what a policy names is what runs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import pytest

from kvasir.core.events import Prefilled, Routed
from kvasir.core.specs import (
    Deployment,
    LimitsSpec,
    ModelSpec,
    PolicySpec,
    PoolSpec,
    RouteSpec,
    SloSpec,
    TopologySpec,
)
from kvasir.core.specs.deployment import BatchSpec, FittedCost
from kvasir.policy.admit import ADMITS
from kvasir.policy.batch import BATCHES
from kvasir.policy.route import ROUTES
from kvasir.runtime.verify import verify_dir
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.run import simulate
from kvasir.world.sim.world import SimWorld

Event = TypeVar("Event")
COST = FittedCost(overhead_s=0.002, per_token_s=2e-5, per_context_s=1e-8)


def deployment(
    name: str = "netkv", roles: Iterable[str] = ("prefill", "decode", "mixed"), **fields
) -> Deployment:
    blocks = fields.pop("kv_blocks", 60)
    count = fields.pop("count", 2)
    shape = {
        "count": count, "hardware": "h100", "kv_blocks": blocks, "cost": COST, "batch_max": 8
    }  # fmt: skip
    route = fields.pop("route", {"decode_choice": "arrival"})
    policy = fields.pop("policy", {})
    return Deployment(
        models=(ModelSpec(name="m", shape="tiny"),),
        topology=TopologySpec(preset="fabric", nic_bandwidth=2e7),
        pools=tuple(PoolSpec(name=r, role=r, batch_tokens_max=128, **shape) for r in roles),
        policy=PolicySpec(route=RouteSpec(name=name, **route), **policy),
        limits=LimitsSpec(beat_s=0.2, dead_after_s=1.0, grace_s=0.5),
        block_size=16,
        **fields,
    )


def trace(count: int = 60, rate: float = 60.0, output: int = 30) -> Trace:
    rng, at, found = random.Random(7), 0.0, []
    for i in range(count):
        at += rng.expovariate(rate)
        tokens, group = rng.randint(20, 250), rng.randint(0, 5)
        shared = rng.randint(0, tokens // 16)
        ids = [group * 1000 + j for j in range(shared)]
        ids += [10**6 + i * 100 + j for j in range(-(-tokens // 16) - shared)]
        found.append(Arrival(at, tokens, output, tuple(ids), session=f"s{group}"))
    return Trace("t", 16, tuple(found))


def routed(d: Deployment, t: Trace) -> list[Routed]:
    return heard(d, t, Routed)


def heard(d: Deployment, t: Trace, kind: type[Event]) -> list[Event]:
    """All events of a kind, in order."""
    world = SimWorld(d, t.arrivals, after_event=SimWorld.check_touched)
    found: list[Event] = []
    told = world.recorder.event

    def listen(now: float, event) -> None:
        told(now, event)
        if isinstance(event, kind):
            found.append(event)

    world.recorder.event = listen  # type: ignore[method-assign]
    world.run()
    assert not world.requests.lives
    return found


@pytest.mark.parametrize("choice", ["arrival", "prefill_end"])
@pytest.mark.parametrize("name", ROUTES)
def test_all_requests_end_well_and_the_recording_verifies(
    name: str, choice: str, tmp_path: Path
) -> None:
    d = deployment(name, route={"decode_choice": choice})
    result = simulate(d, trace(), record=tmp_path)
    assert result.summary.completed == 60
    verdict = verify_dir(tmp_path)
    assert verdict.ok, verdict.lines


def results() -> str:
    """One line a policy; a process of its own prints it under another hash seed."""
    admits = [deployment(policy={"admit": name}, slo=TIGHT) for name in ADMITS]
    batches = [deployment(policy={"batch": BatchSpec(name=name)}) for name in BATCHES]
    every = [*(deployment(name) for name in ROUTES), *admits, *batches]
    return "\n".join(simulate(d, trace()).to_json().decode() for d in every)


def test_results_do_not_depend_on_the_hash_seed() -> None:
    code = "from tests.sim.test_policies import results; print(results())"
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=Path(__file__).parents[2], timeout=100,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert printed[0] == printed[1] and len(printed[0].splitlines()) >= len(ROUTES)


# --- both phases named at once --------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["arrival", "prefill_end"])
def test_a_pair_is_dispatched_as_named_whatever_the_deployment_says(choice: str) -> None:
    """Decode workers that are never worth staying on: all requests are disaggregated at once."""
    d = deployment("netkv_joint", ("prefill", "decode"), kv_blocks=1000,
                   route={"decode_choice": choice, "stay_weight": 1e6})  # fmt: skip
    found = routed(d, trace(40, rate=40.0, output=200))
    apart = [e for e in found if e.path == "disaggregated"]
    assert len(apart) > 20
    assert all(e.prefill.startswith("prefill") and e.decode.startswith("decode") for e in apart)
    assert all("cost" in e.why and e.decode in e.why for e in apart), "one decision for both"


def test_a_decode_worker_keeps_a_request_that_it_can_serve_sooner() -> None:
    slow = deployment("netkv_joint", ("prefill", "decode"), route={"fetch_prefix": False})
    found = routed(slow, trace(10, rate=1.0))
    assert all(e.path == "aggregated" and e.prefill == e.decode for e in found)
    assert all(e.decode.startswith("decode") for e in found)


def test_splitwise_overflows_when_prompt_queues_are_full() -> None:
    d = deployment("splitwise", ("prefill", "decode"), route={"queue_tokens_max": 100})
    found = routed(d, trace(60, rate=400.0))
    assert {e.path for e in found} == {"aggregated", "disaggregated"}
    whole = [e for e in found if e.path == "aggregated"]
    assert all(e.prefill == e.decode for e in whole)
    assert any(e.decode.startswith("decode") for e in whole)


def test_sessions_stay() -> None:
    d = deployment("session", ("prefill", "decode"), route={"load_bound": 100})
    found = routed(d, trace(60, rate=5.0))
    assert [e.request_id for e in found] == [f"r{i}" for i in range(60)]
    workers: dict[int, set[str]] = {}
    for event, arrival in zip(found, trace(60, rate=5.0).arrivals, strict=True):
        workers.setdefault(int(str(arrival.session)[1:]), set()).add(event.decode)
    assert all(len(w) == 1 for w in workers.values()), workers
    assert len({w for ws in workers.values() for w in ws}) == 2


# --- what a worker runs first ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("token_budget", "0123"), ("lpm", "0132")])
def test_a_worker_runs_the_order_that_its_policy_gives(name: str, order: str) -> None:
    """While a long prompt fills every step, two come to wait: the later has 8 blocks cached."""
    warm = tuple(range(8))
    t = Trace("t", 16, (
        Arrival(0.0, 129, 1, (*warm, 50)),
        Arrival(1.0, 1280, 1, tuple(range(100, 180))),
        Arrival(1.001, 200, 1, tuple(range(200, 213))),
        Arrival(1.002, 200, 1, (*warm, *range(300, 305))),
    ))  # fmt: skip
    d = deployment("netkv", ("mixed",), kv_blocks=200, count=1,
                   policy={"batch": BatchSpec(name=name)})  # fmt: skip
    assert "".join(e.request_id[1:] for e in heard(d, t, Prefilled)) == order


# --- refusing early -------------------------------------------------------------------------------

TIGHT = SloSpec(ttft_s=0.02, tpot_s=0.0021)


def refused(admit: str, slo: SloSpec) -> tuple[int, int]:
    """(refused requests, prefilled requests) under a load that cannot be served in time."""
    d = deployment(
        "least_loaded", ("prefill", "decode"), slo=slo, policy={"admit": admit},
        route={"decode_choice": "prefill_end"},
    )  # fmt: skip
    counts = simulate(d, trace(200, rate=300.0, output=60)).counts
    return counts.get("Rejected", 0), counts.get("Prefilled", 0)


def test_early_rejection_saves_what_the_baseline_wastes() -> None:
    """Only decode is over its SLO. The baseline notices after prefill, the early ones before."""
    slo = SloSpec(ttft_s=100.0, tpot_s=0.0021)
    found = {name: refused(name, slo) for name in ADMITS}
    assert found["bounded"] == (0, 200)
    rejected, prefilled = found["early_baseline"]
    assert rejected > 20 and prefilled == 200, "every refusal wasted a prefill"
    for name in ("early", "early_predicted"):
        rejected, prefilled = found[name]
        assert rejected > 20 and prefilled == 200 - rejected


def test_a_prompt_queue_over_its_slo_is_refused_on_arrival() -> None:
    slo = SloSpec(ttft_s=0.02, tpot_s=100.0)
    for name in ("early_baseline", "early", "early_predicted"):
        rejected, prefilled = refused(name, slo)
        assert rejected > 20 and prefilled == 200 - rejected, name
