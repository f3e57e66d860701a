"""Means and percentiles of samples. Knows numbers only, no unit but seconds.

Percentiles interpolate linearly between order statistics: numpy's `linear`, type 7 of Hyndman and
Fan (1996), so that figures agree with those of `vllm bench serve` to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec


class Dist(msgspec.Struct, frozen=True):
    """One distribution, in seconds; all zero when there is no sample.

    `std_s` divides by `count`. `percentiles` maps each percentile asked for, in its order.
    """

    count: int = 0
    mean_s: float = 0.0
    median_s: float = 0.0
    std_s: float = 0.0
    percentiles: tuple[tuple[float, float], ...] = ()

    def percentile(self, p: float) -> float:
        """Raises KeyError for a percentile that was not asked for."""
        return dict(self.percentiles)[p]


def distribution(samples: Sequence[float], percentiles: Sequence[float]) -> Dist:
    """Statistics of `samples`, in any order."""
    count = len(samples)
    if not count:
        return Dist(percentiles=tuple((p, 0.0) for p in percentiles))
    ordered = sorted(samples)
    mean = math.fsum(ordered) / count
    variance = math.fsum((x - mean) ** 2 for x in ordered) / count
    values = [interpolated(ordered.__getitem__, count, p) for p in (50.0, *percentiles)]
    return Dist(
        count=count,
        mean_s=mean,
        median_s=values[0],
        std_s=math.sqrt(variance),
        percentiles=tuple(zip(percentiles, values[1:], strict=True)),
    )


def interpolated(at: Callable[[int], float], count: int, percentile: float) -> float:
    """The percentile of `count` samples of which `at(rank)` is the one of that rank, from 0."""
    below, above, share = ranks(count, percentile)
    a, b = at(below), at(above)
    # numpy's own order of operations: exact at both ends.
    return b - (b - a) * (1 - share) if share >= 0.5 else a + (b - a) * share


def ranks(count: int, percentile: float) -> tuple[int, int, float]:
    """The two ranks that a percentile lies between, and how far towards the upper one."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile {percentile:g} is not in [0, 100]")
    place = (count - 1) * (percentile / 100)
    below = math.floor(place)
    return below, min(below + 1, count - 1), place - below
