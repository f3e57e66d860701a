"""The conductor by hand: where attempts go, what is reserved, and what every loss leads to."""

from typing import Any

import msgspec
import pytest

from kvasir.core.effects import Timer
from kvasir.core.events import (
    PrefixUsed,
    Queued,
    Rejected,
    Retried,
    Routed,
    WorkerJoined,
    WorkerLeft,
)
from kvasir.core.messages import (
    Abort,
    Accepted,
    Active,
    Alarm,
    AnyMessage,
    Declined,
    Dispatch,
    Done,
    Ended,
    Finished,
    GatewayBeat,
    KvEvents,
    KvResync,
    Load,
    Lost,
    Placed,
    PrefillDone,
    Refused,
    Start,
    Submit,
    TransferReport,
    Usage,
    Welcome,
    WorkerGone,
)
from kvasir.core.request import Request
from kvasir.core.specs import Deployment, LimitsSpec, ModelSpec, PolicySpec, PoolSpec, RouteSpec
from kvasir.core.specs.deployment import FittedCost
from kvasir.measure.calibration import models_of
from kvasir.node.conductor import Conductor
from tests.nodes import (
    BLOCK,
    GATEWAY,
    PREFILL_REPORT,
    REPORT,
    Driven,
    Effects,
    hello,
    keys,
    request,
)

GRACE_S, DEAD_S = 3.0, 5.0


def deployment(limits: dict[str, Any], **route: Any) -> Deployment:
    shape = {"count": 2, "kv_blocks": 32, "cost": FittedCost()}
    return Deployment(
        models=(ModelSpec(name="m", shape="tiny"),),
        pools=tuple(PoolSpec(name=role, role=role, **shape)
                    for role in ("prefill", "decode", "mixed")),
        policy=PolicySpec(route=RouteSpec(**({"name": "least_loaded"} | route))),
        limits=LimitsSpec(**({"grace_s": GRACE_S, "dead_after_s": DEAD_S} | limits)),
        block_size=BLOCK,
    )  # fmt: skip


WORKERS = {"p": "prefill", "p2": "prefill", "d": "decode", "d2": "decode", "m": "mixed"}


def join(c: Driven[Conductor], worker: str, **more: Any) -> Effects:
    role = WORKERS[worker]
    return c(hello(worker, role, pool=role, **more))


def conductor(
    *workers: str, limits: dict[str, Any] | None = None, **route: Any
) -> Driven[Conductor]:
    """With one prefill and one decode worker unless told otherwise."""
    d = deployment(limits or {}, **route)
    c = Driven(Conductor(d, models_of(d)))
    c(Start())
    for worker in workers or ("p", "d"):
        join(c, worker)
    c.heard.clear()
    return c


def submit(c: Driven[Conductor], of: Request | None = None, **more: Any) -> Effects:
    return c(Submit(of or request(), **more))


def load(worker: str, *active: Active, incarnation: int = 1) -> Load:
    return Load(worker, incarnation, 0, 0, 32, active=active)


def beat(c: Driven[Conductor], after: float = 1.0) -> Effects:
    return c(Alarm("beat"), after=after)


def prefilled(c: Driven[Conductor], attempt: int = 1) -> Effects:
    return c(PrefillDone("p", "r", attempt, PREFILL_REPORT))


def shipped(c: Driven[Conductor], attempt: int = 1) -> Effects:
    return c(TransferReport("r", attempt, "p", "d", 120, 0.01, "shm"))


def finished(c: Driven[Conductor], worker: str = "d", attempt: int = 1) -> Effects:
    return c(Finished(worker, "r", attempt, "stop", 5, REPORT))


def ended(c: Driven[Conductor], attempt: int = 1, **more: Any) -> Effects:
    return c(Ended("r", attempt, "stop", Usage(10, 0, 5)), **more)


def reserved(c: Driven[Conductor]) -> dict[str, int]:
    return {m.id: m.blocks_reserved for m in c.node.members.values() if m.holds}


# --- the usual way --------------------------------------------------------------------------------


def test_each_prefill_says_what_it_hit_and_what_it_could_have_hit() -> None:
    """The decode worker has all 8 tokens, in blocks of 4; the last token is always computed."""
    c = conductor()
    of = request(tokens=8, group=7)
    c(KvEvents("d", 1, 1, of.keys))
    submit(c, of)
    (used,) = prefilled(c).noted(PrefixUsed)
    assert used == PrefixUsed("p", "r", 8, 4, 4)
    assert not finished(c).noted(PrefixUsed), "told once"


