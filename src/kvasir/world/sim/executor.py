"""Steps in virtual time: the cost model says how long, the trace says how many tokens come.

A run of decode steps is one event: its length is a closed form, and a `Cut` shortens it to the end
of the iteration that is running then. Knows nothing of policy. The true output lengths are here and
nowhere else: no node can see them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvasir.core.effects import Step
from kvasir.core.ids import RequestId, StepId
from kvasir.core.messages import RowDone
from kvasir.cost.step import StepModel


class Outcome(NamedTuple):
    """What a step came to: `steps` iterations from `started` to `ended`, the first of them
    `first_s` long and the last `last_s`."""

    started: float
    ended: float
    steps: int
    first_s: float
    last_s: float
    rows: tuple[RowDone, ...]


class Executor:
    """One worker's compute. At most one step runs."""

    def __init__(self, model: StepModel, outputs: Callable[[RequestId], int]) -> None:
        self._model = model
        self._outputs = outputs
        self.step: Step | None = None
        self.version = 0
        self.ends_at = 0.0
        self.first_s = 0.0  # of the running step's first iteration
        self.started = 0.0
        self._steps = 0
        self._context = 0

    def begin(self, now: float, step: Step) -> float:
        """Start; returns when it will end, unless it is cut."""
        assert self.step is None, "a step is running"
        self.step, self.started = step, now
        self.version += 1
        self._steps = 1
        if step.steps > 1:
            left = (self._outputs(row.request_id) - row.index for row in step.rows)
            self._steps = max(1, min(step.steps, *left))
            self._context = sum(row.start + 1 for row in step.rows)
            seconds = self._model.elapsed(len(step.rows), self._context, self._steps)
            self.first_s = self._model.iteration_seconds(len(step.rows), self._context, 0)
        else:
            seconds = self._model.batch([(row.count, row.start) for row in step.rows])
            self.first_s = seconds
        self.ends_at = now + seconds
        return self.ends_at

    def cut(self, now: float, step_id: StepId) -> float | None:
        """Shorten to the end of the present iteration; the new end, or None if nothing changes."""
        step = self.step
        if step is None or step.id != step_id or self._steps == 1:
            return None
        done = self._model.steps_within(len(step.rows), self._context, now - self.started)
        if done + 1 >= self._steps:
            return None
        self._steps = done + 1
        self.version += 1
        self.ends_at = self.started + self._model.elapsed(
            len(step.rows), self._context, self._steps
        )
        return self.ends_at

    def finish(self) -> Outcome:
        """The running step is over as planned."""
        return self._close(self.ends_at, self._steps)

    def crash(self, now: float) -> Outcome | None:
        """The worker died: iterations done by now count, the running one is lost."""
        step = self.step
        if step is None:
            return None
        done = 0
        if self._steps > 1:
            done = self._model.steps_within(len(step.rows), self._context, now - self.started)
            done = min(done, self._steps)
        return self._close(now, done)

    def _close(self, ended: float, steps: int) -> Outcome:
        step = self.step
        assert step is not None
        self.step = None
        self.version += 1
        first_s = last_s = ended - self.started
        if steps > 1:
            batch = len(step.rows)
            first_s = self._model.iteration_seconds(batch, self._context, 0)
            last_s = self._model.iteration_seconds(batch, self._context, steps - 1)
        rows = []
        for row in step.rows:
            sampled = steps if row.sample else 0
            end = ""
            if sampled:
                last = row.index + sampled
                if last >= row.end_at:
                    end = "length"
                elif last >= self._outputs(row.request_id):
                    end = "stop"
            rows.append(RowDone(row.request_id, row.attempt, sampled, end))  # type: ignore[arg-type]
        return Outcome(self.started, ended, steps, first_s, last_s, tuple(rows))
