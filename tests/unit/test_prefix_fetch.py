"""Prefixes between caches, by hand: what is fetched is as if it had always been there."""

import pytest

from kvasir.core.effects import Fetch, Release, Send, Step
from kvasir.core.ids import prefix_id
from kvasir.core.messages import (
    Abort,
    Alarm,
    Finished,
    KvGone,
    KvWant,
    Load,
    PrefillDone,
    Prompt,
    Received,
    Refused,
    SendOver,
    TransferReport,
)
from kvasir.node.worker import Worker
from tests.nodes import BLOCK, TOKEN_BYTES, Driven, Effects, dispatch, keys, request
from tests.unit.test_worker_node import begin, over, worker

NAME = prefix_id("r")
KEYS = keys(3, ord("r"))  # of a prompt of 13 tokens: three full blocks


def asked(w: Driven[Worker], blocks: int = 3) -> Effects:
    """A prompt of 13 tokens whose first `blocks` a peer is said to have."""
    w(dispatch(request(tokens=13), "prefill", prefix_from="peer", prefix_blocks=blocks))
    return w(Prompt("r", 1, 13))


def test_what_is_fetched_is_not_computed() -> None:
    w = worker()
    effects = asked(w)
    fetch = effects.one(Fetch)
    assert (fetch.request_id, fetch.source, fetch.first_block) == (NAME, "peer", 0)
    assert len(fetch.blocks) == 3 and fetch.bytes == 3 * BLOCK * TOKEN_BYTES
    want = effects.told(KvWant)
    assert want.to == ["peer"] and want.one().keys == KEYS
    assert not effects.of(Step), "it waits for the blocks"

    here = w(Received(NAME, 1, True, fetch.bytes, 0.01, "shm"), after=0.1)
    assert here.one(Release) == Release(NAME, 1)
    assert here.told(TransferReport).one().source == "peer"
    row = here.one(Step).rows[0]
    assert (row.start, row.count, row.request_id) == (12, 1, "r")
    report = w(over(here.one(Step))).told(PrefillDone).one().report
    assert (report.cached_tokens, report.computed_tokens) == (12, 1)
    assert report.queue_s == pytest.approx(0.1), "the fetch is a part of the wait"


def test_only_what_is_missing_is_fetched() -> None:
    w = worker()
    begin(w, "first", 8, keys=KEYS[:2])
    w(over(w.heard.one(Step), ends=["first"]))
    effects = asked(w)
    assert effects.one(Fetch).first_block == 2 and len(effects.one(Fetch).blocks) == 1
    assert effects.told(KvWant).one().keys == KEYS[2:]
    assert not asked(worker(), blocks=0).of(Fetch)


@pytest.mark.parametrize("fault", ["gone", "broken", "slow"])
def test_what_does_not_come_is_computed(fault: str) -> None:
    w = worker()
    asked(w)
    if fault == "gone":
        assert w(KvGone(NAME, 1, "no longer cached")).one(Release) == Release(NAME, 1)
    elif fault == "slow":
        w.now += 100
        assert w(Alarm("beat")).one(Release) == Release(NAME, 1)
    step = w(Received(NAME, 1, False, reason="x")).one(Step)
    assert (step.rows[0].start, step.rows[0].count) == (0, 13)
    assert w.node.pool.held == 4


def test_an_abort_while_it_is_fetched_waits_for_the_transport() -> None:
    w = worker()
    asked(w)
    effects = w(Abort(1, "r", 1, "x"))
    assert Release(NAME, 1) in effects and w.node.pool.held == 3, "bytes may still be written"
    after = w(Received(NAME, 1, False, reason="released"))
    assert w.node.pool.held == 0 and not w.node.quarantine
    assert not after.told(Refused) and not after.of(Step)


def test_no_room_for_a_fetch_is_no_reason_to_wait() -> None:
    w = worker(kv_blocks=4)
    begin(w, "other", 10)
    assert not asked(w).of(Fetch)
    assert w.node.load().waiting == 1


def test_lent_blocks_are_held_until_the_transfer_is_over() -> None:
    w = worker()
    begin(w, "r", 13)
    w(over(w.heard.one(Step), ends=["r"]))
    assert w.node.pool.held == 0
    want = KvWant(NAME, 1, "peer", 1, keys=KEYS[1:])
    sent = w(want).one(Send)
    assert (sent.request_id, sent.to, sent.first_block, sent.last) == (NAME, "peer", 1, True)
    assert len(sent.blocks) == 2 and w.node.pool.held == 2
    assert not w(want).of(Send), "asked twice"
    assert w(Alarm("beat")).told(Load).one().leases == 1
    assert w(SendOver(NAME, 1, False)).one(Release) == Release(NAME, 1)
    assert w.node.pool.held == 0


def test_what_is_no_longer_cached_is_not_lent() -> None:
    w = worker()
    gone = w(KvWant(NAME, 1, "peer", 0, keys=KEYS)).told(KvGone)
    assert gone.to == ["peer"] and gone.one().request_id == NAME


def test_a_worker_of_both_phases_fetches_too() -> None:
    w = worker()
    w(dispatch(request(tokens=13, output=1), prefix_from="peer", prefix_blocks=2))
    w(Prompt("r", 1, 13))
    step = w(Received(NAME, 1, True)).one(Step)
    assert (step.rows[0].start, step.rows[0].count) == (8, 5)
    assert w(over(step, ends=["r"])).told(Finished).one().report.prefill.cached_tokens == 8
