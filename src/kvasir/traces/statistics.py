"""What a trace is like, and what a cache could do for it: prefix hits with zero service time.

Every request looks up its leading blocks in one cache and leaves all its blocks in it at once;
generated tokens are not kept. Cache and eviction policy are the very ones that workers use, so the
table says what they are worth, not what a model of them is.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from statistics import fmean, pstdev
from typing import NamedTuple

from kvasir.core.keys import trace_keys
from kvasir.kv.pool import BlockPool
from kvasir.policy.evict import EVICTS
from kvasir.traces.record import Arrival, Trace


def gap_variation(trace: Trace) -> float | None:
    """Coefficient of variation of the gaps between arrivals; None when there are too few."""
    gaps = [b.at_s - a.at_s for a, b in pairwise(trace.arrivals)]
    mean = fmean(gaps) if len(gaps) > 1 else 0.0
    return pstdev(gaps, mean) / mean if mean > 0 else None


class HitRow(NamedTuple):
    """Hits of one cache size over a whole trace. `capacity_blocks` None: nothing is ever evicted.

    A hit block is one of the leading blocks found; a partial last block counts its real tokens.
    """

    capacity_blocks: int | None
    hit_blocks: int
    blocks: int
    hit_tokens: int
    tokens: int

    @property
    def block_ratio(self) -> float:
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def token_ratio(self) -> float:
        return self.hit_tokens / self.tokens if self.tokens else 0.0


def hit_table(trace: Trace, capacities: Iterable[int | None], evict: str = "lru") -> list[HitRow]:
    """One row for each capacity, in blocks of `trace.block_size` tokens. `evict`: as in EVICTS."""
    distinct = len({(a.adapter, i) for a in trace.arrivals for i in a.hash_ids})
    return [_hits(trace, capacity, max(distinct, 1), evict) for capacity in capacities]


def shared_tokens(trace: Trace) -> int:
    """Prompt tokens that an infinite cache shared by all would serve: leading full blocks that an
    earlier arrival has, less the one with the prompt's last token, which is always computed."""
    size, every, tokens = trace.block_size or 1, dict[str | None, set[int]](), 0
    for arrival in trace.arrivals:
        seen = every.setdefault(arrival.adapter, set())
        blocks = arrival.hash_ids[: arrival.input_tokens // size]
        found = next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        tokens += min(found, (arrival.input_tokens - 1) // size) * size
        seen.update(blocks)
    return tokens


def _hits(trace: Trace, capacity: int | None, distinct: int, evict: str) -> HitRow:
    pool = BlockPool(min(capacity or distinct, distinct), EVICTS[evict])
    block_size = trace.block_size or 0
    hit_blocks = blocks = hit_tokens = tokens = 0
    for arrival in trace.arrivals:
        hits = _visit(pool, arrival)
        hit_blocks += hits
        blocks += len(arrival.hash_ids)
        hit_tokens += min(hits * block_size, arrival.input_tokens)
        tokens += arrival.input_tokens
    pool.check()
    return HitRow(capacity, hit_blocks, blocks, hit_tokens, tokens)


def _visit(pool: BlockPool, arrival: Arrival) -> int:
    """Leading blocks found; afterwards the pool holds the request's blocks as the most recent.

    A request of more blocks than the pool has keeps its first ones.
    """
    keys = trace_keys(arrival.hash_ids, arrival.adapter)
    found = pool.match(keys)
    kept = keys[: pool.blocks_count]
    pool.take(found)
    fresh = pool.allocate(len(kept) - len(found))
    for block, key in zip(fresh, kept[len(found) :], strict=True):
        pool.commit(block, key)
    pool.free(found + fresh)
    return len(found)
