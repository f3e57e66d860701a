"""A worker's tiers by hand: what is copied, what comes back, and what a broken tier costs."""

from typing import Any

import pytest

from kvasir.core.effects import NOWHERE, Ask, Release, Reopen, Restore, Step, Store, Timer
from kvasir.core.events import (
    Preempted,
    Recomputed,
    TierBack,
    TierHit,
    TierOff,
    TierPassed,
    TierStored,
)
from kvasir.core.messages import Abort, Alarm, Finished, KvEvents, KvResync, Load, PrefillDone
from kvasir.core.tiers import Held, Moved, Restored, Stored, TierGone, TierReady
from kvasir.node.worker import Worker
from kvasir.policy.tiers import PrefillCost, TierRule, TierRules
from tests.nodes import Driven, Effects, dispatch, keys, request
from tests.unit.test_worker_node import beat, begin, over, prompt, worker

GROUP = ord("r")


def rules(
    *tiers: TierRule, cost: float = 1.0, always: bool = False, wait_s: float = 0.5
) -> TierRules:
    """Computing takes `cost` seconds a token; nothing loads as slowly."""
    return TierRules(tiers or (rule("host"),), PrefillCost(0.0, cost, 0.0), always, wait_s)


def rule(tier: Any, blocks: int = 64, evict: str = "lru", write: str = "always") -> TierRule:
    return TierRule(tier, blocks, 1e6, evict, write)


def tiered(*tiers: TierRule, blocks: int = 32, **more: Any) -> Driven[Worker]:
    """A worker whose tiers are ready and empty."""
    config = {k: more.pop(k) for k in list(more) if k in ("batch_max", "steps_max")}
    w = worker(kv_blocks=blocks, tiers=rules(*tiers, **more), **config)
    for tier in w.node.config.tiers.tiers:  # type: ignore[union-attr]
        w(TierReady(tier.tier))
    return w


def stored(w: Driven[Worker]) -> None:
    """Answer all copies, and those that they make room for."""
    states = w.node.tiers.states.values()
    while under_way := [one for state in states for one in state.writing.items()]:
        for name, writing in under_way:
            w(Stored(name, len(writing.keys), 1000, 0.001))


def served(w: Driven[Worker], request_id: str, tokens: int, **more: Any) -> None:
    """A request with one token of output, and its copies to tiers."""
    begin(w, request_id, tokens, **more)
    w(over(w.heard.of(Step)[-1], ends=[request_id]), after=step_s(w, tokens))
    stored(w)


def flush(w: Driven[Worker], request_id: str = "flush") -> None:
    """Something else fills the whole device, without keys of its own."""
    tokens = w.node.config.capacity.kv_blocks * w.node.blocks.size - 1
    begin(w, request_id, tokens, keys=())
    w(over(w.heard.of(Step)[-1], ends=[request_id]), after=step_s(w, tokens))


def step_s(w: Driven[Worker], tokens: int) -> float:
    """A step takes what the rules foresee."""
    rules = w.node.config.tiers
    return rules.cost.more(0, tokens) if rules is not None else 0.0


def moved(restore: Restore, seconds: float = 0.001) -> tuple[Moved, ...]:
    return tuple(Moved(s.tier, 40 * len(s.slots), seconds) for s in restore.shelves)


# --- there and back -------------------------------------------------------------------------------


def test_full_blocks_are_copied_and_named() -> None:
    w = tiered()
    begin(w, "r", 10)
    done = w(over(w.heard.one(Step)))
    copy = done.one(Store)
    assert (copy.tier, copy.keys, len(copy.slots)) == ("host", keys(2, GROUP), 2)
    assert copy.blocks == tuple(w.node.works["r"].blocks[:2])
    told = w(Stored(copy.id, 2, 80, 0.01))
    assert told.told(KvEvents).one().tier == "host"
    assert told.told(KvEvents).one().added == keys(2, GROUP)
    assert told.noted(TierStored)[0].bytes == 80
    assert not any(e.of(Store) for e in (told, beat(w))), "once"


