"""Equal inputs, equal bytes: in another process, under another hash seed, a second time here."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvasir.cli.files import load_deployment
from kvasir.core.specs import ModelSpec
from kvasir.core.specs.faults import FaultSpec
from kvasir.core.specs.speculate import SpeculateSpec
from kvasir.runtime.verify import verify_dir
from kvasir.traces.record import Trace
from kvasir.traces.workload import workload
from kvasir.world.sim.run import Result, simulate
from tests.sims import cluster, trace

ROOT = Path(__file__).parents[2]
FAULTS = FaultSpec(loss=0.01, delay_s_max=0.01, deaths=3, down_s=0.5, cancel=0.1, until_s=3.0)


def small(seed: int = 0) -> Result:
    """Prefill, decode and mixed workers, with too little memory for all."""
    d = cluster(
        "prefill", "decode", "mixed", count=1, pool={"kv_blocks": 40},
        route={"output_reserve_tokens": 0}, topology={"preset": "paper"},
    )  # fmt: skip
    return simulate(d, trace(80), seed=seed)


def faulty(seed: int = 0) -> Result:
    """Round robin shows in which order workers are looked at."""
    d = cluster(count=3, pool={"kv_blocks": 60}, route={"name": "round_robin"})
    return simulate(d.model_copy(update={"faults": FAULTS}), trace(60), seed=seed)


def mooncake(seed: int = 0) -> Result:
    """The first 300 requests of the conversation trace on 64 H100."""
    d = load_deployment("mooncake-64")
    return simulate(d, mooncake_trace(300), seed=seed)


def mooncake_trace(limit: int) -> Trace:
    d = load_deployment("mooncake-64")
    assert d.workload.trace == "mooncake-conversation"
    return workload(d.workload.model_copy(update={"limit": limit}), d.block_size, 0)


def guessing(seed: int = 0) -> Result:
    """Rows that guess beside rows that do not, with deaths and too little memory."""
    d = cluster(count=3, pool={"kv_blocks": 60}, first_token="decode")
    models = (ModelSpec(name="m", shape="tiny", speculate=SpeculateSpec(rows_max=6)),)
    return simulate(d.model_copy(update={"models": models, "faults": FAULTS}), trace(60), seed=seed)


RUNS: list[Callable[[int], Result]] = [small, faulty, mooncake, guessing]
by_name = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)


def in_a_process(run: str, hash_seed: str) -> bytes:
    code = f"import sys; from {__name__} import {run}; sys.stdout.buffer.write({run}().to_json())"
    path = os.pathsep.join([str(ROOT), *sys.path])
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, cwd=ROOT, capture_output=True,
        check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@by_name
def test_a_fresh_process_gives_the_same_bytes_under_any_hash_seed(
    run: Callable[[int], Result],
) -> None:
    here = run(0).to_json()
    assert in_a_process(run.__name__, "1") == here
    assert in_a_process(run.__name__, "4242") == here


def test_simulate_keeps_no_state_between_runs() -> None:
    """Others ran in between."""
    first = [run(0).to_json() for run in (small, faulty)]
    assert [run(0).to_json() for run in (small, faulty)] == first


def test_the_seed_is_an_input() -> None:
    assert faulty(1).to_json() != faulty(2).to_json()


def test_what_happened_is_worth_comparing() -> None:
    """The runs above meet shipping, preemption, death and cancellation."""
    counts = {name: run(0).counts for name, run in (("small", small), ("faulty", faulty))}
    assert counts["small"]["Shipped"] and counts["small"]["Preempted"]
    assert counts["faulty"]["WorkerLeft"] and counts["faulty"]["Retried"]
    assert small(0).summary.completed == 80
    guessed = guessing(0).counts
    assert guessed["WorkerLeft"] and guessed["Speculated.drafted"] > guessed["Speculated.accepted"]


@pytest.mark.parametrize("choice", ["arrival", "prefill_end"])
def test_a_recording_of_a_run_replays(choice: str, tmp_path: Path) -> None:
    d = cluster(pool={"kv_blocks": 60}, route={"decode_choice": choice})
    simulate(d.model_copy(update={"faults": FAULTS}), trace(60), record=tmp_path)
    names = {p.stem for p in tmp_path.iterdir()}
    assert {"conductor", "gateway-0", *d.worker_ids()} < names, "restarts have their own"
    verdict = verify_dir(tmp_path)
    assert verdict.ok, "\n".join(verdict.lines)
    assert sum(n.inputs for n in verdict.nodes) > 1000


def test_recording_changes_nothing(tmp_path: Path) -> None:
    d, t = cluster(), trace(40)
    assert simulate(d, t, record=tmp_path).to_json() == simulate(d, t).to_json()


def test_mooncake_records_and_replays(tmp_path: Path) -> None:
    simulate(load_deployment("mooncake-64"), mooncake_trace(60), record=tmp_path)
    verdict = verify_dir(tmp_path)
    assert verdict.ok, "\n".join(verdict.lines)
    assert len(verdict.nodes) == 18
