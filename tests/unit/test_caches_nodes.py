"""Kept prefixes by hand: the conductor's book and a worker's pins, each with the messages that can
come late, twice or never; and the rules that both ask."""

from __future__ import annotations

from typing import Any

import pytest

from kvasir.core.caches import CacheState, Keep, Kept, Mark, Pin, Retain
from kvasir.core.messages import (
    Alarm,
    Arrive,
    Declined,
    Dispatch,
    Ended,
    Load,
    Lost,
    Placed,
    Submit,
    Usage,
    WorkerGone,
)
from kvasir.core.specs import Deployment, LimitsSpec, ModelSpec, PolicySpec, PoolSpec, RouteSpec
from kvasir.core.specs.deployment import FittedCost
from kvasir.core.specs.tenants import CachesSpec, TenantSpec
from kvasir.measure.calibration import models_of
from kvasir.node.conductor import Conductor
from kvasir.node.request import Requests
from kvasir.policy.caches import Asked, gives_way, has_room, may_keep
from tests.nodes import BLOCK, GATEWAY, Driven, dispatch, hello, keys, request
from tests.unit.test_worker_node import begin, over, prompt, worker

GRACE_S = 3.0


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(0, 1, 0, 10, 10), ""),
        (Asked(1, 1, 0, 0, 10), "1 caches are kept already"),
        (Asked(0, 1, 1, 10, 10), "needs 10 KV blocks more, and 1 of at most 10"),
        (Asked(5, 9, 10, 0, 10), ""),
        (Asked(0, 0, 0, 1, 10), "the limit"),
    ],
)
def test_a_tenant_may_keep_so_much(asked: Asked, words: str) -> None:
    verdict = may_keep(asked)
    assert (verdict.status == 429) == bool(words) and words in verdict.reason


def test_a_worker_keeps_a_share_and_what_ends_first_gives_way() -> None:
    assert has_room(0, 25, 100, 0.25) and not has_room(1, 25, 100, 0.25)
    assert has_room(0, 0, 100, 0.0) and not has_room(0, 1, 100, 0.0)
    assert gives_way([(3.0, "a"), (2.0, "c"), (2.0, "b")]) == "b"


# --- the conductor --------------------------------------------------------------------------------


def conductor(**caches: Any) -> Driven[Conductor]:
    d = Deployment(
        models=(ModelSpec(name="m", shape="tiny"),),
        pools=tuple(PoolSpec(name=role, role=role, count=2, kv_blocks=32, cost=FittedCost())
                    for role in ("prefill", "decode")),
        policy=PolicySpec(route=RouteSpec(name="least_loaded")),
        limits=LimitsSpec(grace_s=GRACE_S, dead_after_s=1000.0), block_size=BLOCK,
        caches=CachesSpec(**caches), tenants=(TenantSpec(name="ann"), TenantSpec(name="bob")),
    )  # fmt: skip
    c = Driven(Conductor(d, models_of(d)))
    for name in ("p", "p2"):
        c(hello(name, "prefill", pool="prefill"))
    c(hello("d", "decode", pool="decode"))
    c.heard.clear()
    return c


def submit(
    c: Driven[Conductor], name: str = "r", *marks: Mark, tenant: str = "ann", tokens: int = 10
) -> Dispatch:
    of = request(name, tokens, 1 if marks else 5, group=1, tenant=tenant)
    told = c(Submit(of, marks=marks)).told(Dispatch)
    return next(d for d in told.messages if d.phase != "decode")


def must(cache: str = "c", blocks: int = 2, ttl_s: float = 60.0) -> Mark:
    return Mark(cache, blocks, ttl_s, must=True)


def kept(c: Driven[Conductor], at: str = "p", cache: str = "c", blocks: int = 2, why: str = "",
         incarnation: int = 1) -> Any:  # fmt: skip
    return c(Kept(at, incarnation, cache, blocks, why))


def load(c: Driven[Conductor], at: str, *pins: str, after: float = 0.0) -> Any:
    return c(Load(at, 1, 0, 0, 32, pins=pins), after=after)


def states(effects: Any) -> list[tuple[str, str]]:
    told = effects.told(CacheState)
    assert set(told.to) <= {GATEWAY}
    return [(m.cache, m.state) for m in told.messages]


def ready(**caches: Any) -> Driven[Conductor]:
    """One cache `c`, kept by `p`; its request is over."""
    c = conductor(**caches)
    ordered = submit(c, "r", must())
    assert (ordered.phase, ordered.pins) == ("both", (Pin("c", 2, 60.0),))
    assert states(kept(c)) == [("c", "ready")]
    c(Ended("r", 1, "length", Usage(10, 0, 1)))
    c.heard.clear()
    return c


