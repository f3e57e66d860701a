"""A worker's copies of what a peer has cached: ordered by the conductor, before anybody asks.

What the worker has on a tier of its own is brought to the device in the same way. Nobody waits for
a copy. It takes blocks that nothing needs now, never more than its share before
they are used, and what goes wrong leaves nothing behind. Each block that came is watched until a
prompt begins with it (used) or it is evicted (wasted). Knows blocks and keys; must not know why a
copy is worth it, nor how bytes travel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from kvasir.core.copies import Copied, Copy, Purpose
from kvasir.core.effects import AnyEffect, Fetch, Note, Release, Tell
from kvasir.core.events import BlocksCopied, CopiesUsed, CopyFailed
from kvasir.core.ids import BlockId, BlockKey, RequestId
from kvasir.core.messages import Dispatch, KvGone, KvWant, Received
from kvasir.core.request import Request
from kvasir.core.tiers import Restored
from kvasir.node.blocks import Blocks
from kvasir.node.config import WorkerConfig
from kvasir.node.tiers import Tiers
from kvasir.node.work import Work

ATTEMPT: Final = 1  # an order has one


class Coming(NamedTuple):
    """A copy under way: `blocks` are held, of which those from `first` on are written to."""

    order: Copy
    blocks: list[BlockId]
    first: int
    since: float


class Loading(NamedTuple):
    """A copy out of a tier under way, as an attempt that will never run: blocks from `first` on."""

    order: Copy
    work: Work
    first: int


class Replicas:
    """`coming` from peers and `loading` from a tier, by the name of the order; `unused` blocks came
    and no prompt has begun with them."""

    def __init__(
        self, blocks: Blocks, config: WorkerConfig, tiers: Tiers,
        emit: Callable[[AnyEffect], None],
    ) -> None:  # fmt: skip
        self.coming: dict[RequestId, Coming] = {}
        self.loading: dict[RequestId, Loading] = {}
        self._tiers = tiers
        self.unused: dict[BlockKey, Purpose] = {}
        self._blocks, self._config, self._emit = blocks, config, emit
        self._room = int(config.capacity.kv_blocks * config.copies_share_max)
        if self._room:
            blocks.hit = self.used

    # --- fetching ---------------------------------------------------------------------------------

    def order(self, event: Copy, now: float, reason: str) -> None:
        """Ask the source for what is not here. `reason`: why that must not be now."""
        if event.name in self.coming or event.name in self.loading:
            return
        pool, count = self._blocks.pool, len(event.keys)
        hits = pool.match(event.keys)
        missing = count - len(hits)
        if not missing:
            reason = "it is here"
        elif pool.missing_for(hits, count) > 0:
            reason = reason or "no room"
        elif len(self.unused) + self._expected() + missing > self._room:
            reason = reason or "too many unused copies"
        if reason:
            self._over(event, reason)
            return
        if event.source == self._config.worker:
            self._load(event, len(hits), now)
            return
        pool.take(hits)
        blocks = hits + pool.allocate(missing, hits[-1] if hits else None)
        self.coming[event.name] = Coming(event, blocks, len(hits), now)
        inbound, deadline = tuple(blocks[len(hits) :]), now + self._config.kv_wait_s
        self._emit(
            Fetch(event.name, ATTEMPT, event.source, len(hits), inbound,
                  self._blocks.bytes(missing), deadline, tuple(blocks))
        )  # fmt: skip
        want = KvWant(event.name, ATTEMPT, self._config.worker, len(hits),
                      keys=event.keys[len(hits) :])  # fmt: skip
        self._emit(Tell(event.source, want))

    def _expected(self) -> int:
        loading = sum(len(one.order.keys) - one.first for one in self.loading.values())
        return loading + sum(len(c.blocks) - c.first for c in self.coming.values())

    # --- loading ----------------------------------------------------------------------------------

    def _load(self, order: Copy, first: int, now: float) -> None:
        """As for a prompt of these blocks and one token more; a shared tier is not asked."""
        tokens = len(order.keys) * self._blocks.size + 1
        prompt = Request(order.name, "", tokens, 1, order.keys, tenant=order.tenant)
        work = Work(Dispatch(order.epoch, prompt, ATTEMPT, 0, "prefill", "decode"), now, 0)
        work.shared = frozenset()
        self.loading[order.name] = Loading(order, work, first)
        if not self._tiers.load(work, now, 0.0, behind=0):
            del self.loading[order.name]
            self._over(order, "no tier gives it sooner than computing")

    def restored(self, work: Work | None, event: Restored) -> bool:
        """Whether this was a load of its own. What came is named by now, and held by nobody."""
        loading = self.loading.pop(event.request_id, None) if work is not None else None
        if loading is None:
            return False
        order, blocks = loading.order, event.count
        self.unused.update(dict.fromkeys(order.keys[loading.first :][:blocks], order.purpose))
        self._blocks.free(loading.work)
        nbytes = sum(moved.bytes for moved in event.moved)
        seconds = sum(moved.seconds for moved in event.moved)
        came = Received(order.name, ATTEMPT, blocks > 0, nbytes, seconds, "tier")
        self._over(order, "" if blocks else event.fault or "gone", came, blocks)
        return True

    def received(self, event: Received) -> bool:
        """Whether this was a copy. What came is in the cache, and held by nobody."""
        coming = self.coming.pop(event.request_id, None)
        if coming is None:
            return False
        order, first = coming.order, coming.first
        if event.ok:
            owner = order.tenant if self._blocks.fair else ""
            new = order.keys[first:]
            fresh = [key for key in new if self._blocks.pool.find(key) is None]
            for block, key in zip(coming.blocks[first:], new, strict=True):
                self._blocks.pool.commit(block, key, owner)
            self.unused.update(dict.fromkeys(fresh, order.purpose))
        self._blocks.pool.free(coming.blocks)
        self._emit(Release(order.name, ATTEMPT))
        self._over(order, "" if event.ok else event.reason, event, len(coming.blocks) - first)
        return True

    def gone(self, event: KvGone) -> bool:
        """Whether the source of a copy refused: the transport then answers with `Received`."""
        if event.request_id not in self.coming:
            return False
        self._emit(Release(event.request_id, ATTEMPT))
        return True

    def expire(self, now: float) -> None:
        """Do not wait any longer: as `gone`."""
        for name, coming in self.coming.items():
            if now - coming.since > self._config.kv_wait_s:
                self._emit(Release(name, ATTEMPT))

    def _over(
        self, order: Copy, reason: str, came: Received | None = None, blocks: int = 0
    ) -> None:
        c, source = self._config, order.source
        if reason or came is None:
            said = Copied(c.worker, c.incarnation, order.name, source, reason=reason)
            self._emit(Note(CopyFailed(c.worker, source, order.purpose, reason)))
        else:
            said = Copied(c.worker, c.incarnation, order.name, source, blocks, came.bytes,
                          came.seconds, came.transport)  # fmt: skip
            moved = (blocks, came.bytes, came.seconds, came.transport)
            self._emit(Note(BlocksCopied(c.worker, source, order.purpose, *moved)))
        self._emit(Tell(c.conductor, said))

    # --- what became of them ----------------------------------------------------------------------

    def used(self, work: Work, blocks: int) -> None:
        """An attempt began with so many blocks out of the cache."""
        if self.unused and work.id not in self.loading:
            self._out_of(work.keys[:blocks], used=True)

    def evicted(self, keys: Iterable[BlockKey]) -> None:
        """These are not in the cache any more."""
        find = self._blocks.pool.find
        self._out_of([key for key in keys if find(key) is None], used=False)

    def _out_of(self, keys: Iterable[BlockKey], *, used: bool) -> None:
        unused = self.unused
        found = Counter(unused.pop(key) for key in keys if key in unused)
        for purpose, count in found.items():
            blocks = (count, 0) if used else (0, count)
            self._emit(Note(CopiesUsed(self._config.worker, purpose, *blocks)))

    @property
    def busy(self) -> bool:
        return bool(self.coming or self.loading)

    def held(self) -> Iterator[list[BlockId]]:
        """Blocks that copies under way hold."""
        yield from (coming.blocks for coming in self.coming.values())
        yield from (loading.work.blocks for loading in self.loading.values())

    def check(self) -> None:
        """Blocks of copies are held; unused ones are in the cache, and within their share."""
        pool = self._blocks.pool
        assert all(pool.find(key) is not None for key in self.unused)
        assert len(self.unused) + self._expected() <= self._room
        for name, coming in self.coming.items():
            assert name == coming.order.name and 0 <= coming.first < len(coming.blocks)
            assert len(coming.blocks) == len(coming.order.keys)
            assert all(pool.refs(block) > 0 for block in coming.blocks)
