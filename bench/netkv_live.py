"""Route policies on real processes and real links: what does asking the network gain, live?

    python -m bench.netkv_live [--repeat 10] [--requests 20] [--rate 6] [--conditions idle,trunk]
                               [--arms round_robin,cache_load,netkv] [--priority -10]

`bench/netkv_live.yaml` is laid out in network namespaces: one decode worker near, two behind a slow
trunk, links held to their bandwidth by `htb`. Each arm has a `kvasir serve` of its own, all from
the start; workers run in the nodes' namespaces, KV goes over the links, control messages over a
network beside them. Each repeat sends new requests, the same to every arm in turn, through the
gateway. Conditions: `idle`, `trunk` (a TCP connection of others fills the slow trunk), `near` (one
fills the near worker's link). The simulator then predicts the same deployment and requests.

Switch counters come from the kernel's counters of the switches' ports. TTFT holds the transfer
(first_token: decode). Needs root, `ip` and `tc`, and says so. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final, NamedTuple

import yaml

from bench.namespaces import Cross, Lab, laid_out, unable
from bench.twin import prefer
from kvasir.cli.files import load_deployment
from kvasir.core.specs import Deployment
from kvasir.measure.distribution import distribution
from kvasir.measure.intervals import Interval, interval, paired
from kvasir.measure.loadgen import Answer, Target, fire
from kvasir.measure.shots import Shot, arrival_times
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.run import simulate

Config = dict[str, Any]
FILE: Final = Path(__file__).with_suffix(".yaml")
ARMS: Final = ("round_robin", "cache_load", "netkv_self", "netkv", "netkv_path")
BASES: Final = ("round_robin", "cache_load")  # that differences are taken from
MORE_ARMS: Final = ("netkv_static", "netkv_joint", "least_loaded")  # on request
TARGETS: Final = {"idle": "", "trunk": "x1", "near": "near"}  # where x0's traffic goes
NODES: Final = {"prefill-0": "p", "decode-0": "near", "decode-1": "far0", "decode-2": "far1"}
DECODERS: Final = tuple(name for name in NODES if name.startswith("decode"))
LINKS: Final = {"near": "leaf0>near", "trunk": "leaf0>leaf1"}
PORT: Final = 7000  # of control messages; each arm has ports of its own
GROUPS: Final = 4  # of requests with a common prefix of PREFIX tokens
PREFIX: Final = 256
SETTLE_S: Final = 0.6  # for traffic to fill its link and readings to tell of it
REST_S: Final = 0.3
VOCAB: Final = range(10, 250)


class Run(NamedTuple):
    """One arm, one repeat. Seconds; requests by decode worker; KV bytes to the near worker and over
    the trunk, by the server's or the simulator's word; and what the kernel counted on these links,
    with headers and others' traffic."""

    ttft_s: float
    ttft_p90_s: float
    transfer_s: float
    workers: Counter[str]
    kv_bytes: dict[str, int]
    link_bytes: dict[str, int]


class Sent(NamedTuple):
    """The same requests for the load generator and for the simulator."""

    shots: list[Shot]
    trace: Trace


# --- what is asked --------------------------------------------------------------------------------


