"""Speed of the simulator: the bundled Mooncake hour on 64 GPUs, one fresh process per policy.

    python bench/sim.py [--policies netkv,round_robin] [--limit N] [--repeats 3]

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

DEPLOYMENT = "mooncake-64"
GOAL_CPU_S, GOAL_MIB = 60.0, 600.0


def one(policy: str, limit: int | None) -> dict[str, Any]:
    """Simulate in this process and say what it took."""
    began = time.perf_counter()
    from kvasir.cli.files import load_deployment
    from kvasir.cli.overrides import with_policy
    from kvasir.traces.workload import workload
    from kvasir.world.sim.run import simulate

    deployment = with_policy(load_deployment(DEPLOYMENT), policy)
    spec = deployment.workload.model_copy(update={"limit": limit})
    trace = workload(spec, deployment.block_size, deployment.seed)
    result = simulate(deployment, trace, seed=deployment.seed)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = used.ru_utime + used.ru_stime
    requests = result.summary.completed + result.summary.failed
    return {
        "policy": policy,
        "cpu_s": round(cpu_s, 3),
        "wall_s": round(time.perf_counter() - began, 3),
        "requests": requests,
        "requests_per_cpu_s": round(requests / cpu_s, 1),
        "events": result.events,
        "peak_mib": round(used.ru_maxrss / 1024, 1),
        "ttft_mean_s": result.summary.ttft.mean_s,
        "goodput": result.summary.goodput,
    }


def fresh(policy: str, limit: int | None) -> dict[str, Any]:
    """`one` in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--one", policy]
    if limit is not None:
        command += ["--limit", str(limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default="round_robin,least_loaded,cache_load,netkv")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(one(flags.one, flags.limit)))
        return
    print(f"{DEPLOYMENT}, Python {platform.python_version()}, {platform.machine()}, one thread")
    row = "{:<14}{:>10}{:>16}{:>10}{:>10}{:>10}{:>10}"
    print(row.format("policy", "CPU s", "min..max", "req/CPU s", "events", "MiB", "TTFT s"))
    runs = []
    for policy in flags.policies.split(","):
        repeats = [fresh(policy, flags.limit) for _ in range(flags.repeats)]
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
    print(f"goal: at most {GOAL_CPU_S:.0f} CPU s and {GOAL_MIB:.0f} MiB for each policy")
    keys = ("cpu_s", "wall_s", "requests", "requests_per_cpu_s", "events", "peak_mib")
    print(json.dumps({k: worst[k] for k in keys} | {"policy": worst["policy"], "runs": runs}))


if __name__ == "__main__":
    main()
