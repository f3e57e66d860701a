"""The steps of a recording, with the time that each took: what a fit of served steps starts from.

Reads journals by running their worker nodes again. Knows steps and times; must not know what is
fitted to them. A step's time is the worker's own, from the decision to its `StepDone`: what the
host adds to the engine is in it.
"""

from __future__ import annotations

from pathlib import Path

from kvasir.core.effects import Release, Step
from kvasir.core.errors import ConfigError
from kvasir.core.ids import RequestId
from kvasir.core.messages import StepDone
from kvasir.cost.step import Row
from kvasir.measure.fit import Sample
from kvasir.runtime.replay import header_of, journals, turns

Key = tuple[RequestId, int]


def served_steps(directory: Path) -> list[Sample]:
    """All steps of all workers, in order. Of a run of decode steps, the mean iteration: its context
    is that in the middle of the run.

    Raises ConfigError: no recording there, or one that this version decides otherwise.
    """
    return [
        sample
        for path in journals(directory)
        if header_of(path).kind == "worker"
        for sample in _steps(path)
    ]


def _steps(path: Path) -> list[Sample]:
    batch, found = Batch(), list[Sample]()
    began = 0.0
    for turn in turns(path):
        if not turn.same:
            raise ConfigError(
                "this version decides otherwise than the one that recorded",
                where=f"{path}, input {turn.entry.seq}",
                next_step="kvasir verify says where; record again",
            )
        event, now = turn.entry.event, turn.entry.now
        if isinstance(event, StepDone) and batch.step is not None:
            rows = batch.middle(event)
            found.append(Sample(rows, (now - began) / max(1, event.steps_done)))
            batch.over(event)
        for effect in turn.effects:
            if isinstance(effect, Step):
                batch.begin(effect)
                began = now
            elif isinstance(effect, Release):
                batch.leave((effect.request_id, effect.attempt))
    return found


class Batch:
    """A worker's batch as its runner knows it: rows that are named, and those that stay unnamed.

    The contract is that of `core.effects.Row.stays` and `Step`.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self._rows: list[Row] = []  # of the running step, all of them
        self._staying: dict[Key, int] = {}  # to the position that each computes next
        self._gone: set[Key] = set()  # left while the step ran

    def begin(self, step: Step) -> None:
        for key in step.dropped:
            self.leave(key)
        named = {(row.request_id, row.attempt) for row in step.rows}
        carried = [(1, at) for key, at in self._staying.items() if key not in named]
        assert len(carried) == step.carried, (len(carried), step.carried)
        self.step = step
        self._rows = [*((row.count, row.start) for row in step.rows), *carried]

    def middle(self, done: StepDone) -> tuple[Row, ...]:
        """The batch in the middle of the run of iterations; a row that guesses has as many tokens
        as it computed in the mean iteration."""
        assert self.step is not None
        ahead = max(0, done.steps_done - 1) // 2
        rows = [(new, before + ahead) for new, before in self._rows]
        for i, (row, one) in enumerate(zip(self.step.rows, done.rows, strict=False)):
            if row.draft and done.steps_done:
                guesses = round(one.drafted / done.steps_done)
                rows[i] = (1 + guesses, row.start + one.sampled // 2)
        return tuple(rows)

    def over(self, done: StepDone) -> None:
        assert self.step is not None
        for key in self._staying:
            self._staying[key] += done.steps_done
        for row in self.step.rows:
            if row.stays:
                at = row.start + row.count + done.steps_done - 1
                self._staying[row.request_id, row.attempt] = at
        ended = {(one.request_id, one.attempt) for one in done.rows if one.end}
        for key in self._gone | ended:
            self._staying.pop(key, None)
        self._gone.clear()
        self.step = None

    def leave(self, key: Key) -> None:
        self._staying.pop(key, None)
        if self.step is not None:
            self._gone.add(key)
