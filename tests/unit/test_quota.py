"""Whose blocks go first, by table; and a cache of slots with owners."""

from __future__ import annotations

from functools import partial

import pytest

from kvasir.core.keys import trace_key
from kvasir.kv.pool import BlockPool
from kvasir.kv.tiers import TierCache, Use
from kvasir.policy.evict import EVICTS, RANKS
from kvasir.policy.quota import furthest_over


@pytest.mark.parametrize(
    ("blocks", "weights", "who"),
    [
        ({"a": 1, "b": 9}, {}, "b"),
        ({"a": 6, "b": 9}, {"b": 2.0}, "a"),
        ({"a": 4, "b": 9}, {"b": 2.0}, "b"),
        ({"a": 5, "b": 5}, {}, "b"),
        ({"only": 0}, {}, "only"),
    ],
)
def test_who_is_furthest_over(blocks: dict[str, int], weights: dict[str, float], who: str) -> None:
    assert furthest_over(blocks, weights) == who


def named(pool: BlockPool, owner: str, first: int, count: int) -> None:
    """Blocks of an owner that are cached, one by one."""
    for i in range(first, first + count):
        (block,) = pool.allocate(1)
        pool.commit(block, trace_key(i), owner)
        pool.free([block])


def cached(pool: BlockPool, first: int, count: int) -> int:
    return sum(pool.find(trace_key(i)) is not None for i in range(first, first + count))


@pytest.mark.parametrize(("evict", "kept"), [("fair", 4), ("lru", 0)])
def test_a_flood_in_the_pool(evict: str, kept: int) -> None:
    pool = BlockPool(10, EVICTS[evict])
    named(pool, "a", 0, 4)
    named(pool, "b", 100, 50)
    pool.check()
    assert cached(pool, 0, 4) == kept and cached(pool, 100, 50) == 10 - kept


def test_what_others_leave_anybody_may_use_and_gives_back() -> None:
    pool = BlockPool(10, EVICTS["fair"], {"a": 4.0})
    named(pool, "b", 100, 10)
    assert cached(pool, 100, 10) == 10
    named(pool, "a", 0, 30)
    assert cached(pool, 0, 30) in (8, 9) and cached(pool, 109, 1) == 1, "the last of the others"
    pool.check()


def test_blocks_in_use_count_and_do_not_go() -> None:
    """The flood holds most of what there is: it has to make do with that."""
    pool = BlockPool(10, EVICTS["fair"])
    blocks = pool.allocate(6)
    for i, block in enumerate(blocks):
        pool.commit(block, trace_key(100 + i), "b")
    named(pool, "a", 0, 3)
    named(pool, "b", 200, 20)
    assert cached(pool, 0, 3) == 3 and cached(pool, 200, 20) == 1
    pool.free(blocks)
    pool.check()


def use(tick: int, owner: str) -> Use:
    return Use(0, tick, 1.0, owner=owner)


def stored(cache: TierCache, owner: str, first: int, count: int) -> None:
    for i in range(first, first + count):
        slot = cache.reserve(use(i, owner))
        if slot is not None:
            cache.name(slot, trace_key(i), use(i, owner))
            cache.release([slot])
    cache.check()


def held(cache: TierCache, first: int, count: int) -> int:
    return sum(cache.find(trace_key(i)) is not None for i in range(first, first + count))


@pytest.mark.parametrize("rank", RANKS)
def test_a_flood_in_a_tier(rank: str) -> None:
    cache = TierCache(10, RANKS[rank], partial(furthest_over, weights={}))
    stored(cache, "a", 0, 4)
    stored(cache, "b", 100, 50)
    assert held(cache, 0, 4) == 4 and cache.pool.cached_keys == 10
    stored(cache, "a", 20, 6)
    assert held(cache, 0, 30) == 5 and held(cache, 100, 50) == 5


def test_what_was_found_at_the_start_belongs_to_its_first_user() -> None:
    cache = TierCache(4, RANKS["lru"], partial(furthest_over, weights={}))
    cache.adopt({slot: trace_key(slot) for slot in range(4)})
    assert cache.touch(trace_key(1), 5, 1.0, again=True, owner="a")
    stored(cache, "b", 100, 20)
    assert held(cache, 1, 1) == 1 and held(cache, 100, 20) == 3