def test_a_request_that_ends_with_its_first_token_says_it_too() -> None:
    c = conductor("m")
    submit(c)
    (used,) = finished(c, "m").noted(PrefixUsed)
    assert (used.input_tokens, used.attainable_tokens) == (10, 0)
    assert used.hit_tokens == REPORT.prefill.cached_tokens


def test_workers_are_welcomed_with_the_epoch() -> None:
    d = deployment({})
    c = Driven(Conductor(d, models_of(d), epoch=7))
    assert c(Start()).one(Timer).name == "beat"
    effects = join(c, "p")
    assert effects.told(Welcome).pairs == [("p", Welcome(7))]
    assert effects.noted(WorkerJoined) == [WorkerJoined("p", 1, ("prefill",))]
    join(c, "d")
    dispatched = submit(c).told(Dispatch).messages
    assert {d.epoch for d in dispatched} == {7}


def test_decode_chosen_at_arrival_is_dispatched_with_prefill() -> None:
    c = conductor()
    effects = submit(c)
    (to_p, prefill), (to_d, decode) = effects.told(Dispatch).pairs
    assert (to_p, prefill.phase, prefill.target, prefill.source) == ("p", "prefill", "d", "")
    assert (to_d, decode.phase, decode.source, decode.target) == ("d", "decode", "p", "")
    placed = effects.told(Placed)
    assert placed.to == [GATEWAY]
    assert (placed.one().path, placed.one().prefill, placed.one().decode) == (
        "disaggregated", "p", "d")  # fmt: skip
    assert effects.noted(Routed)[0].why == placed.one().why != ""
    assert reserved(c) == {"p": 3, "d": 4}, "the prompt; the prompt and its output"


def test_decode_may_be_chosen_when_prefill_ends() -> None:
    c = conductor("p", "d", "d2", decode_choice="prefill_end")
    effects = submit(c)
    assert effects.told(Dispatch).one().target == ""
    assert effects.told(Placed).one().decode == ""
    c(Load("d", 1, 0, 0, 32))
    submit(c, request("other"))
    after = prefilled(c)
    assert after.told(Dispatch).pairs[0][1].phase == "decode"
    assert after.told(Placed).one().decode == after.told(Dispatch).to[0]


def test_reservations_go_as_the_work_does() -> None:
    c = conductor()
    submit(c)
    assert c.node.members["p"].prefill_s > 0 and c.node.members["d"].decoding == 1
    prefilled(c)
    assert c.node.members["p"].prefill_s == 0
    shipped(c)
    assert reserved(c) == {"d": 4}
    finished(c)
    assert reserved(c) == {} and c.node.members["d"].decoding == 0
    ended(c)
    assert not c.node.placements


def test_a_prefix_hit_is_reserved_and_shipped_only_once() -> None:
    c = conductor("p", "d", "d2", name="netkv")
    c(KvEvents("d2", 1, 1, keys(2, 7)))
    routed = submit(c, request(group=7)).noted(Routed)[0]
    assert (routed.decode, routed.decode_hit_blocks) == ("d2", 2)
    assert reserved(c) == {"p": 3, "d2": 2}


def test_little_left_to_prefill_stays_on_the_decode_worker() -> None:
    c = conductor(local_prefill_tokens=2)
    c(KvEvents("d", 1, 1, keys(2, 7)))
    effects = submit(c, request(group=7))
    assert effects.told(Dispatch).pairs[0][0] == "d"
    assert effects.told(Dispatch).one().phase == "both"
    assert effects.told(Placed).one().path == "aggregated"


def test_a_mixed_worker_keeps_what_it_prefills() -> None:
    c = conductor("m")
    assert submit(c).told(Dispatch).one().phase == "both"
    assert reserved(c) == {"m": 4}


@pytest.mark.parametrize("left", ["p", "d"])
def test_without_the_other_role_one_worker_runs_both_phases(left: str) -> None:
    c = conductor(left)
    effects = submit(c)
    assert effects.told(Dispatch).to == [left]
    assert effects.told(Dispatch).one().phase == "both"


# --- admission and waiting ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "of", "status"),
    [
        (("p", "d"), request(tokens=120, output=9), 400),  # 33 blocks at its longest
        (("p", "d"), Request("r", "another", 10, 5), 503),
    ],
)
def test_what_nobody_can_serve_is_declined(
    workers: tuple[str, ...], of: Request, status: int
) -> None:
    effects = submit(conductor(*workers), of)
    assert effects.told(Declined).pairs[0][0] == GATEWAY
    assert effects.told(Declined).one().status == status
    assert effects.noted(Rejected)[0].status == status
    assert not effects.told(Dispatch)


