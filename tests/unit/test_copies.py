"""Copies by hand: what is counted, what is worth it, what a worker does with an order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from kvasir.core.copies import Copied, Copy, Leave, Left
from kvasir.core.effects import Fetch, Quit, Release, Restore, Send, Step
from kvasir.core.events import BlocksCopied, CopiesUsed, CopyFailed, CopyOrdered
from kvasir.core.messages import (
    Accepted,
    Active,
    Alarm,
    Drain,
    Ended,
    Finished,
    KvEvents,
    KvGone,
    KvWant,
    Load,
    Lost,
    Prompt,
    Received,
    Refused,
    SendOver,
    Start,
    Usage,
)
from kvasir.core.specs.copies import CopiesSpec
from kvasir.core.tiers import Restored
from kvasir.kv.heat import Heat, depths
from kvasir.kv.recent import Recent
from kvasir.measure.calibration import models_of
from kvasir.node.conductor import Conductor
from kvasir.node.worker import Worker
from kvasir.policy.copies import Used, Way, bring, pays, rescue, spread
from kvasir.policy.turns import Gaps, fetch_after_s, learned
from tests.nodes import BLOCK, REPORT, TOKEN_BYTES, Driven, dispatch, keys, request
from tests.unit.test_conductor_node import beat, deployment, join, submit
from tests.unit.test_tiers_node import flush, moved, served, stored, tiered
from tests.unit.test_worker_node import begin, over, worker

# --- counting -------------------------------------------------------------------------------------


def test_uses_are_counted_by_prefix_and_halve() -> None:
    heat = Heat(10.0, 100)
    heat.use(keys(3, 1), 0.0)
    assert heat.use(keys(2, 1), 0.0) == [(1, 2.0), (2, 2.0)]
    assert heat.use(keys(3, 1), 10.0) == [(1, 2.0), (2, 2.0), (3, 1.5)]
    assert heat.use(keys(3, 2), 10.0)[0] == (1, 1.0), "other blocks"


def test_counts_are_bounded_and_the_oldest_go() -> None:
    heat = Heat(10.0, 4)
    heat.use(keys(3, 1), 0.0)
    heat.use(keys(3, 2), 1.0)
    assert len(heat) == 4
    assert [uses for _, uses in heat.use(keys(3, 2), 1.0)] == [2.0, 2.0, 2.0]


def test_depths_are_dense_first_and_within_an_eighth_later() -> None:
    assert depths(5) == (1, 2, 3, 4, 5)
    found = depths(6250)
    assert found[:16] == tuple(range(1, 17)) and len(found) < 80
    assert all(b <= a + max(1, a // 8) for a, b in pairwise(found))


def test_of_a_session_the_longest_prompt_is_kept_and_of_all_the_latest() -> None:
    recent = Recent(10, 8)
    recent.keep(request("a", 12, session="s"))
    recent.keep(request("b", 20, session="s"))
    recent.check()
    assert [r.id for r in recent.latest_first()] == ["b"]
    recent.keep(request("c", 12), keys(1, 9))
    recent.check()
    assert [(r.id, len(r.keys)) for r in recent.latest_first()] == [("c", 4), ("b", 5)]
    recent.keep(request("d", 12))
    recent.check()
    assert [r.id for r in recent.latest_first()] == ["d", "c"], "10 blocks hold no more"
    recent.keep(request("e", 4 * 11))
    assert recent.of("s") is None and len(recent) == 2, "one that is larger than all is not kept"


# --- the policy -----------------------------------------------------------------------------------


class Target(NamedTuple):
    id: str
    prefill_s: float = 0.0


class View(NamedTuple):
    """A block takes 1 s to compute and `copy_s` to copy."""

    depths: Mapping[str, int]
    targets: Sequence[Target] = (Target("p", 5.0), Target("p2"), Target("p3", 1.0))
    computing: str = ""
    stored: Mapping[str, int] = {}
    copy_s: float = 0.1
    crowded: float = 1.0
    spec: CopiesSpec = CopiesSpec(hot=True, uses_per_copy=4.0)

    def way(self, source: str, target: str, blocks: int) -> Way:
        idle_s = (blocks - self.depths.get(target, 0)) * self.copy_s
        return Way(idle_s * self.crowded, idle_s)

    def saved_s(self, target: str, blocks: int) -> float:
        return float(blocks - self.depths.get(target, 0))


USED = [Used(1, 30.0), Used(2, 9.0), Used(3, 8.0), Used(4, 3.0)]


def test_the_longest_hot_part_goes_to_the_least_loaded() -> None:
    plan = spread(View({"p": 4}), USED)
    assert plan is not None and plan[:3] == (3, "p", "p2")


@pytest.mark.parametrize(
    ("view", "why"),
    [
        (View({}), "nobody has it"),
        (View({"p": 4, "p2": 4, "p3": 4}), "all have it"),
        (View({"p": 4}, targets=(Target("p"), Target("p2", 1.0))), "who has it is idle"),
        (View({"p": 4}, computing="p2"), "it is being computed there"),
        (View({"p": 4}, copy_s=1.5), "computing is sooner"),
        (View({"p": 4}, crowded=3.0), "the path is busy"),
        (View({"p": 4}, spec=CopiesSpec(uses_per_copy=20.0)), "not hot enough for two"),
        (View({"p": 4}, spec=CopiesSpec(uses_per_copy=1.0, copies_max=1)), "one copy is allowed"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_nothing_is_spread_where(view: View, why: str) -> None:
    assert spread(view, USED) is None


def test_a_shorter_part_may_deserve_more_copies() -> None:
    view = View({"p": 4, "p2": 3}, targets=(Target("p", 5.0), Target("p2", 2.0), Target("p3", 1.0)))
    plan = spread(view, USED)
    assert plan is not None and plan.blocks == 1 and plan.target == "p3"


def test_all_that_anybody_has_is_brought_from_the_nearest() -> None:
    assert bring(View({"p": 4}), "p") is None
    assert bring(View({}), "p") is None
    plan = bring(View({"d": 6, "p": 4}), "p")
    assert plan is not None and plan[:3] == (6, "d", "p")
    tier = bring(View({"d": 6, "p": 4}, stored={"p": 7, "d": 6}), "p")
    assert tier is not None and tier[:3] == (7, "p", "p"), "its own tiers have more"
    assert bring(View({"p": 7}, stored={"p": 7}), "p") is None, "it is on the device"


def test_what_only_a_leaving_worker_has_goes_to_who_has_most_of_it() -> None:
    plan = rescue(View({"p": 4, "p3": 2}, targets=(Target("p2"), Target("p3", 9.0))), "p")
    assert plan is not None and plan[:3] == (4, "p", "p3")
    assert rescue(View({"p": 4, "p3": 4}), "p") is None
    assert rescue(View({"p": 4}, targets=(Target("p"),)), "p") is None, "nobody else is there"
    assert rescue(View({"p": 4}, copy_s=2.0), "p") is None
    assert pays(View({}, copy_s=2.0), "p", "p2", 3) is None


def test_a_turn_is_prepared_by_its_own_gaps_when_they_are_known() -> None:
    regular = Gaps()
    for _ in range(30):
        regular = learned(regular, 10.0)
    assert regular.mean_s == 10.0 and regular.deviation_s < 0.01
    everyone = Gaps(4.0, 1.0, 100)
    assert fetch_after_s(regular, everyone) == pytest.approx(10.0, abs=0.05)
    assert fetch_after_s(Gaps(10.0, 1.0, 1), everyone) == 2.0
    assert fetch_after_s(Gaps(), Gaps()) == 0.0
    irregular = Gaps()
    for gap_s in (1.0, 30.0) * 20:
        irregular = learned(irregular, gap_s)
    assert fetch_after_s(irregular, everyone) == 0.0


# --- the worker -----------------------------------------------------------------------------------

KEYS = keys(3, 5)
NAME = "copy/1.1"


def ordered(w: Driven[Worker], name: str = NAME, of: tuple[bytes, ...] = KEYS) -> Any:
    return w(Copy(1, name, "peer", of, "hot", "default"))


def taking(**more: Any) -> Driven[Worker]:
    return worker(copies_share_max=0.5, **more)


def test_what_was_copied_is_cached_and_told_and_its_use_too() -> None:
    w = taking()
    effects = ordered(w)
    fetch = effects.one(Fetch)
    assert (fetch.request_id, fetch.source, len(fetch.blocks)) == (NAME, "peer", 3)
    assert fetch.bytes == 3 * BLOCK * TOKEN_BYTES
    want = effects.told(KvWant)
    assert want.to == ["peer"] and want.one().keys == KEYS
    assert w.node.pool.held == 3
    came = w(Received(NAME, 1, True, fetch.bytes, 0.5, "shm"))
    assert came.one(Release) == Release(NAME, 1)
    said = came.told(Copied).one()
    assert (said.blocks, said.bytes, said.seconds, said.reason) == (3, fetch.bytes, 0.5, "")
    assert came.noted(BlocksCopied)[0].purpose == "hot"
    assert came.told(KvEvents).one().added == KEYS and w.node.pool.held == 0
    begun = begin(w, "r", 13, keys=KEYS)
    assert begun.one(Step).rows[0].start == 12, "it is computed nowhere"
    assert begun.noted(CopiesUsed) == [CopiesUsed("w", "hot", 3, 0)]
    w(over(begun.one(Step), ends=["r"]))
    assert not begin(w, "s", 13, keys=KEYS).noted(CopiesUsed), "counted once"


def test_what_is_evicted_before_it_is_used_is_wasted() -> None:
    w = taking()
    ordered(w)
    w(Received(NAME, 1, True, 100, 0.5, "shm"))
    effects = begin(w, "big", 4 * 32 - 1, keys=keys(31, 77))
    assert effects.noted(CopiesUsed) == [CopiesUsed("w", "hot", 0, 3)]
    assert not w.node.replicas.unused


@pytest.mark.parametrize("fault", ["gone", "broken", "late"])
def test_what_does_not_come_leaves_nothing(fault: str) -> None:
    w = taking(kv_wait_s=5.0)
    ordered(w)
    if fault == "gone":
        assert w(KvGone(NAME, 1, "no longer cached")).one(Release) == Release(NAME, 1)
    if fault == "late":
        assert not w(Alarm("beat"), after=4.0).of(Release)
        assert w(Alarm("beat"), after=2.0).one(Release) == Release(NAME, 1)
    assert w.node.pool.held == 3, "until the transfer is known to be over"
    effects = w(Received(NAME, 1, False, reason="peer lost"))
    assert effects.told(Copied).one().reason == "peer lost"
    assert effects.noted(CopyFailed) and not effects.told(KvEvents)
    assert w.node.pool.held == 0 and w.node.pool.cached_keys == 0


def test_what_a_tier_has_comes_back_before_it_is_asked_for() -> None:
    w = tiered(blocks=8)
    w.node.replicas._room, w.node.blocks.hit = 4, w.node.replicas.used
    served(w, "r", 13, keys=KEYS)
    stored(w)
    flush(w)
    own = Copy(1, NAME, "w", KEYS, "next_turn", "default")
    effects = w(own)
    restore = effects.one(Restore)
    assert restore.keys == KEYS and not effects.of(Fetch)
    assert not w(own), "said twice"
    came = w(Restored(NAME, 1, 3, moved(restore)))
    assert came.told(Copied).one().blocks == 3 and w.node.pool.held == 0
    begun = begin(w, "again", 13, keys=KEYS)
    assert begun.one(Step).rows[0].start == 12
    assert begun.noted(CopiesUsed) == [CopiesUsed("w", "next_turn", 3, 0)]


@pytest.mark.parametrize("fault", ["damaged", "late", "gone"])
def test_what_a_tier_does_not_give_leaves_nothing(fault: Any) -> None:
    w = tiered(blocks=8)
    w.node.replicas._room = 4
    served(w, "r", 13, keys=KEYS)
    stored(w)
    flush(w)
    w(Copy(1, NAME, "w", KEYS, "next_turn", "default"))
    effects = w(Restored(NAME, 1, 0, (), fault))
    assert effects.told(Copied).one().reason == fault
    assert w.node.pool.held == 0 and not w.node.replicas.unused and not w.node.replicas.busy
    assert worker_without_tiers().told(Copied).one().reason.startswith("no tier")


def worker_without_tiers() -> Any:
    return taking()(Copy(1, NAME, "w", KEYS, "next_turn", "default"))


def test_an_order_said_twice_and_one_that_is_there_already() -> None:
    w = taking()
    assert ordered(w).of(Fetch)
    again = ordered(w)
    assert not again
    w(Received(NAME, 1, True, 100, 0.5, "shm"))
    assert ordered(w, "copy/1.2").told(Copied).one().reason == "it is here"
    longer = ordered(w, "copy/1.3", keys(5, 5))
    assert longer.one(Fetch).first_block == 3 and len(longer.one(Fetch).blocks) == 2


def test_a_worker_that_has_no_room_says_so() -> None:
    w = taking()
    full = ordered(w, of=keys(17, 5))
    assert full.told(Copied).one().reason == "too many unused copies" and not full.of(Fetch)
    assert worker()(Copy(1, NAME, "p", KEYS, "hot", "")).told(Copied).one().reason, "off: no room"
    w(dispatch(request("a", 31 * BLOCK), "both"))
    w(Prompt("a", 1, 31 * BLOCK))
    assert ordered(w).told(Copied).one().reason == "no room"
    draining = taking()
    draining(Drain(1))
    assert ordered(draining).told(Copied).one().reason == "draining"


def test_a_worker_leaves_when_it_holds_nothing_for_anybody() -> None:
    w = taking()
    begun = begin(w, "r", 13, keys=KEYS)
    assert not w(Drain(1, leave=True)).of(Quit), "it serves"
    assert w(dispatch(request("s"), "both")).told(Refused).one().reason == "draining"
    w(over(begun.one(Step), ends=["r"]))
    lent = w(KvWant("copy/1.9", 1, "peer", 0, keys=KEYS))
    assert lent.of(Send) and not w(Drain(1, leave=True)).of(Quit), "it lends"
    w(SendOver("copy/1.9", 1, True))
    gone = w(Drain(1, leave=True))
    assert gone.told(Left).one() == Left("w", 1) and gone.of(Quit)
    assert w(Alarm("beat"), after=1.0) == [], "it is over"


# --- the conductor --------------------------------------------------------------------------------


def copying(**copies: Any) -> Driven[Any]:
    d = deployment({"dead_after_s": 1e6})
    policy = d.policy.model_copy(update={"copies": CopiesSpec(**copies)})
    d = d.model_copy(update={"policy": policy})
    c = Driven(Conductor(d, models_of(d)))
    c(Start())
    for name in ("p", "d"):
        join(c, name)
    c.heard.clear()
    return c


def test_a_worker_that_is_to_leave_is_told_with_each_beat_until_it_has() -> None:
    c = copying()
    of = request(group=7)
    submit(c, of)
    c(Accepted("p", of.id, 1))
    assert c(Leave("p", 30.0)).told(Drain).one() == Drain(1, leave=False)
    assert c(_beat(c, "p", of), after=1.0).told(Drain).one() == Drain(1, leave=False)
    c(Ended("r", 1, "stop", Usage(10, 0, 5)))
    assert c(_beat(c, "p"), after=1.0).told(Drain).one() == Drain(1, leave=True)
    assert c(_beat(c, "p"), after=1.0).told(Drain).one() == Drain(1, leave=True), "again"
    c(Left("p", 1))
    assert "p" not in c.node.members and not c.node.leaving.going
    assert not c(Left("p", 1)), "twice is once"
    assert not c(Leave("nobody", 1.0))


def test_what_runs_there_when_time_is_over_goes_on_elsewhere() -> None:
    c = copying()
    of = request(group=7)
    submit(c, of)
    c(Leave("p", 2.0))
    assert not c(_beat(c, "p", of), after=1.0).told(Lost)
    late = c(_beat(c, "p", of), after=1.5)
    assert late.told(Lost).one().reason == "p leaves" and not late.told(Lost).one().died
    assert late.told(Drain).one().leave


def _beat(c: Driven[Any], name: str, *of: Any) -> Load:
    active = tuple(Active(r.id, 1) for r in of)
    return Load(name, c.node.members[name].incarnation, 0, 0, 32, active=active)


def test_of_a_worker_that_tells_no_news_a_copy_is_taken_to_be_there() -> None:
    c = copying(next_turn=True)
    join(c, "p", kv_events=False, incarnation=2)
    of = request(group=7, session="s")
    c(KvEvents("d", 1, 1, of.keys))
    submit(c, request("other"))
    c(Ended("other", 1, "stop", Usage(10, 0, 5)))
    c.node.copies.recent.keep(of)
    c.node.copies.ended(of, Finished("d", of.id, 1, "stop", 5, REPORT), c.now)
    (name,) = c.node.copies.orders
    assert c.node.index.match(of.keys) == {"d": 2}
    c(Copied("p", 2, name, "d", 2, 320, 0.1, "shm"))
    assert c.node.index.match(of.keys) == {"d": 2, "p": 2} and not c.node.copies.orders


def test_an_order_that_is_never_answered_is_forgotten() -> None:
    c = copying(next_turn=True)
    of = request(group=7, session="s")
    submit(c, of)
    c(KvEvents("d", 1, 1, of.keys))
    c(Finished("d", of.id, 1, "stop", 5, REPORT))
    effects = c(Ended("r", 1, "stop", Usage(10, 0, 5)))
    assert effects.told(Copy).to == ["p"] and effects.noted(CopyOrdered)
    assert len(c.node.copies.orders) == 1 == c.node.oracle.inbound("p").transfers
    for _ in range(120):
        beat(c, after=1.0)
    assert c.node.copies.orders and "p" in c.node.members, "its time is not over"
    for _ in range(10):
        beat(c, after=1.0)
    assert not c.node.copies.orders and not c.node.oracle.inbound("p").transfers
