"""The same trace on a live cluster and in simulation: how far the simulator is from what it models.

    python -m bench.twin [--requests 120] [--rate 3] [--repeat 3] [--priority -10] [--transport tcp]

One prefill and one decode worker of the embedded engine serve a model of 25 M parameters with
random weights, each pinned to a core of its own; the load generator is niced. Then the very
deployment that was served is simulated on the same arrivals. Its constants come from elsewhere,
never from the trace that is compared:

    cost      from a grid of steps (`kvasir measure engine`), and, apart, from the steps that a
              calibration trace made the cluster run (`kvasir measure engine --recording`)
    latency   of tier 0: from the end of prefill to the KV's arrival, in the calibration trace
    request_s HTTP, parsing and events: client's TTFT less queue and prefill, one request at a time,
              less the same difference in simulation

The trace runs `--repeat` times live: a figure is the median over the runs, its range tells how far
the live cluster is from itself. `--priority` raises gateway and workers above other processes (as
root), on a machine that is not quiet. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final, NamedTuple

import yaml

from kvasir.cli.files import load_deployment
from kvasir.core.messages import Received, StepDone
from kvasir.core.specs import Deployment
from kvasir.engine.tiny import make_tiny
from kvasir.measure.distribution import distribution
from kvasir.measure.fit import choose
from kvasir.measure.loadgen import Target, fire
from kvasir.measure.shots import Shot
from kvasir.measure.summary import RequestOutcome
from kvasir.runtime.replay import header_of, journals, turns
from kvasir.runtime.served import served_steps
from kvasir.traces.generators import generate
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.run import simulate

Config = dict[str, Any]
LATENCIES: Final = ("TTFT", "TPOT")
PERCENTILES: Final = (50.0, 90.0, 99.0)
GOAL: Final = 0.10  # at p50 and p90
HELD_OUT: Final = 4
VOCAB: Final = range(10, 250)
SHM_BYTES_PER_S: Final = 6e9  # docs/measured.md; a hand-over here is at most 8 MB
CALIBRATION_SEED, TRACE_SEED = 1, 2
ALONE: Final = tuple(Arrival(0.0, n, 12) for n in (24, 60, 120, 200, 330, 480) for _ in range(3))


class Figure(NamedTuple):
    """One percentile in ms. `low` and `high`: over the live runs. `sims`: by name of the cost."""

    name: str
    live: float
    low: float
    high: float
    sims: dict[str, float]

    def off(self, cost: str) -> float:
        return self.sims[cost] / self.live - 1


# --- the deployment -------------------------------------------------------------------------------


def deployment(folder: Path, asked: argparse.Namespace) -> Config:
    pool = {"hardware": "cpu", "count": 1, "batch_max": 32, "batch_tokens_max": 1024,
            "kv_blocks": 1024}  # fmt: skip
    return {
        "name": "twin",
        "models": [{"name": "m", "path": str(folder), "max_context": 1024}],
        "topology": {"preset": "fabric", "gpus_per_node": 2, "nodes_per_rack": 1,
                     "racks_per_pod": 1, "pods": 1, "nvlink_bandwidth": SHM_BYTES_PER_S},
        "pools": [{"name": role, "role": role, **pool} for role in ("prefill", "decode")],
        "engine": "torch",
        "transport": {"kind": asked.transport},
        "policy": {"route": {"name": "netkv", "output_reserve_tokens": 128},
                   "batch": {"chunk_tokens": 512}},
        "workload": {
            "rate": asked.rate, "requests": asked.requests,
            "input": {"mean": 180, "sigma": 0.7, "min": 16, "max": 512},
            "output": {"mean": 40, "sigma": 0.6, "min": 4, "max": 128},
        },
    }  # fmt: skip


def with_costs(config: Config, cost: Config, latency_s: float, request_s: float) -> Config:
    tiers = [{"latency_s": latency_s}, *({} for _ in range(3))]
    return config | {
        "pools": [pool | {"cost": cost} for pool in config["pools"]],
        "topology": config["topology"] | {"tiers": tiers},
        "host": {"request_s": request_s},
    }


def loaded(config: Config, path: Path) -> Deployment:
    path.write_text(yaml.safe_dump(config))
    return load_deployment(path)


# --- live -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(config: Config, folder: Path, priority: int) -> Iterator[Target]:
    """`kvasir serve` with its workers pinned; recorded in `folder`."""
    folder.mkdir()
    path = folder / "kvasir.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "kvasir", "serve", str(path), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--record", str(folder / "recording")], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )  # fmt: skip
    try:
        port = _ready(process)
        cores = sorted(os.sched_getaffinity(0))
        assert len(cores) >= 2, "two cores are needed, one for each worker"
        prefer(process.pid, priority)
        for pid, core in zip(_children(process.pid), cores, strict=False):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {core})
            prefer(pid, priority)
        yield Target(base_url=f"http://127.0.0.1:{port}", model="m", timing=True)
    finally:
        process.terminate()
        process.wait()


def _ready(process: subprocess.Popen[str]) -> int:
    """The port, once every worker is ready."""
    port = 0
    for line in process.stdout or ():
        found = re.search(r"listening on http://[^ ]*:(\d+)", line)
        port = int(found[1]) if found else port
        if "ready in" in line:
            return port
    raise SystemExit("kvasir serve did not start; its words are above")


def _children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sorted(map(int, found))


def prefer(pid: int, priority: int) -> None:
    """Nice value of a process' threads, and of its session, by which Linux groups them first."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), priority)
    group = Path(f"/proc/{pid}/autogroup")
    if priority < 0 and group.exists():
        group.write_text(str(priority))