def full(**more: Any) -> Driven[Conductor]:
    """The only decode worker holds 28 of 32 blocks; "first" does."""
    c = conductor(**more)
    submit(c, request("first", tokens=100, output=12))
    c.heard.clear()
    return c


def test_without_room_a_request_waits_for_it() -> None:
    c = full()
    effects = submit(c, request(tokens=17))
    assert not effects.told(Dispatch) and effects.noted(Queued) == [Queued("r", 1)]
    assert ended(c).told(Dispatch).to == [], "that was another one"
    submit(c, request(tokens=17))
    after = c(Ended("first", 1, "cancelled", Usage(100, 0, 0)))
    assert after.told(Abort).to == ["p", "d"]
    assert after.told(Dispatch).to == ["p", "d"]


def test_nobody_overtakes_within_a_band_and_the_urgent_band_is_first() -> None:
    c = full()
    for name, tokens, band in (("a", 40, 1), ("b", 1, 1), ("c", 40, 0), ("d", 40, 2)):
        assert not submit(c, request(name, tokens=tokens, band=band)).told(Dispatch)
    order = [p.id for p in c.node.queue]
    assert order == ["c", "a", "b", "d"]
    after = c(Ended("first", 1, "stop", Usage(100, 0, 1)))
    assert [d.request.id for d in after.told(Dispatch).messages[::2]] == ["c", "a", "b"]


def test_a_full_queue_declines_but_never_a_later_attempt() -> None:
    c = full(limits={"queue_max": 1})
    assert not submit(c, request("a", tokens=40)).told(Declined)
    declined = submit(c, request("b", tokens=40)).told(Declined).one()
    assert declined.status == 429 and declined.retry_after_s is not None
    assert not submit(c, request("c", tokens=40), attempt=2, emitted=1).told(Declined)


def test_waiting_has_an_end() -> None:
    c = full(limits={"queue_wait_s": 30, "dead_after_s": 1000})
    submit(c, request(tokens=40))
    assert not beat(c, after=30).told(Declined)
    assert beat(c).told(Declined).one().status == 503
    assert list(c.node.placements) == ["first"] and not c.node.queue


@pytest.mark.parametrize(("tokens", "decode"), [(51, "d"), (52, "d2")])
def test_a_decode_worker_without_room_is_left_out(tokens: int, decode: str) -> None:
    """d has the better prefix and 13 blocks left of 32; 13 or 14 are needed beside the hit."""
    c = conductor("p", "d", "d2", name="cache_load", cache_weight=100)
    c(KvEvents("d", 1, 1, keys(1, 7)))
    submit(c, request("first", tokens=70, output=7, group=7))
    assert reserved(c)["d"] == 19
    assert submit(c, request(tokens=tokens, group=7)).noted(Routed)[0].decode == decode


SMALL = {"capacity": {"kv_blocks": 8}}


def test_a_prompt_larger_than_any_prefill_worker_runs_whole_on_a_decode_worker() -> None:
    c = conductor("d")
    join(c, "p", **SMALL)
    effects = submit(c, request(tokens=60))
    assert effects.told(Dispatch).to == ["d"]
    assert effects.told(Dispatch).one().phase == "both"


def test_one_that_can_never_fit_the_mixed_worker_blocks_nobody() -> None:
    c = conductor("d")
    join(c, "m", **SMALL)
    assert submit(c, request("large", tokens=60)).told(Dispatch).to == ["d"]
    assert submit(c, request("small")).told(Dispatch)


# --- losses ---------------------------------------------------------------------------------------


def lost(effects: Effects) -> Lost:
    told = effects.told(Lost)
    assert told.to == [GATEWAY]
    assert len(effects.noted(Retried)) == 1
    return told.one()


def test_a_refusal_loses_the_attempt_at_both_workers() -> None:
    c = conductor()
    submit(c)
    effects = c(Refused("d", "r", 1, "queue full"))
    assert "queue full" in lost(effects).reason and not lost(effects).died
    assert effects.told(Abort).to == ["p", "d"]
    assert reserved(c) == {} and not c.node.placements


