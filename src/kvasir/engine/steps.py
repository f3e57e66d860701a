"""What all runners share: attempts (tokens, block tables, keys) and the loop of a step.

Knows when a row ends and which keys it filled; must not know how KV or tokens are computed: that is
the subclass's `_compute`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvasir.core.effects import Row, Step
from kvasir.core.ids import BlockId, BlockKey, RequestId
from kvasir.core.keys import extend_keys
from kvasir.core.messages import Logprobs, RowDone, TextEnd
from kvasir.core.request import Sampling, Steering
from kvasir.engine.base import RunnerSpec, Sampled, StepHooks, StepResult

if TYPE_CHECKING:
    from kvasir.engine.guide import Guide

DEFAULT_SAMPLING = Sampling()


@dataclass(slots=True)
class BlockTable:
    """Blocks in logical order. The first `run` of them follow one another in memory."""

    blocks: list[BlockId] = field(default_factory=list)
    run: int = 0

    def extend(self, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            if self.run == len(self.blocks) and (not self.run or block == self.blocks[-1] + 1):
                self.run += 1
            self.blocks.append(block)

    def replace(self, blocks: Sequence[BlockId]) -> None:
        self.blocks, self.run = [], 0
        self.extend(blocks)


@dataclass(slots=True)
class Attempt:
    """Tokens known so far, and where their KV stands. `keys` names the leading full blocks; the
    scheduler knows the first `keys_count` of them."""

    tokens: list[int] = field(default_factory=list)
    table: BlockTable = field(default_factory=BlockTable)
    opened: bool = False
    keys_count: int = 0
    salt: bytes = b""
    keys: list[BlockKey] = field(default_factory=list)
    steering: Steering | None = None
    guide: Guide | None = None  # a runner that draws keeps here what it knows of the output

    def keys_filled(self, end: int, block_size: int) -> tuple[BlockKey, ...]:
        """Keys of the blocks before position `end` that the scheduler does not know yet. Each is
        told once and in order, also when its block was filled elsewhere or is filled again."""
        first, last = self.keys_count, end // block_size
        if first >= last:
            return ()
        if len(self.keys) < last:
            extend_keys(self.keys, self.tokens[: last * block_size], block_size, self.salt)
        self.keys_count = last
        return tuple(self.keys[first:last])


@dataclass(slots=True)
class Lane:
    """One row of the batch: positions [start, start + count) and output token `index` come next."""

    row: Row
    attempt: Attempt
    start: int
    count: int
    index: int

    def move(self) -> None:
        """On to the token that was just drawn."""
        self.start, self.count, self.index = self.start + self.count, 1, self.index + 1


class Work(msgspec.Struct, frozen=True):
    """One row in one iteration: positions [start, start + count), output token `index` if any."""

    row: Row
    attempt: Attempt
    start: int
    count: int
    index: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def new_tokens(self) -> list[int]:
        return self.attempt.tokens[self.start : self.end]


class Choice(NamedTuple):
    """The token drawn for a row. `end`: the row's grammar ends it here."""

    token: int
    logprobs: Logprobs | None = None
    end: TextEnd = ""