def sent(target: Target, trace: Sequence[Arrival], seed: int, at_once: int | None = None) -> list[
    RequestOutcome
]:  # fmt: skip
    """The trace live, with random prompts; raises SystemExit when a request fails."""
    random = Random(seed)
    shots = [
        Shot(a.at_s, tuple(random.choices(VOCAB, k=a.input_tokens)), a.input_tokens,
             a.output_tokens)
        for a in trace
    ]  # fmt: skip
    outcomes = asyncio.run(fire(target, shots, max_concurrency=at_once)).outcomes
    failed = [o.error for o in outcomes if not o.ok]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    return outcomes


# --- constants from elsewhere ---------------------------------------------------------------------


def grid_cost(folder: Path, out: Path, priority: int) -> Config:
    """What `kvasir measure engine` writes, measured on one core with nothing else of ours."""
    command = [sys.executable, "-m", "kvasir", "measure", "engine", str(folder), "--yaml", str(out),
               "--tokens-max", "512", "--batch-max", "16", "--context-max", "640",
               "--rounds", "5", "--seconds", "150"]  # fmt: skip
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    prefer(process.pid, priority)
    if process.wait():
        raise SystemExit("kvasir measure engine failed")
    found: Config = yaml.safe_load(out.read_text())["cost"]
    return found


def served_cost(recording: Path) -> tuple[Config, float]:
    """The cost of the steps that were served, and its median error on those held out."""
    steps = served_steps(recording)
    choice = choose([s for i, s in enumerate(steps) if i % HELD_OUT], steps[::HELD_OUT])
    return choice.best.cost.model_dump(mode="json"), choice.errors.median


def handover_s(recording: Path) -> float:
    """Median time from the end of prefill to the arrival of the KV, by the workers' own clocks."""
    ended: dict[str, float] = {}
    came: dict[str, float] = {}
    for path in journals(recording):
        if header_of(path).kind == "worker":
            for turn in turns(path):
                event, now = turn.entry.event, turn.entry.now
                if isinstance(event, Received) and event.ok:
                    came[event.request_id] = now
                elif isinstance(event, StepDone):
                    for row in event.rows:
                        if row.sampled:  # the first token is the prefill worker's
                            ended[row.request_id] = min(now, ended.get(row.request_id, now))
    return median(max(0.0, came[name] - ended[name]) for name in came if name in ended)


def outside(outcomes: Sequence[RequestOutcome]) -> float:
    """Median of what TTFT holds beside queue and prefill."""
    return median(o.ttft_s - (o.queue_s or 0) - (o.prefill_s or 0) for o in outcomes)


# --- comparison -----------------------------------------------------------------------------------


def percentiles(outcomes: Sequence[RequestOutcome]) -> dict[str, float]:
    """TTFT and TPOT in ms, by name and percentile."""
    samples = {
        "TTFT": [o.ttft_s for o in outcomes],
        "TPOT": [o.tpot_s for o in outcomes if o.tpot_s is not None],
    }
    return {
        f"{name} p{p:g}": distribution(values, PERCENTILES).percentile(p) * 1e3
        for name, values in samples.items()
        for p in PERCENTILES
    }


