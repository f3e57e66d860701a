"""What copying cached blocks ahead of their use brings, and what it wastes: simulated, off and on.

    python bench/copies.py                  every case, some minutes on one core
    python bench/copies.py --case chats     one of them

Llama-3-70B on H100s (tp 4), four prefill workers or more, a fabric of 100 Gb/s NICs. TTFT is the
mean over requests, hits a share of all prompt tokens; of the blocks that were copied: used, evicted
before that (wasted), and not asked for by the end. Traces from `kvasir.traces`, seed 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvasir.core.specs import (
    Deployment,
    LengthSpec,
    ModelSpec,
    PolicySpec,
    PoolSpec,
    RouteSpec,
    TopologySpec,
    WorkloadSpec,
)
from kvasir.core.specs.copies import CopiesSpec
from kvasir.core.specs.faults import Departure, FaultSpec
from kvasir.measure.summary import Summary
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.workload import workload
from kvasir.world.sim.run import Result, simulate

ROUTES = ("cache_load", "netkv", "netkv_joint")
LONG = LengthSpec(mean=7000, sigma=0.3, min=6100, max=12000)
SHORT = LengthSpec(mean=60, max=200)
TURN = LengthSpec(mean=800, max=4000)
ANSWER = LengthSpec(mean=300, max=1000)


class Case(NamedTuple):
    """`on` is what is compared with nothing."""

    name: str
    what: str
    on: dict[str, Any]
    load: WorkloadSpec
    prefill: int = 4
    kv_blocks: int = 20_000
    departures: tuple[Departure, ...] = ()
    trace: Trace | None = None
    routes: tuple[str, ...] = ROUTES


def cases(mooncake: Path | None) -> Iterator[Case]:
    shared = {"requests": 800, "input": LONG, "output": SHORT, "prefix_tokens": 6000}
    yield Case(
        "hot", "12 system prompts of 6,000 tokens, 6 requests/s", {"hot": True},
        WorkloadSpec(rate=6.0, prefix_share=0.95, prefix_groups=12, **shared), 6, 5000,
    )  # fmt: skip
    yield Case(
        "hot-few", "2 system prompts of 6,000 tokens, 6 requests/s", {"hot": True},
        WorkloadSpec(rate=6.0, prefix_share=0.95, prefix_groups=2, **shared), 6, 5000,
    )  # fmt: skip
    yield Case(
        "random", "prompts that share nothing (loses if anything is copied)", {"hot": True},
        WorkloadSpec(rate=2.0, prefix_share=0.0, **shared), 6, 5000, routes=("cache_load",),
    )  # fmt: skip
    yield Case(
        "flash", "each system prompt is asked for 12 times at once, never again (loses)",
        {"hot": True}, WorkloadSpec(), 6, 5000, trace=flashes(),
    )  # fmt: skip
    chats = {"requests": 1500, "turns": 5, "input": TURN, "output": ANSWER, "name_answers": True}
    yield Case(
        "chats", "sessions of 5 turns, 20 s apart, 2 requests/s", {"next_turn": True},
        WorkloadSpec(rate=2.0, think_s=20, **chats),
    )  # fmt: skip
    yield Case(
        "chats-late", "the same, 120 s apart, in caches that hold a quarter", {"next_turn": True},
        WorkloadSpec(rate=2.0, think_s=120, **chats), kv_blocks=3000,
    )  # fmt: skip
    yield Case(
        "singles", "sessions of mostly one turn (loses: nobody comes again)", {"next_turn": True},
        WorkloadSpec(rate=2.0, think_s=20, **{**chats, "turns": 1.05}), kv_blocks=3000,
    )  # fmt: skip
    yield Case(
        "leaving", "as chats; a prefill worker leaves after 200 s", {"leaving": True},
        WorkloadSpec(rate=2.0, think_s=20, **chats),
        departures=(Departure(worker="prefill-0", at_s=200.0, within_s=30.0),),
    )  # fmt: skip
    if mooncake is not None:
        load = WorkloadSpec(trace=str(mooncake), limit=2000, time_scale=2.0)
        what = f"{mooncake.name}, half as fast, 12 prefill workers"
        yield Case("mooncake", what, {"hot": True}, load, 12, 20_000)


def flashes() -> Trace:
    """50 crowds of 12 prompts within 100 ms, one every 10 s."""
    found = []
    for crowd in range(50):
        shared = tuple(range(crowd * 1000, crowd * 1000 + 375))
        for i in range(12):
            own = tuple(range(10**7 + (crowd * 12 + i) * 100, 10**7 + (crowd * 12 + i) * 100 + 63))
            at = 10.0 * crowd + (1.0 + 0.008 * i if i else 0.0)
            found.append(Arrival(at, 7001, 60, (*shared, *own)))
    return Trace("flashes", 16, tuple(found))


def deployment(case: Case, route: str, copies: dict[str, Any], block_size: int) -> Deployment:
    shape = {"tp": 4, "hardware": "h100", "batch_tokens_max": 8192}
    blocks = case.kv_blocks * 16 // block_size
    return Deployment(
        name=case.name,
        models=(ModelSpec(name="llama", shape="llama-3-70b"),),
        topology=TopologySpec(preset="fabric"),
        pools=(
            PoolSpec(name="prefill", role="prefill", count=case.prefill, kv_blocks=blocks, **shape),
            PoolSpec(name="decode", role="decode", count=2, **shape),
        ),
        policy=PolicySpec(route=RouteSpec(name=route), copies=CopiesSpec(**copies)),
        faults=FaultSpec(departures=case.departures) if case.departures else None,
        workload=case.load,
        block_size=block_size,
    )  # fmt: skip


def run(case: Case) -> None:
    trace = case.trace or workload(case.load, 16, 1)
    size = trace.block_size or 16
    print(f"\n{case.name}: {case.what}; {len(trace.arrivals)} requests")
    print(f"  {'route':12} {'copies':6} {'TTFT ms':>9} {'hits %':>7} {'copied':>8} {'used %':>7} "
          f"{'wasted %':>9} {'unasked %':>10}")  # fmt: skip
    for route in case.routes:
        for copies in ({}, case.on):
            result = simulate(deployment(case, route, copies, size), trace)
            print(f"  {route:12} {'on' if copies else 'off':6} {line(result)}", flush=True)


def line(result: Result) -> str:
    summary: Summary = result.summary
    prefix = summary.prefix
    assert prefix is not None
    counts = {what: sum(n for name, n in result.counts.items() if name.endswith(f"{what} blocks"))
              for what in ("copied", "used", "wasted")}  # fmt: skip
    hits = 100 * prefix.hits_tokens / prefix.queries_tokens
    shown = f"{1e3 * summary.ttft.mean_s:9.1f} {hits:7.1f}"
    if not counts["copied"]:
        return f"{shown} {0:8}"
    used, wasted = (100 * counts[w] / counts["copied"] for w in ("used", "wasted"))
    return f"{shown} {counts['copied']:8} {used:7.1f} {wasted:9.1f} {100 - used - wasted:10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", default="", help="one case by name")
    parser.add_argument("--mooncake", type=Path, help="a Mooncake trace (JSON lines)")
    args = parser.parse_args()
    for case in cases(args.mooncake):
        if args.case in ("", case.name):
            run(case)


if __name__ == "__main__":
    main()
