"""What all runners share: attempts (tokens, block tables, keys) and the loop of a step.

Knows when a row ends and which keys it filled; must not know how KV or tokens are computed: that is
the subclass's `_compute`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

from kvasir.core.effects import Row, Step
from kvasir.core.ids import BlockId, BlockKey, RequestId
from kvasir.core.keys import extend_keys
from kvasir.core.messages import Logprobs, RowDone, TextEnd
from kvasir.core.request import Sampling, Steering
from kvasir.engine.adapters import Adapters
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
    adapter: Any = None  # what the runner's `Adapters` read

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
    """One row of the batch: positions [start, start + count) and output token `index` come next.
    In the step that runs it drew `sampled` tokens and guessed `drafted`, `accepted` of them right.
    """

    row: Row
    attempt: Attempt
    start: int
    count: int
    index: int
    sampled: int = 0
    drafted: int = 0
    accepted: int = 0
    end: TextEnd = ""

    @property
    def draft_max(self) -> int:
        """Tokens that may be guessed now: none after the last one that it may draw."""
        return min(self.row.draft, self.row.end_at - self.index - 1)

    def begin(self) -> None:
        """A new step."""
        self.sampled = self.drafted = self.accepted = 0

    def move(self, kept: Sequence[int], guess: Sequence[int]) -> None:
        """On to the last one of the tokens that were just drawn; one that draws none is over."""
        self.start, self.count = self.start + self.count + max(len(kept), 1) - 1, 1
        self.index += len(kept)
        self.sampled += len(kept)
        self.drafted += len(guess)
        self.accepted += sum(a == b for a, b in zip(kept, guess, strict=False))


class Work(msgspec.Struct, frozen=True):
    """One row in one iteration: positions [start, start + count), output token `index` if any. The
    last `len(guess)` of the positions hold guessed tokens, drawn from `odds` (see `Guess`)."""

    row: Row
    attempt: Attempt
    start: int
    count: int
    index: int
    guess: Sequence[int] = ()
    odds: Any = None

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def drawn_at(self) -> int:
        """The position whose logits give output token `index`."""
        return self.end - len(self.guess) - 1

    @property
    def new_tokens(self) -> list[int]:
        return [*self.attempt.tokens[self.start : self.end], *self.guess]


@dataclass(frozen=True, slots=True)
class Wish:
    """Up to `count` guesses are wanted for what follows an attempt's tokens, the first of them at
    output `index`."""

    key: tuple[RequestId, int]
    attempt: Attempt
    index: int
    count: int
    sampling: Sampling


class Guess(NamedTuple):
    """Token ids that may follow. `odds`: what they were drawn from, float32 of shape [tokens,
    vocab], rows not normalised, if their draws were independent of the verifier's; None: they are
    compared with what the verifier draws."""

    tokens: Sequence[int]
    odds: Any = None


class Guesser(Protocol):
    """Guesses tokens that a model then verifies; owned by one runner."""

    def guess(self, wishes: Sequence[Wish]) -> list[Guess]:
        """For each wish 0 to `count` tokens."""

    def forget(self, key: tuple[RequestId, int]) -> None:
        """The attempt is over. Unknown ones are no error."""


NO_GUESS: Final = Guess(())


class Helpers(Protocol):
    """Processes that compute for a runner. `check` and `stop` as in engine.base.Runner."""

    def check(self) -> None: ...

    def stop(self) -> None: ...


class Choice(NamedTuple):
    """The token drawn for a row. `end`: the row's grammar ends it here."""

    token: int
    logprobs: Logprobs | None = None
    end: TextEnd = ""


