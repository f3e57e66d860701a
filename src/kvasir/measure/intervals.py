"""How sure a mean is: Student's t intervals of means and of paired differences. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """`mean` +- `half` holds the true mean with probability 0.95; `half` None: one sample only."""

    mean: float
    half: float | None

    @property
    def apart(self) -> bool:
        """Whether zero lies outside: a difference that is not chance."""
        return self.half is not None and abs(self.mean) > self.half


def interval(samples: Sequence[float]) -> Interval:
    """Of independent samples, at least one."""
    mean = fmean(samples)
    if len(samples) < 2:
        return Interval(mean, None)
    t = quantile(len(samples) - 1)
    return Interval(mean, t * stdev(samples) / math.sqrt(len(samples)))


def paired(samples: Sequence[float], base: Sequence[float]) -> Interval:
    """Of the differences of samples that share their seed, in order."""
    return interval([a - b for a, b in zip(samples, base, strict=True)])


def quantile(degrees: int) -> float:
    """Student's t at 0.975. Exact for 1 and 2 degrees of freedom, else a series in 1 / degrees
    (Abramowitz and Stegun, 26.7.5), good to 1e-2 from 3 on and to 1e-4 from 8 on."""
    assert degrees > 0
    p = 1 - (1 - LEVEL) / 2
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        a = 2 * p - 1
        return a * math.sqrt(2 / (1 - a * a))
    x = NormalDist().inv_cdf(p)
    series = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return math.fsum(term / float(degrees) ** power for power, term in enumerate(series))