def test_only_the_one_that_has_it_is_told_to_keep_it_longer() -> None:
    c = ready()
    told = c(Retain(GATEWAY, "ann", "c", 200.0), after=1.0)
    assert told.told(Keep).pairs == [("p", Keep(1, "c", 200.0))]
    assert told.told(CacheState).one().left_s == 200.0


def test_a_second_keeper_is_sent_home() -> None:
    c = ready()
    assert kept(c, "p2").told(Keep).pairs == [("p2", Keep(1, "c", 0.0))]
    assert kept(c, "p").told(Keep).pairs == []
    assert c.node.caches.pinned("p") == 2 and c.node.caches.pinned("p2") == 0


@pytest.mark.parametrize("says", ["kept", "load"])
def test_what_is_not_known_is_not_kept(says: str) -> None:
    c = conductor()
    told = kept(c, cache="old") if says == "kept" else load(c, "p", "old")
    assert told.told(Keep).pairs == [("p", Keep(1, "old", 0.0))]


def test_a_lost_kept_is_made_up_for_by_a_beat() -> None:
    c = conductor()
    submit(c, "r", must())
    assert states(load(c, "p", "c")) == [("c", "ready")]


def test_a_beat_without_it_means_that_it_is_lost_but_not_at_once() -> None:
    c = ready()
    assert states(load(c, "p", after=1.0)) == [], "the beat may be older than the word"
    assert states(load(c, "p", after=GRACE_S)) == [("c", "lost")]
    assert submit(c, "next").pins == (Pin("c", 2, 56.0),), "the next use makes it again"


def test_a_use_orders_no_second_copy_elsewhere() -> None:
    c = ready()
    first, second = submit(c, "u1"), submit(c, "u2")
    pins = {d.pins for d in (first, second)}
    assert pins == {(), (Pin("c", 2, 60.0),)}, "p refreshes, p2 keeps nothing"


def test_a_dead_worker_loses_it_and_an_old_life_says_nothing() -> None:
    c = ready()
    assert states(c(WorkerGone("p", 1, "died"))) == [("c", "lost")]
    assert len(kept(c)) == 0
    c(hello("p", "prefill", pool="prefill", incarnation=2))
    assert len(kept(c)) == 0, "of the first life"
    assert states(kept(c, incarnation=2)) == [("c", "ready")]


def test_it_ends_on_time_and_with_a_zero() -> None:
    c = ready()
    assert c(Alarm("beat"), after=59.0).told(Keep).pairs == []
    told = c(Alarm("beat"), after=1.1)
    assert told.told(Keep).pairs == [("p", Keep(1, "c", 0.0))] and states(told) == [("c", "ended")]
    d = ready()
    assert states(d(Retain(GATEWAY, "ann", "c", 0.0))) == [("c", "ended")]
    assert states(d(Retain(GATEWAY, "ann", "c", 0.0))) == [("c", "ended")], "and said again"


def test_another_tenant_neither_changes_it_nor_learns_of_it() -> None:
    c = ready()
    theirs = c(Retain(GATEWAY, "bob", "c", 0.0)).told(CacheState).one()
    nothing = c(Retain(GATEWAY, "bob", "x", 0.0)).told(CacheState).one()
    assert (theirs.state, nothing.state) == ("ended", "ended")
    assert (theirs.left_s, theirs.reason) == (nothing.left_s, nothing.reason)
    assert c.node.caches.pinned("p") == 2


def test_tokens_are_billed_as_kept_to_its_tenant_only() -> None:
    c = ready()
    submit(c, "a")
    submit(c, "b", tenant="bob")
    placed = {m.request_id: m.kept_tokens for m in c.heard.told(Placed).messages}
    assert placed == {"a": 8, "b": 0}


def test_a_worker_that_refuses_ends_what_was_asked_for_by_name() -> None:
    c = conductor()
    submit(c, "r", must())
    told = kept(c, blocks=0, why="full").told(CacheState).one()
    assert (told.state, told.status, told.reason) == ("refused", 429, "full")
    assert not c.node.caches.entries


def test_a_request_that_was_lost_does_not_leave_a_cache() -> None:
    c = conductor()
    submit(c, "r", must())
    told = c(WorkerGone("p", 1, "died"))
    assert told.told(Lost).to == [GATEWAY] and states(told) == [("c", "ended")]
    again = c(Submit(request("r", 10, 1, group=1, tenant="ann"), 2, marks=(must(),)))
    assert states(again) == [("c", "new")]


def test_two_requests_that_would_make_it_and_one_that_leaves() -> None:
    c = conductor()
    mark = Mark("eph", 2, 60.0)
    submit(c, "one", mark)
    submit(c, "two", mark)
    c(Ended("one", 1, "cancelled", Usage(10, 0, 0)))
    assert states(kept(c, "p2", "eph")) == [("eph", "ready")]


