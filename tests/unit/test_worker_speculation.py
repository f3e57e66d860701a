"""The worker node and guesses: who may make them, for how long, and what came of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvasir.core.effects import Cut, Step
from kvasir.core.events import Preempted, Speculated
from kvasir.core.messages import (
    Abort,
    Done,
    Prompt,
    Received,
    RowDone,
    StepDone,
)
from kvasir.node.config import WorkerConfig
from kvasir.node.worker import Worker
from kvasir.policy.speculate import ITERATIONS_MAX, PROBE_TOKENS, Drafting
from tests.nodes import BLOCK, CAPACITY, PREFILL_REPORT, Driven, Effects, dispatch, request

RULE = Drafting(tokens=6, rows_max=2)
CONFIG = WorkerConfig("w", 1, ("mixed",), "m", "m", CAPACITY, steps_max=256, speculate=RULE)
FIRST = 4  # guesses before anything is known of them
Rounds = Callable[[int], list[int]]  # of a draft: how many were right in each iteration


def worker(**config: Any) -> Driven[Worker]:
    capacity = {k: config.pop(k) for k in list(config) if hasattr(CAPACITY, k)}
    config["capacity"] = msgspec.structs.replace(CAPACITY, **({"kv_blocks": 400} | capacity))
    return Driven(Worker(msgspec.structs.replace(CONFIG, **config)))


def begin(w: Driven[Worker], request_id: str = "r", tokens: int = 10, output: int = 400) -> Step:
    w(dispatch(request(request_id, tokens, output)))
    return w(Prompt(request_id, 1, tokens)).one(Step)


def over(step: Step, right: float = 1.0, iterations: int | None = None, end: str = "") -> StepDone:
    """The step as a runner would end it, with that share of the guesses right in each iteration."""
    times = iterations or step.steps
    rows = []
    for r in step.rows:
        each = int(r.draft * right)
        sampled = (times * (1 + each)) if r.sample else 0
        rows.append(
            RowDone(r.request_id, r.attempt, sampled, "stop" if r.request_id == end else "", (),
                    times * r.draft, times * each)
        )  # fmt: skip
    return StepDone(step.id, times, tuple(rows), 0.01)


def run(w: Driven[Worker], step: Step, right: float = 1.0, end: str = "") -> Step:
    return w(over(step, right, end=end), after=0.1).one(Step)


# --- who guesses ----------------------------------------------------------------------------------


def test_a_row_that_guesses_is_named_and_does_not_stay() -> None:
    w = worker()
    first = begin(w)
    assert (first.rows[0].draft, first.rows[0].stays) == (0, True), "a prompt guesses nothing"
    step = run(w, first)
    row = step.rows[0]
    assert (row.draft, row.count, row.stays, row.sample, row.index) == (FIRST, 1, False, True, 1)
    assert (step.steps, step.carried, step.dropped) == (ITERATIONS_MAX, 0, (("r", 1),))
    assert len(w.node.works["r"].blocks) * BLOCK >= 10 + ITERATIONS_MAX * (1 + FIRST)

    again = run(w, step)
    assert again.rows[0].index == 1 + ITERATIONS_MAX * (1 + FIRST)
    assert again.rows[0].start == row.start + ITERATIONS_MAX * (1 + FIRST)
    assert again.rows[0].draft > FIRST, "they were all right"


def test_a_row_whose_guesses_are_wrong_stops_and_tries_again_later() -> None:
    w = worker()
    step = run(w, begin(w))
    while step.rows and step.rows[0].draft:
        step = run(w, step, right=0.0)
    assert step.rows[0].stays and step.steps == PROBE_TOKENS
    work = w.node.works["r"]
    wrong = work.drafted
    assert wrong > 0 and work.accepted == 0
    probe = run(w, step)
    assert 0 < probe.rows[0].draft < FIRST and probe.dropped == (("r", 1),)
    quiet = run(w, probe, right=0.0)
    assert quiet.rows[0].stays and quiet.steps == PROBE_TOKENS
    assert work.drafted == wrong + ITERATIONS_MAX * probe.rows[0].draft


def test_nobody_guesses_in_a_large_batch() -> None:
    w = worker()
    step = run(w, begin(w, "a"))
    for name in ("b", "c"):
        w(dispatch(request(name, 10, 400)))
        assert w(Prompt(name, 1, 10)).of(Cut) == ([Cut(step.id)] if name == "b" else [])
    both = run(w, step)
    assert {r.request_id: r.draft for r in both.rows}.keys() == {"a", "b", "c"}
    after = run(w, both)
    assert not any(r.draft for r in after.rows) and after.steps > ITERATIONS_MAX
    alone = w(over(after, end="c"), after=0.1).one(Step)
    assert {r.request_id: r.draft for r in alone.rows} == {"a": 6, "b": FIRST}


def test_a_decode_worker_guesses_from_its_first_token() -> None:
    w = worker()
    w(dispatch(request(output=50), "decode", first_token="decode"))
    w(Prompt("r", 1, 10))
    step = w(Received("r", 1, True, report=PREFILL_REPORT)).one(Step)
    assert (step.rows[0].draft, step.rows[0].index, step.rows[0].start) == (FIRST, 0, 9)


def test_without_a_rule_nobody_guesses() -> None:
    w = worker(speculate=None, kv_blocks=4000)
    step = run(w, begin(w))
    assert (step.rows[0].draft, step.rows[0].stays) == (0, True)
    assert step.steps > PROBE_TOKENS, "nothing has to be decided anew"


# --- blocks ---------------------------------------------------------------------------------------


def test_guesses_are_given_up_before_anybody_is_preempted() -> None:
    """Ten blocks: two sequences with 20 tokens each fill them."""
    w = worker(kv_blocks=10)
    step = begin(w, "a", 16)
    w(dispatch(request("b", 15, 40)))
    w(Prompt("b", 1, 15))
    step = w(over(step)).one(Step)
    drafts = []
    for _ in range(4):
        drafts.append([r.draft for r in step.rows])
        step = w(over(step, right=0.3), after=0.1).one(Step)
        if w.heard.noted(Preempted):
            break
    assert any(any(each) for each in drafts), drafts
    held = sum(len(work.blocks) for work in w.node.works.values())
    assert held <= 10


def test_few_iterations_where_blocks_for_more_are_missing() -> None:
    w = worker(kv_blocks=6)  # 24 tokens
    step = run(w, begin(w, output=14))
    row = step.rows[0]
    assert row.draft == FIRST
    assert 10 + min(14, step.steps * (1 + FIRST)) <= 24
    assert len(w.node.works["r"].blocks) <= 6


def test_a_preempted_row_guesses_again_after_it_was_recomputed() -> None:
    w = worker(kv_blocks=12)
    a = begin(w, "a", 20, 24)
    w(dispatch(request("b", 18, 26)))
    w(Prompt("b", 1, 18))
    step, seen = w(over(a)).one(Step), set()
    for _ in range(60):
        seen |= {(r.request_id, r.draft > 0, bool(w.heard.noted(Preempted))) for r in step.rows}
        rows = []
        for r in step.rows:
            sampled = min(step.steps, r.end_at - r.index) if r.sample else 0
            ends = r.sample and r.index + sampled >= r.end_at
            rows.append(RowDone(r.request_id, 1, sampled, "length" if ends else "", (), r.draft))
        named = {r.request_id for r in step.rows}
        for work in w.node.steps.cohort:
            w.node.steps.cohort.settle(work)
            if work.id not in named and work.output_left <= step.steps:
                rows.append(RowDone(work.id, 1, step.steps, "length"))
        effects = w(StepDone(step.id, step.steps, tuple(rows)), after=0.1)
        if not effects.of(Step):
            break
        step = effects.one(Step)
    assert w.heard.noted(Preempted), "there is no room for both"
    assert {d.output_tokens for d in w.heard.told(Done).messages} == {24, 26}
    assert w.node.pool.held == 0


# --- ends -----------------------------------------------------------------------------------------


def test_what_was_guessed_is_told_at_the_end() -> None:
    w = worker()
    step = run(w, begin(w))
    last = w(over(step, right=0.5, iterations=3, end="r"))
    assert last.noted(Speculated) == [Speculated("w", "r", 3 * FIRST, 3 * FIRST // 2)]
    assert last.told(Done).one().output_tokens == 1 + 3 * (1 + FIRST // 2)
    assert w.node.pool.held == 0


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_an_aborted_row_keeps_its_blocks_while_the_step_runs(right: float) -> None:
    w = worker()
    step = run(w, begin(w))
    effects: Effects = w(Abort(1, "r", 1, "cancelled"))
    assert effects.of(Cut) and w.node.pool.held > 0
    w(over(step, right))
    assert w.node.pool.held == 0 and not w.node.quarantine