def test_what_the_device_lost_is_loaded_and_not_computed() -> None:
    w = tiered()
    served(w, "r", 13)
    flush(w)
    assert w.node.pool.match(keys(3, GROUP)) == []
    effects = begin(w, "again", 15, keys=keys(3, GROUP))
    restore = effects.one(Restore)
    assert restore.keys == keys(3, GROUP) and not effects.of(Step)
    assert beat(w, after=0.0).told(Load).one().waiting == 1

    here = w(Restored("again", 1, 3, moved(restore)), after=0.2)
    row = here.one(Step).rows[0]
    assert (row.start, row.count, len(row.blocks), row.fresh) == (12, 3, 4, True)
    hit = here.noted(TierHit)[0]
    assert (hit.tier, hit.tokens, hit.preempted) == ("host", 12, False)
    assert "12 tokens" in hit.why and "host" in hit.why
    report = w(over(here.one(Step), ends=["again"])).told(Finished).one().report.prefill
    assert (report.cached_tokens, report.computed_tokens) == (12, 3)
    assert report.queue_s == pytest.approx(0.2), "the load is a part of the wait"


def test_only_what_the_device_lacks_is_loaded() -> None:
    w = tiered(blocks=8)
    served(w, "r", 13)
    begin(w, "other", 24, keys=())
    w(over(w.heard.of(Step)[-1], ends=["other"]))
    left = len(w.node.pool.match(keys(3, GROUP)))
    assert 0 < left < 3, "a part of the chain"
    restore = begin(w, "again", 15, keys=keys(3, GROUP)).one(Restore)
    assert restore.keys == keys(3, GROUP)[left:]


def test_the_fastest_tier_that_has_a_block_gives_it() -> None:
    w = tiered(rule("host", blocks=2), rule("disk"))
    served(w, "r", 17)
    flush(w)
    restore = begin(w, "again", 20, keys=keys(4, GROUP)).one(Restore)
    assert [(s.tier, len(s.slots)) for s in restore.shelves] == [("host", 2), ("disk", 2)]
    here = w(Restored("again", 1, 3, moved(restore), "late"))
    assert here.one(Step).rows[0].start == 12
    assert [(e.tier, e.tokens) for e in here.noted(TierHit)] == [("host", 8), ("disk", 4)]
    assert [(e.tokens, e.why) for e in here.noted(TierPassed)] == [(4, "late")]


def test_others_run_while_one_waits_for_a_tier() -> None:
    w = tiered()
    served(w, "r", 13)
    flush(w)
    begin(w, "again", 15, keys=keys(3, GROUP))
    step = begin(w, "new", 6).one(Step)
    assert [row.request_id for row in step.rows] == ["new"]
    assert not w(Restored("again", 1, 3)).of(Step)
    after = w(over(step)).one(Step)
    assert [row.request_id for row in after.rows] == ["again"] and after.carried == 1


def test_found_on_disk_at_the_start() -> None:
    w = worker(tiers=rules(rule("disk", blocks=4)))
    w(TierReady("disk", (3,), keys(1, GROUP), last=False))
    assert not begin(w, "early", 6, keys=()).of(Store), "not ready yet"
    w(over(w.heard.one(Step), ends=["early"]))
    told = w(TierReady("disk", (1,), keys(2, GROUP)[1:])).told(KvEvents).one()
    assert (told.tier, set(told.added)) == ("disk", set(keys(2, GROUP)))
    restore = begin(w, "r", 10).one(Restore)
    assert (restore.shelves[0].slots, restore.keys) == ((3, 1), keys(2, GROUP))


# --- what is worth it -----------------------------------------------------------------------------


def test_what_is_computed_sooner_is_computed() -> None:
    w = tiered(cost=1e-9)
    served(w, "r", 13)
    flush(w)
    effects = begin(w, "again", 15, keys=keys(3, GROUP))
    assert not effects.of(Restore)
    assert effects.one(Step).rows[0].count == 15
    passed = effects.noted(TierPassed)[0]
    assert (passed.tokens, passed.why) == (12, "sooner") and "to compute" in passed.detail


def test_always_means_always() -> None:
    w = tiered(cost=1e-9, always=True)
    served(w, "r", 13)
    flush(w)
    assert begin(w, "again", 15, keys=keys(3, GROUP)).of(Restore)


def test_a_tier_that_proved_slow_is_passed_over_and_tried_again() -> None:
    """One bad load teaches; and since a tier that is not used is not measured, it is not for ever
    that it stays unused."""
    w = tiered(cost=1e-3)
    served(w, "r", 13)
    flush(w)
    restore = begin(w, "slow", 15, keys=keys(3, GROUP)).one(Restore)
    assert restore.deadline == pytest.approx(w.now + 12e-3 + 0.5, rel=0.05)
    w(Restored("slow", 1, 0, (Moved("host", 0, 0.5),), "late"), after=0.5)
    w(over(w.heard.of(Step)[-1], ends=["slow"]))
    loads = []
    for i in range(150):
        flush(w, f"flush{i}")
        effects = begin(w, f"r{i}", 15, keys=keys(3, GROUP))
        loads.append(bool(effects.of(Restore)))
        if loads[-1]:
            break
        w(over(w.heard.of(Step)[-1], ends=[f"r{i}"]))
    assert len(loads) > 50 and loads[-1]


