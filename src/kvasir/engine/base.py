"""The seam between a worker and its compute. Knows steps, blocks and tokens; must not know who
scheduled them, what time it is, or where the bytes travel.

A runner holds no queue and decides nothing. One thread owns it: every method is called on that
thread, and `step` calls its hooks there. The cache is a fixed array of blocks; who holds which of
them is the caller's business, and a runner writes only into blocks that a row's table names.

    position   0 .. 15   16 .. 31   32 .. 47          block_size 16
    table     [   7    ,    8     ,    3    ]          the attempt's blocks, in logical order
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from kvasir.core.effects import Step
from kvasir.core.ids import BlockId, NodeId, RequestId
from kvasir.core.messages import Logprobs, RowDone, TextEnd
from kvasir.core.request import Steering
from kvasir.core.specs import LayerSpec
from kvasir.engine.adapters import Adapters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Plane = NDArray[np.uint8]
    Allocate = Callable[[int], NDArray[np.uint8]]  # so many zeroed bytes, for good


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """What a runner is, fixed at its start.

    `kv_token_bytes`: over all layers and planes. `vocab`: token ids are in [0, vocab).
    `context_max`: positions are in [0, context_max). `fingerprint`: names config, weights and
    dtype; equal in every process that loads the same, and different wherever KV would differ.
    """

    layers: tuple[LayerSpec, ...]
    block_size: int
    blocks_count: int
    kv_token_bytes: int
    vocab: int
    context_max: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """One drawn token: output token `index` of its request, due at `gateway`."""

    request_id: RequestId
    attempt: int
    index: int
    token: int
    gateway: NodeId
    end: TextEnd
    logprobs: Logprobs | None = None


class StepResult(NamedTuple):
    """`steps_done` iterations ran; `rows` as in `messages.StepDone`."""

    steps_done: int
    rows: tuple[RowDone, ...]


class StepHooks(Protocol):
    """What a step tells while it runs, on the step's own thread. Must return fast."""

    def layer_done(self, layer: int) -> None:
        """KV of every row's new positions stands in the cache for `layer` (0 first, all in order).

        Called in the first iteration of each step, the only one that can hold prefill rows, while
        later layers have yet to compute: what a sender needs to ship KV layer by layer.
        """

    def sampled(self, batch: Sequence[Sampled]) -> None:
        """Once after each iteration, with the tokens it drew (none when no row samples); those of
        one row stand together, in order."""

    def cut(self) -> bool:
        """Asked between two iterations: True ends the step here."""


class Runner(Protocol):
    """Computes steps over a paged cache.

    An *attempt* is (request_id, attempt). It has a token list (prompt, then output) and a block
    table. It comes into being with the first of `open`, `append`, `adopt` that names it, and must
    be open before a step names it. Breaking an order or a bound given here is an assertion.
    """

    @property
    def spec(self) -> RunnerSpec: ...

    @property
    def adapters(self) -> Adapters[Any]:
        """Has its own lock: any thread may load and take. What an attempt took before its `open`
        is used for all its tokens, and given back by `close`."""

    def open(
        self,
        request_id: RequestId,
        attempt: int,
        tokens: Sequence[int],
        keys_count: int,
        salt: bytes,
        steering: Steering | None = None,
    ) -> None:
        """Give prompt and already emitted tokens. They precede any token appended before.

        Only the first `open` of an attempt counts: a message that comes twice does no harm.

        The first `keys_count` blocks have keys that the scheduler knows (the prompt's full blocks);
        keys of later blocks are derived with `salt` (core.keys) and reported by `RowDone.keys`.
        """

    def append(self, request_id: RequestId, attempt: int, token: int) -> None:
        """Add an output token that was sampled elsewhere."""

    def adopt(self, request_id: RequestId, attempt: int, table: Sequence[BlockId]) -> None:
        """Replace the block table: blocks of an inbound transfer, or prefix hits."""

    def step(self, step: Step, hooks: StepHooks) -> StepResult:
        """Run one Step. Each row names a different, open attempt.

        First each row's `blocks` join its table (`fresh`: become its table). An iteration then
        computes KV of positions [start, start + count) from the attempt's tokens; whatever its
        blocks hold before `start` is taken as valid KV. A row with `sample` draws the token after
        its last position, which must be the last one known, and appends it.

        A row that `stays` is in every later step too, one token an iteration and without a name,
        until it ends, is closed, or a step names or drops it; `carried` is how many go on so.

        `steps` > 1 needs rows with count 1 and `sample`, with blocks for all iterations; each
        iteration then moves start and index on by one. The step ends after the first iteration in
        which a row ended, `steps` is reached, or `cut` said so. A row ends with "stop" when its
        token is in `stop_token_ids` or is EOS (unless `ignore_eos`), else with "length" when
        index + 1 >= end_at. Under a grammar it ends with "stop" also when nothing may follow, and
        with "failed" when nothing can.

        A row with `draft` (count 1, `sample`, not `stays`) draws in each iteration up to so many
        tokens more, those that were guessed right; it needs blocks for as many, or up to `end_at`.
        The tokens are those that it would draw one by one. A runner that cannot guess draws one.

        `RowDone.keys` names the full blocks that follow those named before: beyond `keys_count` at
        first, then each block once and in order, wherever its KV was made. Sampled text depends on
        (seed, index) and the tokens before, not on batch neighbours, chunks or resumption; without
        a seed, on the request id in its stead.
        """

    def close(self, request_id: RequestId, attempt: int) -> None:
        """Forget an attempt. Unknown ones are no error."""

    def check(self) -> None:
        """Raises Unavailable when a process that computes for it has ended. Any thread may ask."""

    def stop(self) -> None:
        """End the processes that it started; the last call. Any thread, also while a step waits
        for them: it fails then."""

    def planes(self) -> list[list[Plane]]:
        """The cache memory itself, per layer and plane (K, then V).

        Each is a writable uint8 view of shape [blocks_count, block_size * bytes per token of that
        plane], the same memory on every call. Not to be touched by another thread for blocks that
        a running step writes.
        """
