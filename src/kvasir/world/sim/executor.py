"""Compute in virtual time: a worker's step takes what the cost model says.

A run of decode steps is one event: it ends when a row ends, or at its limit, or, cut, at the end
of the iteration that is running then. Carried rows (`effects.Row.stays`) cost nothing here while
they only decode: they are a number, a sum of contexts and a heap of ends. Knows nothing of policy.
The true output lengths are here and nowhere else: no node can see them.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from msgspec.structs import replace

from kvasir.core.effects import Row, Step
from kvasir.core.ids import BlockKey, RequestId, StepId
from kvasir.core.messages import Drawn, RowDone
from kvasir.cost.step import StepModel
from kvasir.world.sim.guesses import GuessedRun, Luck, Round

Key = tuple[RequestId, int]
End = Literal["", "stop", "length"]


class Joined(NamedTuple):
    """A row that drew `sampled` tokens from output `first` on, and was not in the step before."""

    request_id: RequestId
    first: int
    sampled: int


class Outcome(NamedTuple):
    """What a step came to: `steps` iterations from `started` to `ended`, the first of them
    `first_s` long and the last `last_s`.

    `rows` as in `StepDone`; `drawn` is what clients see of it now: a carried row's tokens are told
    with its second, at its end, and when somebody asks. `joined` and `together` are the rows that
    drew, one by one and the number of those that drew in the step before, `idle_s` earlier.
    `everyone` has the latter's names when asked for. `rounds` are of the rows that guess, which
    are in neither.
    """

    started: float
    ended: float
    steps: int
    first_s: float
    last_s: float
    rows: tuple[RowDone, ...]
    drawn: tuple[Drawn, ...]
    joined: tuple[Joined, ...]
    together: int
    idle_s: float
    everyone: tuple[RequestId, ...]
    rounds: tuple[tuple[RequestId, list[Round]], ...] = ()


class Lane:
    """One row of the batch. Output tokens from `row.index` on are drawn, one a tick from `tick`;
    those before `told` are known outside. `ends_at`: the tick at which its last one is drawn;
    -1 when it has left."""

    __slots__ = ("ends_at", "row", "second", "tick", "told")

    def __init__(self, row: Row, tick: int, ends_at: int) -> None:
        self.row, self.tick, self.ends_at = row, tick, ends_at
        self.told = row.index
        self.second = row.index + 2  # once told up to here, it is quiet until its end


class Executor:
    """One worker's compute. At most one step runs. `names`: outcomes say who decoded.
    `acceptance`: how likely a guessed token is right. `answers`: keys of the blocks that an answer
    fills, told at its end."""

    def __init__(
        self, model: StepModel, outputs: Callable[[RequestId], int], *, names: bool = False,
        acceptance: float = 0.0, answers: Callable[[RequestId], tuple[BlockKey, ...]] | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._answers = answers
        self._outputs = outputs
        self._luck = Luck(outputs, acceptance)
        self._guessed: GuessedRun | None = None  # of the running step, when rows guess
        self._names = names
        self.step: Step | None = None
        self.version = 0
        self.ends_at = 0.0
        self.first_s = 0.0  # of the running step's first iteration
        self.started = 0.0
        self.ended = 0.0  # of the last step
        self._steps = 0
        self._lanes: dict[Key, Lane] = {}
        self._ticks = 0
        self._starts = 0  # sum over lanes of row.start - tick
        self._ends: list[tuple[int, int, Lane]] = []
        self._serial = 0
        self._young: list[Lane] = []  # whose second token was not told
        self._joining: list[Lane] = []  # not in the step before this one
        self._others: list[Row] = []  # rows of this step that are no lanes
        self._batch = self._context = 0  # of a step of decode rows only

    # --- the batch --------------------------------------------------------------------------------

    def _add(self, row: Row) -> None:
        """A row that decodes until its end."""
        key = (row.request_id, row.attempt)
        lane = self._lanes.get(key)
        if lane is not None:  # named again, for its blocks
            self._starts += row.start - self._ticks - (lane.row.start - lane.tick)
            lane.row, lane.tick = row, self._ticks
            return
        left = max(1, min(self._outputs(row.request_id), row.end_at) - row.index)
        lane = self._lanes[key] = Lane(row, self._ticks, self._ticks + left)
        self._starts += row.start - self._ticks
        self._serial += 1
        heappush(self._ends, (lane.ends_at, self._serial, lane))
        self._young.append(lane)
        self._joining.append(lane)

    def _drop(self, key: Key) -> Lane | None:
        lane = self._lanes.pop(key, None)
        if lane is not None:
            self._starts -= lane.row.start - lane.tick
            lane.ends_at = -1
        return lane

    def _index(self, lane: Lane) -> int:
        """The output token that it draws next."""
        return lane.row.index + self._ticks - lane.tick

    def _untold(self, lane: Lane) -> tuple[Drawn, ...]:
        first, count = lane.told, self._index(lane) - lane.told
        lane.told += count
        row = lane.row
        return (Drawn(row.request_id, row.attempt, first, count),) if count > 0 else ()

    def release(self, key: Key) -> tuple[Drawn, ...]:
        """The attempt is forgotten; what it drew so far."""
        lane = self._drop(key)
        return self._untold(lane) if lane is not None else ()

    def drawn(self, key: Key) -> tuple[Drawn, ...]:
        """What a row drew that nobody was told yet."""
        lane = self._lanes.get(key)
        return self._untold(lane) if lane is not None else ()

    # --- steps ------------------------------------------------------------------------------------

    def begin(self, now: float, step: Step) -> tuple[Drawn, ...]:
        """Start; `ends_at` is when it will end, unless it is cut. What dropped rows drew."""
        assert self.step is None, "a step is running"
        told = [drawn for key in step.dropped for drawn in self.release(key)]
        self.step, self.started = step, now
        self.version += 1
        self._others = []
        for row in step.rows:
            if row.stays and row.count == 1:
                self._add(row)
            else:
                self._others.append(row)
        assert len(self._lanes) + len(self._others) == len(step.rows) + step.carried, step
        single = any(row.count > 1 or not row.sample for row in self._others)
        if self._others and any(row.draft for row in self._others):
            seconds = self._guess(1 if single else step.steps)
        elif single:
            self._steps, self._batch = 1, 0
            rows = [(row.count, row.start) for row in self._others]
            rows += [(1, position) for position in self._positions()]
            self.first_s = seconds = self._model.batch(rows)
        else:
            seconds = self._run(step)
        self.ends_at = now + seconds
        return tuple(told)

    def _positions(self) -> list[int]:
        """That each lane computes next."""
        ticks = self._ticks
        return [lane.row.start + ticks - lane.tick for lane in self._lanes.values()]

    def _guess(self, steps: int) -> float:
        """Seconds of a step in which rows guess."""
        if self._lanes:
            steps = min(steps, self._next_end() - self._ticks)
        run = GuessedRun(self._model, self._others, self._positions(), max(1, steps), self._luck)
        self._guessed, self._steps, self._batch = run, run.steps, 0
        self.first_s = run.ends[0]
        return run.ends[-1]

    def _next_end(self) -> int:
        """The tick at which the first lane ends."""
        ends = self._ends
        while ends[0][2].ends_at != ends[0][0]:
            heappop(ends)
        return ends[0][0]

    def _run(self, step: Step) -> float:
        """Seconds of a step in which every row decodes."""
        lanes, others = len(self._lanes), self._others
        self._batch = lanes + len(others)
        self._context = self._starts + lanes * (self._ticks + 1)
        self._context += sum(row.start + 1 for row in others)
        steps = step.steps
        if lanes:
            steps = min(steps, self._next_end() - self._ticks)
        if others:
            steps = min(steps, *(self._outputs(row.request_id) - row.index for row in others))
        self._steps = max(1, steps)
        self.first_s = self._model.iteration_seconds(self._batch, self._context, 0)
        return self._model.elapsed(self._batch, self._context, self._steps)

    def first_drawn(self) -> tuple[Drawn, ...]:
        """The first tokens of rows that join, when they are drawn: not at the end of a run."""
        found = []
        for lane in self._joining:
            if lane.told == lane.row.index and lane.tick == self._ticks and lane.ends_at >= 0:
                lane.told += 1
                row = lane.row
                found.append(Drawn(row.request_id, row.attempt, row.index, 1))
        if self._guessed is not None:
            for row in self._others:
                if row.draft and row.index == 0:
                    found += self._rounds_untold(row, self._guessed, 1)
        return tuple(found)

    def _rounds_untold(self, row: Row, run: GuessedRun, steps: int) -> list[Drawn]:
        """What a row that guesses drew in its first `steps` iterations, and nobody was told."""
        first = run.told.get(row.request_id, 0)
        count = sum(one.sampled for one in run.rounds(row.request_id, steps)) - first
        run.told[row.request_id] = first + count
        return [Drawn(row.request_id, row.attempt, row.index + first, count)] if count else []

    @property
    def joins(self) -> bool:
        if any(lane.told == lane.row.index for lane in self._joining):
            return True
        return self._guessed is not None and any(row.index == 0 for row in self._others)

    @property
    def requests(self) -> list[RequestId]:
        """Whose rows are in the batch."""
        return [request_id for request_id, _ in self._lanes]

    def cut(self, now: float, step_id: StepId) -> float | None:
        """Shorten to the end of the present iteration; the new end, or None if nothing changes."""
        step = self.step
        if step is None or step.id != step_id or self._steps == 1:
            return None
        done = self._done(now)
        if done + 1 >= self._steps:
            return None
        self._steps = done + 1
        self.version += 1
        run = self._guessed
        self.ends_at = self.started + (
            run.ends[done] if run is not None
            else self._model.elapsed(self._batch, self._context, self._steps)
        )  # fmt: skip
        return self.ends_at

    def _done(self, now: float) -> int:
        """Iterations of the running step that are over, when it has several."""
        seconds = now - self.started
        if self._guessed is not None:
            return self._guessed.within(seconds)
        return self._model.steps_within(self._batch, self._context, seconds)

    def finish(self) -> Outcome:
        """The running step is over as planned."""
        return self._close(self.ends_at, self._steps)

    def crash(self, now: float) -> Outcome | None:
        """The worker died: iterations done by now count, the running one is lost. All that was
        drawn is told."""
        step = self.step
        if step is None:
            return None
        done = min(self._done(now), self._steps) if self._steps > 1 else 0
        outcome = self._close(now, done)
        rest = [drawn for lane in self._lanes.values() for drawn in self._untold(lane)]
        return outcome._replace(drawn=outcome.drawn + tuple(rest))

    def _close(self, ended: float, steps: int) -> Outcome:
        step = self.step
        assert step is not None
        self.step = None
        self.version += 1
        first_s = last_s = ended - self.started
        run, self._guessed = self._guessed, None
        if steps > 1 and run is not None:  # a line with the right sum
            first_s, last_s = run.ends[0], max(0.0, 2 * run.ends[steps - 1] / steps - run.ends[0])
        elif steps > 1:
            first_s = self._model.iteration_seconds(self._batch, self._context, 0)
            last_s = self._model.iteration_seconds(self._batch, self._context, steps - 1)
        idle_s = self.started - self.ended
        new = [lane for lane in self._joining if lane.ends_at >= 0]
        together = len(self._lanes) - len(new)
        joined = [Joined(x.row.request_id, self._index(x), steps) for x in new if steps]
        everyone = self._everyone() if self._names else ()
        self._ticks += steps
        drawn: list[Drawn] = []
        if self._young:
            young = [lane for lane in self._young if lane.ends_at >= 0]
            drawn += [one for lane in young for one in self._untold(lane)]
            self._young = [lane for lane in young if lane.told < lane.second]
        # The second token of a text is told apart too.
        self._joining = [lane for lane in new if self._index(lane) == 1]
        rows = [
            self._guesses_done(row, run, steps, drawn) if row.draft and run is not None
            else self._row_done(row, steps, drawn, joined)
            for row in step.rows
        ]  # fmt: skip
        rows += self._ended_unnamed(steps, drawn)
        if self._answers is not None:
            rows = [replace(r, keys=self._answers(r.request_id)) if r.end else r for r in rows]
        self.ended = ended
        return Outcome(
            self.started, ended, steps, first_s, last_s, tuple(rows), tuple(drawn), tuple(joined),
            together if steps else 0, idle_s, everyone,
            _rounds_of(step, run, steps) if run is not None else (),
        )  # fmt: skip

    def _everyone(self) -> tuple[RequestId, ...]:
        new = set(map(id, self._joining))
        return tuple(x.row.request_id for x in self._lanes.values() if id(x) not in new)

    def _row_done(
        self, row: Row, steps: int, drawn: list[Drawn], joined: list[Joined]
    ) -> RowDone:
        """A row that the step named. One that stays is a lane from here on."""
        key = (row.request_id, row.attempt)
        sampled = steps if row.sample else 0
        end = self._end(row, row.index + sampled) if sampled else ""
        lane = self._lanes.get(key)
        if lane is not None:
            if end:
                self._drop(key)
                drawn += self._untold(lane)
        elif sampled:
            drawn.append(Drawn(*key, row.index, sampled))
            joined.append(Joined(row.request_id, row.index, sampled))
            if row.stays and not end:
                self._stay(row)
        return RowDone(*key, sampled, end)

    def _guesses_done(
        self, row: Row, run: GuessedRun, steps: int, drawn: list[Drawn]
    ) -> RowDone:
        rounds = run.rounds(row.request_id, steps)
        drawn += self._rounds_untold(row, run, steps)
        sampled = sum(one.sampled for one in rounds)
        end = self._end(row, row.index + sampled) if sampled else ""
        return RowDone(
            row.request_id, row.attempt, sampled, end,
            drafted=sum(one.drafted for one in rounds),
            accepted=sum(one.accepted for one in rounds),
        )  # fmt: skip

    def _stay(self, row: Row) -> None:
        """A row that ended its prefill here and decodes from now on."""
        joining = self._joining
        self._add(
            Row(row.request_id, row.attempt, row.start + row.count, 1, sample=True,
                index=row.index + 1, end_at=row.end_at, gateway=row.gateway, stays=True)
        )  # fmt: skip
        if row.index != 0:
            joining.pop()

    def _ended_unnamed(self, steps: int, drawn: list[Drawn]) -> list[RowDone]:
        done = []
        ends = self._ends
        while ends and ends[0][0] <= self._ticks:
            at, _, lane = heappop(ends)
            if lane.ends_at != at:
                continue
            key = (lane.row.request_id, lane.row.attempt)
            self._drop(key)
            drawn += self._untold(lane)
            done.append(RowDone(*key, steps, self._end(lane.row, self._index(lane))))
        return done

    def _end(self, row: Row, index: int) -> End:
        """Why a row is over when output `index` would be next."""
        if index >= row.end_at:
            return "length"
        return "stop" if index >= self._outputs(row.request_id) else ""


def _rounds_of(
    step: Step, run: GuessedRun, steps: int
) -> tuple[tuple[RequestId, list[Round]], ...]:
    return tuple((r.request_id, run.rounds(r.request_id, steps)) for r in step.rows if r.draft)
