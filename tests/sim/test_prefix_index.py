"""The prefix index in whole simulated clusters: what it finds, could find, and guesses."""

from kvasir.core.events import PrefixUsed
from kvasir.core.messages import KvEvents
from kvasir.core.specs import Deployment
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.statistics import hit_table, shared_tokens
from kvasir.world.sim.run import simulate
from tests.sims import BLOCK, Watched, cluster, trace


def chats(turns: int = 4, users: int = 12) -> Trace:
    """Users whose every prompt goes on from their last one, one after another."""
    arrivals = [
        Arrival(
            turn * 5.0 + user * 0.2, BLOCK * 10 * (turn + 1) + 3, 4,
            tuple(user * 1000 + i for i in range(10 * (turn + 1) + 1)),
        )
        for turn in range(turns)
        for user in range(users)
    ]  # fmt: skip
    return Trace("chats", BLOCK, tuple(arrivals))


def routed_by_cache(**pool: object) -> Deployment:
    return cluster("prefill", "decode", pool=pool, route={"name": "cache_load"})


def test_what_is_attainable_is_what_an_infinite_cache_has_until_blocks_are_evicted() -> None:
    t = trace(60, rate=2.0)
    ample = simulate(cluster(), t).summary.prefix
    small = simulate(cluster(pool={"kv_blocks": 40}), t).summary.prefix
    assert ample is not None and small is not None
    assert ample.queries_tokens == t.input_tokens
    assert 0 < ample.hits_tokens <= ample.attainable_tokens == ample.infinite_tokens
    assert small.hits_tokens <= small.attainable_tokens < ample.attainable_tokens


def test_totals_are_those_of_the_single_prefills() -> None:
    t = trace(30)
    world = Watched(cluster(), list(t.arrivals))
    world.run()
    used = world.events_of(PrefixUsed)
    assert len({e.request_id for e in used}) == len(used) == 30
    prefix = simulate(cluster(), t).summary.prefix
    assert prefix is not None
    assert prefix.hits_tokens == sum(e.hit_tokens for e in used)
    assert prefix.attainable_tokens == sum(e.attainable_tokens for e in used)


def test_the_infinite_cache_is_the_hit_tables_less_the_last_tokens() -> None:
    """The table counts a prompt's last block too, which a worker always computes."""
    t = trace(60)
    (row,) = hit_table(t, [None])
    assert 0 < shared_tokens(t) <= row.hit_tokens
    assert row.hit_tokens - shared_tokens(t) < BLOCK * len(t.arrivals)


def test_of_workers_that_tell_nothing_a_guess_finds_the_same_while_nothing_is_evicted() -> None:
    told = simulate(routed_by_cache(), chats()).summary
    silent = routed_by_cache(kv_events=False)
    guessed = simulate(silent, chats()).summary
    assert told.cached_tokens == guessed.cached_tokens > 0
    world = Watched(silent, list(chats().arrivals))
    world.run()
    assert not world.messages(KvEvents)


def test_where_caches_are_small_a_guess_hopes_for_more_than_there_is() -> None:
    """It knows no generated blocks and sees no evictions: it can promise what is gone, never the
    other way round for a prompt that was just sent."""
    small = {"kv_blocks": 120}
    told = simulate(routed_by_cache(**small), chats()).summary
    guessed = simulate(routed_by_cache(**small, kv_events=False), chats()).summary
    assert told.completed == guessed.completed == len(chats().arrivals)
    assert told.prefix is not None and guessed.prefix is not None
    assert told.prefix.hits_tokens <= told.prefix.attainable_tokens
    assert guessed.prefix.hits_tokens < guessed.prefix.attainable_tokens
