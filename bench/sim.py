"""Speed of the simulator, one fresh process per policy.

    python bench/sim.py [--policies netkv,round_robin] [--limit N] [--repeats 3]
    python bench/sim.py --reference [--requests 100000] [--gpus 1024]
    python bench/sim.py --peers [--repeats 3]

The first simulates the bundled Mooncake hour on 64 GPUs, the second the fixed workload that other
simulators were measured on (10,000 requests, no shared prefixes, links contended; `--gpus` takes a
cluster of that many, the rate in proportion). The third runs
that workload and DynoSim in turns, on the same arrivals (`sh bench/peers.sh` installs it), and with
the compiled core where `python tools/compile.py` has made one.

CPU seconds are of the whole process (user and system, imports and reading the trace included), on
one thread. The last line is JSON: the figures of the slowest policy, and all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

POLICIES = "round_robin,least_loaded,cache_load,netkv"
GOALS = {
    "mooncake-64": "at most 60 CPU s and 600 MiB for each policy",
    "reference-64": "at most 5 CPU s for 10,000 requests, 50 CPU s and 400 MiB for 100,000",
}


ROOT = Path(__file__).parent.parent
DYNOSIM = ROOT / ".peers" / "dynosim" / "bin" / "python"
COMPILED = ROOT / ".compiled"
PAIRS = {"no prefix caches": False, "prefix caches, each block named": True}


def grown(deployment: Any, gpus: int) -> Any:
    """The same cluster with about `gpus` accelerators: more pods, instances and requests/s."""
    topology, pools = deployment.topology, deployment.pools
    factor = gpus / sum(pool.count * pool.gpus for pool in pools)
    pods = -(-gpus // (topology.gpus // topology.pods))
    racks = topology.racks_per_pod
    placed = [
        pool.model_copy(
            update={
                "count": round(pool.count * factor),
                "racks": tuple(range(i, pods * racks, racks)),
            }
        )
        for i, pool in enumerate(pools)
    ]
    workload = deployment.workload
    return deployment.model_copy(
        update={
            "topology": topology.model_copy(update={"pods": pods}),
            "pools": tuple(placed),
            "workload": workload.model_copy(update={"rate": workload.rate * factor}),
        }
    )


def one(
    name: str, policy: str, limit: int | None, requests: int | None, *, named: bool = False,
    gpus: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Simulate in this process and say what it took. `named`: prompts' blocks have names."""
    began = time.perf_counter()
    from kvasir.cli.files import load_deployment
    from kvasir.cli.overrides import with_policy
    from kvasir.traces.workload import workload
    from kvasir.world.sim.run import simulate

    deployment = with_policy(load_deployment(name), policy)
    if gpus:
        deployment = grown(deployment, gpus)
    given = {"limit": limit} | ({"requests": requests} if requests else {})
    spec = deployment.workload.model_copy(update=given)
    trace = workload(spec, deployment.block_size, deployment.seed)
    if named:
        trace = with_names(trace, deployment.block_size)
    result = simulate(deployment, trace, seed=deployment.seed)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = used.ru_utime + used.ru_stime
    count = result.summary.completed + result.summary.failed
    return {
        "policy": policy,
        "cpu_s": round(cpu_s, 3),
        "wall_s": round(time.perf_counter() - began, 3),
        "requests": count,
        "requests_per_cpu_s": round(count / cpu_s, 1),
        "events": result.events,
        "peak_mib": round(used.ru_maxrss / 1024, 1),
        "ttft_mean_s": result.summary.ttft.mean_s,
        "goodput": result.summary.goodput,
    }


def fresh(policy: str, flags: argparse.Namespace) -> dict[str, Any]:
    """`one` in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--one", policy]
    command += ["--reference"] if flags.reference else []
    for name in ("limit", "requests", "gpus"):
        value = getattr(flags, name)
        command += [f"--{name}", str(value)] if value is not None else []
    return child(command)


def with_names(trace: Any, block_size: int) -> Any:
    """The same arrivals; every block of every prompt has a name that no other has."""
    from msgspec.structs import replace

    names = count()
    arrivals = tuple(
        replace(a, hash_ids=tuple(next(names) for _ in range(-(-a.input_tokens // block_size))))
        for a in trace.arrivals
    )
    return replace(trace, block_size=block_size, arrivals=arrivals)


# --- peers ----------------------------------------------------------------------------------------


def write_trace(path: Path, requests: int | None) -> int:
    """The fixed workload in Mooncake's format, for peers. Returns tokens per block."""
    from kvasir.cli.files import load_deployment
    from kvasir.traces.workload import workload

    d = load_deployment("reference-64")
    spec = d.workload.model_copy(update={"requests": requests} if requests else {})
    trace = with_names(workload(spec, d.block_size, d.seed), d.block_size)
    rows = (
        {"timestamp": a.at_s * 1e3, "input_length": a.input_tokens,
         "output_length": a.output_tokens, "hash_ids": a.hash_ids}
        for a in trace.arrivals
    )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return d.block_size


