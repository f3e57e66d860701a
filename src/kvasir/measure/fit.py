"""From measured steps to the constants of `FittedCost`: non-negative least absolute deviations.

Knows rows of a step and seconds. Must not know what was measured, or how. Errors are relative, so
that a short step counts as much as a long one, and absolute, so that a disturbed one does not bend
the rest. No constant is negative and the curve never falls: time that work would give back is
noise, and a simulator that believes it finds schedules that no engine keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvasir.core.specs.deployment import FittedCost
from kvasir.cost.step import Fitted, Row, work_of
from kvasir.measure.distribution import interpolated

Matrix = NDArray[np.float64]

LINE_ERROR_MAX: Final = 0.05  # of nine in ten held-out steps: the line does, and is simpler
REWEIGHTINGS: Final = 20
RESIDUAL_MIN: Final = 1e-4  # relative; below it a step fits as well as clocks can tell
GRADIENT_MIN: Final = 1e-10
DIGITS: Final = 4


class Sample(NamedTuple):
    """A step over `rows` took `seconds`; with `request`, what surrounds a request is in it."""

    rows: tuple[Row, ...]
    seconds: float
    request: bool = False


class Errors(NamedTuple):
    """Relative errors, in absolute value."""

    median: float
    p90: float
    worst: float


class Fit(NamedTuple):
    """`request_s`: what a request takes beside its steps; 0 when no sample has it."""

    cost: FittedCost
    request_s: float


class Choice(NamedTuple):
    """The line and the curve, each with its errors on steps that were not fitted."""

    line: Fit
    line_errors: Errors
    curve: Fit
    curve_errors: Errors

    @property
    def curved(self) -> bool:
        """The curve is worth its constants: the line is off by more than a few per cent, and the
        curve by less in the middle (p90 is the clock's noise on a busy machine)."""
        line, curve = self.line_errors, self.curve_errors
        return line.p90 > LINE_ERROR_MAX and curve.median < line.median

    @property
    def best(self) -> Fit:
        return self.curve if self.curved else self.line

    @property
    def errors(self) -> Errors:
        return self.curve_errors if self.curved else self.line_errors


def choose(samples: Sequence[Sample], held_out: Sequence[Sample]) -> Choice:
    """Fit both forms to `samples`; `held_out` tells how good they are. Neither may be empty."""
    tokens = [work_of(sample.rows).new_tokens for sample in samples]
    line, curve = fit(samples), fit(samples, ladder(min(tokens), max(tokens)))
    return Choice(line, errors(line, held_out), curve, errors(curve, held_out))


def ladder(least: int, most: int) -> list[int]:
    """`least`, Fibonacci's numbers between, `most`: even steps on a logarithmic scale, half of them
    odd. Powers of two are what kernels are best at, and what requests hardly ever have."""
    steps, a, b = [], 1, 2
    while a < most:
        steps.append(a)
        a, b = b, a + b
    return sorted({least, most, *(n for n in steps if n > least)})


def fit(samples: Sequence[Sample], knots: Sequence[int] = ()) -> Fit:
    """The constants that explain `samples` best.

    `knots`: numbers of new tokens between which the time is a line of its own, increasing; without
    them (or with only one) it is one line.
    """
    knots = [] if len(knots) < 2 else list(knots)
    columns = np.array([_columns(sample, knots) for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    found = [_rounded(x) for x in _least_deviations(columns / seconds[:, None])]
    request_s, per_row_s, per_attention_s, per_prompt_context_s, per_context_s = found[:FIXED]
    first, *slopes = found[FIXED:]
    cost = FittedCost(
        overhead_s=0 if knots else first, per_token_s=0 if knots else slopes[0],
        per_attention_s=per_attention_s, per_context_s=per_context_s, per_row_s=per_row_s,
        per_prompt_context_s=per_prompt_context_s, curve=_curve(first, slopes, knots),
    )  # fmt: skip
    return Fit(cost, request_s)


def _curve(
    first: float, slopes: Sequence[float], knots: Sequence[int]
) -> tuple[tuple[int, float], ...]:
    """From the time at the first knot and the slope after each to a time at every knot."""
    if not knots:
        return ()
    curve, seconds = [(knots[0], first)], first
    for (low, high), slope in zip(pairwise(knots), slopes, strict=True):
        seconds += slope * (high - low)
        curve.append((high, _rounded(seconds)))
    return tuple(curve)


def errors(found: Fit, samples: Sequence[Sample]) -> Errors:
    """How far predictions are from `samples`, at least one."""
    model = Fitted(found.cost)
    off = sorted(
        abs((model.batch(s.rows) + s.request * found.request_s) / s.seconds - 1) for s in samples
    )
    at = off.__getitem__
    count = len(off)
    return Errors(interpolated(at, count, 50), interpolated(at, count, 90), off[-1])


FIXED: Final = 5  # columns that a sample has whatever the knots are


def _columns(sample: Sample, knots: Sequence[int]) -> list[float]:
    """What each constant is multiplied by: FIXED ones, then those of the new tokens."""
    work = work_of(sample.rows)
    fixed = (
        sample.request, len(sample.rows), work.prefill_pairs, work.prefill_context,
        work.decode_context,
    )  # fmt: skip
    return [*map(float, fixed), 1.0, *_token_terms(work.new_tokens, knots)]


def _token_terms(tokens: int, knots: Sequence[int]) -> list[float]:
    """How far `tokens` reach into each range between knots; the last range has no end."""
    if not knots:
        return [float(tokens)]
    ends = [*knots[1:-1], math.inf]
    return [max(0.0, min(tokens, end) - low) for low, end in zip(knots[:-1], ends, strict=True)]


def _least_deviations(columns: Matrix) -> Matrix:
    """x >= 0 with the least sum of |columns @ x - 1|, by reweighted least squares."""
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    scaled, ones = columns / scale, np.ones(len(columns))
    weights, x = ones, np.zeros(scaled.shape[1])
    for _ in range(REWEIGHTINGS):
        x = non_negative(scaled * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(scaled @ x - 1), RESIDUAL_MIN))
    result: Matrix = x / scale
    return result


def non_negative(a: Matrix, b: Matrix) -> Matrix:
    """x >= 0 with the least |a @ x - b|: the active set method of Lawson and Hanson (1974, 23.3).

    A column that is a combination of others gets a share or nothing; never an error.
    """
    count = a.shape[1]
    x, used = np.zeros(count), np.zeros(count, dtype=bool)
    for _ in range(3 * count):
        gradient = np.where(used, -np.inf, a.T @ (b - a @ x))
        best = int(np.argmax(gradient))
        if gradient[best] <= GRADIENT_MIN * max(1.0, float(np.abs(b).max())):
            break
        used[best] = True
        x = _within(a, b, x, used)
    return x


def _within(a: Matrix, b: Matrix, x: Matrix, used: NDArray[np.bool_]) -> Matrix:
    """Least squares over the used columns; those that would turn negative are dropped in turn."""
    while used.any():
        trial = np.zeros(len(x))
        trial[used] = np.linalg.lstsq(a[:, used], b, rcond=None)[0]
        below = used & (trial <= 0)
        if not below.any():
            return trial
        share = min(float(x[i] / (x[i] - trial[i])) if x[i] > 0 else 0.0
                    for i in np.flatnonzero(below))  # fmt: skip
        x = x + share * (trial - x)
        x[below & (x <= 1e-15)] = 0.0
        used &= x > 0
    return np.zeros(len(x))


def _rounded(value: float) -> float:
    """To the digits that timings carry."""
    return float(f"{value:.{DIGITS}g}")
