"""A worker's blocks: what the pool's operations mean for an attempt. Knows counts and keys, no
messages and no time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvasir.core.ids import BlockId, BlockKey, Incarnation, TenantId, WorkerId
from kvasir.core.message import Tier
from kvasir.core.messages import Capacity, KvEvents
from kvasir.kv.pool import UNWEIGHTED, BlockPool
from kvasir.node.work import Stage, Work
from kvasir.policy.evict import EVICTS

Used = Callable[[Work, int, int], None]


class Blocks:
    """One pool, and the numbered news of its cache, and of those of the tiers `below`, for the
    conductor's index. `used` hears which blocks of an attempt were filled or let go."""

    def __init__(
        self, capacity: Capacity, evict: str, worker: WorkerId, incarnation: Incarnation,
        *, tells: bool = True, weights: Mapping[TenantId, float] = UNWEIGHTED,
    ) -> None:  # fmt: skip
        self.pool = BlockPool(capacity.kv_blocks, EVICTS[evict], weights)
        self.fair = evict == "fair"
        self.size = capacity.block_size
        self._token_bytes = capacity.kv_token_bytes
        self._worker, self._incarnation = worker, incarnation
        self._tells = tells
        self._seq = 0
        self.below: dict[Tier, BlockPool] = {}
        self.used: Used | None = None
        self.hit: Callable[[Work, int], None] | None = None  # an attempt begins with so many

    def count(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.size)

    def bytes(self, blocks_count: int) -> int:
        return blocks_count * self.size * self._token_bytes

    def owner(self, work: Work) -> TenantId:
        """Whose share its blocks count for; nobody's where shares do not count."""
        return work.dispatch.request.tenant if self.fair else ""

    def hits(self, work: Work) -> list[BlockId]:
        """Cached leading blocks; a position that still has to be run is never one of them."""
        whole = work.stage is Stage.ROOM and work.dispatch.first_token == "prefill"
        usable = work.known if whole else work.known - 1
        return self.pool.match(work.keys[: usable // self.size])

    def fits(self, work: Work, hits: list[BlockId]) -> bool:
        """Whether `take` would find blocks enough now. What a batch policy was told of a waiting
        attempt may be over: blocks of its prefix that others hold are no hits any more when the
        cached ones before them were evicted."""
        return self.pool.missing_for(hits, self.count(work.known)) <= 0

    def take(self, work: Work, hits: list[BlockId]) -> None:
        """Give an attempt that holds nothing its hits, and fresh blocks for all other tokens."""
        if self.hit is not None and hits:
            self.hit(work, len(hits))
        self.pool.take(hits)
        after = hits[-1] if hits else None
        work.blocks = hits + self.pool.allocate(self.count(work.known) - len(hits), after)
        work.committed = len(hits)
        work.tabled, work.table_fresh = 0, True

    def grow(self, work: Work, tokens: int) -> bool:
        """Blocks for `tokens` tokens. False when a preempted sequence's blocks were shared and so
        did not become free: the row sits this step out."""
        missing = -(-tokens // self.size) - len(work.blocks)
        if missing <= 0:
            return True
        if missing > self.pool.available:
            return False
        after = work.blocks[-1] if work.blocks else None
        work.blocks += self.pool.allocate(missing, after)
        return True

    def commit(self, work: Work) -> None:
        """Name the blocks that became full, so that others can hit them."""
        full = min(work.computed // self.size, len(work.keys))
        for i in range(work.committed, full):
            self.pool.commit(work.blocks[i], work.keys[i], self.owner(work))
        if self.used is not None:
            self.used(work, work.committed, full)
        work.committed = max(work.committed, full)

    def free(self, work: Work) -> None:
        if self.used is not None:
            self.used(work, 0, work.committed)
        self.pool.free(work.blocks)
        work.blocks, work.committed = [], 0

    def news(self) -> Sequence[KvEvents]:
        """What appeared and vanished since the last call, tier by tier; nothing if nobody tells."""
        told: list[KvEvents] = []
        if self.pool.added or self.pool.removed:
            self._news("device", self.pool, told)
        for tier, pool in self.below.items():
            if pool.added or pool.removed:
                self._news(tier, pool, told)
        return told

    def _news(self, tier: Tier, pool: BlockPool, told: list[KvEvents]) -> None:
        added, removed = pool.changes()
        if self._tells and (added or removed):
            told.append(self._event(added, removed, tier=tier))

    def everything(self) -> list[KvEvents]:
        """All keys anew, for an index that lost count."""
        for pool in (self.pool, *self.below.values()):
            pool.changes()
        told = [self._event(tuple(self.pool.all_keys()), (), reset=True)]
        return told + [
            self._event(tuple(pool.all_keys()), (), tier=tier)
            for tier, pool in self.below.items() if pool.cached_keys
        ]  # fmt: skip

    def _event(
        self, added: tuple[BlockKey, ...], removed: tuple[BlockKey, ...], *, tier: Tier = "device",
        reset: bool = False,
    ) -> KvEvents:  # fmt: skip
        self._seq += 1
        return KvEvents(self._worker, self._incarnation, self._seq, added, removed, reset, tier)
