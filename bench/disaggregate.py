"""When do separate prefill and decode workers pay? Goodput of both at equal GPUs.

    python -m bench.disaggregate [--jobs 2] [--seeds 3] [--only a100] [--plots docs/disaggregate]
    python -m bench.disaggregate --quick       one cell, three contenders, seconds

Goodput is the highest rate at which 90 % of the requests meet TTFT and TPOT jointly, per GPU, found
by bisection for each seed; contenders share a seed's arrivals, so ratios are paired. Mixed workers
with chunked prefill, prefill and decode workers, and those with a choice for each request (the stay
rule, `netkv_joint`) are compared; DistServe's SLOs and, on A100, its fitted times.
`docs/when-to-disaggregate.md` discusses the result. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final, NamedTuple

from bench.goodput import (
    ATTAINED,
    PREFILL_TOKENS,
    Cell,
    Contender,
    Point,
    Search,
    Seen,
    each,
    point,
    search,
)
from kvasir.core.specs import SloSpec
from kvasir.measure import svg
from kvasir.measure.charts import Plots
from kvasir.measure.intervals import Interval, interval
from kvasir.measure.svg import Chart, Series

LOW: Final = (0.1, 0.5)  # shares of the best mixed rate at which latencies are printed
GRID: Final = (*LOW, 0.75, 0.9, 1.0, 1.15, 1.4)  # at which attainment is drawn


# --- what is compared -----------------------------------------------------------------------------


def mixed(chunk: int) -> Contender:
    return Contender(0, chunk)


def split(prefill: int) -> Contender:
    return Contender(prefill, PREFILL_TOKENS, "netkv")


def joint(prefill: int, stay_weight: float) -> Contender:
    return Contender(prefill, 512, stay_weight=stay_weight)


VLLM: Final = {"vLLM 2023": Contender(0, 8192, "round_robin", vllm_2023=True)}
MIXED: Final = {"mixed 512": mixed(512), "mixed 2048": mixed(2048), "mixed whole": mixed(8192)}
FOUR: Final = MIXED | {
    "1P:3D": split(1), "2P:2D": split(2), "3P:1D": split(3),
    "1P:3D stay": split(1)._replace(chunk=512, stay_tokens=256),
    "1P:3D joint 1": joint(1, 1), "1P:3D joint 0.01": joint(1, 0.01),
    "2P:2D joint 0.01": joint(2, 0.01),
}  # fmt: skip
EIGHT: Final = MIXED | {
    "3P:5D": split(3), "4P:4D": split(4), "2P(tp 2):4D": split(2)._replace(prefill_tp=2),
    "4P:4D stay": split(4)._replace(chunk=512, stay_tokens=256),
    "4P:4D joint 1": joint(4, 1), "3P:5D joint 0.01": joint(3, 0.01),
}  # fmt: skip


def only(contenders: Mapping[str, Contender], *names: str) -> dict[str, Contender]:
    return {name: contenders[name] for name in names}


TIGHT: Final = {"mixed 256": mixed(256)} | only(
    FOUR, "mixed 512", "2P:2D", "3P:1D", "2P:2D joint 0.01"
)
TWO: Final = only(FOUR, "mixed 512", "mixed 2048") | {
    "1P:1D": split(1), "1P:1D joint 0.01": joint(1, 0.01),
}  # fmt: skip
APART: Final = only(FOUR, "mixed 512", "1P:3D", "2P:2D", "1P:3D joint 0.01", "2P:2D joint 0.01")


def slo(ttft_s: float, tpot_s: float) -> SloSpec:
    return SloSpec(ttft_s=ttft_s, tpot_s=tpot_s)


def a100(name: str, model: str, tp: int, *rest: Any, **more: Any) -> Cell:
    return Cell(f"a100 {name}", "a100", model, tp, {1: 8, 4: 4}[tp], *rest, **more)


def h100(name: str, *rest: Any, instances: int = 4, **more: Any) -> Cell:
    return Cell(f"h100 {name}", "h100", "llama-3.1-70b", 4, instances, *rest, **more)


# DistServe's SLOs. On H100 those of its 66B model, but 5 s for a summary's first token: where 15 s
# may pass, a short run measures how far a queue grows. Then one thing is changed at a time.
CELLS: Final = (
    a100("chat", "opt-13b", 1, "chat", slo(0.25, 0.1), 25, EIGHT | VLLM, 4.0, curves=True),
    a100("code", "opt-66b", 4, "code", slo(0.125, 0.2), 25, FOUR | VLLM, 2.0, curves=True),
    a100("summary", "opt-66b", 4, "summary", slo(15, 0.15), 120, FOUR | VLLM, 0.6, curves=True),
    h100("chat", "chat", slo(0.4, 0.1), 15, FOUR, 4.0, curves=True),
    h100("code", "code", slo(0.125, 0.2), 10, FOUR, 12.0, curves=True),
    h100("summary", "arxiv", slo(5, 0.15), 45, FOUR, 1.2, curves=True),
    a100("chat, TPOT 40 ms", "opt-13b", 1, "chat", slo(0.25, 0.04), 25,
         only(EIGHT, "mixed 512", "mixed 2048", "3P:5D", "4P:4D", "3P:5D joint 0.01"), 3.0),
    h100("chat, TPOT 40 ms", "chat", slo(0.4, 0.04), 15, TIGHT, 3.0),
    h100("chat, TPOT 30 ms", "chat", slo(0.4, 0.03), 15, TIGHT, 2.0),
    h100("chat, TPOT 25 ms", "chat", slo(0.4, 0.025), 15, TIGHT, 1.5),
    h100("summary, TPOT 40 ms", "arxiv", slo(5, 0.04), 45, TIGHT, 0.8),
    h100("chat, 2 instances", "chat", slo(0.4, 0.1), 25, TWO, 3.0, instances=2),
    h100("reasoning", "reasoning", slo(0.4, 0.05), 100,
         only(FOUR, "mixed 512", "1P:3D", "1P:3D joint 0.01"), 1.2),
    a100("summary, apart", "opt-66b", 4, "summary", slo(15, 0.15), 120, APART, 0.6, near=False),
)  # fmt: skip


# --- what came out --------------------------------------------------------------------------------


class Found(NamedTuple):
    """Of a cell: requests per second and GPU by contender and seed; the best of each family; and
    attainment over rates per GPU of these."""

    cell: Cell
    goodput: dict[str, list[float]]
    best: dict[str, str]
    rates: tuple[float, ...]
    seen: dict[str, list[Seen]]


FAMILIES: Final = {"mixed": "every worker does both", "split": "prefill and decode workers",
                   "choice": "prefill and decode workers, a choice for each request"}  # fmt: skip


def family(who: Contender) -> str:
    """Which of FAMILIES; empty for what is shown for comparison only."""
    if who.vllm_2023:
        return ""
    if not who.prefill:
        return "mixed"
    return "choice" if who.stay_tokens or who.route == "netkv_joint" else "split"


def best_of(cell: Cell, goodput: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """The contender with the highest mean in each family."""
    return {
        kind: max(
            (n for n, who in cell.contenders.items() if family(who) == kind),
            key=lambda n: fmean(goodput[n]),
        )
        for kind in FAMILIES
    }


def ratio(samples: Sequence[float], base: Sequence[float]) -> Interval | None:
    """Of samples that share their seeds; None where the base served nothing."""
    return interval([a / b for a, b in zip(samples, base, strict=True)]) if all(base) else None


def explore(cells: Sequence[Cell], seeds: int, jobs: int) -> list[Found]:
    """Highest rates first; then how the best of each family attain, over multiples of the best
    mixed one."""
    searches = [Search(cell, name, seeds) for cell in cells for name in cell.contenders]
    rates = iter(each(search, searches, jobs))
    goodputs = [
        {name: [rate / cell.gpus for rate in next(rates)] for name in cell.contenders}
        for cell in cells
    ]
    bests = [best_of(cell, goodput) for cell, goodput in zip(cells, goodputs, strict=True)]
    grids = [
        tuple(share * fmean(goodput[best["mixed"]]) for share in (GRID if cell.curves else LOW))
        for cell, goodput, best in zip(cells, goodputs, bests, strict=True)
    ]
    points = [
        Point(cell, name, rate * cell.gpus)
        for cell, best, grid in zip(cells, bests, grids, strict=True)
        for name in best.values()
        for rate in grid
    ]
    seen = iter(each(point, points, jobs))
    return [
        Found(cell, goodput, best, grid, {kind: [next(seen) for _ in grid] for kind in best})
        for cell, goodput, best, grid in zip(cells, goodputs, bests, grids, strict=True)
    ]


def print_cell(found: Found) -> None:
    cell, slo = found.cell, found.cell.slo
    print(
        f"{cell.name}: {cell.model}, {cell.instances} instances of {cell.tp} {cell.setting}; "
        f"TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s * 1e3:g} ms, lengths {cell.shape}"
    )
    row = "  {:<18}{:>18}{:>22}  {}"
    print(row.format("", "requests/s/GPU", "over the best mixed", "").rstrip())
    base = found.goodput[found.best["mixed"]]
    kinds = {name: kind for kind, name in found.best.items()}
    for name, rates in found.goodput.items():
        best = f"best {kinds[name]}" if name in kinds else ""
        print(row.format(name, shown(interval(rates)), shown(ratio(rates, base)), best).rstrip())
    for at, share in enumerate(LOW):
        low = (f"{kind} {1e3 * s[at].ttft_s_p90:.0f}, {1e3 * s[at].tpot_s_p90:.1f}"
               for kind, s in found.seen.items())  # fmt: skip
        print(f"  p90 TTFT, TPOT in ms at {share:g} of the best mixed rate: {'; '.join(low)}")
    print()


def shown(value: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.3f}" + (f" +- {value.half:.3f}" if value.half is not None else "")


def print_summary(founds: Sequence[Found]) -> None:
    """One row a cell: what separate workers are worth, and against which mixed ones."""
    row = "{:<26}{:<13}{:>7}  {:<14}{:>16}  {:<18}{:>16}{:>12}"
    print(row.format("", "best mixed", "", "best split", "over mixed", "best choice", "over mixed",
                     "vLLM 2023"))  # fmt: skip
    for found in founds:
        mixed_at, split_at, choice_at = (found.best[kind] for kind in FAMILIES)
        base, own = found.goodput[mixed_at], found.goodput[split_at]
        vllm = ratio(own, found.goodput["vLLM 2023"]) if "vLLM 2023" in found.goodput else None
        print(row.format(
            found.cell.name, mixed_at, f"{fmean(base):.3f}", split_at, shown(ratio(own, base)),
            choice_at, shown(ratio(found.goodput[choice_at], base)),
            f"x{vllm.mean:.2f}" if vllm else "",
        ).rstrip())  # fmt: skip


def chart(found: Found) -> Chart:
    """Attainment over the offered rate, the best of each family."""
    name = found.cell.name.replace(",", "").replace(" ", "-")
    curves = [Series(kind, [100 * s.attained for s in seen]) for kind, seen in found.seen.items()]
    bar = Series(f"{100 * ATTAINED:g} %", [100 * ATTAINED] * len(found.rates))
    return Chart(
        name, f"SLO attainment over rate: {found.cell.name}",
        "Share of requests within both limits, by requests per second and GPU: "
        + ", ".join(f"{kind} is {best}" for kind, best in found.best.items()) + ".",
        svg.plot_height(),
        svg.lines(found.rates, [*curves, bar], "%", found.rates[-1], 100.0, x_unit="/s"),
        ("rate", *FAMILIES),
        tuple(
            (f"{rate:.3f}", *(f"{s.attained:.3f}" for s in seen))
            for rate, *seen in zip(found.rates, *found.seen.values(), strict=True)
        ),
    )  # fmt: skip


def as_json(found: Found) -> dict[str, Any]:
    return {
        "gpus": found.cell.gpus, "ttft_s": found.cell.slo.ttft_s, "tpot_s": found.cell.slo.tpot_s,
        "goodput_per_gpu": {name: rounded(rates) for name, rates in found.goodput.items()},
        "best": found.best, "rates_per_gpu": rounded(found.rates),
        "attained": {kind: rounded(s.attained for s in seen) for kind, seen in found.seen.items()},
    }  # fmt: skip


def rounded(values: Iterable[float]) -> list[float]:
    """To four digits."""
    return [float(f"{value:.4g}") for value in values]


QUICK: Final = CELLS[1]._replace(
    name="quick", window_s=4, curves=False,
    contenders=only(FOUR, "mixed 2048", "2P:2D", "1P:3D joint 0.01"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--plots", type=Path, help="a folder for an SVG of each cell")
    parser.add_argument("--quick", action="store_true", help="one small cell, for tests")
    flags = parser.parse_args()
    cells = [QUICK] if flags.quick else [cell for cell in CELLS if flags.only in cell.name]
    if not cells:
        parser.error(f"--only {flags.only}: the cells are {', '.join(c.name for c in CELLS)}")
    began = time.perf_counter()
    seeds, jobs = (2, 1) if flags.quick else (flags.seeds, flags.jobs)
    founds = explore(cells, seeds, jobs)
    for found in founds:
        print_cell(found)
    print_summary(founds)
    if flags.plots is not None:
        Plots(tuple(chart(found) for found in founds if found.cell.curves)).save(flags.plots)
    print(f"{time.perf_counter() - began:.0f} s with {jobs} processes", file=sys.stderr)
    print(json.dumps({"seeds": seeds, "cells": {f.cell.name: as_json(f) for f in founds}}))


if __name__ == "__main__":
    main()
