"""Which cached blocks go first when room is needed: on the device by the order of their release, in
a tier by a rank that each use raises. Knows how blocks were used, and by whom; no bytes, no keys.

Each rank of a block is at least that of the block after it in a prompt, as whoever uses a block
uses those before it. So a chain loses its tail first, whatever the rule.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

from kvasir.core.ids import BlockId
from kvasir.kv.pool import EvictView, Victims
from kvasir.kv.tiers import Rank, RankOf, Use
from kvasir.policy.quota import furthest_over


def lru(view: EvictView, count: int) -> list[BlockId]:
    """The blocks released longest ago. Chains release tail first, so tails go before heads."""
    return list(islice(view.in_order(), count))


def fair(view: EvictView, count: int) -> list[BlockId]:
    """Those released longest ago of the tenant that is furthest over its fair share, one by one."""
    blocks, found = dict(view.owned()), list[BlockId]()
    orders = {tenant: view.in_order(tenant) for tenant in blocks}
    while len(found) < count:
        tenant = furthest_over(blocks, view.weights)
        victim = next(orders[tenant], None)
        if victim is None:
            del blocks[tenant]
            continue
        found.append(victim)
        blocks[tenant] -= 1
    return found


EVICTS: Final[dict[str, Victims]] = {"lru": lru, "fair": fair}


def least_recent(use: Use) -> Rank:
    return (use.tick, -use.depth)


def least_frequent(use: Use) -> Rank:
    return (use.uses, use.tick, -use.depth)


def longest_first(use: Use) -> Rank:
    """As `least_frequent`, and of equally frequent blocks those that stand later in their prompts
    (Mooncake's LengthAwareCache, arXiv 2407.00079)."""
    return (use.uses, -use.depth, use.tick)


def least_saved(use: Use) -> Rank:
    """GreedyDual-Size with frequency (Cao and Irani, USITS 1997; Cherkasova, HPL-98-69): what a
    block saves when it is used, in seconds of computing, times how often it is, on top of the rank
    that was evicted last. All blocks have the same bytes, so seconds stand for seconds a byte."""
    return (use.floor + use.uses * use.seconds, -use.depth)


RANKS: Final[dict[str, RankOf]] = {
    "lru": least_recent, "lfu": least_frequent, "length": longest_first, "cost": least_saved,
}  # fmt: skip
