"""The token budget: who runs in the next step, with how many tokens, for how many iterations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvasir.policy.batch import Admission, Batch, token_budget, vllm_v1

BLOCK = 4


@dataclass(frozen=True)
class S:
    """A sequence. A decode row has one token that is known and not computed."""

    computed: int
    known: int
    blocks_held: int = 0
    output_left: int = 100
    cached: int = 0  # waiting: what it would start with
    draft: int = 0


def decoding(computed: int, left: int = 100) -> S:
    return S(computed, computed + 1, -(-computed // BLOCK), left)


def guessing(computed: int, draft: int, left: int = 100) -> S:
    return replace(decoding(computed, left), draft=draft)


def prefilling(computed: int, known: int) -> S:
    return S(computed, known, -(-known // BLOCK))


def waiting(known: int, cached: int = 0) -> S:
    return S(0, known, cached=cached)


@dataclass
class View:
    running: Sequence[S] = ()
    waiting: Sequence[S] = ()
    blocks_available: int = 1000
    block_size: int = BLOCK
    batch_max: int = 8
    batch_tokens_max: int = 32
    chunk_tokens: int = 16
    steps_max: int = 64
    decoding: None = None

    def admission(self, index: int) -> Admission:
        s = self.waiting[index]
        return Admission(s.cached, -(-s.known // BLOCK) - s.cached // BLOCK)


A, B = decoding(8), decoding(20)
BATCH: dict[str, tuple[dict[str, Any], Batch]] = {
    "nothing": ({}, Batch((), (), (), 1)),
    "decodes run for many steps": ({"running": [A, B]}, Batch((1, 1), (), (), 64)),
    "running first, then who waits": (
        {"running": [A, B], "waiting": [waiting(10)]}, Batch((1, 1), (10,), (), 1)),
    "a prompt takes a chunk": ({"waiting": [waiting(50)]}, Batch((), (16,), (), 1)),
    "its next chunk": ({"running": [prefilling(16, 50)]}, Batch((16,), (), (), 1)),
    "its last": ({"running": [prefilling(48, 50)]}, Batch((2,), (), (), 1)),
    "chunks beside decodes": (
        {"running": [A, prefilling(16, 50), B]}, Batch((1, 16, 1), (), (), 1)),
    "cached tokens are not computed": (
        {"waiting": [waiting(30, cached=24)]}, Batch((), (6,), (), 1)),
    "the budget is shared in order": (
        {"waiting": [waiting(15), waiting(15), waiting(15)]}, Batch((), (15, 15, 2), (), 1)),
    "running ones use it up": (
        {"running": [prefilling(0, 99), prefilling(0, 99), A], "waiting": [waiting(1)]},
        Batch((16, 16, 0), (), (), 1)),
    "the batch is full": (
        {"running": [A, B], "waiting": [waiting(1)], "batch_max": 2}, Batch((1, 1), (), (), 64)),
    "one place is left": (
        {"running": [A], "waiting": [waiting(1), waiting(1)], "batch_max": 2},
        Batch((1,), (1,), (), 1)),
    "guesses take what the budget leaves": (
        {"running": [guessing(8, 20), guessing(8, 20)], "batch_tokens_max": 24},
        Batch((1, 1), (), (), 64, drafts=(20, 2))),
    "a prompt's chunk goes before guesses": (
        {"running": [guessing(8, 20), prefilling(16, 50)], "batch_tokens_max": 20},
        Batch((1, 16), (), (), 1, drafts=(3, 0))),
    "no blocks for guesses": (
        {"running": [guessing(8, 4)], "blocks_available": 1}, Batch((1,), (), (), 4)),
    "guesses preempt nobody": (
        {"running": [guessing(8, 4), B], "blocks_available": 2}, Batch((1, 1), (), (), 4)),
    "blocks for all guesses of all iterations": (
        {"running": [guessing(8, 3)], "blocks_available": 9},
        Batch((1,), (), (), 8, drafts=(3,))),
    "blocks that it holds are not counted twice": (
        {"running": [S(8, 9, 9, draft=3), guessing(8, 3)], "blocks_available": 1},
        Batch((1, 1), (), (), 1, drafts=(3, 3))),
    "no blocks beyond the last token": (
        {"running": [guessing(8, 3, left=10)], "blocks_available": 3},
        Batch((1,), (), (), 10, drafts=(3,))),
    "more running than places: the oldest go until one ends": (
        {"running": [A, B, A], "batch_max": 2}, Batch((1, 1, 0), (), (), 64)),
    "no room: nobody overtakes": (
        {"waiting": [waiting(40), waiting(4)], "blocks_available": 9}, Batch((), (), (), 1)),
    "room for the first only": (
        {"waiting": [waiting(12), waiting(12)], "blocks_available": 5}, Batch((), (12,), (), 1)),
    "the youngest is preempted": (
        {"running": [A, A, A], "blocks_available": 1}, Batch((1, 1, 0), (), (2,), 4)),
    "two of them, youngest first": (
        {"running": [A, decoding(1), decoding(1)], "blocks_available": -1},
        Batch((1, 0, 0), (), (2, 1), 4)),
    "one whose block has space is not": (
        {"running": [A, decoding(9)], "blocks_available": 1}, Batch((1, 1), (), (), 2)),
    "who waits does not come in over the preempted": (
        {"running": [A, A], "waiting": [waiting(4)], "blocks_available": 0},
        Batch((1, 0), (), (1,), 8)),
    "alone and too large: it gives its own up": (
        {"running": [A], "blocks_available": 0}, Batch((0,), (), (0,), 1)),
}  # fmt: skip


@pytest.mark.parametrize(("view", "expected"), BATCH.values(), ids=BATCH)
def test_token_budget(view: dict[str, Any], expected: Batch) -> None:
    assert token_budget(View(**view)) == expected


IDLE = S(8, 8, 2)  # holds blocks, has nothing to compute
VLLM: dict[str, tuple[dict[str, Any], Batch]] = {
    "a sequence that computes nothing holds its place": (
        {"running": [IDLE, A], "waiting": [waiting(1)], "batch_max": 2},
        Batch((0, 1), (), (), 64)),
    "beside it there may be one": (
        {"running": [IDLE, A], "waiting": [waiting(1)], "batch_max": 3},
        Batch((0, 1), (1,), (), 1)),
    "long prompts are cut at the threshold, short ones fill up": (
        {"waiting": [waiting(50), waiting(9), waiting(9)]}, Batch((), (16, 9, 7), (), 1)),
    "a prompt of which only the first chunk would fit stays out": (
        {"waiting": [waiting(50)], "blocks_available": 12}, Batch((), (), (), 1)),
}  # fmt: skip


@pytest.mark.parametrize(("view", "expected"), (BATCH | VLLM).values(), ids=BATCH | VLLM)
def test_vllm_v1(view: dict[str, Any], expected: Batch) -> None:
    assert vllm_v1(View(**view)) == expected


STEPS: dict[str, tuple[dict[str, Any], int]] = {
    "free": ({}, 64),
    "steps_max": ({"steps_max": 10}, 10),
    "one at a time": ({"steps_max": 1}, 1),
    "the first to end": ({"running": [decoding(8, left=30), decoding(20, left=7)]}, 7),
    "the last token": ({"running": [decoding(8, left=1), B]}, 1),
    # A holds 2 full blocks and needs one for its next 4 tokens; 2 blocks are 8 steps.
    "two blocks": ({"running": [A], "blocks_available": 2}, 8),
    # 64 halved until the blocks suffice: 3 blocks would do for 12.
    "three blocks": ({"running": [A], "blocks_available": 3}, 8),
    "blocks for two": ({"running": [A, B], "blocks_available": 4}, 8),
    "no block to spare": ({"running": [decoding(9)], "blocks_available": 0}, 2),
    "beside a prompt": ({"running": [A, prefilling(0, 5)]}, 1),
    "beside a newcomer": ({"running": [A], "waiting": [waiting(1)]}, 1),
    "a newcomer without room": (
        {"running": [A], "waiting": [waiting(400)], "blocks_available": 99}, 64),
}  # fmt: skip


@pytest.mark.parametrize(("view", "steps"), STEPS.values(), ids=STEPS)
def test_steps(view: dict[str, Any], steps: int) -> None:
    assert token_budget(View(**({"running": [A, B]} | view))).steps == steps


def test_a_decode_never_waits_for_more_than_one_chunk() -> None:
    """However long the prompts before and after it: it is in every step."""
    view = View(running=[prefilling(0, 1000), decoding(8)], waiting=[waiting(1000)])
    for _ in range(20):
        plan = token_budget(view)
        assert plan.counts[1] == 1 and plan.steps == 1
        assert plan.counts[0] == 16 and sum(plan.admitted) == 15
        long, row = view.running
        view.running = [replace(long, computed=long.computed + plan.counts[0]),
                        replace(row, computed=row.computed + 1, known=row.known + 1)]  # fmt: skip


@st.composite
def views(draw: st.DrawFn) -> View:
    def running() -> S:
        computed = draw(st.integers(0, 60))
        known = computed + draw(st.sampled_from([1, 1, 1, 3, 40]))
        held = -(-computed // BLOCK) + draw(st.integers(0, 2))
        return S(computed, known, held, draw(st.integers(1, 80)))

    def waits() -> S:
        known = draw(st.integers(1, 80))
        return waiting(known, draw(st.integers(0, (known - 1) // BLOCK)) * BLOCK)

    return View(
        running=[running() for _ in range(draw(st.integers(0, 7)))],
        waiting=[waits() for _ in range(draw(st.integers(0, 4)))],
        blocks_available=draw(st.integers(0, 60)),
        batch_max=draw(st.integers(1, 8)),
        batch_tokens_max=draw(st.integers(1, 64)),
        chunk_tokens=draw(st.integers(1, 32)),
        steps_max=draw(st.integers(1, 64)),
    )


@given(views())
def test_a_batch_keeps_every_bound(view: View) -> None:
    plan = token_budget(view)
    counts = [c for c in (*plan.counts, *plan.admitted) if c]
    assert sum(counts) <= view.batch_tokens_max
    assert len(counts) <= view.batch_max
    assert all(c <= view.chunk_tokens for c in counts)
    assert all(c > 0 for c in plan.admitted)
    for s, count in zip(view.running, plan.counts, strict=True):
        assert 0 <= count <= s.known - s.computed
    for s, count in zip(view.waiting, plan.admitted, strict=False):
        assert count <= s.known - s.cached
    assert all(plan.counts[i] == 0 for i in plan.preempted)
    assert 1 <= plan.steps <= view.steps_max


@given(views())
def test_a_batch_has_the_blocks_that_it_needs(view: View) -> None:
    """Give the blocks out as a worker does: preempt, grow for all steps, let in."""
    plan = token_budget(view)
    blocks = view.blocks_available + sum(view.running[i].blocks_held for i in plan.preempted)
    for s, count in zip(view.running, plan.counts, strict=True):
        if count:
            last = s.computed + count + plan.steps - 1
            blocks -= max(0, -(-last // BLOCK) - s.blocks_held)
    for index in range(len(plan.admitted)):
        blocks -= view.admission(index).blocks_needed
    assert blocks >= 0


@given(views())
def test_the_oldest_goes_on_or_is_the_one_preempted(view: View) -> None:
    assume(view.running)
    plan = token_budget(view)
    assert plan.counts[0] > 0 or plan.preempted[-1] == 0
    youngest_first = list(range(len(view.running) - 1, -1, -1))
    assert list(plan.preempted) == youngest_first[: len(plan.preempted)]
    assert not (plan.preempted and plan.admitted)


@given(views())
def test_without_a_cap_on_chunks_a_step_is_filled_exactly(view: View) -> None:
    """DeepSpeed-FastGen's SplitFuse: long prompts are cut, short ones composed, until the budget is
    met or nobody is left who could use it."""
    view.chunk_tokens = view.batch_tokens_max
    plan = token_budget(view)
    given_out = sum(plan.counts) + sum(plan.admitted)
    if given_out == view.batch_tokens_max or plan.preempted:
        return
    placed = sum(c > 0 for c in plan.counts) + len(plan.admitted)
    blocks = view.blocks_available
    for s, count in zip(view.running, plan.counts, strict=True):
        assert count == s.known - s.computed or placed == view.batch_max
        blocks -= max(0, -(-(s.computed + count) // BLOCK) - s.blocks_held)
    for i, (s, count) in enumerate(zip(view.waiting, plan.admitted, strict=False)):
        assert count == s.known - s.cached
        blocks -= view.admission(i).blocks_needed
    if len(plan.admitted) < len(view.waiting) and placed < view.batch_max:
        assert view.admission(len(plan.admitted)).blocks_needed > blocks


@given(views())
def test_many_steps_are_for_decodes_alone(view: View) -> None:
    plan = token_budget(view)
    rows = [s for s, c in zip(view.running, plan.counts, strict=True) if c]
    if plan.steps > 1:
        assert not plan.admitted
        assert all(s.known - s.computed == 1 for s in rows)
        assert plan.steps <= min(s.output_left for s in rows)


@given(views())
def test_a_row_sits_out_only_for_lack_of_budget_or_places(view: View) -> None:
    plan = token_budget(view)
    out = [c == 0 for i, c in enumerate(plan.counts) if i not in plan.preempted]
    if any(out):
        used = [c for c in plan.counts if c]
        assert sum(used) == view.batch_tokens_max or len(used) == view.batch_max
        assert out == sorted(out), "an older one sits out while a younger one runs"