def test_blocks_are_counted_once_and_given_back() -> None:
    c = conductor(tenant_blocks_max=2, tenant_caches_max=3)
    submit(c, "r", must("c", 2), must("head", 1))
    other = Submit(request("q", 10, 1, group=7, tenant="ann"), marks=(must("other"),))
    assert c(other).told(Declined).one().status == 429
    bobs = Submit(request("s", 10, 1, group=7, tenant="bob"), marks=(must("bobs"),))
    assert len(c(bobs).told(Declined)) == 0
    c(Retain(GATEWAY, "ann", "c", 0.0))
    c(Retain(GATEWAY, "ann", "head", 0.0))
    third = Submit(request("t", 10, 1, group=7, tenant="ann"), marks=(must("third"),))
    assert len(c(third).told(Declined)) == 0


# --- a worker -------------------------------------------------------------------------------------


def pin(w: Any, name: str = "r", tokens: int = 10, group: int = 1, **order: Any) -> Any:
    """One request of ten tokens, prefilled, with an order to keep two blocks of it."""
    pins = (Pin(order.get("cache", "c"), order.get("blocks", 2), order.get("ttl_s", 30.0)),)
    w(dispatch(request(name, tokens, 1, group=group), pins=pins))
    w(prompt(tokens, name))
    return w(over(w.node.steps.step, ends=[name]))


def test_blocks_outlive_their_request_and_eviction() -> None:
    w = worker(kv_blocks=8)
    assert pin(w).told(Kept).one() == Kept("w", 1, "c", 2)
    assert w.node.pool.held == 2 and not w.node.works
    begin(w, "big", 23, output=1, group=5)
    w(over(w.node.steps.step, ends=["big"]))
    assert len(w.node.pool.match(keys(2, 1))) == 2
    load = w(Alarm("beat"), after=1.0).told(Load).one()
    assert (load.pins, load.pinned, load.kv_blocks_free) == (("c",), 2, 6)


def test_it_lets_go_when_told_or_when_time_is_over() -> None:
    w = worker()
    pin(w)
    w(Keep(1, "c", 5.0))
    w(Keep(0, "c", 0.0))
    assert w.node.pins.held, "an older conductor's word"
    w(Alarm("beat"), after=5.0)
    assert w.node.pool.held == 0
    assert w(Keep(1, "c", 5.0)).told(Kept).one().blocks == 0, "it is not there any more"
    assert len(w(Keep(1, "c", 0.0)).told(Kept)) == 0


def test_it_keeps_no_more_than_its_share() -> None:
    w = worker(kv_blocks=16)  # a quarter: 4 blocks
    pin(w, "r1", cache="a")
    assert pin(w, "r2", cache="b").told(Kept).one().blocks == 2, "the same blocks: no more"
    assert w.node.pins.blocks_count == 2
    pin(w, "r3", group=2, cache="d")
    assert pin(w, "r4", group=3, cache="e").told(Kept).one().blocks == 0
    w(Keep(1, "a", 0.0))
    assert w.node.pins.blocks_count == 4, "b has them still"


def test_an_order_twice_is_one_pin_for_longer() -> None:
    w = worker()
    pin(w, "r1", ttl_s=5.0)
    w.now += 4.0
    assert pin(w, "r2", ttl_s=5.0).told(Kept).one().blocks == 2
    assert len(w.node.pins.held) == 1 and w.node.pool.refs(w.node.pool.match(keys(1, 1))[0]) == 1
    w(Alarm("beat"), after=4.0)
    assert "c" in w.node.pins.held


def test_more_blocks_than_the_prompt_has_are_not_kept() -> None:
    w = worker()
    assert pin(w, blocks=3).told(Kept).one().blocks == 0


# --- a gateway ------------------------------------------------------------------------------------


def gateway() -> Driven[Requests]:
    return Driven(Requests(GATEWAY, 1, beat_s=1.0, grace_s=3.0, attempts_max=3, deaths_max=3))


def test_marks_go_with_each_attempt() -> None:
    g = gateway()
    marks = (must(),)
    assert g(Arrive(request(), marks)).told(Submit).one().marks == marks
    assert g(Lost("r", 1, "gone")).told(Submit).one().marks == marks


def test_a_change_is_said_until_it_is_answered() -> None:
    g = gateway()
    change = Retain(GATEWAY, "ann", "c", 0.0)
    assert g(change).told(Retain).one() == change
    assert g(Alarm("beat"), after=1.0).told(Retain).one() == change
    g(CacheState("c", "ended"))
    assert len(g(Alarm("beat"), after=1.0).told(Retain)) == 0


def test_what_is_known_of_a_cache_ends_with_it() -> None:
    g = gateway()
    g(CacheState("c", "ready", 10.0))
    g(Alarm("beat"), after=12.0)
    assert "c" in g.node.caches, "a word that it is kept longer may be on its way"
    g(Alarm("beat"), after=2.0)
    assert not g.node.caches