class AttemptRunner(ABC):
    """Base of the runners here; with `planes` and `_compute` it is a `Runner` (see engine.base)."""

    def __init__(self, spec: RunnerSpec) -> None:
        self.spec = spec
        self._attempts: dict[tuple[RequestId, int], Attempt] = {}
        self._carried: dict[tuple[RequestId, int], Lane] = {}

    @abstractmethod
    def _compute(
        self, works: Sequence[Work], iteration: int, layer_done: Callable[[int], None]
    ) -> list[Choice]:
        """Write KV of all works, calling `layer_done` after each layer; draw for those that sample.

        Returns one choice for each work with `row.sample`, in order.
        """

    def open(
        self,
        request_id: RequestId,
        attempt: int,
        tokens: Sequence[int],
        keys_count: int,
        salt: bytes,
        steering: Steering | None = None,
    ) -> None:
        self._known_tokens(tokens)
        one = self._attempt(request_id, attempt)
        if one.opened:
            return
        one.tokens[:0] = tokens
        one.opened, one.keys_count, one.salt = True, keys_count, salt
        one.steering = steering

    def append(self, request_id: RequestId, attempt: int, token: int) -> None:
        self._known_tokens((token,))
        self._attempt(request_id, attempt).tokens.append(token)

    def adopt(self, request_id: RequestId, attempt: int, table: Sequence[BlockId]) -> None:
        self._known_blocks(table)
        self._attempt(request_id, attempt).table.replace(table)

    def close(self, request_id: RequestId, attempt: int) -> None:
        self._attempts.pop((request_id, attempt), None)
        self._carried.pop((request_id, attempt), None)

    def step(self, step: Step, hooks: StepHooks) -> StepResult:
        lanes = self._join(step)
        done = 0
        while True:
            works = [Work(x.row, x.attempt, x.start, x.count, x.index) for x in lanes]
            self._check(works)
            layer_done = hooks.layer_done if done == 0 else _ignore
            ends = self._record(works, self._compute(works, done, layer_done), hooks)
            done += 1
            for lane in lanes:
                lane.move()
            if done == step.steps or any(ends) or hooks.cut():
                break
        self._carry(lanes, ends)
        rows = [self._row_done(work, end, done) for work, end in zip(works, ends, strict=True)]
        named = len(step.rows)
        return StepResult(done, (*rows[:named], *(r for r in rows[named:] if r.end or r.keys)))

    def _join(self, step: Step) -> list[Lane]:
        """The step's rows, with their blocks in their tables, and those that go on unnamed."""
        rows = step.rows
        assert (rows or step.carried) and step.steps >= 1, f"step {step.id} asks for nothing"
        keys = [(row.request_id, row.attempt) for row in rows]
        assert len(set(keys)) == len(rows), "an attempt in two rows"
        for key in (*step.dropped, *keys):
            self._carried.pop(key, None)
        others = list(self._carried.values())
        assert len(others) == step.carried, f"step {step.id} carries {step.carried} rows"
        single = all(row.count == 1 and row.sample for row in rows)
        assert step.steps == 1 or single, f"step {step.id}: only decode rows may take several steps"
        lanes = []
        for row, key in zip(rows, keys, strict=True):
            attempt = self._attempts.get(key)
            assert attempt and attempt.opened, f"{row.request_id}/{row.attempt} is not open"
            self._known_blocks(row.blocks)
            if row.fresh:
                attempt.table.replace(row.blocks)
            else:
                attempt.table.extend(row.blocks)
            lanes.append(Lane(row, attempt, row.start, row.count, row.index))
        return lanes + others

    def _carry(self, lanes: Sequence[Lane], ends: Sequence[TextEnd]) -> None:
        for lane, end in zip(lanes, ends, strict=True):
            key = (lane.row.request_id, lane.row.attempt)
            if lane.row.stays and not end:
                self._carried[key] = lane
            else:
                self._carried.pop(key, None)

    def _check(self, works: Sequence[Work]) -> None:
        for work in works:
            row, attempt, end = work.row, work.attempt, work.end
            name = f"{row.request_id}/{row.attempt}"
            assert work.count > 0 and work.start >= 0, f"{name}: nothing to compute"
            known, room = len(attempt.tokens), len(attempt.table.blocks) * self.spec.block_size
            assert end <= known, f"{name}: computes to {end}, but only {known} tokens are known"
            assert end <= room, f"{name}: computes to {end}, but its blocks end at {room}"
            assert end == known or not row.sample, f"{name}: samples at {end} of {known} tokens"
            assert end <= self.spec.context_max, f"{name}: {end} is beyond the model's context"

    def _record(
        self, works: Sequence[Work], choices: list[Choice], hooks: StepHooks
    ) -> list[TextEnd]:
        """Append and announce this iteration's tokens. Returns each row's end."""
        drawn = iter(choices)
        ends: list[TextEnd] = []
        batch = []
        for work in works:
            row, index = work.row, work.index
            if not row.sample:
                ends.append("")
                continue
            token, logprobs, end = next(drawn)
            work.attempt.tokens.append(token)
            ends.append(end := end or end_of(row, index, token, self.spec.eos_token_ids))
            batch.append(
                Sampled(row.request_id, row.attempt, index, token, row.gateway, end, logprobs)
            )
        assert next(drawn, None) is None, "more tokens than rows that sample"
        hooks.sampled(batch)
        return ends

    def _row_done(self, last: Work, end: TextEnd, iterations: int) -> RowDone:
        row = last.row
        return RowDone(
            request_id=row.request_id,
            attempt=row.attempt,
            sampled=iterations if row.sample else 0,
            end=end,
            keys=last.attempt.keys_filled(last.end, self.spec.block_size),
        )

    def _attempt(self, request_id: RequestId, attempt: int) -> Attempt:
        return self._attempts.setdefault((request_id, attempt), Attempt())

    def _known_tokens(self, tokens: Sequence[int]) -> None:
        vocab = self.spec.vocab
        assert not tokens or 0 <= min(tokens) <= max(tokens) < vocab, f"a token not in [0, {vocab})"

    def _known_blocks(self, blocks: Sequence[BlockId]) -> None:
        count = self.spec.blocks_count
        assert not blocks or 0 <= min(blocks) <= max(blocks) < count, f"a block not in [0, {count})"


def end_of(row: Row, index: int, token: int, eos_token_ids: Sequence[int]) -> TextEnd:
    """Why a row is over after output token `index` was `token`; empty when it is not."""
    if token in stop_tokens(row.sampling or DEFAULT_SAMPLING, eos_token_ids):
        return "stop"
    return "length" if index + 1 >= row.end_at else ""


def stop_tokens(sampling: Sampling, eos_token_ids: Sequence[int]) -> Sequence[int]:
    """Tokens that end a text."""
    own = sampling.stop_token_ids
    return own if sampling.ignore_eos else (*own, *eos_token_ids)


def _ignore(layer: int) -> None:
    """`layer_done` of the iterations after a step's first."""
