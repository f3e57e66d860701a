"""The conductor's book of kept prefixes: whose they are, where they stand, when they end.

A cache is made by a request that computes its prompt: the worker that prefills it pins the blocks.
If that worker goes, nothing is moved: the next request that begins with the prefix has it pinned
where it runs. Knows names, keys and ends; must not know how a worker keeps blocks.

    Submit(mark) --> new --Kept--> ready --worker gone, drains or gives way--> lost
                      |             ^ '--time, Retain(0)--> ended                |
                      '--refused    '-------------Kept, of the next use----------'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from kvasir.core.caches import CacheState, Keep, Kept, Mark, Pin, Retain, State
from kvasir.core.effects import AnyEffect, Note, Tell
from kvasir.core.events import CacheChanged
from kvasir.core.ids import BlockKey, CacheId, Epoch, NodeId, RequestId, TenantId, WorkerId
from kvasir.core.messages import Load, Submit
from kvasir.core.request import Request
from kvasir.core.specs import Deployment
from kvasir.node.registry import Member
from kvasir.policy import caches
from kvasir.policy.admit import ADMITTED, Verdict

K = TypeVar("K", int, BlockKey)


class Entry:
    """One cache. `worker` is empty while none has it; `made`: one has had it; until then `makers`
    are the requests that would make it."""

    __slots__ = (
        "ends_at", "gateway", "id", "keys", "made", "makers", "must", "since", "tenant", "worker",
    )  # fmt: skip

    def __init__(
        self, mark: Mark, tenant: TenantId, gateway: NodeId, keys: Sequence[BlockKey], now: float
    ) -> None:
        self.id = mark.cache
        self.tenant, self.gateway = tenant, gateway
        self.keys = tuple(keys[: mark.blocks])
        self.ends_at = now + mark.ttl_s
        self.must = mark.must
        self.worker: WorkerId = ""
        self.since = now
        self.made = False
        self.makers: set[RequestId] = set()

    @property
    def blocks(self) -> int:
        return len(self.keys)

    @property
    def tip(self) -> BlockKey:
        """A key names all blocks before it too."""
        return self.keys[-1]

    @property
    def state(self) -> State:
        if self.worker:
            return "ready"
        return "lost" if self.made else "new"


class Account:
    """What one tenant keeps: caches, and how many of them have each block."""

    __slots__ = ("blocks", "caches")

    def __init__(self) -> None:
        self.caches = 0
        self.blocks: Counter[BlockKey] = Counter()


class Caches:
    """All caches of one conductor. `emit` takes what is to be told."""

    def __init__(
        self, deployment: Deployment, epoch: Epoch, emit: Callable[[AnyEffect], None]
    ) -> None:
        self.entries: dict[CacheId, Entry] = {}
        self._spec, self._grace_s = deployment.caches, deployment.limits.grace_s
        own = ((t.name, t.pinned_blocks_max) for t in deployment.tenants)
        self._own_max = {name: most for name, most in own if most is not None}
        self._epoch, self._emit, self._size = epoch, emit, deployment.block_size
        self._accounts: dict[TenantId, Account] = {}
        self._tips: dict[BlockKey, dict[CacheId, Entry]] = {}
        self._lengths: Counter[int] = Counter()  # in blocks
        self._held: dict[WorkerId, Counter[BlockKey]] = {}
        self._at: dict[WorkerId, dict[CacheId, Entry]] = {}

    # --- reading ----------------------------------------------------------------------------------

    def within(self, keys: Sequence[BlockKey]) -> Iterable[Entry]:
        """Caches that a prompt of these keys begins with."""
        for blocks in self._lengths:
            if blocks <= len(keys):
                yield from self._tips.get(keys[blocks - 1], {}).values()

    def kept_tokens(self, tenant: TenantId, keys: Sequence[BlockKey]) -> int:
        """Of the prompt, in a cache that this tenant keeps and that was made."""
        own = (e.blocks for e in self.within(keys) if e.tenant == tenant and e.made)
        return max(own, default=0) * self._size

    def pins(
        self, keys: Sequence[BlockKey], worker: WorkerId, now: float
    ) -> tuple[Pin, ...]:
        """What `worker` is to keep of a prompt that it prefills: caches that no other has."""
        found = [e for e in self.within(keys) if e.worker in ("", worker) and e.ends_at > now]
        return tuple(Pin(e.id, e.blocks, e.ends_at - now) for e in found)

    def pinned(self, worker: WorkerId) -> int:
        """Different blocks that it keeps."""
        return len(self._held.get(worker, ()))

    def with_room(self, marks: Sequence[Mark], members: Iterable[Member]) -> list[Member]:
        """Workers that may keep so many blocks more."""
        blocks = max((mark.blocks for mark in marks), default=0)
        share = self._spec.pool_share_max
        return [
            m for m in members
            if caches.has_room(self.pinned(m.id), blocks, m.blocks_total, share)
        ]  # fmt: skip

    # --- wishes -----------------------------------------------------------------------------------

    def mark(self, event: Submit, members: Iterable[Member], now: float) -> Verdict:
        """Write down what a request wishes to be kept. The refusal of what it must have."""
        must = any(mark.must and mark.cache not in self.entries for mark in event.marks)
        if must and not self.with_room(event.marks, members):
            return Verdict(429, "no worker may keep so many blocks more now")
        for mark in event.marks:
            verdict = self._mark(mark, event, now)
            if verdict.status:
                refused = CacheState(mark.cache, "refused", 0.0, verdict.status, verdict.reason)
                self._emit(Tell(event.request.gateway, refused))
                if mark.must:
                    return verdict
        return ADMITTED

    def _mark(self, mark: Mark, event: Submit, now: float) -> Verdict:
        entry, verdict = self.entries.get(mark.cache), ADMITTED
        if entry is not None:
            self._until(entry, mark.ttl_s, now)
        else:
            verdict = self._open(mark, event.request, now)
            entry = self.entries.get(mark.cache)
        if entry is not None and not entry.made:
            entry.makers.add(event.request.id)
        return verdict

    def _open(self, mark: Mark, request: Request, now: float) -> Verdict:
        assert 0 < mark.blocks <= len(request.keys), mark
        entry = Entry(mark, request.tenant, request.gateway, request.keys, now)
        account = self._accounts.get(request.tenant) or Account()
        blocks_max = self._own_max.get(request.tenant, self._spec.tenant_blocks_max)
        new = sum(key not in account.blocks for key in entry.keys)
        verdict = caches.may_keep(
            caches.Asked(account.caches, self._spec.tenant_caches_max, len(account.blocks), new,
                         blocks_max)
        )  # fmt: skip
        if verdict.status:
            return verdict
        self._accounts[request.tenant] = account
        account.caches += 1
        account.blocks.update(entry.keys)
        self.entries[entry.id] = entry
        self._tips.setdefault(entry.tip, {})[entry.id] = entry
        self._lengths[entry.blocks] += 1
        self._changed(entry, entry.state, now)
        return ADMITTED

    def retain(self, event: Retain, now: float) -> None:
        """Longer, or no longer; of a tenant's own cache only."""
        entry = self.entries.get(event.cache)
        if entry is None or entry.tenant != event.tenant:
            self._emit(Tell(event.gateway, CacheState(event.cache, "ended")))
        elif event.ttl_s:
            self._until(entry, event.ttl_s, now)
            self._tell(entry, entry.state, now)
        else:
            self._end(entry, now)

    def over(self, request_id: RequestId, marks: Sequence[Mark], now: float) -> None:
        """A request is over, or starts again: what it did not come to make is not kept."""
        for mark in marks:
            entry = self.entries.get(mark.cache)
            if entry is not None:
                entry.makers.discard(request_id)
                if not entry.made and not entry.makers:
                    self._end(entry, now)

    def _until(self, entry: Entry, ttl_s: float, now: float) -> None:
        entry.ends_at = now + ttl_s
        if entry.worker:
            self._emit(Tell(entry.worker, Keep(self._epoch, entry.id, ttl_s)))

    # --- what workers say -------------------------------------------------------------------------

    def kept(self, event: Kept, now: float) -> None:
        entry = self.entries.get(event.cache)
        if event.blocks:
            if entry is None or entry.worker not in ("", event.worker):
                self._emit(Tell(event.worker, Keep(self._epoch, event.cache, 0.0)))
            elif not entry.worker:
                self._place(entry, event.worker, now)
        elif entry is not None and entry.worker == event.worker:
            self._lose(entry, now)
        elif entry is not None and entry.must and not entry.made:
            self._end(entry, now, CacheState(entry.id, "refused", 0.0, 429, event.reason))

    def beat(self, member: Member, load: Load, now: float) -> None:
        """What a worker keeps against what it should: messages may have been lost."""
        for cache in load.pins:
            entry = self.entries.get(cache)
            if entry is None or entry.worker not in ("", member.id):
                self._emit(Tell(member.id, Keep(self._epoch, cache, 0.0)))
            elif not entry.worker and not member.draining:
                self._place(entry, member.id, now)
        for entry in list(self._at.get(member.id, {}).values()):
            if entry.id not in load.pins and now - entry.since > self._grace_s:
                self._lose(entry, now)

    def gone(self, worker: WorkerId, now: float) -> None:
        """All that it kept is lost."""
        for entry in list(self._at.get(worker, {}).values()):
            self._lose(entry, now)

    def expire(self, members: Mapping[WorkerId, Member], now: float) -> None:
        """End what is over, and take back what stands where no request goes any more."""
        for entry in list(self.entries.values()):
            if now >= entry.ends_at:
                self._end(entry, now)
            elif entry.worker and members[entry.worker].draining:
                self._emit(Tell(entry.worker, Keep(self._epoch, entry.id, 0.0)))
                self._lose(entry, now)

    # --- states -----------------------------------------------------------------------------------

    def _place(self, entry: Entry, worker: WorkerId, now: float) -> None:
        entry.worker, entry.since, entry.made = worker, now, True
        entry.makers.clear()
        self._held.setdefault(worker, Counter()).update(entry.keys)
        self._at.setdefault(worker, {})[entry.id] = entry
        self._changed(entry, "ready", now)

    def _lose(self, entry: Entry, now: float) -> None:
        self._unplace(entry)
        self._changed(entry, "lost", now)

    def _unplace(self, entry: Entry) -> None:
        if entry.worker:
            subtract(self._held[entry.worker], entry.keys)
            del self._at[entry.worker][entry.id]
            entry.worker = ""

    def _end(self, entry: Entry, now: float, said: CacheState | None = None) -> None:
        if entry.worker:
            self._emit(Tell(entry.worker, Keep(self._epoch, entry.id, 0.0)))
        self._unplace(entry)
        del self.entries[entry.id]
        account, same = self._accounts[entry.tenant], self._tips[entry.tip]
        account.caches -= 1
        subtract(account.blocks, entry.keys)
        if not account.caches:
            del self._accounts[entry.tenant]
        del same[entry.id]
        if not same:
            del self._tips[entry.tip]
        subtract(self._lengths, (entry.blocks,))
        self._emit(Tell(entry.gateway, said or CacheState(entry.id, "ended")))
        self._emit(Note(CacheChanged("refused" if said else "ended", entry.blocks)))

    def _changed(self, entry: Entry, state: State, now: float) -> None:
        self._tell(entry, state, now)
        self._emit(Note(CacheChanged(state, entry.blocks)))

    def _tell(self, entry: Entry, state: State, now: float) -> None:
        left_s = max(0.0, entry.ends_at - now)
        self._emit(Tell(entry.gateway, CacheState(entry.id, state, left_s)))

    def check(self) -> None:
        """Every count is that of the entries."""
        entries = self.entries.values()
        assert self._lengths == Counter(e.blocks for e in entries)
        assert {i for same in self._tips.values() for i in same} == set(self.entries)
        for tenant, account in self._accounts.items():
            own = [e for e in entries if e.tenant == tenant]
            assert account.caches == len(own) > 0
            assert account.blocks == Counter(key for e in own for key in e.keys)
        assert {e.tenant for e in entries} == set(self._accounts)
        for worker, held in self._held.items():
            there = {e.id: e for e in entries if e.worker == worker}
            assert held == Counter(key for e in there.values() for key in e.keys)
            assert self._at[worker] == there
        assert all(e.made for e in entries if e.worker)
        assert all(e.made != bool(e.makers) for e in entries)


def subtract(counts: Counter[K], keys: Iterable[K]) -> None:
    """Take one off each count; none is kept at zero."""
    for key in keys:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]
