"""Closed forms for decode steps whose time is piecewise linear in total context.

Knows lines and where they join. Must not know what the time is made of.

For a fixed batch size b the time of an iteration is continuous and grows with K, the sum of the
contexts; each iteration adds b to K. So a run of k iterations is a sum over the pieces that it
crosses, each in closed form:

    n iterations from K on one line = n * base + per_context * (n * K + b * n (n - 1) / 2)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

from kvasir.cost.step import DecodeLine, StepModel


class Pieces(NamedTuple):
    """`lines[i]` holds from total context `starts[i]` until `starts[i + 1]`; `starts[0]` is 0."""

    starts: tuple[float, ...]
    lines: tuple[DecodeLine, ...]


class Run(NamedTuple):
    """Iterations that stay on one line: how many at most (None: any), from which context."""

    most: int | None
    context: int
    line: DecodeLine


class PiecewiseModel(StepModel):
    """A StepModel whose decode time has one line per range of total context.

    `decode_line` is the line at a mean context of TYPICAL_CONTEXT, an estimate for routing.
    """

    TYPICAL_CONTEXT = 2048

    def __init__(self) -> None:
        super().__init__()
        self._pieces_by_batch: dict[int, Pieces] = {}

    def _pieces(self, batch_size: int) -> Pieces:
        raise NotImplementedError

    def pieces(self, batch_size: int) -> Pieces:
        """The lines of `batch_size` >= 1 decode rows; `batch` of such rows is on them exactly."""
        found = self._pieces_by_batch.get(batch_size)
        if found is None:
            assert batch_size > 0, f"a batch of {batch_size} rows"
            found = self._pieces_by_batch[batch_size] = self._pieces(batch_size)
        return found

    def _line(self, batch_size: int) -> DecodeLine:
        starts, lines = self.pieces(batch_size)
        return lines[bisect_right(starts, batch_size * self.TYPICAL_CONTEXT) - 1]

    def iteration_seconds(self, batch_size: int, context: int, j: int = 0) -> float:
        """As `StepModel.iteration_seconds`."""
        starts, lines = self.pieces(batch_size)
        context += batch_size * j
        line = lines[bisect_right(starts, context) - 1]
        return line.base_s + line.per_context_s * context

    def elapsed(self, batch_size: int, context: int, k: int) -> float:
        """As `StepModel.elapsed`."""
        seconds, left = 0.0, k
        while left > 0:
            run = self._run(batch_size, context)
            count = left if run.most is None else min(left, run.most)
            seconds += _on_line(run.line, batch_size, context, count)
            context += batch_size * count
            left -= count
        return seconds

    def steps_within(self, batch_size: int, context: int, seconds: float) -> int:
        """As `StepModel.steps_within`."""
        if seconds < 0:
            return 0
        first, k, left = context, 0, seconds
        while True:
            run = self._run(batch_size, context)
            if run.most is not None:
                whole = _on_line(run.line, batch_size, context, run.most)
                if whole <= left:
                    k, left = k + run.most, left - whole
                    context += batch_size * run.most
                    continue
            k += _inverse(run.line, batch_size, context, left)
            break
        while k and self.elapsed(batch_size, first, k) > seconds:
            k -= 1
        while self.elapsed(batch_size, first, k + 1) <= seconds:
            k += 1
        return k

    def _run(self, batch_size: int, context: int) -> Run:
        starts, lines = self.pieces(batch_size)
        at = bisect_right(starts, context) - 1
        if at + 1 == len(starts):
            return Run(None, context, lines[at])
        return Run(math.ceil((starts[at + 1] - context) / batch_size), context, lines[at])


def _on_line(line: DecodeLine, batch_size: int, context: int, count: int) -> float:
    read = count * context + batch_size * (count * (count - 1) // 2)
    return count * line.base_s + line.per_context_s * read


def _inverse(line: DecodeLine, batch_size: int, context: int, seconds: float) -> int:
    """About how many iterations fit on one line: a quadratic, as in `StepModel.steps_within`."""
    square = line.per_context_s * batch_size / 2
    linear = line.base_s + line.per_context_s * (context - batch_size / 2)
    return int(2 * seconds / (linear + math.sqrt(linear * linear + 4 * square * seconds)))
