"""Several policies over several seeds: means with intervals, and paired differences, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvasir.measure.intervals import Interval, interval, paired
from kvasir.measure.summary import Summary

LABEL, COLUMN = 20, 26


class Quantity(NamedTuple):
    label: str
    of: Callable[[Summary], float]


def _p99_ms(summary: Summary) -> float:
    return dict(summary.ttft.percentiles).get(99.0, 0.0) * 1e3


QUANTITIES = (
    Quantity("mean TTFT (ms)", lambda s: s.ttft.mean_s * 1e3),
    Quantity("P99 TTFT (ms)", _p99_ms),
    Quantity("mean TPOT (ms)", lambda s: s.tpot.mean_s * 1e3),
    Quantity("goodput (req/s)", lambda s: s.goodput or 0.0),
    Quantity("SLO attainment (%)", lambda s: 100 * s.slo.attainment if s.slo else 0.0),
)


def intervals_table(runs: Mapping[str, Sequence[Summary]]) -> str:
    """One block a quantity. `runs` by policy, seeds in the same order; the first is the base.

    "*" marks a difference whose interval does not hold zero. One seed: figures without intervals.
    """
    base_name = next(iter(runs))
    count = len(runs[base_name])
    if count < 2:
        head, mean = "one seed: no intervals (--seeds 3 gives them)", "one seed"
    else:
        head = f"95 % intervals; differences are paired by seed with {base_name}"
        mean = f"mean of {count} seeds"
    width = max(LABEL, max(map(len, runs)) + 4)
    lines = [head, ""]
    for label, of in QUANTITIES:
        base = [of(s) for s in runs[base_name]]
        lines.append(f"{label:<{width}}{mean:>{COLUMN}}{'difference':>{COLUMN}}")
        for name, summaries in runs.items():
            values = [of(s) for s in summaries]
            row = f"  {name:<{width - 2}}{_shown(interval(values)):>{COLUMN}}"
            if name != base_name:
                row += f"{_shown(paired(values, base), mark=True):>{COLUMN}}"
            lines.append(row)
    return "\n".join(lines)


def _shown(found: Interval, *, mark: bool = False) -> str:
    if found.half is None:
        return f"{found.mean:.2f}"
    star = " *" if mark and found.apart else ""
    return f"{found.mean:.2f} +- {found.half:.2f}{star}"
