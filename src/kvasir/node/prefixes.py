"""Prefixes that travel between caches: lent to a peer, or fetched from one before a prefill.

What is fetched goes into the cache, and the attempt goes on as if it had always been there; when it
does not come, the tokens are computed. So a fetch can be wrong, late or lost, and costs time only.
Knows blocks and keys; the worker around it knows stages. Must not know when to fetch (the
conductor's choice) or how bytes travel.
"""

from __future__ import annotations

from kvasir.core.effects import AnyEffect, Fetch, Note, Release, Send, Tell
from kvasir.core.events import Shipped, TransferFailed
from kvasir.core.ids import BlockId, RequestId, prefix_id
from kvasir.core.messages import KvGone, KvWant, Received, SendOver, TransferReport
from kvasir.node.blocks import Blocks
from kvasir.node.config import WorkerConfig
from kvasir.node.work import Work

Key = tuple[RequestId, int]


class Prefixes:
    """`lent` blocks are held for peers until their transfer is over; `wanted` are fetches."""

    def __init__(self, blocks: Blocks, config: WorkerConfig) -> None:
        self.lent: dict[Key, list[BlockId]] = {}
        self.wanted: dict[Key, Work] = {}
        self._blocks, self._config = blocks, config

    # --- fetching ---------------------------------------------------------------------------------

    def ask(self, work: Work, now: float) -> list[AnyEffect]:
        """Blocks for what the peer has and this cache has not; nothing when there is no such thing
        or no room for it."""
        d, pool, size = work.dispatch, self._blocks.pool, self._blocks.size
        count = min(d.prefix_blocks, len(work.keys), (work.known - 1) // size)
        hits = pool.match(work.keys[:count])
        if not d.prefix_from or len(hits) >= count or pool.missing_for(hits, count) > 0:
            return []
        pool.take(hits)
        after = hits[-1] if hits else None
        work.blocks = hits + pool.allocate(count - len(hits), after)
        work.inbound, work.first_block = True, len(hits)
        name, inbound = prefix_id(work.id), tuple(work.blocks[len(hits) :])
        self.wanted[name, work.attempt] = work
        nbytes, deadline = self._blocks.bytes(len(inbound)), now + self._config.kv_wait_s
        fetch = Fetch(name, work.attempt, d.prefix_from, len(hits), inbound, nbytes, deadline,
                      tuple(work.blocks))  # fmt: skip
        keys = tuple(work.keys[len(hits) : count])
        want = KvWant(name, work.attempt, self._config.worker, len(hits), keys=keys)
        return [fetch, Tell(d.prefix_from, want)]

    def received(self, event: Received) -> list[AnyEffect]:
        """A wanted attempt's fetch is over; what came is in the cache, and held by nobody."""
        work = self.wanted.pop((event.request_id, event.attempt))
        work.inbound = False
        if event.ok:
            for block, key in zip(work.blocks, work.keys, strict=False):
                self._blocks.pool.commit(block, key, self._blocks.owner(work))
        self._blocks.free(work)
        c, source, name = self._config, work.dispatch.prefix_from, event.request_id
        release = Release(name, event.attempt)
        if not event.ok:
            return [release, Note(TransferFailed(name, c.worker, event.reason))]
        measured = (event.bytes, event.seconds, event.transport)
        report = TransferReport(name, event.attempt, source, c.worker, *measured)
        shipped = Shipped(name, source, c.worker, *measured)
        return [release, Tell(c.conductor, report), Note(shipped)]

    def cancel(self, work: Work) -> list[AnyEffect]:
        """Do not wait any longer: the transport answers with `Received`."""
        name = prefix_id(work.id)
        return [Release(name, work.attempt)] if (name, work.attempt) in self.wanted else []

    # --- lending ----------------------------------------------------------------------------------

    def lend(self, event: KvWant, now: float) -> list[AnyEffect]:
        """All that was asked for, or nothing."""
        key = (event.request_id, event.attempt)
        blocks = self._blocks.pool.match(event.keys)
        if key in self.lent:
            return []
        if len(blocks) < len(event.keys) or len(self.lent) >= self._config.waiting_max:
            return [Tell(event.target, KvGone(*key, "no longer cached"))]
        self._blocks.pool.take(blocks)
        self.lent[key] = blocks
        nbytes, deadline = self._blocks.bytes(len(blocks)), now + self._config.kv_wait_s
        return [Send(*key, event.target, event.first_block, tuple(blocks), nbytes, deadline,
                     None, True)]  # fmt: skip

    def returned(self, event: SendOver) -> list[AnyEffect]:
        """A loan's transfer is over, well or not. Nothing when it is none of these."""
        key = (event.request_id, event.attempt)
        blocks = self.lent.pop(key, None)
        if blocks is None:
            return []
        self._blocks.pool.free(blocks)
        return [Release(*key)]
