"""Mooncake's two published orders (arXiv 2407.00079) on the bundled conversation trace.

    python bench/mooncake.py [--jobs 2] [--requests 12031]

1. Mean TTFT of random, load balancing, cache-aware and KVCache-centric scheduling: 92.07, 60.41,
   14.36 and 6.26 s at 8P+8D.
2. Requests rejected under overload (2x replay) by the baseline, early rejection and early rejection
   with prediction: 4,183, 3,771 and 3,589 of 23,608.

The trace is another one (12,031 requests of chat) and so is the hardware's time model, so orders
are compared, not seconds: `docs/mooncake.md` says what differs. Algorithm 1 without fetches from
peers is the paper's cache-aware row, with them its KVCache-centric one. Prints tables, then one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from kvasir.cli.files import load_deployment
from kvasir.cli.overrides import changed, with_counts
from kvasir.core.specs import Deployment
from kvasir.runtime.sweep import Case, sweep
from kvasir.world.sim.run import Result

FILE = Path(__file__).parent / "mooncake.yaml"
REQUESTS = 12_031
RATES = (1.0, 1.5, 2.0)


class Arm(NamedTuple):
    """A policy, whether it fetches prefixes, the paper's name for it, its mean TTFT in seconds."""

    policy: str
    fetches: bool
    theirs: str
    published_s: float | None


ARMS = (
    Arm("random", False, "random", 92.07),
    Arm("least_loaded", False, "load balancing", 60.41),
    Arm("mooncake", False, "cache-aware", 14.36),
    Arm("mooncake", True, "KVCache-centric", 6.26),
    Arm("cache_load", False, "(ours: cache and load, weighed)", None),
    Arm("netkv_joint", True, "(ours: pair and fetch, priced)", None),
)
REJECTED = {"early_baseline": 4183, "early": 3771, "early_predicted": 3589}


class Overload(NamedTuple):
    """A cluster and a load on which the three rejections are compared."""

    name: str
    decode: int
    rate: float
    ttft_s: float
    tpot_s: float
    share: float  # of the requests


OVERLOADS = (
    Overload("as published", decode=8, rate=2.0, ttft_s=30, tpot_s=0.1, share=1.0),
    Overload("decode binds", decode=1, rate=2.0, ttft_s=30, tpot_s=0.025, share=0.33),
    Overload("both bind", decode=1, rate=4.0, ttft_s=5, tpot_s=0.04, share=0.33),
)


def routed(requests: int) -> list[Case]:
    base = changed(load_deployment(FILE), {"workload.limit": requests}, "--requests")
    return [
        Case(f"{arm.policy} {arm.fetches} {rate:g}", _at(base, rate, _route(arm)), 0)
        for rate in RATES
        for arm in ARMS
    ]


def _route(arm: Arm) -> dict[str, object]:
    return {"policy.route.name": arm.policy, "policy.route.fetch_prefix": arm.fetches}


def refused(requests: int) -> list[Case]:
    cases = []
    for o in OVERLOADS:
        base = with_counts(load_deployment(FILE), {"prefill": 8, "decode": o.decode})
        limits = {"slo.ttft_s": o.ttft_s, "slo.tpot_s": o.tpot_s,
                  "workload.limit": round(requests * o.share)}  # fmt: skip
        for name in REJECTED:
            spec = _at(base, o.rate, limits | {"policy.admit": name})
            cases.append(Case(f"{o.name} {name}", spec, 0))
    return cases


def _at(base: Deployment, rate: float, changes: dict[str, object]) -> Deployment:
    return changed(base, {"workload.time_scale": 1 / rate} | changes, "bench/mooncake.py")


def print_routes(results: dict[str, Result]) -> dict[str, Any]:
    print("mean TTFT in seconds, 8P+8D, by how much faster than recorded requests come")
    heads = "".join(f"{f'x{rate:g}':>10}" for rate in RATES)
    print(f"{'':<14}{'in the paper':<34}{'published':>10}{heads}")
    found: dict[str, Any] = {}
    for arm in ARMS:
        runs = [results[f"{arm.policy} {arm.fetches} {rate:g}"].summary for rate in RATES]
        means = [run.ttft.mean_s for run in runs]
        shown = "".join(f"{mean:>10.2f}" for mean in means)
        hits = ", ".join(f"{run.cache_hit_ratio:.1%}" for run in runs)
        print(f"{arm.policy:<14}{arm.theirs:<34}{arm.published_s or '-':>10}{shown}   hits {hits}")
        found[arm.theirs] = means
    ordered = [arm.theirs for arm in ARMS if arm.published_s]
    kept = [
        all(a > b for a, b in pairwise(column))
        for column in zip(*(found[n] for n in ordered), strict=True)
    ]
    print(f"the published order at each rate: {', '.join('yes' if k else 'no' for k in kept)}\n")
    return {"ttft_mean_s": found, "rates": RATES, "order_kept": kept}


def print_refused(results: dict[str, Result]) -> dict[str, Any]:
    row = "{:<17}{:>10}{:>10}{:>10}{:>14}{:>10}{:>14}{:>13}"
    print("rejected requests; those that were prefilled first are wasted work")
    found: dict[str, Any] = {}
    for o in OVERLOADS:
        print(f"{o.name}: 8P+{o.decode}D, x{o.rate:g}, TTFT {o.ttft_s:g} s, TPOT {o.tpot_s:g} s")
        heads = ("published", "rejected", "prefilled", "of requests", "good", "mean TTFT s")
        print(row.format("", *heads, "mean TPOT ms"))
        for name, published in REJECTED.items():
            result = results[f"{o.name} {name}"]
            s, total = result.summary, result.counts["Closed"]
            rejected = result.counts.get("Rejected", 0)
            wasted = result.counts.get("Prefilled", 0) - s.completed
            good = s.slo.good if s.slo else 0
            print(
                row.format(
                    name, published, rejected, wasted, total, good, f"{s.ttft.mean_s:.2f}",
                    f"{s.tpot.mean_s * 1e3:.1f}",
                )
            )  # fmt: skip
            found[f"{o.name}, {name}"] = {"rejected": rejected, "wasted": wasted, "good": good,
                                          "requests": total}  # fmt: skip
        print()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    flags = parser.parse_args()
    began = time.perf_counter()
    cases = [*routed(flags.requests), *refused(flags.requests)]
    results = dict(zip((c.label for c in cases), sweep(cases, jobs=flags.jobs), strict=True))
    found = {"routes": print_routes(results), "rejections": print_refused(results)}
    print(f"{len(cases)} runs of up to {flags.requests} requests in "
          f"{time.perf_counter() - began:.0f} s", file=sys.stderr)  # fmt: skip
    print(json.dumps(found | {"requests": flags.requests}))


if __name__ == "__main__":
    main()