def test_what_computing_takes_is_measured() -> None:
    w = tiered(cost=1e-6)
    served(w, "r", 13)
    assert w.node.tiers._cost(0, 100) == pytest.approx(100e-6, rel=0.1)
    for i in range(20):
        begin(w, f"x{i}", 40, keys=())
        w(over(w.heard.of(Step)[-1], ends=[f"x{i}"]), after=0.4)
    assert w.node.tiers._cost(0, 100) == pytest.approx(1.0, rel=0.02)


def test_reused_blocks_alone_are_written_if_so_wanted() -> None:
    w = tiered(rule("host", write="reused"))
    served(w, "r", 13)
    assert not w.heard.of(Store)
    served(w, "again", 15, keys=keys(3, GROUP))
    assert sum((copy.keys for copy in w.heard.of(Store)), ()) == keys(3, GROUP)


def test_a_tier_that_is_never_written_is_read() -> None:
    w = worker(tiers=rules(rule("disk", write="never")))
    w(TierReady("disk", (0,), keys(1, GROUP)))
    served(w, "other", 13)
    assert not w.heard.of(Store) and begin(w, "r", 10).of(Restore)


# --- preemption -----------------------------------------------------------------------------------


def test_preempted_by_swap() -> None:
    """Two sequences decode in too little memory. The younger makes room, the older takes its
    blocks, and when it has ended they come out of the tier."""
    w = tiered(blocks=8, steps_max=1)
    for name, tokens in (("old", 10), ("young", 13)):
        begin(w, name, tokens)
        w(over(w.heard.of(Step)[-1]))
        stored(w)
    while w.node.works["old"].known < 30:
        w(over(w.heard.of(Step)[-1]))
        stored(w)
    (preempted,) = w.heard.noted(Preempted)
    assert preempted.request_id == "young" and not w.heard.noted(Recomputed)
    restore = w(over(w.heard.of(Step)[-1], ends=["old"])).one(Restore)
    assert (restore.request_id, restore.keys) == ("young", keys(3, sum(map(ord, "young"))))
    back = w(Restored("young", 1, 3, moved(restore)))
    assert back.noted(TierHit)[0].preempted
    assert [e.tokens for e in back.noted(Recomputed)] == [preempted.tokens - 12]
    report = w(over(back.one(Step), ends=["young"])).told(Finished).one().report
    assert (report.preemptions, report.recomputed_tokens) == (1, preempted.tokens - 12)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "count"), [("late", 1), ("damaged", 1), ("gone", 0)])
def test_what_does_not_come_is_computed(fault: Any, count: int) -> None:
    w = tiered()
    served(w, "r", 13)
    flush(w)
    restore = begin(w, "again", 15, keys=keys(3, GROUP)).one(Restore)
    here = w(Restored("again", 1, count, moved(restore), fault))
    assert here.one(Step).rows[0].start == 4 * count
    assert here.noted(TierPassed)[0].why == fault
    w(over(here.one(Step), ends=["again"]))
    flush(w, "flush2")
    host = w.node.tiers.states["host"].cache
    assert (host.find(keys(3, GROUP)[1]) is None) == (fault == "damaged"), "never again"


def test_a_damaged_block_is_written_anew() -> None:
    w = tiered()
    served(w, "r", 13)
    flush(w)
    restore = begin(w, "again", 15, keys=keys(3, GROUP)).one(Restore)
    gone = w(Restored("again", 1, 1, moved(restore), "damaged")).told(KvEvents).messages
    assert [e.removed for e in gone if e.tier == "host"] == [(keys(3, GROUP)[1],)]
    copy = w(over(w.heard.of(Step)[-1])).one(Store)
    assert copy.keys == (keys(3, GROUP)[1],)


def test_an_abort_while_it_loads_waits_for_the_tier() -> None:
    w = tiered()
    served(w, "r", 13)
    flush(w)
    begin(w, "again", 15, keys=keys(3, GROUP))
    effects = w(Abort(1, "again", 1, "x"))
    assert Release("again", 1) in effects and w.node.pool.held == 4, "bytes may still be written"
    after = w(Restored("again", 1, 0, (), "released"))
    assert w.node.pool.held == 0 and not w.node.quarantine and not after.of(Step)