def test_a_refusal_of_one_that_is_no_longer_needed_loses_nothing() -> None:
    """The KV has arrived; then its lease ended."""
    c = conductor()
    submit(c)
    shipped(c)
    assert not c(Refused("p", "r", 1, "its lease ended")).told(Lost)
    finished(c)
    assert not c(Refused("d", "r", 1, "late")).told(Lost)


@pytest.mark.parametrize("by", ["p", "d"])
def test_a_refusal_with_a_status_is_for_the_client(by: str) -> None:
    """No other attempt would go better, so there is none."""
    c = conductor()
    submit(c)
    effects = c(Refused(by, "r", 1, "the adapter is gone", 503))
    declined = effects.told(Declined)
    assert declined.to == [GATEWAY]
    assert (declined.one().status, declined.one().reason) == (503, f"{by}: the adapter is gone")
    assert not effects.told(Lost) and not c.node.placements
    assert set(effects.told(Abort).to) == {"p", "d"}


def test_a_draining_worker_gets_nothing_more() -> None:
    c = conductor("p", "d", "d2")
    assert submit(c).told(Dispatch).to == ["p", "d"]
    c(Refused("d", "r", 1, "draining"))
    for i in range(3):
        assert submit(c, request(f"r{i}")).told(Dispatch).to == ["p", "d2"]


@pytest.mark.parametrize("gone", ["p", "d"])
def test_a_dead_worker_loses_what_it_serves(gone: str) -> None:
    c = conductor("p", "p2", "d", "d2")
    c(KvEvents(gone, 1, 1, keys(2, 7)))
    submit(c)
    effects = c(WorkerGone(gone, 1, "died"))
    assert lost(effects).died and gone in lost(effects).reason
    assert effects.told(Abort).to == [{"p": "d", "d": "p"}[gone]], "its partner is told"
    assert effects.noted(WorkerLeft) == [WorkerLeft(gone, 1, "died")]
    assert gone not in c.node.members and reserved(c) == {}
    assert c.node.index.match(keys(2, 7)) == {}
    again = submit(c, attempt=2, emitted=1).told(Dispatch)
    assert gone not in again.to and again.messages[0].emitted == 1


def test_when_the_kv_has_arrived_prefill_may_die() -> None:
    c = conductor()
    submit(c)
    shipped(c)
    assert not c(WorkerGone("p", 1, "died")).told(Lost)
    assert c(WorkerGone("d", 1, "died")).told(Lost).one().died


def test_what_is_finished_may_lose_its_worker() -> None:
    c = conductor()
    submit(c)
    finished(c)
    assert not c(WorkerGone("d", 1, "died")).told(Lost)


def test_silence_is_death() -> None:
    c = conductor()
    submit(c)
    c(load("p", Active("r", 1)), after=4)
    effects = beat(c, after=2)
    assert effects.noted(WorkerLeft) == [WorkerLeft("d", 1, "not heard of")]
    assert lost(effects).died
    assert list(c.node.members) == ["p"]


def test_a_past_life_is_not_taken_for_the_present_one() -> None:
    c = conductor()
    join(c, "d", incarnation=3)
    past: list[AnyMessage] = [
        WorkerGone("d", 2, "died"), load("d", incarnation=2),
        KvEvents("d", 2, 1, keys(2, 7)), hello("d", "decode", pool="decode", incarnation=2),
    ]  # fmt: skip
    for message in past:
        effects = c(message)
        assert not effects.noted(WorkerLeft) and not effects.noted(WorkerJoined)
        assert c.node.members["d"].incarnation == 3
    assert c.node.index.blocks_of("d") == 0


def test_other_weights_stay_out_until_the_old_ones_are_gone() -> None:
    """Equal keys would name other KV: a replaced model folder, and workers restarted in turns."""
    c = conductor("p", "d")
    new = hello("d", "decode", pool="decode", incarnation=2)
    new = msgspec.structs.replace(new, fingerprint="new")
    (left,) = c(new).noted(WorkerLeft)[1:]
    assert left == WorkerLeft("d", 2, "its weights of m are not those of p")
    assert list(c.node.members) == ["p"]
    assert c(load("d", incarnation=2)).told(Welcome).one().again, "asked to try again"
    c(WorkerGone("p", 1, "died"))
    assert c(new).noted(WorkerJoined) and list(c.node.members) == ["d"]


