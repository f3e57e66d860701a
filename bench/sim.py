"""Speed of the simulator, one fresh process per policy.

    python bench/sim.py [--policies netkv,round_robin] [--limit N] [--repeats 3]
    python bench/sim.py --reference [--requests 100000]

The first simulates the bundled Mooncake hour on 64 GPUs, the second the fixed workload that other
simulators were measured on (10,000 requests, no shared prefixes, links contended).

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
import time
from statistics import median
from typing import Any

POLICIES = "round_robin,least_loaded,cache_load,netkv"
GOALS = {
    "mooncake-64": "at most 60 CPU s and 600 MiB for each policy",
    "reference-64": "at most 5 CPU s for 10,000 requests, 50 CPU s and 400 MiB for 100,000",
}


def one(name: str, policy: str, limit: int | None, requests: int | None) -> dict[str, Any]:
    """Simulate in this process and say what it took."""
    began = time.perf_counter()
    from kvasir.cli.files import load_deployment
    from kvasir.cli.overrides import with_policy
    from kvasir.traces.workload import workload
    from kvasir.world.sim.run import simulate

    deployment = with_policy(load_deployment(name), policy)
    given = {"limit": limit} | ({"requests": requests} if requests else {})
    spec = deployment.workload.model_copy(update=given)
    trace = workload(spec, deployment.block_size, deployment.seed)
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
    for name in ("limit", "requests"):
        value = getattr(flags, name)
        command += [f"--{name}", str(value)] if value is not None else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies")
    parser.add_argument("--reference", action="store_true", help="the fixed workload")
    parser.add_argument("--requests", type=int, help="of the fixed workload")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    name = "reference-64" if flags.reference else "mooncake-64"
    if flags.one:
        print(json.dumps(one(name, flags.one, flags.limit, flags.requests)))
        return
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