def peers(flags: argparse.Namespace) -> int:
    """Kvasir and DynoSim in turns, fresh processes, the same arrivals. Returns the exit status."""
    if not DYNOSIM.exists():
        print("DynoSim is not installed, so there is nothing to compare with", file=sys.stderr)
        print("  try: sh bench/peers.sh", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        block = write_trace(trace, flags.requests)
        theirs = [str(DYNOSIM), str(ROOT / "bench" / "dynosim.py"), str(trace), "--block",
                  str(block)]  # fmt: skip
        ours = [sys.executable, __file__, "--one", "round_robin", "--reference"]
        ours += ["--requests", str(flags.requests)] if flags.requests else []
        commands = {}
        for pair, named in PAIRS.items():
            commands["kvasir", pair] = ours + ["--named"] * named
            if COMPILED.exists():
                commands["compiled", pair] = ours + ["--named"] * named
            commands["dynosim", pair] = theirs + ["--prefix-cache"] * named
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in commands}
        for _ in range(flags.repeats):
            for key, command in commands.items():
                runs[key].append(child(command, compiled=key[0] == "compiled"))
    print_peers(runs)
    return 0


def print_peers(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """One row a simulator and pair, the ratio of each pair, then one JSON line."""
    requests = {r["requests"] for found in runs.values() for r in found}
    assert len(requests) == 1, f"not everybody ended every request: {requests}"
    version = runs["dynosim", next(iter(PAIRS))][0]["version"]
    print(f"reference-64, {requests.pop()} requests, 4 prefill + 4 decode, round robin; DynoSim")
    print(f"{version}; Python {platform.python_version()}, {platform.machine()}, one thread each")
    row = "{:<34}{:<10}{:>8}{:>14}{:>9}{:>10}"
    print(row.format("", "", "CPU s", "min..max", "MiB", "TTFT s"))
    ratios = {}
    for pair in PAIRS:
        cpu = {}
        names = [n for n in ("kvasir", "compiled", "dynosim") if (n, pair) in runs]
        for name in names:
            found = runs[name, pair]
            seconds = [r["cpu_s"] for r in found]
            cpu[name] = median(seconds)
            print(
                row.format(
                    pair, name, f"{cpu[name]:.2f}", f"{min(seconds):.2f}..{max(seconds):.2f}",
                    f"{max(r['peak_mib'] for r in found):.0f}", f"{found[-1]['ttft_mean_s']:.3f}",
                )
            )  # fmt: skip
        ratios[pair] = {n: round(cpu[n] / cpu["dynosim"], 2) for n in names if n != "dynosim"}
        for name, ratio in ratios[pair].items():
            print(f"{'':<34}{name} takes {ratio:.2f} times DynoSim's CPU seconds")
    print("not like for like: DynoSim's hand-overs do not contend and its time model is its own,")
    print("uncalibrated; Kvasir's flows share links, whose rates are solved anew at each change")
    flat = {f"{name}, {pair}": found for (name, pair), found in runs.items()}
    print(json.dumps({"ratios": ratios, "dynosim": version, "runs": flat}))


def child(command: list[str], *, compiled: bool = False) -> dict[str, Any]:
    """A process of its own, on one thread; the JSON of its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if compiled:
        environment["PYTHONPATH"] = str(COMPILED)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies")
    parser.add_argument("--reference", action="store_true", help="the fixed workload")
    parser.add_argument("--peers", action="store_true", help="the fixed workload, and DynoSim")
    parser.add_argument("--requests", type=int, help="of the fixed workload")
    parser.add_argument("--gpus", type=int, help="with --reference: a cluster of about so many")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--named", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    name = "reference-64" if flags.reference else "mooncake-64"
    if flags.one:
        found = one(
            name, flags.one, flags.limit, flags.requests, named=flags.named, gpus=flags.gpus
        )
        print(json.dumps(found))
        return
    if flags.peers:
        sys.exit(peers(flags))
    policies = flags.policies or ("round_robin" if flags.reference else POLICIES)
    print(f"{name}, Python {platform.python_version()}, {platform.machine()}, one thread")
    row = "{:<14}{:>10}{:>16}{:>10}{:>10}{:>10}{:>10}"
    print(row.format("policy", "CPU s", "min..max", "req/CPU s", "events", "MiB", "TTFT s"))
    runs = []
    for policy in policies.split(","):
        repeats = [fresh(policy, flags) for _ in range(flags.repeats)]
        seconds = [r["cpu_s"] for r in repeats]
        run = {**repeats[-1], "cpu_s": median(seconds), "cpu_s_all": seconds}
        run["requests_per_cpu_s"] = round(run["requests"] / run["cpu_s"], 1)
        runs.append(run)
        spread = f"{min(seconds):.1f}..{max(seconds):.1f}"
        print(
            row.format(
                policy, f"{run['cpu_s']:.1f}", spread, f"{run['requests_per_cpu_s']:.0f}",
                run["events"], f"{run['peak_mib']:.0f}", f"{run['ttft_mean_s']:.3f}",
            )
        )  # fmt: skip
    worst = max(runs, key=lambda r: r["cpu_s"])
    print(f"goal: {GOALS[name]}")
    keys = ("cpu_s", "wall_s", "requests", "requests_per_cpu_s", "events", "peak_mib")
    print(json.dumps({k: worst[k] for k in keys} | {"policy": worst["policy"], "runs": runs}))


if __name__ == "__main__":
    main()