def requests(seed: int, count: int, rate: float, block_size: int) -> Sent:
    """Poisson arrivals. A prompt is one of GROUPS prefixes and 128 to 640 tokens of its own."""
    random = Random(f"netkv_live {seed}")
    prefixes = [random.choices(VOCAB, k=PREFIX) for _ in range(GROUPS)]
    shots, arrivals = [], []
    for i, at_s in enumerate(arrival_times(count, rate, 1.0, random)):
        group, outputs = random.randrange(GROUPS), random.randint(4, 16)
        own = random.choices(VOCAB, k=random.randint(128, 640))
        tokens = PREFIX + len(own)
        blocks = -(-tokens // block_size)
        shared = [group * blocks_max(block_size) + b for b in range(PREFIX // block_size)]
        first = (GROUPS + i) * blocks_max(block_size)
        ids = (*shared, *range(first, first + blocks - len(shared)))
        shots.append(Shot(at_s, (*prefixes[group], *own), tokens, outputs))
        arrivals.append(Arrival(at_s, tokens, outputs, ids))
    return Sent(shots, Trace(f"live-{seed}", block_size, tuple(arrivals)))


def blocks_max(block_size: int) -> int:
    """More than any prompt has: so far apart are the block ids of groups and requests."""
    return 1024 // block_size + 1


# --- live -----------------------------------------------------------------------------------------


def live_config(base: Config, arm: int, name: str, lab: Lab) -> Config:
    """The file that is simulated, with addresses, the policy, and where to read counters."""
    endpoints: Config = {"main": {"control": f"{lab.control()}:{PORT + arm}"}}
    for worker, node in NODES.items():
        endpoints[worker] = {
            "control": f"{lab.control(node)}:{PORT + arm}", "kv": lab.address(node),
            "command": list(lab.command(node)),
        }  # fmt: skip
    telemetry = base["topology"]["telemetry"] | {"counters": lab.counters()}
    return named(base, name) | {
        "endpoints": endpoints, "topology": base["topology"] | {"telemetry": telemetry},
    }  # fmt: skip


def named(base: Config, policy: str) -> Config:
    route = base["policy"]["route"] | {"name": policy}
    return base | {"policy": base["policy"] | {"route": route}}


@contextlib.contextmanager
def served(config: Config, path: Path, lab: Lab, priority: int) -> Iterator[Target]:
    """A `kvasir serve` in the switches' namespace, with its workers in theirs."""
    path.write_text(yaml.safe_dump(config))
    command = [*lab.command(), sys.executable, "-m", "kvasir", "serve", str(path), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        port = _ready(process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):
            prefer(pid, priority)
        yield Target(base_url=f"http://127.0.0.1:{port}", model="tiny", timing=True, timeout_s=60)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # what then still runs ends with its namespace


def _ready(process: subprocess.Popen[str]) -> int:
    """The port, once every worker is ready."""
    port = 0
    for line in process.stdout or ():
        found = re.search(r"listening on http://[^ ]*:(\d+)", line)
        port = int(found[1]) if found else port
        if "ready in" in line:
            return port
    raise SystemExit("kvasir serve did not start; its words are above")


def measured(target: Target, shots: Sequence[Shot], lab: Lab) -> Run:
    """Raises SystemExit when a request fails."""
    answers: list[Answer] = []
    before = lab.moved()
    with lab.inside():
        load = asyncio.run(fire(target, shots, on_answer=answers.append))
    after = lab.moved()
    failed = [o.error for o in load.outcomes if not o.ok]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    ttft = [o.ttft_s for o in load.outcomes]
    kv_bytes = dict.fromkeys(LINKS, 0)
    for answer in answers:
        near = NODES[answer.timing.workers.decode] == "near"
        kv_bytes["near" if near else "trunk"] += answer.timing.bytes
    return Run(
        fmean(ttft), distribution(ttft, (90.0,)).percentile(90.0),
        fmean(o.transfer_s or 0.0 for o in load.outcomes),
        Counter(a.timing.workers.decode for a in answers), kv_bytes,
        {name: after[link] - before[link] for name, link in LINKS.items()},
    )  # fmt: skip


class Measured(NamedTuple):
    """Runs by condition and arm, repeat by repeat, and what was sent in each."""

    runs: dict[str, dict[str, list[Run]]]
    sent: dict[str, list[Sent]]


def all_measured(
    targets: Mapping[str, Target], lab: Lab, base: Deployment, asked: argparse.Namespace
) -> Measured:
    """Every arm in turn within each repeat and condition, each time beginning with another one."""
    arms = list(targets)
    out = Measured({c: {a: [] for a in arms} for c in asked.conditions},
                   {c: [] for c in asked.conditions})  # fmt: skip
    for arm in arms:  # connections, caches of code
        measured(targets[arm], requests(-1, 4, asked.rate, base.block_size).shots, lab)
    for repeat in range(asked.repeat):
        for at, condition in enumerate(asked.conditions):
            seed = repeat * len(asked.conditions) + at
            sent = requests(seed, asked.requests, asked.rate, base.block_size)
            out.sent[condition].append(sent)
            with crossed(lab, TARGETS[condition]):
                for arm in arms[repeat % len(arms) :] + arms[: repeat % len(arms)]:
                    out.runs[condition][arm].append(measured(targets[arm], sent.shots, lab))
                    time.sleep(REST_S)
        print(f"repeat {repeat + 1} of {asked.repeat}, load {os.getloadavg()[0]:.1f}", flush=True)
    return out


@contextlib.contextmanager
def crossed(lab: Lab, target: str) -> Iterator[None]:
    cross = Cross(lab, "x0", target) if target else None
    time.sleep(SETTLE_S)
    try:
        yield
    finally:
        if cross is not None:
            cross.close()


# --- simulated ------------------------------------------------------------------------------------


def predicted(base: Config, arm: str, condition: str, sent: Sequence[Sent], scratch: Path) -> list[
    Run
]:  # fmt: skip
    config = named(base, arm)
    names = [node["name"] for node in base["topology"]["nodes"]]
    if TARGETS[condition]:
        flow = {"sources": [names.index("x0")], "target": names.index(TARGETS[condition]),
                "bandwidth": "1 GB/s"}  # fmt: skip
        config |= {"faults": {"traffic": [flow]}}
    path = scratch / "simulated.yaml"
    path.write_text(yaml.safe_dump(config))
    deployment = load_deployment(path)
    found = []
    for one in sent:
        result = simulate(deployment, one.trace, seed=deployment.seed)
        ttft, moved = [o.ttft_s for o in result.outcomes], result.summary.bytes_by_tier
        found.append(Run(
            fmean(ttft), distribution(ttft, (90.0,)).percentile(90.0),
            fmean(o.transfer_s or 0.0 for o in result.outcomes), Counter(),
            {name: moved[tier] for name, tier in zip(LINKS, ("rack", "pod"), strict=True)}, {},
        ))  # fmt: skip
    return found


# --- figures --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One arm under one condition; ms, and MB a run. `less`: TTFT less each base arm's, paired."""

    arm: str
    ttft: Interval
    p90: Interval
    transfer: float
    less: dict[str, Interval]
    shares: dict[str, float]
    kv_mb: dict[str, float]
    link_mb: dict[str, float]
    sim_ttft: float
    sim_p90: float
    sim_less: dict[str, Interval]
    sim_kv_mb: dict[str, float]


def rows(runs: dict[str, list[Run]], sims: dict[str, list[Run]]) -> list[Row]:
    bases = [arm for arm in BASES if arm in runs]

    def ms(found: dict[str, list[Run]], arm: str) -> list[float]:
        return [1e3 * run.ttft_s for run in found[arm]]

    def mb(found: Sequence[dict[str, int]]) -> dict[str, float]:
        return {name: fmean(moved[name] for moved in found) / 1e6 for name in LINKS}

    def less(found: dict[str, list[Run]], arm: str) -> dict[str, Interval]:
        return {b: paired(ms(found, arm), ms(found, b)) for b in bases if b != arm}

    out = []
    for arm, own in runs.items():
        workers = sum((run.workers for run in own), Counter[str]())
        out.append(Row(
            arm, interval(ms(runs, arm)), interval([1e3 * run.ttft_p90_s for run in own]),
            1e3 * fmean(run.transfer_s for run in own), less(runs, arm),
            {w: workers[w] / workers.total() for w in DECODERS},
            mb([run.kv_bytes for run in own]), mb([run.link_bytes for run in own]),
            fmean(ms(sims, arm)), 1e3 * fmean(run.ttft_p90_s for run in sims[arm]),
            less(sims, arm), mb([run.kv_bytes for run in sims[arm]]),
        ))  # fmt: skip
    return out


def table(condition: str, found: Sequence[Row]) -> Iterator[str]:
    bases = [b for b in BASES if any(b in row.less for row in found)]
    yield f"\n{condition}: TTFT in ms, 95 % intervals; differences paired by repeat, * is no chance"
    yield "MB a run: KV to the near worker and over the trunk, and all that the trunk counted"
    head = "".join(f"{'- ' + b:>21}{'sim':>8}" for b in bases)
    yield (f"{'':<12}{'mean':>14}{'sim':>7}{'p90':>15}{'sim':>7}{'transfer':>9}{head}"
           f"{'near far far':>14}{'KV near':>9}{'trunk':>7}{'sim':>7}{'counted':>9}")  # fmt: skip
    for r in found:
        line = f"{r.arm:<12}{shown(r.ttft):>14}{r.sim_ttft:>7.0f}{shown(r.p90):>15}"
        line += f"{r.sim_p90:>7.0f}{r.transfer:>9.0f}"
        for b in bases:
            own, sim = r.less.get(b), r.sim_less.get(b)
            line += f"{shown(own, mark=True):>21}" if own else f"{'':>21}"
            line += f"{sim.mean:>8.0f}" if sim else f"{'':>8}"
        line += f"{' '.join(f'{100 * s:.0f}' for s in r.shares.values()):>12} %"
        line += f"{r.kv_mb['near']:>9.1f}{r.kv_mb['trunk']:>7.1f}{r.sim_kv_mb['trunk']:>7.1f}"
        yield line + f"{r.link_mb['trunk']:>9.1f}"


def shown(found: Interval, *, mark: bool = False) -> str:
    half = "" if found.half is None else f" +- {found.half:.0f}"
    return f"{found.mean:.0f}{half}{' *' if mark and found.apart else ''}"


# --- all of it ------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    def names(known: Sequence[str]) -> Any:
        return lambda text: [n for n in text.split(",") if n in known or sys.exit(f"no {n}")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--requests", type=int, default=20, help="of one arm in one repeat")
    parser.add_argument("--rate", type=float, default=6.0, help="requests per second")
    parser.add_argument("--arms", type=names((*ARMS, *MORE_ARMS)), default=list(ARMS))
    parser.add_argument("--conditions", type=names(tuple(TARGETS)), default=["idle", "trunk"])
    parser.add_argument("--priority", type=int, default=0, help="nice value of what is measured")
    parser.add_argument("--seconds-max", type=int, default=900, help="then it stops")
    return parser.parse_args()


def live(base: Config, asked: argparse.Namespace, scratch: Path) -> Measured:
    deployment = load_deployment(FILE)
    with laid_out(deployment.topology) as lab, contextlib.ExitStack() as stack:
        targets = {
            arm: stack.enter_context(
                served(live_config(base, i, arm, lab), scratch / f"{arm}.yaml", lab, asked.priority)
            )
            for i, arm in enumerate(asked.arms)
        }
        print(f"{len(targets)} deployments serve in namespaces {lab.switches}, ...", flush=True)
        return all_measured(targets, lab, deployment, asked)


def main() -> None:
    asked = parsed()
    reason = unable()
    if reason:
        print(f"netkv_live: skipped, {reason}")
        return
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(name, lambda number, _: sys.exit(f"ended by {signal.Signals(number).name}"))
    signal.alarm(asked.seconds_max)
    base = yaml.safe_load(FILE.read_text())
    loads, began = [os.getloadavg()[0]], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        found = live(base, asked, scratch)
        loads.append(os.getloadavg()[0])
        report: Config = {}
        for condition, runs in found.runs.items():
            sims = {a: predicted(base, a, condition, found.sent[condition], scratch) for a in runs}
            report[condition] = rows(runs, sims)
            print("\n".join(table(condition, report[condition])))
    print(f"\n{time.monotonic() - began:.0f} s; load {loads[0]:.1f} before, {loads[1]:.1f} after")
    print(json.dumps({
        "bench": "netkv_live", "load": loads, "repeat": asked.repeat, "requests": asked.requests,
        "rate": asked.rate,
        "conditions": {c: [r._asdict() for r in found] for c, found in report.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; namespaces and processes are gone")
