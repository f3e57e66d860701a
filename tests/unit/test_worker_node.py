"""The worker node by hand: each stage of an attempt, and what its end frees when."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import pytest

from kvasir.core.effects import Cut, Fetch, Release, Send, Step, Timer
from kvasir.core.events import Preempted, Prefilled, Recomputed, Shipped
from kvasir.core.messages import (
    Abort,
    Accepted,
    Alarm,
    AnyMessage,
    Done,
    Drain,
    Finished,
    Hello,
    KvEvents,
    KvGone,
    KvResync,
    KvWant,
    Load,
    PrefillDone,
    Prompt,
    Received,
    Refused,
    RowDone,
    SendOver,
    Start,
    StepDone,
    TransferReport,
    Welcome,
)
from kvasir.core.request import Sampling
from kvasir.node.config import WorkerConfig
from kvasir.node.work import Stage
from kvasir.node.worker import Worker
from tests.nodes import (
    BLOCK,
    CAPACITY,
    GATEWAY,
    PREFILL_REPORT,
    TOKEN_BYTES,
    Driven,
    Effects,
    dispatch,
    keys,
    request,
)

BLOCK_BYTES = BLOCK * TOKEN_BYTES
CONFIG = WorkerConfig("w", 1, ("mixed",), "m", "m", CAPACITY, pool="both", steps_max=8,
                      prompt_wait_s=10, kv_wait_s=30, lease_s=60)  # fmt: skip


def worker(**config: Any) -> Driven[Worker]:
    capacity = {k: config.pop(k) for k in list(config) if hasattr(CAPACITY, k)}
    config["capacity"] = msgspec.structs.replace(CAPACITY, **capacity)
    return Driven(Worker(msgspec.structs.replace(CONFIG, **config)))


def prompt(tokens: int, request_id: str = "r", attempt: int = 1) -> Prompt:
    return Prompt(request_id, attempt, tokens)


def over(
    step: Step, iterations: int = 1, ends: Sequence[str] = (), attempt: int = 1
) -> StepDone:
    """The step as a runner would end it; rows named in `ends` are over, carried ones too."""
    rows = [
        RowDone(r.request_id, r.attempt, iterations if r.sample else 0,
                "stop" if r.request_id in ends else "")
        for r in step.rows
    ]  # fmt: skip
    unnamed = [name for name in ends if name not in {r.request_id for r in step.rows}]
    rows += [RowDone(name, attempt, iterations, "stop") for name in unnamed]
    return StepDone(step.id, iterations, tuple(rows), 0.01)


def begin(w: Driven[Worker], request_id: str = "r", tokens: int = 10, **more: Any) -> Effects:
    """Dispatch both phases and give the prompt; what that led to."""
    output = more.pop("output", 50)
    of = request(request_id, tokens, output, **more)
    w(dispatch(of))
    return w(prompt(tokens, request_id))


def beat(w: Driven[Worker], after: float = 1.0) -> Effects:
    return w(Alarm("beat"), after=after)


# --- the usual way --------------------------------------------------------------------------------


def test_start_says_hello_and_beats() -> None:
    w = worker()
    effects = w(Start())
    assert effects.told(Hello).to == ["conductor"]
    assert effects.one(Timer) == Timer("beat", 1.0)
    load = beat(w).told(Load).one()
    assert (load.running, load.waiting, load.kv_blocks_free) == (0, 0, 32)
    assert load.iteration_s is None, "unknown, not idle"


def test_prefill_holds_its_kv_until_it_is_shipped() -> None:
    w = worker()
    assert w(dispatch(request(), "prefill")).told(Accepted).to == ["conductor"]
    assert not w.heard.of(Step), "there is no prompt yet"
    row = w(prompt(10)).one(Step).rows[0]
    assert (row.start, row.count, row.sample, row.index) == (0, 10, True, 0)
    assert len(row.blocks) == 3 and row.fresh

    done = w(over(w.heard.one(Step)), after=0.2)
    report = done.told(PrefillDone).one().report
    assert (report.prefill_s, report.cached_tokens, report.computed_tokens) == (0.2, 0, 10)
    assert done.told(KvEvents).one().added == keys(2, ord("r"))
    assert not done.of(Release) and w.node.pool.held == 3

    sent = w(KvWant("r", 1, "d", first_block=0)).one(Send)
    assert (sent.to, sent.first_block, sent.blocks) == ("d", 0, row.blocks)
    assert sent.bytes == 3 * BLOCK_BYTES
    assert sent.last and sent.step is None and sent.report == report

    end = w(SendOver("r", 1, True))
    assert end.one(Release) == Release("r", 1)
    assert w.node.pool.held == 0 and not w.node.works
    assert len(w.node.pool.match(keys(2, ord("r")))) == 2, "what was computed stays cached"


def test_without_the_first_token_prefill_samples_nothing() -> None:
    w = worker()
    w(dispatch(request(), "prefill", first_token="decode"))
    row = w(prompt(10)).one(Step).rows[0]
    assert not row.sample and row.sampling is None


def test_blocks_leave_layer_by_layer_with_the_step_that_completes_them() -> None:
    """Two chunks of 8: blocks 0 and 1, then 2 and 3; the closing part carries the report."""
    w = worker(chunk_tokens=8)
    w(dispatch(request(tokens=15), "prefill"))
    w(KvWant("r", 1, "d", first_block=1))
    first = w(prompt(15))
    step = first.one(Step)
    part = first.one(Send)
    assert (part.first_block, len(part.blocks), part.step, part.last) == (1, 1, step.id, False)
    assert first.index(part) < first.index(step), "it waits for the step when that begins"
    second = w(over(step))
    part = second.one(Send)
    assert (part.first_block, len(part.blocks)) == (2, 2) and part.step == second.one(Step).id
    rest = w(over(second.one(Step))).one(Send)
    assert (rest.blocks, rest.bytes, rest.last) == ((), 0, True)
    assert rest.report is not None and rest.report.computed_tokens == 15


def test_a_want_that_comes_during_a_step_takes_what_it_completes() -> None:
    """15 tokens in chunks of 6: after the second one 12 are there, three whole blocks."""
    w = worker(chunk_tokens=6)
    w(dispatch(request(tokens=15), "prefill"))
    second = w(over(w(prompt(15)).one(Step))).one(Step)
    part = w(KvWant("r", 1, "d", first_block=1)).one(Send)
    assert (part.first_block, len(part.blocks), part.step, part.last) == (1, 2, second.id, False)
    third = w(over(second)).one(Step)
    part = w.heard.of(Send)[-1]
    assert (part.first_block, len(part.blocks), part.step) == (3, 1, third.id)
    assert w(over(third)).one(Send).last
    assert [s.first_block for s in w.heard.of(Send)] == [1, 3, 4], "each block once"


@pytest.mark.parametrize(
    ("first_token", "start", "index", "left"), [("prefill", 10, 1, 4), ("decode", 9, 0, 5)]
)
def test_decode_fetches_then_runs(first_token: Any, start: int, index: int, left: int) -> None:
    w = worker()
    effects = w(dispatch(request(), "decode", first_token=first_token))
    fetch = effects.one(Fetch)
    assert (fetch.source, fetch.first_block, len(fetch.blocks)) == ("p", 0, 3)
    assert fetch.bytes == 3 * BLOCK_BYTES and fetch.table == fetch.blocks
    assert effects.told(KvWant).to == ["p"]
    w(prompt(10))

    received = w(Received("r", 1, True, 120, 0.05, "shm", report=PREFILL_REPORT), after=0.3)
    told = received.told(TransferReport).one()
    assert (told.source, told.target, told.bytes, told.seconds) == ("p", "w", 120, 0.05)
    assert received.noted(Shipped) == [Shipped("r", "p", "w", 120, 0.05, "shm")]
    step = received.one(Step)
    assert (step.rows[0].start, step.rows[0].index) == (start, index)
    assert step.steps == left, "as many as there are to draw"

    end = w(over(step, 3, ends=["r"]))
    done = end.told(Done)
    assert done.to == [GATEWAY] and done.one().output_tokens == index + 3
    assert end.told(Finished).to == ["conductor"]
    report = done.one().report
    assert report.prefill == PREFILL_REPORT and report.decode_worker == "w"
    assert (report.transfer_s, report.transfer_bytes, report.transport) == (0.05, 120, "shm")
    assert end.one(Release) and w.node.pool.held == 0


def test_both_phases_on_one_worker() -> None:
    w = worker()
    step = begin(w, output=5).one(Step)
    prefilled = w(over(step))
    assert prefilled.told(PrefillDone).one().report.computed_tokens == 10
    assert prefilled.noted(Prefilled)
    decode = prefilled.one(Step)
    assert decode.steps == 4 and decode.rows[0].index == 1
    end = w(over(decode, 4, ends=["r"]))
    assert end.told(Done).one().output_tokens == 5
    assert w.node.pool.held == 0


def test_a_request_that_ends_with_its_first_token_is_not_handed_over() -> None:
    w = worker()
    w(dispatch(request(), "prefill"))
    end = w(over(w(prompt(10)).one(Step), ends=["r"]))
    assert end.told(Done).one().output_tokens == 1
    assert not end.told(PrefillDone) and w.node.pool.held == 0


def test_a_prefix_hit_is_neither_computed_nor_fetched_again() -> None:
    w = worker()
    w(over(begin(w, "a", 10, group=7).one(Step), ends=["a"]))
    again = begin(w, "b", 11, group=7).one(Step)
    assert (again.rows[0].start, again.rows[0].count) == (8, 3)
    told = w(over(again, ends=["b"])).told(Done).one()
    assert told.report.prefill.cached_tokens == 8 and told.report.prefill.computed_tokens == 3
    fetch = w(dispatch(request("c", 12, group=7), "decode")).one(Fetch)
    assert (fetch.first_block, len(fetch.blocks), len(fetch.table)) == (2, 1, 3)
    assert w.heard.told(KvWant).one().first_block == 2


@pytest.mark.parametrize(("first_token", "hit"), [("prefill", 3), ("decode", 2)])
def test_a_position_that_has_to_be_run_is_never_a_hit(first_token: Any, hit: int) -> None:
    """12 tokens, all 3 blocks cached: who draws the first token here runs the last position."""
    w = worker()
    w(over(begin(w, "a", 12, group=7).one(Step), ends=["a"]))
    w(dispatch(request("b", 12, group=7), "decode", first_token=first_token))
    assert w.heard.told(KvWant).one().first_block == hit
    assert begin(w, "c", 12, group=7).one(Step).rows[0].start == 8


# --- out of order ---------------------------------------------------------------------------------


def test_a_prompt_may_come_before_its_dispatch() -> None:
    w = worker()
    assert w(prompt(10)) == []
    assert w(dispatch(request())).one(Step)


def test_a_want_may_come_before_its_dispatch() -> None:
    w = worker()
    assert w(KvWant("r", 1, "d", 0)) == []
    w(dispatch(request(), "prefill"))
    assert [s.last for s in w(prompt(10)).of(Send)] == [False]
    assert not beat(w).told(KvGone), "it was kept"


def test_kv_may_come_before_the_prompt() -> None:
    w = worker()
    w(dispatch(request(), "decode"))
    assert not w(Received("r", 1, True)).of(Step)
    assert w(prompt(10)).one(Step)


def test_a_want_for_what_never_comes_is_answered_after_a_beat() -> None:
    w = worker()
    w(KvWant("r", 1, "d", 0))
    assert not beat(w).told(KvGone)
    assert beat(w).told(KvGone).to == ["d"]
    assert not beat(w).told(KvGone), "once"


def test_a_want_for_what_is_no_longer_here_is_answered_at_once() -> None:
    w = worker()
    w(dispatch(request(), "prefill", attempt=2))
    assert w(KvWant("r", 1, "d", 0)).told(KvGone).to == ["d"]
    begin(w, "whole")
    assert w(KvWant("whole", 1, "d", 0)).told(KvGone).one().reason == "kv gone"


def test_the_same_dispatch_again_changes_nothing() -> None:
    w = worker()
    begin(w)
    assert w(dispatch(request())) == []
    assert w(dispatch(request(), attempt=0)) == []


def test_a_newer_attempt_takes_the_place_of_the_older() -> None:
    w = worker()
    w(dispatch(request()))
    effects = w(dispatch(request(), attempt=2))
    assert effects.one(Release) == Release("r", 1)
    assert effects.told(Accepted).one().attempt == 2
    assert w(prompt(10)).one(Release) == Release("r", 1), "the prompt of the older one"
    assert w(prompt(10, attempt=2)).one(Step).rows[0].attempt == 2


def test_a_later_attempt_continues_the_output() -> None:
    """Of 5 tokens 3 were emitted: they are input now, and output goes on at index 3."""
    w = worker()
    w(dispatch(request(tokens=10, output=5), attempt=2, emitted=3))
    row = w(prompt(13, attempt=2)).one(Step).rows[0]
    assert (row.count, row.index, row.end_at) == (13, 3, 5)
    decode = w(over(w.heard.one(Step))).one(Step)
    assert (decode.steps, decode.rows, decode.carried) == (1, (), 1)
    assert w(over(decode, ends=["r"], attempt=2)).told(Done).one().output_tokens == 5


@pytest.mark.parametrize(
    "message",
    [
        dispatch(request("new")),
        Abort(1, "r", 1, "x"),
        Drain(1),
        KvResync(1),
        Welcome(1, again=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_an_older_conductor_is_not_obeyed(message: AnyMessage) -> None:
    w = worker()
    begin(w)
    w(Welcome(epoch=2))
    assert w(message) == []
    assert list(w.node.works) == ["r"] and not w.node.draining
    newer = msgspec.structs.replace(message, epoch=2)
    assert w(newer) or w.node.draining or not w.node.works


# --- refusing -------------------------------------------------------------------------------------


def refusal(effects: Effects) -> str:
    """One `Refused`; the world forgets the attempt too."""
    refused = effects.told(Refused)
    assert refused.to == ["conductor"]
    assert effects.one(Release).request_id == refused.one().request_id
    return refused.one().reason


def test_a_draining_worker_takes_nothing_new_and_ends_what_it_has() -> None:
    w = worker()
    step = begin(w, "old").one(Step)
    w(Drain(1))
    w(prompt(10, "new"))
    assert refusal(w(dispatch(request("new")))) == "draining"
    assert w(over(step, ends=["old"])).told(Done)


def test_what_can_never_fit_is_refused() -> None:
    w = worker(kv_blocks=3)
    assert "larger" in refusal(w(dispatch(request(tokens=12))))
    assert w(dispatch(request("r2", tokens=11))).told(Accepted)


def test_a_full_queue_refuses() -> None:
    w = worker(batch_max=1, waiting_max=2)
    for name in ("a", "b", "c"):
        assert begin(w, name).told(Refused).to == []
    assert refusal(w(dispatch(request("d")))) == "queue full"


@pytest.mark.parametrize("phase", ["both", "prefill", "decode"])
@pytest.mark.parametrize("early", [False, True])
def test_what_cannot_be_loaded_is_refused_for_good(phase: Any, early: bool) -> None:
    w = worker()
    events: list[AnyMessage] = [dispatch(request(), phase), Prompt("r", 1, 10, fault="no folder")]
    for event in reversed(events) if early else events:
        w(event)
    refused = w.heard.told(Refused).one()
    assert (refused.status, refused.reason) == (503, "no folder")
    assert not w.heard.of(Step) and not w.node.works
    assert w.heard.of(Release)
    w(dispatch(request(), phase, 2))  # another attempt is another matter
    assert not w(prompt(10, attempt=2)).told(Refused)


# --- nothing waits for ever -----------------------------------------------------------------------


def test_a_prompt_that_does_not_come_ends_the_attempt() -> None:
    w = worker()
    w(dispatch(request()))
    assert not beat(w, after=10).told(Refused)
    assert refusal(beat(w)) == "its prompt did not come"


def test_kv_that_does_not_come_ends_the_attempt_and_the_fetch() -> None:
    w = worker()
    w(dispatch(request(), "decode"))
    w(prompt(10))
    assert not beat(w, after=30).told(Refused)
    assert refusal(beat(w)) == "its KV did not come"
    assert w.node.pool.held == 3, "somebody may still write to it"
    w(Received("r", 1, False))
    assert w.node.pool.held == 0


def test_room_that_does_not_come_ends_the_attempt() -> None:
    w = worker(kv_blocks=4)
    w(dispatch(request("a"), "decode"))
    w(dispatch(request("b"), "decode"), after=1.0)
    w(prompt(10, "a"))
    w(prompt(10, "b"))
    w(Received("a", 1, True))
    assert refusal(beat(w, after=30.5)) == "its KV did not come"
    assert list(w.node.works) == ["a"]


@pytest.mark.parametrize("asked", [False, True])
def test_a_lease_ends(asked: bool) -> None:
    """Nobody fetched the KV, or somebody is too slow: then it is free when the transfer is over."""
    w = worker()
    w(dispatch(request(), "prefill"))
    w(over(w(prompt(10)).one(Step)))
    if asked:
        assert w(KvWant("r", 1, "d", 0)).one(Send).deadline == 60.0
    assert not beat(w, after=60).told(Refused)
    assert refusal(beat(w)) == "its lease ended"
    assert w.node.pool.held == (3 if asked else 0)
    w(SendOver("r", 1, False))
    assert w.node.pool.held == 0
    assert w.heard.told(Refused).one(), "told once"


def test_early_prompts_are_forgotten() -> None:
    w = worker()
    w(prompt(10))
    assert not beat(w, after=10).of(Release)
    assert beat(w).one(Release) == Release("r", 1)
    w(dispatch(request()))
    assert not w.heard.of(Step)


def test_early_prompts_have_a_bound() -> None:
    w = worker(waiting_max=3)
    assert [len(w(prompt(10, f"r{i}")).of(Release)) for i in range(5)] == [0, 0, 0, 1, 1]


# --- the end of an attempt, in every stage --------------------------------------------------------


class Case(NamedTuple):
    """An attempt "r" in a stage; what has to be over before its blocks are free."""

    stage: Stage
    reach: Callable[[Driven[Worker]], object]
    over: tuple[AnyMessage, ...] = ()


def in_queue(w: Driven[Worker]) -> None:
    """Behind one that takes the whole budget of every step."""
    w(dispatch(request("first", tokens=100), "prefill"))
    w(prompt(100, "first"))
    w(dispatch(request()))
    w(prompt(10))


def in_room(w: Driven[Worker]) -> None:
    """Behind one that holds nearly all blocks."""
    w(dispatch(request("first", tokens=120), "decode"))
    w(dispatch(request(), "decode"))


def held(w: Driven[Worker]) -> None:
    w(dispatch(request(), "prefill"))
    w(over(w(prompt(10)).one(Step)))


def streaming(w: Driven[Worker]) -> None:
    w(dispatch(request(), "prefill"))
    w(KvWant("r", 1, "d", 0))
    w(prompt(10))


STEP_OVER = StepDone(1, 1, (RowDone("r", 1, 1),), 0.01)
CASES = {
    "waits for its prompt": Case(Stage.PROMPT, lambda w: w(dispatch(request()))),
    "waits for its turn": Case(Stage.QUEUE, in_queue),
    "in a step": Case(Stage.RUN, begin, (STEP_OVER,)),
    "in a step that streams its KV": Case(
        Stage.RUN, streaming, (STEP_OVER, SendOver("r", 1, False))),
    "... the transfer first": Case(Stage.RUN, streaming, (SendOver("r", 1, False), STEP_OVER)),
    "holds its KV": Case(Stage.HOLD, held),
    "ships its KV": Case(Stage.HOLD, lambda w: (held(w), w(KvWant("r", 1, "d", 0))),
                         (SendOver("r", 1, False),)),
    "waits for room": Case(Stage.ROOM, in_room),
    "receives KV": Case(Stage.KV, lambda w: w(dispatch(request(), "decode")),
                        (Received("r", 1, False),)),
    "has KV and no prompt": Case(
        Stage.KV, lambda w: (w(dispatch(request(), "decode")), w(Received("r", 1, True)))),
}  # fmt: skip


def abort(w: Driven[Worker]) -> Effects:
    return w(Abort(1, "r", 1, "cancelled"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_abort_frees_all_as_soon_as_nothing_touches_it(case: Case) -> None:
    w = worker()
    case.reach(w)
    work = w.node.works["r"]
    assert work.stage is case.stage
    mine, others = set(work.blocks), w.node.pool.held - len(work.blocks)
    abort(w)
    assert "r" not in w.node.works
    for event in case.over:
        assert w.node.pool.held == others + len(mine) > others
        assert w.node.load().quarantined == 1
        w(event)
    assert w.node.pool.held == others
    assert w.node.load().quarantined == 0
    assert [r for r in w.heard.of(Release) if r.request_id == "r"] == [Release("r", 1)]
    told = [*w.heard.told(Done).messages, *w.heard.told(Refused).messages]
    assert not [m for m in told if m.request_id == "r"], "nobody waits for an answer"


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.over],
                         ids=[n for n, c in CASES.items() if c.over])  # fmt: skip
def test_blocks_in_quarantine_are_given_to_nobody(case: Case) -> None:
    """The next one needs all blocks that there are."""
    w = worker()
    case.reach(w)
    abort(w)
    w(dispatch(request("next", tokens=32 * BLOCK - 1), "decode"))
    for event in case.over:
        assert w.node.works["next"].blocks == []
        w(event)
    assert len(w.node.works["next"].blocks) == 32


@pytest.mark.parametrize("stage", ["in a step", "in a step that streams its KV"])
def test_the_world_keeps_what_a_step_uses_until_it_is_over(stage: str) -> None:
    w = worker()
    CASES[stage].reach(w)
    assert not abort(w).of(Release)
    assert w(STEP_OVER).one(Release) == Release("r", 1)


def test_an_abort_ends_a_long_run_of_steps() -> None:
    w = worker()
    run = w(over(begin(w).one(Step))).one(Step)
    assert run.steps == 8
    assert abort(w).one(Cut) == Cut(run.id)
    assert w(over(run, 3)).told(Done).to == []


def test_an_abort_of_a_newer_attempt_ends_the_older_one_too() -> None:
    w = worker()
    w(dispatch(request()))
    w(Abort(1, "r", 3, "x"))
    assert not w.node.works
    w(dispatch(request(), attempt=4))
    w(Abort(1, "r", 3, "x"))
    assert list(w.node.works) == ["r"]


def test_an_abort_before_its_dispatch_forgets_the_early_prompt() -> None:
    w = worker()
    w(prompt(10))
    assert abort(w).one(Release) == Release("r", 1)


def test_what_the_source_lost_is_given_up() -> None:
    w = worker()
    w(dispatch(request(), "decode"))
    effects = w(KvGone("r", 1, "kv gone"))
    assert refusal(effects) == "kv gone"
    assert w.node.pool.held == 3
    w(Received("r", 1, False))
    assert w.node.pool.held == 0


@pytest.mark.parametrize(
    "late",
    [KvGone("r", 2, "x"), Received("r", 2, True), SendOver("r", 1, True), StepDone(99, 1, ())],
    ids=lambda m: type(m).__name__,
)
def test_news_of_something_else_changes_nothing(late: AnyMessage) -> None:
    w = worker()
    w(dispatch(request(), "decode"))
    assert w(late) == []
    assert w.node.works["r"].stage is Stage.KV


def test_a_failed_transfer_gives_the_attempt_up() -> None:
    target, source = worker(), worker()
    target(dispatch(request(), "decode"))
    assert refusal(target(Received("r", 1, False, reason="checksum"))) == "checksum"
    held(source)
    source(KvWant("r", 1, "d", 0))
    assert refusal(source(SendOver("r", 1, False))) == "transfer failed"
    assert target.node.pool.held == source.node.pool.held == 0


def test_a_sender_that_let_go_is_not_the_receivers_failure() -> None:
    """The conductor knows why, and says so; if it does not, the wait has its end."""
    for aborted in (True, False):
        w = worker()
        w(dispatch(request(), "decode"))
        w(prompt(10))
        assert not w(Received("r", 1, False, by_sender=True)).told(Refused)
        if aborted:
            abort(w)
        else:
            assert refusal(beat(w, after=31)) == "its KV did not come"
        assert w.node.pool.held == 0 and not w.node.works


# --- steps ----------------------------------------------------------------------------------------


def test_a_newcomer_ends_a_run_of_steps_once() -> None:
    w = worker()
    run = w(over(begin(w, "a").one(Step))).one(Step)
    assert begin(w, "b").one(Cut) == Cut(run.id)
    assert not begin(w, "c").of(Cut)
    joined = w(over(run, 2)).one(Step)
    assert [(r.request_id, r.count) for r in joined.rows] == [("b", 10), ("c", 10)]
    assert joined.carried == 1, "a goes on without being named"


def test_no_runs_of_steps_while_one_wants_single_steps() -> None:
    """`Sampling.single_step`, as a grammar has it: also while it is recomputed, and not after."""
    w = worker()
    w(over(begin(w, "a").one(Step)))
    assert w.heard.of(Step)[-1].steps > 1
    begin(w, "g", tokens=9, output=4, sampling=Sampling(single_step=True))
    joined = w(over(w.heard.of(Step)[-1], 2)).one(Step)
    assert [row.request_id for row in joined.rows] == ["g"]
    for _ in range(3):
        step = w(over(w.heard.of(Step)[-1])).one(Step)
        assert step.steps == 1 and step.carried + len(step.rows) == 2
        w.node.check()
    after = w(over(step, ends=["g"])).one(Step)
    assert after.steps > 1 and after.carried == 1
    w.node.check()


def test_single_steps_from_the_first_one_on() -> None:
    w = worker()
    sampling = Sampling(single_step=True)
    w(dispatch(request("g", sampling=sampling), "decode"))
    w(prompt(10, "g"))
    step = w(Received("g", 1, True, 120, 0.05, "shm", report=PREFILL_REPORT)).one(Step)
    assert step.steps == 1
    chunked = worker(chunk_tokens=9)
    begin(chunked, "g", tokens=10, sampling=sampling)
    last = chunked(over(chunked.heard.of(Step)[-1])).one(Step)
    assert (last.rows[0].start, last.rows[0].count, last.steps) == (9, 1, 1)


def test_only_what_can_join_ends_a_run() -> None:
    w = worker()
    w(over(begin(w, "a").one(Step)))
    quiet = [Alarm("beat"), KvResync(1), Welcome(1), dispatch(request("b")), KvWant("x", 1, "d", 0)]
    assert not [m for m in quiet if w(m).of(Cut)]


def test_room_ends_a_run_for_one_that_waits_for_it() -> None:
    """14 blocks: "a" has 10 for its runs of steps, "r" receives into 3, and "b" waits for two, not
    for a place."""
    w = worker(kv_blocks=14)
    w(over(begin(w, "a", 8).one(Step)))
    w(dispatch(request(tokens=10), "decode"))
    begin(w, "b", 8)
    run = w(over(w.heard.of(Step)[-1])).one(Step)
    assert (run.rows, run.carried) == ((), 1) and run.steps > 1
    assert w.node.works["r"].stage is Stage.KV and w.node.works["b"].stage is Stage.QUEUE
    assert w(Received("r", 1, False, reason="checksum")).one(Cut) == Cut(run.id)


def test_the_urgent_band_goes_first() -> None:
    w = worker(batch_tokens_max=10, chunk_tokens=10)
    step = begin(w, "a").one(Step)
    for name, band in (("b", 1), ("c", 0), ("d", 2), ("e", 0)):
        begin(w, name, band=band)
    order = []
    while step is not None:
        order.append(step.rows[0].request_id)
        after = w(over(step, ends=[order[-1]])).of(Step)
        step = after[0] if after else None
    assert order == ["a", "c", "e", "b", "d"]


def test_the_youngest_gives_its_blocks_up_and_is_computed_again() -> None:
    """4 blocks: two sequences of 8 tokens have two each, and the older one needs a third."""
    w = worker(kv_blocks=4)
    w(dispatch(request("a", 7, 20)))
    w(dispatch(request("b", 7, 20, keys=())))
    w(prompt(7, "a"))
    w(prompt(7, "b"))
    step = w(over(w.heard.one(Step))).one(Step)  # b enters beside a
    assert ([r.request_id for r in step.rows], step.carried) == (["b"], 1)
    effects = w(over(step))
    assert effects.noted(Preempted) == [Preempted("w", "b", 7)]
    assert effects.noted(Recomputed) == [Recomputed("b", 7, "preempted")]
    assert [r.request_id for r in effects.one(Step).rows] == ["a"]
    assert w.node.load().waiting == 1

    back = w(over(effects.one(Step), ends=["a"])).one(Step)
    row = back.rows[0]
    assert (row.request_id, row.start, row.count, row.index) == ("b", 0, 8, 1)
    assert row.fresh, "its old block table is void"
    end = w(over(back, ends=["b"])).told(Done).one()
    assert end.output_tokens == 2
    assert (end.report.preemptions, end.report.recomputed_tokens) == (1, 7)


def test_one_that_is_being_shipped_is_lost_instead_of_preempted() -> None:
    """6 blocks: "r" has four and computes one a step, "a" needs a third one then."""
    w = worker(kv_blocks=6, chunk_tokens=4)
    w(dispatch(request("a", 7, 20)))
    w(dispatch(request("r", 16), "prefill"))
    w(KvWant("r", 1, "d", 0))
    step = w(prompt(7, "a")).one(Step)
    w(prompt(16))
    for _ in range(2):
        step = w(over(step)).one(Step)
        assert w.heard.of(Send)[-1].step == step.id
    effects = w(over(step))
    assert refusal(effects) == "preempted while its KV was shipped"
    assert "r" not in [e.request_id for e in effects.noted(Preempted)]
    assert w.node.load().quarantined == 1
    after = w(SendOver("r", 1, False))
    assert w.node.load().quarantined == 0
    assert [r.request_id for r in after.one(Step).rows] == ["a"]


# --- what the conductor is told -------------------------------------------------------------------


def test_an_unknown_worker_introduces_itself_with_all_its_blocks() -> None:
    w = worker()
    w(over(begin(w, "a", 10).one(Step)))
    effects = w(Welcome(1, again=True))
    assert effects.told(Hello).one().incarnation == 1
    events = effects.told(KvEvents).one()
    assert events.reset and set(events.added) == set(keys(2, ord("a")))
    assert w(Welcome(1)) == []


def test_events_are_numbered_without_a_gap() -> None:
    w = worker(kv_blocks=6)
    for i in range(4):
        step = begin(w, f"r{i}", 16).one(Step)
        w(over(step, ends=[f"r{i}"]))
        w(KvResync(1))
    events = w.heard.told(KvEvents).messages
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    known: set[bytes] = set()
    for e in events:
        known = (set() if e.reset else known - set(e.removed)) | set(e.added)
        assert not e.reset or set(e.added) == known
    assert known == set(w.node.pool.all_keys())


def test_the_beat_tells_what_is_served_and_how_fast() -> None:
    w = worker()
    run = w(over(begin(w, "a").one(Step))).one(Step)
    run = w(over(run, 4), after=0.2).one(Step)
    w(dispatch(request(), "prefill"))
    w(prompt(10))
    w(over(w(over(run, 2), after=0.2).one(Step)))
    load = beat(w).told(Load).one()
    assert {a.request_id: a.done for a in load.active} == {"a": 10 + 4 + 2 + 1, "r": 10}
    assert load.iteration_s == pytest.approx(0.05 + 0.2 * 0.05), "a mean that the newest moves"
    assert (load.leases, load.running, load.waiting) == (1, 1, 0)
    assert load.kv_blocks_free == w.node.pool.available


def test_who_loses_the_head_of_its_hits_to_a_neighbour_waits_on() -> None:
    """Blocks of its prefix that others hold count for nothing once the cached one before them is
    evicted by who enters just before it: then it needs more blocks than its admission said."""
    w = worker(kv_blocks=8, batch_max=8)
    head, tail = keys(1, 7), keys(3, 8)[1:]
    for name, own in (("s", head), ("t", keys(3, 9))):  # leave 1 and 3 cached blocks, in this order
        step = begin(w, name, BLOCK * len(own), output=1, keys=own).one(Step)
        w(over(step, ends=[name]))
    held = begin(w, "r", 3 * BLOCK + 1, keys=(*keys(1, 6), *tail)).one(Step)
    assert w.node.pool.held == 4 and w.node.pool.available == 4

    begin(w, "a", 2 * BLOCK)
    begin(w, "b", 3 * BLOCK + 1, keys=(*head, *tail))
    step = w(over(held)).one(Step)
    assert [row.request_id for row in step.rows] == ["a"] and step.carried == 1
    assert [work.id for work in w.node.steps.waiting] == ["b"]

    step = w(over(step, ends=["a"])).one(Step)
    assert [row.request_id for row in step.rows] == ["b"]
