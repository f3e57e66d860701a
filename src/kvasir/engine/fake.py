"""A runner without a model, for tests, demos and load tests. Knows hashing; must not know torch.

KV of position i is an 8-byte hash of tokens[0..i], continued from the KV of position i - 1 and
written into real memory: two layers of K and V, told apart by a constant. The next token is a hash
of *all* KV bytes before it and of its index. So a block that was not transferred, came damaged, or
stands in the wrong place of a table gives wrong tokens, as it would with a model.

    h(i)     = h(i-1) * M + (token(i) + 1) * C      mod 2^64, h(-1) = 0
    kv(p, i) = h(i) ^ salt(p)                       plane p = 2 * layer + (0 for K, 1 for V)
    next     = mix(sum over p, i of kv(p, i) * (2 i + 1)  +  index * G)

An adapter's h(-1) is the first half of its digest in place of 0: other KV, other tokens.

To load links as a model would, each hash may be kept several times over: `kv_token_bytes`. A copy
that differs gives wrong tokens too.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kvasir.core.errors import ModelError
from kvasir.core.ids import RequestId
from kvasir.core.request import Adapter
from kvasir.core.specs import LayerSpec
from kvasir.cost.acceptance import accepted_tokens
from kvasir.engine.adapters import Adapters
from kvasir.engine.base import RunnerSpec
from kvasir.engine.peft import read_peft
from kvasir.engine.steps import (
    Attempt,
    AttemptRunner,
    BlockTable,
    Choice,
    Guess,
    Wish,
    Work,
    verified,
)  # fmt: skip

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvasir.engine.base import Allocate, Plane

    Words = NDArray[np.uint64]

LAYERS: Final = 2
PLANES: Final = 2 * LAYERS
WORD_BYTES: Final = 8
KV_TOKEN_BYTES: Final = PLANES * WORD_BYTES
BITS: Final = (1 << 64) - 1
M: Final = 0x9E3779B97F4A7C15  # odd, hence with an inverse mod 2^64
C: Final = 0xC2B2AE3D27D4EB4F
G: Final = 0xD6E8FEB86659FD93
SALTS: Final = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89)

Seconds = Callable[[Sequence[tuple[int, int]]], float]


def no_time(rows: Sequence[tuple[int, int]]) -> float:
    """A cost model under which everything is free."""
    return 0.0


class FakeRunner(AttemptRunner):
    """A `Runner` (engine.base) whose tokens `fake_tokens` foretells.

    Tokens are drawn from [0, vocab) without `eos_token_ids`, unless `draw_eos`. `seconds`
    of rows (new tokens, context before) is how long an iteration takes; `sleep` waits that long,
    half of it before each layer. Sampling values other than stop ids are ignored. Adapters are
    checked against the model in `folder`.
    """

    def __init__(
        self,
        *,
        blocks_count: int,
        block_size: int = 16,
        vocab: int = 256,
        context_max: int = 131072,
        eos_token_ids: Sequence[int] = (),
        draw_eos: bool = False,
        seconds: Seconds = no_time,
        sleep: Callable[[float], None] = time.sleep,
        kv_token_bytes: int = KV_TOKEN_BYTES,
        folder: Path | None = None,
        adapters_max: int = 8,
        allocate: Allocate | None = None,
    ) -> None:
        copies = kv_token_bytes // KV_TOKEN_BYTES
        assert copies and kv_token_bytes % KV_TOKEN_BYTES == 0, kv_token_bytes
        layer = LayerSpec(kv_heads=copies, head_dim=WORD_BYTES, dtype="int8")
        name = f"fake:{vocab}:{sorted(eos_token_ids)}:{draw_eos}"
        super().__init__(
            RunnerSpec(
                layers=(layer,) * LAYERS,
                block_size=block_size,
                blocks_count=blocks_count,
                kv_token_bytes=kv_token_bytes,
                vocab=vocab,
                context_max=context_max,
                eos_token_ids=tuple(eos_token_ids),
                fingerprint=hashlib.blake2b(name.encode(), digest_size=16).hexdigest(),
            ),
            Adapters(partial(_adapter_seed, folder), adapters_max),
        )
        self._drawn = _drawn(vocab, eos_token_ids, draw_eos)
        self._seconds, self._sleep = seconds, sleep
        shape = (PLANES, blocks_count * block_size, copies)
        zeroed = partial(np.zeros, dtype=np.uint8) if allocate is None else allocate
        self._words: Words = zeroed(8 * math.prod(shape)).view(np.uint64).reshape(shape)

    def planes(self) -> list[list[Plane]]:
        """Per layer K and V, uint8 [blocks, kv_token_bytes / 4 * block_size]: views, not copies."""
        planes = self._words.view(np.uint8).reshape(PLANES, self.spec.blocks_count, -1)
        return [[planes[2 * layer], planes[2 * layer + 1]] for layer in range(LAYERS)]

    def _compute(
        self, works: Sequence[Work], iteration: int, layer_done: Callable[[int], None]
    ) -> list[Sequence[Choice]]:
        seconds = self._seconds([(work.count, work.start) for work in works]) / LAYERS
        for layer in range(LAYERS):
            if seconds > 0:
                self._sleep(seconds)
            for work in works:
                self._write(layer, work)
            layer_done(layer)
        return [
            verified(work.guess, partial(self._next, work)) for work in works if work.row.sample
        ]

    def _write(self, layer: int, work: Work) -> None:
        slots = self._slots(work.attempt.table, work.end)
        tokens = np.array(work.new_tokens, dtype=np.uint64)
        for plane in (2 * layer, 2 * layer + 1):
            salt = np.uint64(SALTS[plane])
            words = self._words[plane]
            first = np.uint64(work.attempt.adapter or 0)
            before = words[slots[work.start - 1], 0] ^ salt if work.start else first
            words[slots[work.start :]] = (running_hash(before, tokens) ^ salt)[:, None]

    def _next(self, work: Work, after: int) -> Choice:
        """The token after the first `after` guesses."""
        total = self._total(work.attempt.table, work.drawn_at + after + 1)
        return Choice(self._drawn[_mix(total, work.index + after) % len(self._drawn)])

    def _total(self, table: BlockTable, end: int) -> int:
        """Sum of the weighed KV words before position `end`, not reduced."""
        seen = self._words[:, self._slots(table, end)]
        weights = np.arange(1, 2 * end, 2, dtype=np.uint64)
        total = int((seen[..., 0] * weights).sum(dtype=np.uint64))
        if seen.shape[-1] > 1:  # copies are equal, and add nothing
            total += int((seen[..., 1:] ^ seen[..., :1]).sum(dtype=np.uint64))
        return total

    def foretell(self, attempt: Attempt, index: int, count: int) -> list[int]:
        """The next `count` tokens of an attempt whose KV stands but for its last token's."""
        end = len(attempt.tokens) - 1
        seen = _Hash(attempt.adapter or 0, self._total(attempt.table, end) if end else 0, end)
        if end:
            last = self._slots(attempt.table, end)[-1]
            seen.running = int(self._words[0, last, 0]) ^ SALTS[0]
        return seen.draw(attempt.tokens[-1:], index, count, self._drawn)

    def _slots(self, table: BlockTable, end: int) -> NDArray[np.intp]:
        """Cache slots of positions [0, end)."""
        size = self.spec.block_size
        first = np.array(table.blocks[: -(-end // size)], dtype=np.intp) * size
        return (first[:, None] + np.arange(size)).reshape(-1)[:end]


def running_hash(before: np.uint64, tokens: Words) -> Words:
    """h of each token, given h before the first one. The recurrence, solved for numpy:

    h(j) = M^j * (before + sum over i <= j of (token(i) + 1) * C * M^-i), all mod 2^64.
    """
    count = len(tokens)
    up = np.cumprod(np.full(count, M, dtype=np.uint64), dtype=np.uint64)
    inverse = pow(M, -1, BITS + 1)
    down = np.cumprod(np.full(count, inverse, dtype=np.uint64), dtype=np.uint64)
    terms: Words = (tokens + np.uint64(1)) * np.uint64(C) * down
    hashes: Words = np.cumsum(terms, dtype=np.uint64)
    hashes += before
    hashes *= up
    return hashes


def fake_tokens(
    prompt_tokens: Sequence[int],
    n: int,
    *,
    index: int = 0,
    vocab: int = 256,
    eos_token_ids: Sequence[int] = (),
    draw_eos: bool = False,
    adapter: str = "",
) -> list[int]:
    """The `n` tokens that a FakeRunner of the same values gives after `prompt_tokens`, under the
    adapter of that digest.

    `index` is the output index of the first of them: the number of output tokens that stand at the
    end of `prompt_tokens` already. EOS does not end it. Pure; written out without numpy, so that it
    does not share a mistake with the runner.
    """
    drawn = _drawn(vocab, eos_token_ids, draw_eos)
    return _Hash(seed_of(adapter), 0, 0).draw(prompt_tokens, index, n, drawn)


@dataclass(slots=True)
class _Hash:
    """All tokens before `position`: the last one's hash, and the sum over their KV."""

    running: int
    total: int
    position: int

    def draw(self, fresh: Sequence[int], index: int, n: int, drawn: Sequence[int]) -> list[int]:
        """The `n` tokens after `fresh` ones, the first of them at output `index`."""
        out: list[int] = []
        while len(out) < n:
            for token in fresh:
                self.running = (self.running * M + (token + 1) * C) & BITS
                weight = 2 * self.position + 1
                self.total += sum(self.running ^ salt for salt in SALTS) * weight
                self.position += 1
            out.append(drawn[_mix(self.total & BITS, index + len(out)) % len(drawn)])
            fresh = out[-1:]
        return out


class Oracle:
    """Satisfies `engine.steps.Guesser`: guesses right with probability `acceptance`, because it
    knows what its runner will draw. The simulator's requests have the same luck."""

    def __init__(self, runner: FakeRunner, acceptance: float) -> None:
        self._runner, self._acceptance = runner, acceptance

    def guess(self, wishes: Sequence[Wish]) -> list[Guess]:
        return [Guess(self._one(wish)) for wish in wishes]

    def forget(self, key: tuple[RequestId, int]) -> None:
        pass

    def _one(self, wish: Wish) -> list[int]:
        right = accepted_tokens(wish.key[0], wish.index, wish.count, self._acceptance)
        tokens = self._runner.foretell(wish.attempt, wish.index, wish.count)
        if right < wish.count:
            tokens[right] = (tokens[right] + 1) % self._runner.spec.vocab
        return tokens


def seed_of(digest: str) -> int:
    """h(-1) under the adapter of that digest; 0 without one."""
    return int(digest[:16], 16) if digest else 0


def _adapter_seed(folder: Path | None, adapter: Adapter) -> int:
    """Raises ModelError for an adapter that the model in `folder` could not run with."""
    if folder is None:
        raise ModelError("made-up tokens of no model have no adapters", where=adapter.path)
    return seed_of(read_peft(Path(adapter.path), folder, adapter.digest).digest)


def _drawn(vocab: int, eos_token_ids: Sequence[int], draw_eos: bool) -> tuple[int, ...]:
    return tuple(token for token in range(vocab) if draw_eos or token not in eos_token_ids)


def _mix(total: int, index: int) -> int:
    """The upper bits of a product, twice (after splitmix64); low bits of `total` are weak."""
    x = (total + index * G) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)
