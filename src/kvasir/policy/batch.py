"""What a worker runs next: one token budget, no phases (vLLM v1; Sarathi, arXiv 2403.02310).

Running sequences come first, oldest first, each with the tokens that it still has to compute; then
waiting ones enter with what is left of the budget. A decode therefore never waits for more than one
chunk. When blocks run out the youngest running sequence is preempted and recomputed later.
Knows counts of tokens and blocks; nothing of tensors, requests' content or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from kvasir.core.ids import BlockKey
from kvasir.policy.order import depth_first, longest_prefix

LPM_WAITING_MAX: Final = 128  # beyond it SGLang no longer matches every waiting prompt
# Sequences with blocks for fewer than 1/8 of `steps_max` iterations (at least 16) are given blocks
# for twice as many: long runs of steps, few allocations, and little memory that waits for tokens.
# While others wait for blocks, nobody is given one before its first token is due.
LOW_SHARE: Final = 8
LOW_LEAST: Final = 16


class WorkView(Protocol):
    """One sequence. `known` tokens exist (input and generated), KV of `computed` of them stands in
    `blocks_held` blocks. `output_left` tokens may still be drawn. `keys` name its full blocks. One
    that decodes may guess `draft` tokens in each iteration."""

    @property
    def computed(self) -> int: ...
    @property
    def known(self) -> int: ...
    @property
    def blocks_held(self) -> int: ...
    @property
    def output_left(self) -> int: ...
    @property
    def keys(self) -> Sequence[BlockKey]: ...
    @property
    def draft(self) -> int: ...


class DecodingView(Protocol):
    """`count` sequences that have one known token to compute and more to draw, at a cost that does
    not grow with their number. `output_left` and `covered`: iterations until the first of them has
    drawn all, and for which all of them have blocks. `short(n)`: those that have blocks for fewer
    than n."""

    @property
    def count(self) -> int: ...
    @property
    def output_left(self) -> int: ...
    @property
    def covered(self) -> int: ...
    def short(self, iterations: int) -> Sequence[WorkView]: ...


class BatchView(Protocol):
    """`running` hold blocks, oldest first; `decoding` is there when all of them decode. `waiting`
    hold none; `admission(i)` says how many cached tokens the i-th would start with and how many
    blocks must be available for all its tokens."""

    @property
    def running(self) -> Sequence[WorkView]: ...
    @property
    def decoding(self) -> DecodingView | None: ...
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
    """`counts[i]` new tokens for the i-th running sequence (0: it sits this step out; None: one
    for each); `admitted[j]` for the j-th waiting one, or for the one at index `order[j]` where an
    order is given. `preempted` are indices into running. An empty batch with nothing preempted
    means that nothing can run. The i-th running sequence guesses `drafts[i]` tokens an iteration
    beyond its own one; no drafts: nobody does.

    At most `steps` iterations: as many as everyone has blocks for, once those that decode with
    blocks for fewer than `low` iterations were given blocks for `reserve`, or to their end.
    """

    counts: tuple[int, ...] | None
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]
    steps: int
    order: tuple[int, ...] = ()
    low: int = 0
    reserve: int = 0
    drafts: tuple[int, ...] = ()


class Share(NamedTuple):
    """What running sequences get, and what is left. `drafts` as in `Batch`."""

    counts: list[int]
    drafts: list[int]
    preempted: list[int]
    blocks: int
    budget: int


def reach(work: WorkView, count: int, draft: int, iterations: int) -> int:
    """Positions that a sequence can have computed after so many iterations, the first of `count`
    tokens and each with `draft` guesses: what it needs blocks for."""
    drawn = min(iterations * (1 + draft), max(1, work.output_left))
    return work.computed + count - 1 + drawn


def token_budget(view: BatchView) -> Batch:
    """Fill the budget: running first, then waiting in order, first come first served."""
    return _fill(view, ())


def lpm(view: BatchView) -> Batch:
    """Running first, then waiting ones by longest cached prefix (SGLang's schedule policy `lpm`,
    arXiv 2312.07104); first come first served when over 128 wait, as there. Equal prefixes keep
    their order. Its deferral of prompts that share a prefix with another waiting one is left out.
    A short prefix can starve under load: nobody ages."""
    count = len(view.waiting)
    if not 1 < count <= LPM_WAITING_MAX:
        return _fill(view, ())
    return _fill(view, longest_prefix([view.admission(i).cached_tokens for i in range(count)]))


def dfs(view: BatchView) -> Batch:
    """Running first, then waiting ones depth first through the tree of their prefixes (SGLang's
    `dfs-weight`). Bounded like `lpm`, though SGLang walks any number: the walk is made at each
    step. A branch can starve while prompts keep coming under a heavier one."""
    count = len(view.waiting)
    if not 1 < count <= LPM_WAITING_MAX:
        return _fill(view, ())
    cached = [view.admission(i).cached_tokens // view.block_size for i in range(count)]
    return _fill(view, depth_first([work.keys for work in view.waiting], cached))


def vllm_v1(view: BatchView) -> Batch:
    """vLLM's own scheduler, for engines that plan their batches themselves (vLLM 0.11 to 0.19,
    `vllm/v1/core/sched/scheduler.py`, `Scheduler.schedule`, first come first served).

    `batch_tokens_max` is its `max_num_batched_tokens`, `batch_max` its `max_num_seqs`, and
    `chunk_tokens` its `long_prefill_token_threshold`. As `token_budget`, but each running sequence
    holds a place, also one that computes nothing in this step. A prompt enters when all of it fits
    (`scheduler_reserve_full_isl`; before 0.18 its first chunk sufficed). Left out: that a request
    joins one step later under asynchronous scheduling, which plans a step ahead.
    """
    return _fill(view, (), places=len(view.running))


def _fill(view: BatchView, order: tuple[int, ...], places: int | None = None) -> Batch:
    """`places` that running sequences hold; None: as many as take part in the step."""
    everyone = view.decoding
    batch = _decode(view, everyone, order) if everyone is not None else None
    if batch is not None:
        return batch
    counts, drafts, preempted, blocks, budget = _run(view)
    rows = zip(view.running, counts, drafts, strict=True)
    decoding = [(work, draft) for work, count, draft in rows if count]
    plain = all(w.known - w.computed == 1 and w.output_left > 0 for w, _ in decoding)
    room = view.batch_max - (len(decoding) if places is None else places)
    admitted = () if preempted else _admit(view, budget, blocks, room, order)
    steps = 1
    if plain and decoding and not admitted:
        steps = _steps(view, decoding, blocks)
    return Batch(
        tuple(counts), admitted, tuple(preempted), steps, order[: len(admitted)],
        drafts=tuple(drafts) if any(drafts) else (),
    )  # fmt: skip


def _decode(view: BatchView, decoding: DecodingView, order: tuple[int, ...]) -> Batch | None:
    """Everyone decodes, and whoever fits joins. None when not everyone has room."""
    count = decoding.count
    room, budget = view.batch_max - count, view.batch_tokens_max - count
    blocks = view.blocks_available
    if decoding.covered < 1:
        blocks -= _missing(view, decoding.short(1), 1)
    if room < 0 or budget < 0 or blocks < 0:
        return None
    admitted = _admit(view, budget, blocks, room, order) if view.waiting else ()
    if admitted:
        return Batch(None, admitted, (), 1, order[: len(admitted)], 1, 1)
    steps = min(view.steps_max, decoding.output_left)
    horizon = max(LOW_LEAST, view.steps_max // LOW_SHARE)
    low, reserve = min(steps, horizon), 2 * horizon
    if view.waiting and room > 0:
        low = reserve = 1
    if decoding.covered >= low:
        return Batch(None, (), (), steps)
    short = decoding.short(low)
    while reserve > 1 and _missing(view, short, reserve) > view.blocks_available:
        reserve //= 2
    return Batch(None, (), (), steps, (), low, reserve)


def _missing(view: BatchView, works: Sequence[WorkView], iterations: int) -> int:
    """Blocks that decoding sequences lack for so many iterations, or to their end."""
    size, missing = view.block_size, 0
    for work in works:
        tokens = work.computed + min(iterations, work.output_left)
        missing += max(0, -(-tokens // size) - work.blocks_held)
    return missing


def _run(view: BatchView) -> Share:
    """Counts for running sequences, at most `batch_max` of them; the youngest are preempted until
    the older ones fit. Guesses take what is left, and preempt nobody."""
    running, size = view.running, view.block_size
    budget, blocks = view.batch_tokens_max, view.blocks_available
    counts, drafts = [0] * len(running), [0] * len(running)
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
    for i in range(last):
        work, draft = running[i], min(running[i].draft, budget)
        if counts[i] and draft:
            held = max(work.blocks_held, -(-reach(work, counts[i], 0, 1) // size))
            need = max(0, -(-reach(work, counts[i], draft, 1) // size) - held)
            if need <= blocks:
                drafts[i] = draft
                budget -= draft
                blocks -= need
    return Share(counts, drafts, preempted, blocks, budget)


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


def _steps(view: BatchView, decoding: Sequence[tuple[WorkView, int]], blocks: int) -> int:
    """Iterations that need nobody's attention, with every block they can need at hand.

    `decoding`: sequences and their guesses. `blocks` is what is left after the first iteration.
    """
    steps = min(view.steps_max, *(work.output_left for work, _ in decoding))
    size = view.block_size
    after = [max(w.blocks_held, -(-reach(w, 1, draft, 1) // size)) for w, draft in decoding]
    while steps > 1:
        more = sum(
            max(0, -(-reach(work, 1, draft, steps) // size) - held)
            for (work, draft), held in zip(decoding, after, strict=True)
        )
        if more <= blocks:
            break
        steps //= 2
    return steps


BATCHES: Final[dict[str, Callable[[BatchView], Batch]]] = {
    "token_budget": token_budget,
    "lpm": lpm,
    "dfs": dfs,
    "vllm_v1": vllm_v1,
}
