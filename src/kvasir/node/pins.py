"""What a worker keeps of prompts beyond their requests. Knows blocks, keys and ends; must not know
tenants, or who asked: the conductor does.

A kept block is held like that of a living sequence, so nothing evicts it. It is kept by order only
(`Pin`, `Keep`), for a time, and at most in a share of the pool. What could never run here while
blocks are kept makes them give way, and the conductor hears of it.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvasir.core.caches import Keep, Kept, Pin
from kvasir.core.effects import AnyEffect, Tell
from kvasir.core.ids import BlockId, CacheId
from kvasir.node.blocks import Blocks
from kvasir.node.config import WorkerConfig
from kvasir.node.work import Work
from kvasir.policy import caches


class Held(NamedTuple):
    """`until` is on this worker's clock."""

    blocks: tuple[BlockId, ...]
    until: float


class Pins:
    """Caches by name. One block may be in several."""

    def __init__(self, blocks: Blocks, config: WorkerConfig) -> None:
        self.held: dict[CacheId, Held] = {}
        self._uses: Counter[BlockId] = Counter()
        self._blocks, self._config = blocks, config

    @property
    def blocks_count(self) -> int:
        """Different blocks that are kept."""
        return len(self._uses)

    def pin(self, work: Work, now: float) -> list[AnyEffect]:
        """Its prompt is prefilled: keep what the conductor ordered of it."""
        return [self._pin(order, work, now) for order in work.dispatch.pins]

    def _pin(self, order: Pin, work: Work, now: float) -> AnyEffect:
        if order.cache in self.held:
            held = self.held[order.cache]
            self.held[order.cache] = Held(held.blocks, now + order.ttl_s)
            return self._tell(order.cache, len(held.blocks))
        blocks = self._blocks.pool.match(work.keys[: order.blocks])
        if len(blocks) < order.blocks:  # the prompt is shorter than what is to be kept of it
            return self._tell(order.cache, 0, "it is not cached here")
        more = sum(block not in self._uses for block in blocks)
        total, share = self._config.capacity.kv_blocks, self._config.pinned_share_max
        if not caches.has_room(self.blocks_count, more, total, share):
            return self._tell(order.cache, 0, "this worker keeps as much as it may")
        self._blocks.pool.take(blocks)
        self._uses.update(blocks)
        self.held[order.cache] = Held(tuple(blocks), now + order.ttl_s)
        return self._tell(order.cache, len(blocks))

    def keep(self, event: Keep, now: float) -> list[AnyEffect]:
        """Longer, or no longer."""
        held = self.held.get(event.cache)
        if held is None:
            return [self._tell(event.cache, 0, "it is not kept here")] if event.ttl_s else []
        if event.ttl_s:
            self.held[event.cache] = Held(held.blocks, now + event.ttl_s)
        else:
            self._free(event.cache)
        return []

    def expire(self, now: float) -> None:
        """The conductor ends a cache on time; this is for when it cannot."""
        for cache in [cache for cache, held in self.held.items() if now >= held.until]:
            self._free(cache)

    def yield_to(self, work: Work) -> list[AnyEffect]:
        """`work` waits for blocks. Let go of what is in its way, if it could never run here else:
        what it needs, and does not find kept, is more than all blocks that are not kept."""
        told: list[AnyEffect] = []
        while self.held and self._bars(work):
            cache = caches.gives_way((held.until, cache) for cache, held in self.held.items())
            self._free(cache)
            told.append(self._tell(cache, 0, "a request needed its blocks"))
        return told

    def _bars(self, work: Work) -> bool:
        room = self._config.capacity.kv_blocks - self.blocks_count
        needed = self._blocks.count(work.known)
        if needed <= room:
            return False
        shared = sum(block in self._uses for block in self._blocks.hits(work))
        return needed > room + shared

    def _free(self, cache: CacheId) -> None:
        blocks = self.held.pop(cache).blocks
        for block in blocks:
            self._uses[block] -= 1
            if not self._uses[block]:
                del self._uses[block]
        self._blocks.pool.free(blocks)

    def _tell(self, cache: CacheId, blocks: int, reason: str = "") -> AnyEffect:
        c = self._config
        return Tell(c.conductor, Kept(c.worker, c.incarnation, cache, blocks, reason))

    def check(self) -> None:
        """The count of kept blocks is that of what is held, and within its share."""
        uses = Counter(block for held in self.held.values() for block in held.blocks)
        assert uses == self._uses
        most = int(self._config.capacity.kv_blocks * self._config.pinned_share_max)
        assert self.blocks_count <= most, (self.blocks_count, most)
