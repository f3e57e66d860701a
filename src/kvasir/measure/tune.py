"""Which of several settings is best, by what a tuning slice measured. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from kvasir.measure.summary import Summary


def best(runs: Mapping[str, Sequence[Summary]]) -> str:
    """The label with the most goodput, mean over its seeds; among equals the least mean TTFT, then
    the first. `runs` is not empty."""

    def rank(label: str) -> tuple[float, float]:
        found = runs[label]
        return -fmean(s.goodput or 0.0 for s in found), fmean(s.ttft.mean_s for s in found)

    return min(runs, key=rank)
