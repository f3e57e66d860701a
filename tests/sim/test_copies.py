"""Copies of cached blocks ahead of their use, in whole simulated clusters: hot ones, those of a
session's next turn, those of a worker that leaves; and all of it while things go wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvasir.core.copies import Copied, Copy, Left
from kvasir.core.events import (
    BlocksCopied,
    CopiesUsed,
    CopyFailed,
    CopyOrdered,
    PrefixUsed,
    WorkerDraining,
    WorkerLeft,
)
from kvasir.core.messages import Dispatch, Drain
from kvasir.core.specs import Deployment
from kvasir.core.specs.copies import CopiesSpec
from kvasir.core.specs.faults import Departure, FaultSpec
from kvasir.runtime.verify import verify_dir
from kvasir.traces.answers import answer_keys
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.faults import Death, Faults
from kvasir.world.sim.run import simulate
from kvasir.world.sim.world import SimWorld
from tests.sim import test_faults as faults
from tests.sims import BLOCK, FITTED, Watched, cluster

SLOW = FITTED.model_copy(update={"per_token_s": 2e-4})  # a block takes 3.2 ms
FAST = {"nic_bandwidth": 1e9, "gpus_per_node": 1}


def copying(
    *, count: int = 3, route: str = "cache_load", departures: tuple[Departure, ...] = (),
    pool: dict[str, Any] | None = None, **copies: Any,
) -> Deployment:  # fmt: skip
    d = cluster(
        count=count, cost=SLOW, route={"name": route}, topology=FAST, pool=pool,
        faults=FaultSpec(departures=departures) if departures else None,
    )  # fmt: skip
    policy = d.policy.model_copy(update={"copies": CopiesSpec(**copies)})
    return d.model_copy(update={"policy": policy})


def crowd(count: int = 60, shared: int = 60, rate: float = 40.0, own: int = 6) -> list[Arrival]:
    """Prompts that all begin with `shared` blocks, if any; a first one, and then the crowd."""
    rng, at, found = random.Random(3), 0.0, []
    for i in range(count):
        at = max(1.0, at + rng.expovariate(rate)) if i else 0.0
        ids = (*range(shared), *range(1000 * (i + 1), 1000 * (i + 1) + own))
        found.append(Arrival(at, len(ids) * BLOCK + 1, 4, (*ids, 10**7 + i)))
    return found


def chats(turns: int = 4, users: int = 12, gap_s: float = 6.0) -> list[Arrival]:
    """Each turn is all before it, the answer of 10 blocks, and 2 blocks more."""
    found = []
    for turn in range(turns):
        for user in range(users):
            blocks = 8 + 12 * turn
            ids = tuple(user * 10_000 + i for i in range(blocks + 1))
            at = turn * gap_s + user * 0.31
            found.append(Arrival(at, blocks * BLOCK + 1, 10 * BLOCK, ids, session=f"u{user}"))
    return sorted(found, key=lambda a: a.at_s)


def ran(d: Deployment, arrivals: list[Arrival], *, answers: bool = False) -> Watched:
    named = answer_keys(arrivals, BLOCK) if answers else None
    world = Watched(d, arrivals, faults=Faults(d.faults, 1) if d.faults else None, answers=named)
    world.run()
    world.rest(5.0)
    world.check()
    assert not world.requests.lives and not world.conductor.copies.orders
    for worker in world.workers():
        assert not worker.replicas.coming and not worker.prefixes.lent and worker.pool.held == 0
    assert len(world.transfers) == 0
    return world


def hits(world: Watched) -> int:
    return sum(e.hit_tokens for e in world.events_of(PrefixUsed))


def ttft_s(world: Watched) -> float:
    outcomes = world.recorder.outcomes
    return sum(o.ttft_s for o in outcomes) / len(outcomes)


def blocks(world: Watched, purpose: str) -> tuple[int, int, int]:
    """Copied, used, wasted."""
    used = [e for e in world.events_of(CopiesUsed) if e.purpose == purpose]
    came = sum(e.blocks for e in world.events_of(BlocksCopied) if e.purpose == purpose)
    return came, sum(e.used for e in used), sum(e.wasted for e in used)


# --- off ------------------------------------------------------------------------------------------


def test_off_nothing_is_counted_ordered_or_told() -> None:
    world = ran(copying(), crowd())
    assert not world.messages(Copy) and not world.events_of(CopyOrdered)
    copies = world.conductor.copies
    assert not len(copies.recent) and not len(copies._heat) and not copies.sessions


# --- hot blocks -----------------------------------------------------------------------------------


def test_a_hot_prefix_goes_to_workers_that_lack_it_and_is_used_there() -> None:
    off, on = ran(copying(), crowd()), ran(copying(hot=True), crowd())
    orders = on.events_of(CopyOrdered)
    assert orders and {o.blocks for o in orders} == {57}, "the depth counted below 60"
    assert {o.target.partition("-")[0] for o in orders} == {"prefill"}
    came, used, wasted = blocks(on, "hot")
    assert came == sum(o.blocks for o in orders) == used and wasted == 0
    assert hits(on) > hits(off) and ttft_s(on) < ttft_s(off)
    bytes_count = 16 * on.hosts["prefill-0"].node.config.capacity.kv_token_bytes  # type: ignore[union-attr]
    assert {e.bytes for e in on.events_of(BlocksCopied)} == {57 * bytes_count}


def test_prompts_that_share_nothing_are_not_copied() -> None:
    """The losing case of counting: it costs what counting costs, and moves nothing."""
    arrivals = crowd(shared=0, own=40)
    off, on = ran(copying(), arrivals), ran(copying(hot=True), arrivals)
    assert not on.events_of(CopyOrdered) and hits(on) == 0
    assert ttft_s(on) == ttft_s(off)


def test_what_was_hot_for_a_moment_only_is_wasted_and_said_to_be() -> None:
    """The losing case of copying: a crowd that is over when the copies are there, and then
    prompts that need the room."""
    later = [Arrival(10.0 + 0.05 * i, 60 * BLOCK + 1, 2,
                     tuple(range(10**9 + 100 * i, 10**9 + 100 * i + 61)))
             for i in range(30)]  # fmt: skip
    world = ran(copying(hot=True, pool={"kv_blocks": 300}), [*crowd(count=10, rate=1e3), *later])
    came, used, wasted = blocks(world, "hot")
    assert came == wasted > 0 and not used


def test_where_a_copy_takes_longer_than_computing_none_is_made() -> None:
    d = copying(hot=True)
    slow = d.topology.model_copy(update={"nic_bandwidth": 1e4})
    world = ran(d.model_copy(update={"topology": slow}), crowd(count=20))
    assert not world.events_of(CopyOrdered)


def test_copies_keep_to_their_rate() -> None:
    ample, tight = (
        ran(copying(next_turn=True, bytes_per_s=rate), chats(turns=2), answers=True)
        for rate in (1e9, 1e3)
    )
    assert len(tight.events_of(CopyOrdered)) == 1 < len(ample.events_of(CopyOrdered))


# --- the next turn --------------------------------------------------------------------------------


def test_the_next_turns_blocks_are_there_before_it_comes() -> None:
    off, on = (ran(copying(next_turn=on), chats(), answers=True) for on in (False, True))
    came, used, wasted = blocks(on, "next_turn")
    assert came > 0 and used > 0.7 * came and wasted == 0, "the last turns' are never asked for"
    assert {o.source.partition("-")[0] for o in on.events_of(CopyOrdered)} == {"decode"}
    assert {o.target.partition("-")[0] for o in on.events_of(CopyOrdered)} == {"prefill"}
    assert hits(on) > 1.3 * hits(off)
    assert ttft_s(on) < 0.7 * ttft_s(off)


def test_sessions_that_do_not_come_again_waste_what_was_brought() -> None:
    """The losing case: single turns, then others that need the room."""
    gone = [Arrival(0.4 * i, 8 * BLOCK + 1, 10 * BLOCK,
                    tuple(range(1000 * i, 1000 * i + 9)), f"a{i}")
            for i in range(30)]  # fmt: skip
    answers = tuple(tuple(b"%016d" % (1000 * i + j) for j in range(8, 18)) for i in range(30))
    d = copying(next_turn=True, count=1, pool={"kv_blocks": 120})
    world = Watched(d, gone, answers=answers)
    world.run()
    world.rest(5.0)
    world.check()
    came, used, wasted = blocks(world, "next_turn")
    assert came > 0 and used == 0 and wasted > 0
    unused = sum(len(w.replicas.unused) for w in world.workers())
    assert came == wasted + unused, "each block that came is used, wasted or waits"
    assert unused <= 120 * d.policy.copies.pool_share_max


def test_a_regular_session_is_prepared_when_its_turn_is_due() -> None:
    world = ran(copying(next_turn=True), chats(turns=6, users=1, gap_s=20.0), answers=True)
    ended = sorted(o.start_s + o.e2e_s for o in world.recorder.outcomes)
    ordered = [s.at for s in world.seen if isinstance(s.message, Copy)]
    early, late = ordered[0] - ended[0], ordered[-1] - ended[-2]
    assert early < 1.0, "nothing is known yet: at once"
    assert 5.0 < late < 19.0, "two mean deviations before it usually comes"


def test_what_only_a_tier_has_is_on_the_device_when_the_turn_comes() -> None:
    """Caches are too small for the pauses; the host has it all, slowly."""
    tier = {"host": {"blocks": 5000, "bytes_per_s": 5e6}}
    pool = {"kv_blocks": 150, "tiers": tier}
    arrivals = chats(users=4, turns=7, gap_s=8.0)
    off, on = (
        ran(copying(next_turn=on, count=1, pool=pool, pool_share_max=0.6), arrivals)
        for on in (False, True)
    )
    orders = on.events_of(CopyOrdered)
    assert orders and all(o.source == o.target == "prefill-0" for o in orders)
    came, used, wasted = blocks(on, "next_turn")
    assert used > 0.6 * came and used + wasted <= came
    assert hits(on) == hits(off) and ttft_s(on) < 0.85 * ttft_s(off), "the load is over before"


# --- leaving --------------------------------------------------------------------------------------


def test_a_worker_leaves_in_good_order_and_what_only_it_had_stays() -> None:
    away = Departure(worker="prefill-0", at_s=9.0, within_s=5.0)
    off, on = (
        ran(copying(departures=(away,), leaving=leaving), chats()) for leaving in (False, True)
    )
    for world in (off, on):
        assert len(world.events_of(WorkerDraining)) == 1
        (left,) = world.events_of(WorkerLeft)
        assert (left.worker, left.reason) == ("prefill-0", "left")
        assert "prefill-0" not in world.hosts and "prefill-0" not in world.conductor.members
        after = [s for s in world.seen if s.node == "prefill-0" and isinstance(s.message, Dispatch)]
        assert all(s.at < 9.1 for s in after), "nothing new goes there"
        assert len(world.messages(Left)) == 1
        assert set(world.ended.values()) == {"length"}
        assert all(world.emitted[r] == 10 * BLOCK for r in world.ended)
    came, used, _ = blocks(on, "leaving")
    assert came >= used > 0 and blocks(off, "leaving") == (0, 0, 0)
    assert hits(on) > hits(off)


def test_what_peers_have_already_does_not_travel() -> None:
    arrivals = [Arrival(0.1 * i, 60 * BLOCK + 1, 4, (*range(60), 10**6 + i)) for i in range(60)]
    away = Departure(worker="prefill-0", at_s=20.0, within_s=5.0)
    last = Arrival(30.0, 60 * BLOCK + 1, 4, (*range(60), 10**7))
    d = copying(departures=(away,), leaving=True, route="round_robin")
    world = ran(d, [*arrivals, last])
    assert world.events_of(WorkerLeft) and not world.events_of(CopyOrdered)


@pytest.mark.parametrize("who", ["decode-0", "prefill-0"])
def test_what_takes_too_long_goes_on_elsewhere(who: str) -> None:
    arrivals = [Arrival(0.01 * i, 64, 3000, tuple(range(5 * i, 5 * i + 4))) for i in range(6)]
    away = Departure(worker=who, at_s=1.0, within_s=0.5)
    d = copying(departures=(away,), leaving=True, count=2)
    world = ran(d, arrivals)
    assert all(world.emitted[f"r{i}"] == 3000 for i in range(6)), "none lost, none doubled"
    (left,) = world.events_of(WorkerLeft)
    assert left.reason == "left"
    moved = [e for e in world.recorder.counts if e == "Retried: leaves"]
    assert bool(moved) == (who == "decode-0"), "prefill was over"


def test_the_last_word_may_be_lost() -> None:
    """Every message from the worker that leaves is lost once it is told to go."""
    away = Departure(worker="prefill-0", at_s=9.0, within_s=3.0)
    d = copying(departures=(away,), leaving=True)
    world = Watched(d, chats(), faults=Faults(d.faults, 1))
    send = world.send

    def lossy(to: str, message: Any) -> None:
        if not isinstance(message, Left):
            send(to, message)

    world.send = lossy  # type: ignore[method-assign]
    world.run()
    world.rest(5.0)
    world.check()
    (left,) = world.events_of(WorkerLeft)
    assert left.reason == "not heard of"
    assert set(world.ended.values()) == {"length"}


# --- while things go wrong ------------------------------------------------------------------------


def test_a_peer_that_dies_during_a_copy_costs_only_the_copy() -> None:
    for victim in ("source", "target"):
        d = copying(hot=True)
        link = d.topology.model_copy(update={"nic_bandwidth": 1e7})  # a copy takes 50 ms
        d = d.model_copy(update={"topology": link})
        world = Watched(d, crowd(), faults=Faults(FaultSpec(), 1))
        while not any(w.replicas.coming for w in world.workers()):
            world._turn()
            assert world.requests.lives or world.now < 1.5, "nothing was copied"
        (order,) = world.events_of(CopyOrdered)
        world._die(Death(world.now, getattr(order, victim), world.now + 1.0))
        world.run()
        world.rest(10.0)
        world.check()
        assert set(world.ended.values()) == {"length"}
        assert not world.conductor.copies.orders
        assert not any(w.replicas.coming or w.prefixes.lent for w in world.workers())
        failed = [e.reason for e in world.events_of(CopyFailed)]
        assert ("peer lost" in failed) == (victim == "source")


def test_an_order_said_twice_is_carried_out_once() -> None:
    world = Watched(copying(hot=True), crowd())
    send = world.schedule_message

    def twice(at: float, to: str, message: Any) -> None:
        send(at, to, message)
        if isinstance(message, Copy):
            send(at, to, message)

    world.schedule_message = twice  # type: ignore[method-assign]
    world.run()
    world.rest(5.0)
    world.check()
    orders, came = world.events_of(CopyOrdered), world.events_of(BlocksCopied)
    assert 0 < len(orders) == len(came) and len(world.messages(Copy)) == 2 * len(orders)


def test_recordings_of_copies_are_the_same_again(tmp_path: Any) -> None:
    away = Departure(worker="prefill-0", at_s=9.0, within_s=5.0)
    d = copying(departures=(away,), leaving=True, hot=True, next_turn=True)
    d = d.model_copy(update={"workload": d.workload.model_copy(update={"name_answers": True})})
    trace = Trace("chats", BLOCK, tuple(chats()))
    first = simulate(d, trace, record=tmp_path)
    assert first.to_json() == simulate(d, trace).to_json()
    assert first.counts["CopyOrdered"] > 0
    verdict = verify_dir(tmp_path)
    assert verdict.ok, verdict.lines


def run_seed(seed: int) -> dict[str, int]:
    """As `tests.sim.test_faults.run_seed`, with all copies on and workers that leave."""
    rng = random.Random(f"copies {seed}")
    spec = FaultSpec(
        loss=rng.choice([0.0, 0.005, 0.03]), delay_s_max=rng.choice([0.0, 0.003, 0.05]),
        deaths=rng.randint(0, 3), down_s=rng.choice([0.3, 2.0]), cancel=rng.choice([0.0, 0.2]),
        cancel_s_max=1.0, until_s=4.0,
        departures=(Departure(worker="prefill-1", at_s=rng.uniform(0.2, 3.0),
                              within_s=rng.choice([0.05, 1.0])),) if rng.random() < 0.6 else (),
    )  # fmt: skip
    d = faults.deployment(rng)
    kinds = {k: rng.random() < 0.8 for k in ("hot", "next_turn", "leaving")}
    copies = CopiesSpec(
        **kinds, uses_per_copy=1.0, at_once=rng.choice([1, 4]), bytes_per_s=rng.choice([1e5, 1e9]),
        pool_share_max=rng.choice([0.1, 0.5]), blocks_max=rng.choice([30, 4000]),
    )  # fmt: skip
    cost = FITTED.model_copy(update={"per_token_s": 1e-3})
    pools = tuple(pool.model_copy(update={"cost": cost}) for pool in d.pools)
    policy = d.policy.model_copy(update={"copies": copies})
    d = d.model_copy(update={"policy": policy, "pools": pools})
    trace = faults.arrivals(rng, 40)
    world = SimWorld(
        d, trace, faults=Faults(spec, seed), after_event=SimWorld.check_touched,
        answers=answer_keys(trace, 16),
    )  # fmt: skip
    world.run(until=300.0)
    assert not world.requests.lives, f"{len(world.requests.lives)} requests never ended"
    world.rest(20.0)
    world.check()
    faults.check_ended(world, trace)
    check_nothing_left(world)
    return world.recorder.counts


def check_nothing_left(world: SimWorld) -> None:
    conductor = world.conductor
    assert not conductor.placements and not conductor.queue and not conductor.choosing
    assert not conductor.copies.orders and not conductor.oracle._transfers
    for worker in world.workers():
        name = worker.config.worker
        assert not worker.works and not worker.quarantine, name
        assert not worker.replicas.coming and not worker.prefixes.lent, name
        assert worker.pool.held == 0, name
    assert len(world.transfers) == 0


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_lost_doubled_or_left(seed: int) -> None:
    try:
        run_seed(seed)
    except AssertionError:
        print(f'python -c "from tests.sim.test_copies import run_seed; run_seed({seed})"')
        raise


def test_the_seeds_meet_what_they_are_for() -> None:
    counts: dict[str, int] = {}
    for seed in range(40):
        for name, count in run_seed(seed).items():
            counts[name] = counts.get(name, 0) + count
    for name in ("CopyOrdered", "BlocksCopied", "CopyFailed", "CopiesUsed", "WorkerDraining"):
        assert counts.get(name, 0) > 5, (name, counts)
    for purpose in ("hot", "next_turn", "leaving"):
        assert counts.get(f"Copies: {purpose}, copied blocks", 0) > 0, counts


def test_messages_of_copies_are_few() -> None:
    """One order and one answer for each copy, and a word to the source."""
    world = ran(copying(hot=True), crowd())
    assert len(world.messages(Copy)) == len(world.messages(Copied))
    assert not world.messages(Drain)
