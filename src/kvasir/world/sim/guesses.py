"""Steps in which rows guess tokens ahead, in virtual time: each iteration on its own, since each
draws as many tokens as its guesses come true. Knows the cost model and an acceptance; no policy.

A row that may guess n tokens is charged n + 1 new ones, whether they come true or not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvasir.core.effects import Row
from kvasir.core.ids import RequestId
from kvasir.cost.acceptance import accepted_tokens
from kvasir.cost.step import Row as CostRow
from kvasir.cost.step import StepModel


class Round(NamedTuple):
    """One row in one iteration that ends `at` seconds into the step: `sampled` tokens from output
    `first` on."""

    at: float
    first: int
    sampled: int
    drafted: int
    accepted: int


class Luck(NamedTuple):
    """How many tokens requests have, and how likely each guess is right."""

    outputs: Callable[[RequestId], int]
    acceptance: float


class GuessedRun:
    """The iterations of one step, worked out when it begins. `rows` are those that it names and
    that do not stay; `lanes` the positions of all others, which draw one token an iteration.

    It ends when a row that guesses does, or after `steps`.
    """

    def __init__(
        self, model: StepModel, rows: Sequence[Row], lanes: Sequence[int], steps: int, luck: Luck
    ) -> None:
        self.ends: list[float] = []  # of the iterations, seconds from the step's beginning
        self.told: dict[RequestId, int] = {}  # tokens that are known outside already
        self._rounds: dict[RequestId, list[Round]] = {r.request_id: [] for r in rows if r.draft}
        now, done, over = 0.0, 0, False
        while done < steps and not over:
            batch: list[CostRow] = [(1, at + done) for at in lanes]
            drawn = []
            for row in rows:
                if row.draft:
                    one = self._next(row, luck)
                    behind = one.first - row.index
                    batch.append((1 + one.drafted, row.start + behind))
                    drawn.append((row, one))
                else:
                    batch.append((row.count, row.start + done))
            now += model.batch(batch)
            done += 1
            self.ends.append(now)
            for row, one in drawn:
                self._rounds[row.request_id].append(one._replace(at=now))
                over |= one.first + one.sampled >= _last(row, luck)

    def _next(self, row: Row, luck: Luck) -> Round:
        before = self._rounds[row.request_id]
        index = before[-1].first + before[-1].sampled if before else row.index
        drafted = max(0, min(row.draft, row.end_at - index - 1))
        right = accepted_tokens(row.request_id, index, drafted, luck.acceptance)
        sampled = max(1, min(right + 1, _last(row, luck) - index))
        return Round(0.0, index, sampled, drafted, min(right, sampled))

    @property
    def steps(self) -> int:
        return len(self.ends)

    def within(self, seconds: float) -> int:
        """Iterations that are over after so many seconds."""
        return bisect_right(self.ends, seconds)

    def rounds(self, request_id: RequestId, steps: int) -> list[Round]:
        """The first `steps` iterations of a row that guesses; none of one that does not."""
        return self._rounds.get(request_id, [])[:steps]


def _last(row: Row, luck: Luck) -> int:
    """Output index at which a row is over."""
    return min(luck.outputs(row.request_id), row.end_at)