def test_blocks_that_are_copied_are_not_evicted() -> None:
    w = tiered(blocks=8)
    begin(w, "r", 13)
    w(over(w.heard.one(Step), ends=["r"]))
    copy = w.heard.of(Store)[0]
    assert w.node.pool.available == 8 - len(copy.blocks) and w.node.pool.held == 0
    effects = begin(w, "big", 31, keys=())
    assert not effects.of(Step), "no room while they are read"
    assert w(Stored(copy.id, len(copy.keys))).of(Step) or w.heard.of(Store)[1:]


def test_a_copy_that_failed_names_nothing() -> None:
    w = tiered()
    begin(w, "r", 13)
    copy = w(over(w.heard.one(Step))).of(Store)[0]
    told = w(Stored(copy.id, 1))
    assert [e.added for e in told.told(KvEvents).messages] == [copy.keys[:1]]
    assert w.node.tiers.states["host"].cache.pool.cached_keys == 1


def test_a_tier_that_is_gone_stays_gone() -> None:
    w = tiered(rule("host"), rule("disk"))
    served(w, "r", 13)
    flush(w)
    gone = w(TierGone("disk", "No space left on device"))
    assert gone.noted(TierOff)[0].reason == "No space left on device"
    assert gone.told(KvEvents).one().removed and gone.told(KvEvents).one().tier == "disk"
    w(TierReady("disk"))
    assert list(w.node.tiers.states) == ["host"]
    before = len(w.heard)
    served(w, "next", 13)
    assert {copy.tier for copy in Effects(w.heard[before:]).of(Store)} == {"host"}


def test_a_tier_that_goes_while_it_is_used() -> None:
    w = tiered()
    served(w, "r", 13)
    flush(w)
    begin(w, "again", 15, keys=keys(3, GROUP))
    begin(w, "new", 13)
    copying = w(over(w.heard.of(Step)[-1])).of(Store)
    w(TierGone("host", "x"))
    assert not w.node.tiers.states
    for copy in copying:
        w(Stored(copy.id, 0))
    w(Restored("again", 1, 0, (), "gone"))
    w(over(w.heard.of(Step)[-1], ends=["new"]))
    assert w.heard.of(Step)[-1].rows[0].start == 0


# --- a tier that all share ------------------------------------------------------------------------


def shared_rule(blocks: int = 64, latency_s: float = 0.01) -> TierRule:
    return TierRule("cluster", blocks, 1e6, "lru", "always", "store", latency_s)


def asked(w: Driven[Worker], request_id: str = "r", tokens: int = 15) -> Ask:
    return begin(w, request_id, tokens, keys=keys(3, GROUP)).one(Ask)


def test_a_shared_tier_is_asked_and_what_it_has_is_loaded() -> None:
    w = tiered(shared_rule())
    ask = asked(w)
    assert ask.keys == keys(3, GROUP) and w.node.pool.held == 0
    assert beat(w, after=0.0).told(Load).one().waiting == 1
    restore = w(Held("r", 1, "cluster", 2, 0.01)).one(Restore)
    assert restore.keys == keys(3, GROUP)[:2]
    assert restore.shelves[0].slots == (NOWHERE, NOWHERE)
    step = w(Restored("r", 1, 2, moved(restore))).one(Step)
    assert step.rows[0].start == 8
    copy = w(over(step)).one(Store)
    assert copy.keys == keys(3, GROUP)[2:] and copy.slots == (NOWHERE,), "only what it lacks"
    assert not w(Stored(copy.id, 1, 40, 0.01)).told(KvEvents).messages, "no index knows of it"


def test_what_a_shared_tier_lacks_is_computed_without_asking_twice() -> None:
    w = tiered(shared_rule())
    asked(w)
    effects = w(Held("r", 1, "cluster", 0, 0.01))
    assert not effects.of(Ask) and effects.one(Step).rows[0].count == 15


def test_a_local_tier_gives_what_it_has_and_a_shared_one_the_rest() -> None:
    w = tiered(rule("host", blocks=2), shared_rule())
    asked(w)
    w(Held("r", 1, "cluster", 0, 0.01))
    w(over(w.heard.of(Step)[-1], ends=["r"]), after=15.0)
    stored(w)
    flush(w)
    ask = begin(w, "again", 20, keys=keys(4, GROUP)).one(Ask)
    assert ask.keys == keys(4, GROUP)[2:]
    restore = w(Held("again", 1, "cluster", 2, 0.01)).one(Restore)
    assert [(s.tier, len(s.slots)) for s in restore.shelves] == [("host", 2), ("cluster", 2)]


