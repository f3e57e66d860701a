"""Orders of waiting prompts against what a prefix cache then hits (RadixAttention, theorem 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.ids import BlockKey
from kvasir.core.keys import trace_key
from kvasir.kv.pool import BlockPool
from kvasir.policy.evict import lru
from kvasir.policy.order import depth_first, longest_prefix
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.run import simulate
from tests.sims import BLOCK, cluster

Prompt = tuple[BlockKey, ...]


def prompt(*path: int) -> Prompt:
    """A block named by each step of a path from the root of a tree."""
    name, keys = 0, []
    for step in path:
        name = name * 7 + step + 1
        keys.append(trace_key(name))
    return tuple(keys)


def hits(order: str, prompts: Sequence[Prompt], blocks: int) -> int:
    """Cached blocks when the first in order runs, alone, until none is left."""
    pool = BlockPool(blocks, lru)
    waiting, found = list(prompts), 0
    while waiting:
        cached = [len(pool.match(p)) for p in waiting]
        orders = {"lpm": longest_prefix(cached), "dfs": depth_first(waiting, cached)}
        chosen = waiting.pop(orders[order][0] if order in orders else 0)
        hit = pool.match(chosen)
        pool.take(hit)
        held = hit + pool.allocate(len(chosen) - len(hit))
        for block, key in zip(held, chosen, strict=True):
            pool.commit(block, key)
        pool.free(held)
        found += len(hit)
    return found


def best(prompts: Sequence[Prompt]) -> int:
    """Every block of the tree is computed once; all others are hits."""
    return sum(map(len, prompts)) - len({key for p in prompts for key in p})


def test_a_cached_branch_goes_on_then_the_heavier_then_the_first() -> None:
    a, b = [prompt(0, i) for i in range(3)], [prompt(1, i) for i in range(2)]
    prompts = [b[0], a[0], b[1], a[1], a[2], prompt(2)]
    assert depth_first(prompts, [0] * 6) == (1, 3, 4, 0, 2, 5)
    assert depth_first(prompts, [1, 0, 1, 0, 0, 0]) == (0, 2, 1, 3, 4, 5)
    assert depth_first([prompt(0, 1), prompt(0)], [0, 0]) == (1, 0), "a prefix first"
    assert depth_first([], []) == ()


def test_both_orders_reach_the_best_where_first_come_first_served_thrashes() -> None:
    """Four groups in turns; the cache holds one prompt of ten blocks and little more."""
    prompts = [prompt(g, 0, 0, 0, 0, 0, 0, 0, i, 0) for i in range(6) for g in range(4)]
    assert hits("fcfs", prompts, 12) == 0
    assert hits("lpm", prompts, 12) == hits("dfs", prompts, 12) == best(prompts) == 160


TREES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=6).map(lambda path: prompt(*path)),
    min_size=1, max_size=20,
)  # fmt: skip


@given(TREES, st.integers(0, 4))
def test_depth_first_is_optimal_when_the_cache_holds_the_longest_prompt(
    prompts: list[Prompt], spare: int
) -> None:
    blocks = max(map(len, prompts)) + spare
    assert hits("dfs", prompts, blocks) == best(prompts) >= hits("fcfs", prompts, blocks)


@given(TREES, st.integers(0, 4))
def test_longest_prefix_first_equals_depth_first(prompts: list[Prompt], spare: int) -> None:
    """The theorem's second half."""
    blocks = max(map(len, prompts)) + spare
    assert hits("lpm", prompts, blocks) == hits("dfs", prompts, blocks)


@pytest.mark.parametrize("name", ["lpm", "dfs"])
def test_the_worker_hits_more_than_first_come_first_served(name: str) -> None:
    """The same through simulated workers: prefill runs one prompt at a time out of a small pool."""

    def cached(batch: str) -> int:
        found = [
            Arrival(
                0.001 * (i * 4 + g), 10 * BLOCK, 2,
                (*range(g * 100, g * 100 + 8), 1000 + i * 10 + g, 2000 + i * 10 + g),
            )
            for i in range(6)
            for g in range(4)
        ]  # fmt: skip
        d = cluster(count=1, pool={"batch_max": 1}, batch={"name": batch})
        prefill = d.pools[0].model_copy(update={"kv_blocks": 13})
        d = d.model_copy(update={"pools": (prefill, *d.pools[1:])})
        result = simulate(d, Trace("groups", BLOCK, tuple(found)))
        assert result.summary.completed == 24
        return result.summary.cached_tokens

    assert cached(name) > 2 * cached("token_budget")