def test_of_a_restarted_worker_nothing_old_survives() -> None:
    c = conductor("p", "d", name="netkv")
    c(KvEvents("d", 1, 1, keys(2, 7)))
    c(KvEvents("d", 1, 3))
    submit(c, request(group=7))
    effects = join(c, "d", incarnation=2)
    assert lost(effects).died
    assert [type(n) for n in effects.noted((WorkerLeft, WorkerJoined))] == [
        WorkerLeft, WorkerJoined]  # fmt: skip
    assert reserved(c) == {} and c.node.oracle.inbound("d").transfers == 0
    assert c.node.index.match(keys(2, 7)) == {}
    member = c.node.members["d"]
    assert (member.load, member.resync_asked, member.draining) == (None, False, False)
    c(KvEvents("d", 2, 1, keys(1, 7)))
    assert c.node.index.match(keys(2, 7)) == {"d": 1}, "it counts from the start"


def test_an_unknown_worker_is_asked_to_introduce_itself() -> None:
    """The conductor is new, or took it for dead; or its Hello was lost on the way."""
    c = conductor()
    effects = c(load("d2"))
    assert effects.told(Welcome).pairs == [("d2", Welcome(1, again=True))]
    c(WorkerGone("d", 1, "not heard of"))
    assert c(load("d")).told(Welcome).one().again
    assert c(load("p", incarnation=2)).told(Welcome).one().again
    join(c, "d2")
    assert not c(load("d2")).told(Welcome)


def test_a_worker_of_no_pool_is_not_let_in() -> None:
    c = conductor()
    assert c(hello("d2", "decode", pool="elsewhere")) == []
    assert "d2" not in c.node.members


# --- the index ------------------------------------------------------------------------------------


def test_a_gap_is_repaired_by_a_resync() -> None:
    c = conductor()
    c(KvEvents("d", 1, 1, keys(1, 7)))
    assert c(KvEvents("d", 1, 3, keys(2, 7))).told(KvResync).pairs == [("d", KvResync(1))]
    assert c.node.index.match(keys(2, 7)) == {}
    assert not c(KvEvents("d", 1, 4)).told(KvResync), "asked once"
    assert c(load("d")).told(KvResync).to == ["d"], "and again with each beat"
    c(KvEvents("d", 1, 5, keys(2, 7), reset=True))
    assert c.node.index.match(keys(2, 7)) == {"d": 2}
    assert not c(load("d")).told(KvResync)


def test_a_reset_that_was_overtaken_is_asked_for_again() -> None:
    c = conductor()
    c(KvEvents("d", 1, 2))
    c(KvEvents("d", 1, 4))
    c(KvEvents("d", 1, 3, keys(2, 7), reset=True))
    assert c.node.index.match(keys(2, 7)) == {}
    assert c(load("d")).told(KvResync).to == ["d"]


# --- beats, both ways -----------------------------------------------------------------------------


def test_a_worker_is_told_to_end_what_nobody_wants() -> None:
    c = conductor()
    effects = c(load("d", Active("ghost", 2)))
    assert effects.told(Abort).pairs == [("d", Abort(1, "ghost", 2, "not wanted"))]
    submit(c, attempt=3)
    assert c(load("d", Active("r", 2))).told(Abort).one().attempt == 2, "an older attempt"
    assert not c(load("d", Active("r", 3))).told(Abort)
    assert not c(load("d", Active("r", 4))).told(Abort), "a newer one than the conductor knows"
    shipped(c, attempt=3)
    assert c(load("p", Active("r", 3))).told(Abort).to == ["p"], "its part is done"


def test_what_a_worker_does_not_know_is_lost_after_a_while() -> None:
    """The dispatch got lost, or the answer did."""
    c = conductor()
    submit(c)
    assert not c(load("d"), after=GRACE_S).told(Lost)
    assert c(load("p", Active("r", 1)), after=0.1).told(Lost).to == []
    effects = c(load("d"))
    assert "does not know" in lost(effects).reason
    assert effects.told(Abort).to == ["p", "d"]


def test_the_grace_begins_when_it_was_accepted() -> None:
    c = conductor()
    submit(c)
    c(Accepted("d", "r", 1), after=2)
    assert not c(load("d"), after=GRACE_S).told(Lost)
    assert c(load("d"), after=0.1).told(Lost)


def gateway_beat(*active: Active) -> GatewayBeat:
    return GatewayBeat(GATEWAY, 1, active)