def figures(
    runs: Sequence[dict[str, float]], sims: dict[str, dict[str, float]]
) -> list[Figure]:
    return [
        Figure(
            name, median(run[name] for run in runs), min(run[name] for run in runs),
            max(run[name] for run in runs), {cost: found[name] for cost, found in sims.items()},
        )
        for name in runs[0]
    ]  # fmt: skip


def table(found: Sequence[Figure]) -> Iterator[str]:
    costs = list(found[0].sims)
    head = "".join(f"{f'sim, {cost}':>14}{'off':>8}" for cost in costs)
    yield f"{'ms':<10}{'live':>9}{'range':>18}{head}"
    for f in found:
        cells = "".join(f"{f.sims[cost]:>14.2f}{f.off(cost):>8.1%}" for cost in costs)
        yield f"{f.name:<10}{f.live:>9.2f}{f'{f.low:.2f} to {f.high:.2f}':>18}{cells}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--rate", type=float, default=3.0, help="requests per second")
    parser.add_argument("--repeat", type=int, default=3, help="live runs of the trace")
    parser.add_argument("--priority", type=int, default=0, help="nice value of what is measured")
    parser.add_argument("--transport", choices=("shm", "tcp"), default="shm")
    return parser.parse_args()


def main() -> None:
    asked = parsed()
    with contextlib.suppress(OSError):
        os.setsid()
    prefer(os.getpid(), asked.priority + 5)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        load = [os.getloadavg()[0]]
        model = make_tiny(scratch / "m25", layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64,
                          intermediate=1536)  # fmt: skip
        base = deployment(model, asked)
        report = compared(base, scratch, asked)
        load.append(os.getloadavg()[0])
        print(f"load average {load[0]:.1f} before, {load[1]:.1f} after")
        print(json.dumps({"bench": "twin", "load": load, **report}))


def compared(base: Config, scratch: Path, asked: argparse.Namespace) -> Config:
    grid = grid_cost(Path(base["models"][0]["path"]), scratch / "cost.yaml", asked.priority)
    plain = loaded(base, scratch / "plain.yaml")
    calibration, trace = (
        generate(plain.workload, plain.block_size, seed) for seed in (CALIBRATION_SEED, TRACE_SEED)
    )
    with served(base, scratch / "calibration", asked.priority) as target:
        sent(target, ALONE[:4], 0, at_once=1)
        alone = sent(target, ALONE, 1, at_once=1)
        sent(target, calibration.arrivals, 2)
    recording = scratch / "calibration" / "recording"
    cost, error = served_cost(recording)
    latency_s = handover_s(recording)
    spaced = tuple(Arrival(5.0 * i, a.input_tokens, a.output_tokens) for i, a in enumerate(ALONE))
    quiet = loaded(with_costs(base, grid, latency_s, 0.0), scratch / "quiet.yaml")
    request_s = outside(alone) - outside(simulate(quiet, Trace("alone", None, spaced)).outcomes)
    print(f"served steps: held-out error median {error:.1%}")
    print(f"hand-over latency {latency_s * 1e3:.2f} ms, request_s {request_s * 1e3:.2f} ms")
    sims = {}
    for name, fitted in (("grid", grid), ("served", cost)):
        config = with_costs(base, fitted, latency_s, max(0.0, request_s))
        twin = loaded(config, scratch / f"{name}.yaml")
        sims[name] = percentiles(simulate(twin, trace, seed=twin.seed).outcomes)
    runs = []
    with served(base, scratch / "live", asked.priority) as target:
        sent(target, ALONE[:4], 0, at_once=1)
        for run in range(asked.repeat):
            runs.append(percentiles(sent(target, trace.arrivals, 100 + run)))
    found = figures(runs, sims)
    print("\n".join(table(found)))
    worst = {c: max(abs(f.off(c)) for f in found if "p99" not in f.name) for c in sims}
    for name, off in worst.items():
        print(f"{name}: at most {off:.1%} off at p50 and p90, goal {GOAL:.0%}")
    return {
        "requests": asked.requests, "rate": asked.rate, "repeat": asked.repeat,
        "transport": asked.transport, "latency_s": latency_s, "request_s": request_s,
        "costs": {"grid": grid, "served": cost}, "worst_p50_p90": worst,
        "figures": [f._asdict() for f in found],
    }  # fmt: skip


if __name__ == "__main__":
    main()