class AttemptRunner(ABC):
    """Base of the runners here; with `planes` and `_compute` it is a `Runner` (see engine.base)."""

    def __init__(self, spec: RunnerSpec, adapters: Adapters[Any]) -> None:
        self.spec = spec
        self.adapters = adapters
        self.guesser: Guesser | None = None
        self.helpers: Helpers | None = None
        self._attempts: dict[tuple[RequestId, int], Attempt] = {}
        self._carried: dict[tuple[RequestId, int], Lane] = {}

    @abstractmethod
    def _compute(
        self, works: Sequence[Work], iteration: int, layer_done: Callable[[int], None]
    ) -> list[Sequence[Choice]]:
        """Write KV of all works, calling `layer_done` after each layer; draw for those that sample.

        Returns for each work with `row.sample`, in order, its token; and as long as that is what
        was guessed, the next one too (`verified`).
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
        one.adapter = self.adapters.of((request_id, attempt))

    def append(self, request_id: RequestId, attempt: int, token: int) -> None:
        self._known_tokens((token,))
        self._attempt(request_id, attempt).tokens.append(token)

    def adopt(self, request_id: RequestId, attempt: int, table: Sequence[BlockId]) -> None:
        self._known_blocks(table)
        self._attempt(request_id, attempt).table.replace(table)

    def close(self, request_id: RequestId, attempt: int) -> None:
        self._attempts.pop((request_id, attempt), None)
        self._carried.pop((request_id, attempt), None)
        if self.guesser is not None:
            self.guesser.forget((request_id, attempt))
        self.adapters.give_back((request_id, attempt))

    def check(self) -> None:
        if self.helpers is not None:
            self.helpers.check()

    def stop(self) -> None:
        if self.helpers is not None:
            self.helpers.stop()

    def step(self, step: Step, hooks: StepHooks) -> StepResult:
        lanes = self._join(step)
        done = 0
        while True:
            works = self._works(lanes)
            self._check(works)
            layer_done = hooks.layer_done if done == 0 else _ignore
            self._record(lanes, works, self._compute(works, done, layer_done), hooks)
            done += 1
            if done == step.steps or any(lane.end for lane in lanes) or hooks.cut():
                break
        self._carry(lanes)
        rows = [self._row_done(lane) for lane in lanes]
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
        for lane in others:
            lane.begin()
        return lanes + others

    def _works(self, lanes: Sequence[Lane]) -> list[Work]:
        """The next iteration, with guesses for the rows that may have some."""
        guessing = [x for x in lanes if x.draft_max > 0] if self.guesser is not None else []
        guesses: dict[int, Guess] = {}
        if guessing and self.guesser is not None:
            wishes = [
                Wish(
                    (x.row.request_id, x.row.attempt), x.attempt, x.index, x.draft_max,
                    x.row.sampling or DEFAULT_SAMPLING,
                )
                for x in guessing
            ]  # fmt: skip
            found = self.guesser.guess(wishes)
            guesses = {id(x): guess for x, guess in zip(guessing, found, strict=True)}
        works = []
        for x in lanes:
            one = guesses.get(id(x), NO_GUESS)
            count = x.count + len(one.tokens)
            works.append(Work(x.row, x.attempt, x.start, count, x.index, one.tokens, one.odds))
        return works

    def _carry(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            key = (lane.row.request_id, lane.row.attempt)
            if lane.row.stays and not lane.end:
                self._carried[key] = lane
            else:
                self._carried.pop(key, None)

    def _check(self, works: Sequence[Work]) -> None:
        for work in works:
            row, attempt, end = work.row, work.attempt, work.end
            last, name = end - len(work.guess), f"{row.request_id}/{row.attempt}"
            assert work.count > 0 and work.start >= 0, f"{name}: nothing to compute"
            known, room = len(attempt.tokens), len(attempt.table.blocks) * self.spec.block_size
            assert last <= known, f"{name}: computes to {last}, but only {known} tokens are known"
            assert end <= room, f"{name}: computes to {end}, but its blocks end at {room}"
            assert last == known or not row.sample, f"{name}: samples at {last} of {known} tokens"
            assert end <= self.spec.context_max, f"{name}: {end} is beyond the model's context"

    def _record(
        self, lanes: Sequence[Lane], works: Sequence[Work], choices: list[Sequence[Choice]],
        hooks: StepHooks,
    ) -> None:  # fmt: skip
        """Append and announce this iteration's tokens; tokens after a row's end are dropped."""
        drawn = iter(choices)
        batch: list[Sampled] = []
        for lane, work in zip(lanes, works, strict=True):
            row, kept, end = work.row, list[int](), lane.end
            for token, logprobs, ended in next(drawn) if row.sample else ():
                index = work.index + len(kept)
                end = ended or end_of(row, index, token, self.spec.eos_token_ids)
                kept.append(token)
                batch.append(
                    Sampled(row.request_id, row.attempt, index, token, row.gateway, end, logprobs)
                )
                if end:
                    break
            work.attempt.tokens += kept
            lane.end = end
            lane.move(kept, work.guess)
        assert next(drawn, None) is None, "more tokens than rows that sample"
        hooks.sampled(batch)

    def _row_done(self, lane: Lane) -> RowDone:
        row = lane.row
        return RowDone(
            request_id=row.request_id,
            attempt=row.attempt,
            sampled=lane.sampled,
            end=lane.end,
            keys=lane.attempt.keys_filled(lane.start, self.spec.block_size),
            drafted=lane.drafted,
            accepted=lane.accepted,
        )

    def _attempt(self, request_id: RequestId, attempt: int) -> Attempt:
        return self._attempts.setdefault((request_id, attempt), Attempt())

    def _known_tokens(self, tokens: Sequence[int]) -> None:
        vocab = self.spec.vocab
        assert not tokens or 0 <= min(tokens) <= max(tokens) < vocab, f"a token not in [0, {vocab})"

    def _known_blocks(self, blocks: Sequence[BlockId]) -> None:
        count = self.spec.blocks_count
        assert not blocks or 0 <= min(blocks) <= max(blocks) < count, f"a block not in [0, {count})"


def verified(guess: Sequence[int], draw: Callable[[int], Choice]) -> list[Choice]:
    """The tokens that a row keeps. `draw(i)` is the model's own choice after the first i guesses;
    it counts as long as all of them were its own choices too, and the text goes on.

    So each token is the one that is drawn without guesses, and the distribution is the model's own.
    For a guess that stands for itself (n-gram) no rule accepts more; a draft model's samples are
    weighed instead where no seed promises a text (engine.rejection).
    """
    choices = [draw(0)]
    while len(choices) <= len(guess):
        last = choices[-1]
        if last.end or last.token != guess[len(choices) - 1]:
            break
        choices.append(draw(len(choices)))
    return choices


def sampled_places(works: Sequence[Work]) -> list[int]:
    """Where in the packed batch something is drawn: after a row's last known token, and after each
    guess."""
    places: list[int] = []
    at = 0
    for work in works:
        at += work.count
        if work.row.sample:
            places += range(at - 1 - len(work.guess), at)
    return places


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