def test_what_a_gateway_waits_for_in_vain_is_lost() -> None:
    c = conductor()
    assert c(gateway_beat(Active("ghost", 1))).told(Lost).pairs == [
        (GATEWAY, Lost("ghost", 1, "not known"))
    ]
    submit(c)
    assert not c(gateway_beat(Active("r", 1))).told(Lost)
    assert c(gateway_beat(Active("r", 2))).told(Lost).one().attempt == 2, "its Submit was lost"


def test_what_no_gateway_waits_for_is_dropped_after_a_while() -> None:
    """`Ended` was lost."""
    c = conductor()
    submit(c)
    assert not c(gateway_beat(), after=2 * GRACE_S).told(Abort)
    other = GatewayBeat("gateway-1", 1)
    assert not c(other, after=0.1).told(Abort), "another gateway knows nothing of it"
    effects = c(gateway_beat())
    assert effects.told(Abort).to == ["p", "d"] and not effects.told(Lost)
    assert reserved(c) == {} and not c.node.placements


def test_a_lost_done_is_told_again() -> None:
    c = conductor()
    submit(c)
    finished(c)
    assert not c(gateway_beat(Active("r", 1)), after=GRACE_S).told(Done)
    again = c(gateway_beat(Active("r", 1)), after=0.1).told(Done)
    assert again.pairs == [(GATEWAY, Done("r", 1, "stop", 5, REPORT))]
    ended(c)
    assert not c.node.placements


def test_a_gateway_that_is_gone_leaves_nothing() -> None:
    c = conductor()
    submit(c)
    for _ in range(9):
        c(load("p", Active("r", 1)), after=0.5)
        effects = c(load("d", Active("r", 1)), after=0.5)
        effects += beat(c, after=0)
    assert effects.told(Abort).to == ["p", "d"]
    assert not c.node.placements and reserved(c) == {}


# --- attempts -------------------------------------------------------------------------------------


def test_the_next_attempt_ends_the_one_before() -> None:
    c = conductor("p", "d", "d2")
    submit(c)
    effects = submit(c, attempt=2, emitted=3)
    assert effects.told(Abort).pairs == [
        (w, Abort(1, "r", 1, "superseded")) for w in ("p", "d")
    ]  # fmt: skip
    dispatched = effects.told(Dispatch).messages
    seen = {(d.attempt, d.input_tokens, d.output_tokens_max) for d in dispatched}
    assert seen == {(2, 13, 2)} and len(dispatched) == 2
    assert submit(c, attempt=2, emitted=3) == [] == submit(c)


def test_news_of_an_older_attempt_changes_nothing() -> None:
    c = conductor()
    submit(c)
    submit(c, attempt=2)
    before = reserved(c)
    for effects in (
        c(Refused("d", "r", 1, "x")), c(Accepted("d", "r", 1)), prefilled(c, 1), shipped(c, 1),
        finished(c, "d", 1),
    ):  # fmt: skip
        assert effects == []
    assert reserved(c) == before
    assert c.node.members["p"].prefill_s > 0


def test_an_end_frees_all_at_once() -> None:
    c = conductor()
    submit(c)
    assert ended(c).told(Abort).to == ["p", "d"]
    assert reserved(c) == {} and c.node.oracle.inbound("d").transfers == 0
    assert ended(c) == []


def test_an_end_at_prefill_stops_the_decode_worker() -> None:
    """The first token was the last one."""
    c = conductor()
    submit(c)
    assert finished(c, "p").told(Abort).to == ["d"]
    assert not ended(c).told(Abort)


def test_a_request_whose_prefill_is_over_waits_for_a_decode_worker() -> None:
    c = full(decode_choice="prefill_end", limits={"dead_after_s": 1000})
    c(PrefillDone("p", "first", 1, PREFILL_REPORT))
    submit(c, request(tokens=17))
    assert not prefilled(c).told(Dispatch)
    assert [p.id for p in c.node.choosing] == ["r"]
    after = c(Ended("first", 1, "stop", Usage(100, 0, 1)))
    assert after.told(Dispatch).pairs[0][0] == "d"
    assert after.told(Placed).one().decode == "d"
    assert not c.node.choosing


def test_it_is_lost_with_the_worker_that_holds_its_kv() -> None:
    c = full(decode_choice="prefill_end")
    c(PrefillDone("p", "first", 1, PREFILL_REPORT))
    submit(c, request(tokens=17))
    prefilled(c)
    told = c(WorkerGone("p", 1, "died")).told(Lost).messages
    assert {m.request_id for m in told} == {"first", "r"}
    assert not c.node.choosing and not c.node.placements