def test_what_a_shared_tier_lost_after_it_was_asked_is_stored_anew() -> None:
    w = tiered(shared_rule())
    asked(w)
    restore = w(Held("r", 1, "cluster", 3, 0.01)).one(Restore)
    step = w(Restored("r", 1, 1, moved(restore), "damaged")).one(Step)
    assert step.rows[0].start == 4
    w(over(step))
    assert [copy.keys for copy in w.heard.of(Store)] == [keys(3, GROUP)[1:2]]


def test_who_asks_keeps_its_place_and_others_run() -> None:
    w = tiered(shared_rule())
    asked(w)
    assert [r.request_id for r in begin(w, "new", 3, keys=()).one(Step).rows] == ["new"]
    w(Held("r", 1, "cluster", 0, 0.01))
    after = w(over(w.heard.of(Step)[-1])).one(Step)
    assert [row.request_id for row in after.rows] == ["r"]


def test_an_abort_while_it_asks_leaves_nothing() -> None:
    w = tiered(shared_rule())
    asked(w)
    w(Abort(1, "r", 1, "x"))
    assert not w.node.works and not w.node.quarantine
    assert not w(Held("r", 1, "cluster", 3, 0.01)).of(Restore) and not w.node.tiers.asking


def test_a_prompt_too_short_to_gain_is_not_asked_for() -> None:
    w = tiered(shared_rule(latency_s=100.0))
    assert begin(w, "r", 15).one(Step)


def test_asking_in_vain_is_unlearned_and_bounded() -> None:
    """A store that has nothing is asked less and less, where little is to be gained."""
    w = tiered(shared_rule(latency_s=2.0))
    asks = 0
    for i in range(20):
        effects = begin(w, f"r{i}", 15, keys=keys(3, i))
        asks += bool(effects.of(Ask))
        if effects.of(Ask):
            w(Held(f"r{i}", 1, "cluster", 0, 2.0))
        w(over(w.heard.of(Step)[-1], ends=[f"r{i}"]), after=15.0)
        stored(w)
        flush(w, f"flush{i}")
    assert 1 <= asks <= 10


def test_a_shared_tier_that_failed_is_tried_again_ever_later() -> None:
    w = tiered(shared_rule())
    waits = []
    for attempt in range(8):
        gone = w(TierGone("cluster", "connection refused"))
        assert len(gone.noted(TierOff)) == (attempt == 0), "one alarm"
        (timer,) = [t for t in gone.of(Timer) if t.name != "beat"]
        waits.append(timer.at - w.now)
        assert w(Alarm(timer.name), after=waits[-1]).one(Reopen).tier == "cluster"
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert w(TierReady("cluster")).noted(TierBack)
    assert begin(w, "back", 15).of(Ask)


def test_a_shared_tier_that_goes_while_it_is_used() -> None:
    w = tiered(shared_rule())
    asked(w)
    restore = w(Held("r", 1, "cluster", 3, 0.01)).one(Restore)
    w(TierGone("cluster", "x"))
    (timer,) = [t for t in w.heard.of(Timer) if t.name != "beat"]
    w(Alarm(timer.name), after=1.0)
    w(TierReady("cluster"))
    step = w(Restored("r", 1, 0, moved(restore), "gone")).one(Step)
    assert step.rows[0].start == 0 and w.node.tiers.states["cluster"].expected == 0


def test_an_index_that_lost_count_is_told_all_tiers() -> None:
    w = tiered()
    served(w, "r", 13)
    told = w(KvResync(1)).told(KvEvents).messages
    assert [(e.tier, e.reset, len(e.added)) for e in told] == [
        ("device", True, 3), ("host", False, 3),
    ]  # fmt: skip
    assert told[1].seq == told[0].seq + 1


def test_prefill_workers_load_too() -> None:
    w = tiered()
    served(w, "r", 13)
    flush(w)
    w(dispatch(request("again", 15, keys=keys(3, GROUP)), "prefill"))
    restore = w(prompt(15, "again")).one(Restore)
    step = w(Restored("again", 1, 3, moved(restore))).one(Step)
    assert w(over(step)).told(PrefillDone).one().report.cached_tokens == 12
