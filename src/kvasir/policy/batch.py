"""What a worker runs next: one token budget, no phases (vLLM v1; Sarathi, arXiv 2403.02310).

Running sequences come first, oldest first, each with the tokens that it still has to compute; then
waiting ones enter with what is left of the budget. A decode therefore never waits for more than one
chunk. When blocks run out the youngest running sequence is preempted and recomputed later.
Knows counts of tokens and blocks; nothing of tensors, requests' content or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

LPM_WAITING_MAX: Final = 128  # beyond it SGLang no longer matches every waiting prompt


class WorkView(Protocol):
    """One sequence. `known` tokens exist (input and generated), KV of `computed` of them stands in
    `blocks_held` blocks. `output_left` tokens may still be drawn."""

    @property
    def computed(self) -> int: ...
    @property
    def known(self) -> int: ...
    @property
    def blocks_held(self) -> int: ...
    @property
    def output_left(self) -> int: ...


class BatchView(Protocol):
    """`running` hold blocks, oldest first. `waiting` hold none; `admission(i)` says how many cached
    tokens the i-th would start with and how many blocks must be available for all its tokens."""

    @property
    def running(self) -> Sequence[WorkView]: ...
    @property
    def waiting(self) -> Sequence[WorkView]: ...
    @property
    def blocks_available(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def batch_max(self) -> int: ...
    @property
    def batch_tokens_max(self) -> int: ...
    @property
    def chunk_tokens(self) -> int: ...
    @property
    def steps_max(self) -> int: ...

    def admission(self, index: int) -> Admission: ...


class Admission(NamedTuple):
    cached_tokens: int
    blocks_needed: int


class Batch(NamedTuple):
    """`counts[i]` new tokens for the i-th running sequence (0: it sits this step out);
    `admitted[j]` for the j-th waiting one, or for the one at index `order[j]` where an order is
    given. `preempted` are indices into running. An empty batch with nothing preempted means that
    nothing can run."""

    counts: tuple[int, ...]
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]
    steps: int
    order: tuple[int, ...] = ()


def token_budget(view: BatchView) -> Batch:
    """Fill the budget: running first, then waiting in order, first come first served."""
    return _fill(view, ())


def lpm(view: BatchView) -> Batch:
    """Running first, then waiting ones by longest cached prefix (SGLang's schedule policy `lpm`,
    arXiv 2312.07104); first come first served when over 128 wait, as there. Equal prefixes keep
    their order. Its deferral of prompts that share a prefix with another waiting one is left out:
    a view has no keys. A short prefix can starve under load: nobody ages."""
    count = len(view.waiting)
    if not 1 < count <= LPM_WAITING_MAX:
        return _fill(view, ())
    by_prefix = sorted(range(count), key=lambda i: -view.admission(i).cached_tokens)
    return _fill(view, tuple(by_prefix))


def _fill(view: BatchView, order: tuple[int, ...]) -> Batch:
    counts, preempted, blocks, budget = _run(view)
    decoding = [w for w, c in zip(view.running, counts, strict=True) if c]
    plain = all(w.known - w.computed == 1 and w.output_left > 0 for w in decoding)
    room = view.batch_max - len(decoding)
    admitted = () if preempted else _admit(view, budget, blocks, room, order)
    steps = 1
    if plain and decoding and not admitted:
        steps = _steps(view, decoding, blocks)
    return Batch(tuple(counts), admitted, tuple(preempted), steps, order[: len(admitted)])


def _run(view: BatchView) -> tuple[list[int], list[int], int, int]:
    """Counts for running sequences, at most `batch_max` of them; the youngest are preempted until
    the older ones fit."""
    running, size = view.running, view.block_size
    budget, blocks = view.batch_tokens_max, view.blocks_available
    counts = [0] * len(running)
    preempted: list[int] = []
    last = len(running)
    i = 0
    while i < min(last, view.batch_max) and budget > 0:
        work = running[i]
        count = min(work.known - work.computed, budget, view.chunk_tokens)
        need = -(-(work.computed + count) // size) - work.blocks_held
        while need > blocks and last > i + 1:
            last -= 1
            preempted.append(last)
            blocks += running[last].blocks_held
        if need > blocks:
            preempted.append(i)
            blocks += work.blocks_held
            last = i
            break
        counts[i] = count
        budget -= count
        blocks -= max(need, 0)
        i += 1
    return counts, preempted, blocks, budget


def _admit(
    view: BatchView, budget: int, blocks: int, room: int, order: tuple[int, ...]
) -> tuple[int, ...]:
    admitted: list[int] = []
    for index in order or range(len(view.waiting)):
        if budget <= 0 or room <= 0:
            break
        cached, needed = view.admission(index)
        if needed > blocks:
            break  # nobody overtakes the next in order
        count = min(view.waiting[index].known - cached, budget, view.chunk_tokens)
        admitted.append(count)
        budget -= count
        blocks -= needed
        room -= 1
    return tuple(admitted)


def _steps(view: BatchView, decoding: Sequence[WorkView], blocks: int) -> int:
    """Iterations that need nobody's attention, with every block they can need at hand.

    `blocks` is what is left after the first iteration.
    """
    steps = min(view.steps_max, *(w.output_left for w in decoding))
    size = view.block_size
    after = [max(w.blocks_held, -(-(w.computed + 1) // size)) for w in decoding]
    while steps > 1:
        more = sum(
            max(0, -(-(w.computed + steps) // size) - held) for w, held in zip(decoding, after,
        strict=True) )
        if more <= blocks:
            break
        steps //= 2
    return steps


BATCHES: Final[dict[str, Callable[[BatchView], Batch]]] = {
    "token_budget": token_budget,
    "lpm": lpm,
}
