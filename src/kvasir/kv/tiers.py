"""The cache of one tier: which slot holds which block, and which blocks go when room is needed.

A pool like the device's, whose blocks are slots, with an order of eviction that an ended copy does
not change. Knows keys, slots and how often something was used; must not know bytes, time or whom
the blocks belong to. Of a tier that all workers share, a worker keeps no slots but what it
remembers (`SharedNames`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush, heapreplace

from kvasir.core.effects import NOWHERE
from kvasir.core.ids import BlockKey, TenantId
from kvasir.kv.pool import BlockPool, EvictView

Rank = tuple[float, ...]


class Use:
    """What is known of a block when one has to go. `tick`: when it was used last; `depth`: blocks
    before it in its prompt; `seconds`: what computing it again takes, as the dearest of the prompts
    that used it is computed; `floor`: the cache's, when it was used last; `owner`: the tenant whose
    share it counts for, where shares count."""

    __slots__ = ("depth", "floor", "owner", "seconds", "tick", "uses")

    def __init__(
        self, depth: int, tick: int, seconds: float, uses: int = 1, floor: float = 0.0,
        owner: TenantId = "",
    ) -> None:  # fmt: skip
        self.owner = owner
        self.depth, self.tick, self.seconds, self.uses = depth, tick, seconds, uses
        self.floor = floor


RankOf = Callable[[Use], Rank]
GivesUp = Callable[[Mapping[TenantId, int]], TenantId]
Heap = list[tuple[Rank, int, int, Use]]


def anyone(owned: Mapping[TenantId, int]) -> TenantId:
    """Of those who share by no rule; blocks then have no owner."""
    return next(iter(owned))


class TierCache:
    """`slots_count` slots. Blocks with the lowest rank go first; ranks grow with each use. Of which
    owner one goes is what `gives_up` says, of all that have one that could go."""

    def __init__(self, slots_count: int, rank: RankOf, gives_up: GivesUp = anyone) -> None:
        self.pool = BlockPool(slots_count, self._victims)
        self._rank, self._gives_up = rank, gives_up
        self._owned: Counter[TenantId] = Counter()
        self._comer: TenantId | None = None  # who gets the slot that is evicted for
        self._uses: dict[int, Use] = {}  # by slot
        self._heaps: dict[TenantId, Heap] = {}  # an entry for each named slot, but those
        self._aside: dict[int, Use] = {}  # that were held when their turn came
        self._serial = 0
        self.floor = 0.0  # the first part of the rank that was evicted last

    def find(self, key: BlockKey) -> int | None:
        """The slot that holds it."""
        return self.pool.find(key)

    def touch(
        self, key: BlockKey, tick: int, seconds: float, *, again: bool, owner: TenantId = ""
    ) -> bool:
        """It was used; `again` counts it as one use more. Found after a restart it is its first
        user's. False: it is not here."""
        slot = self.pool.find(key)
        if slot is None:
            return False
        use = self._uses[slot]
        if owner and not use.owner:
            self._drop(slot)
            self._aside.pop(slot, None)
            use.owner = owner
            self._add(slot, use)
        use.tick, use.floor = tick, self.floor
        use.seconds = max(use.seconds, seconds)
        use.uses += again
        return True

    def reserve(self, use: Use, after: int | None = None) -> int | None:
        """A slot to write into, the one behind `after` if it is free. None: all that could go for
        it are worth more, or are being read or written."""
        if not self.pool.free_count:
            owner = self._giver(use.owner)
            lowest = self._lowest(owner) if owner is not None else None
            if lowest is None or (owner == use.owner and self._rank(use) <= lowest):
                return None
        self._comer = use.owner
        (slot,) = self.pool.allocate(1, after)
        self._comer = None
        return slot

    def name(self, slot: int, key: BlockKey, use: Use) -> None:
        """A reserved slot holds this block now. Nothing changes where another slot has it."""
        if self.pool.find(key) is not None:
            return
        self.pool.commit(slot, key)
        self._add(slot, use)

    def adopt(self, found: Mapping[int, BlockKey]) -> None:
        """What slots of an empty cache hold already: older than all that comes."""
        slots = self.pool.allocate(self.pool.blocks_count)
        for slot, key in found.items():
            self.name(slot, key, Use(0, 0, 0.0))
        self.pool.free(slots)

    def forget(self, slot: int) -> None:
        """A held slot holds something else than its name says."""
        self.pool.forget(slot)
        self._drop(slot)

    def take(self, slots: Sequence[int]) -> None:
        """Slots that are about to be read."""
        self.pool.take(slots)

    def damaged(self, slot: int, key: BlockKey) -> None:
        """What `key` names was not in the slot, which is held."""
        self.forget(slot)

    def release(self, slots: Sequence[int]) -> None:
        """Reserved or taken slots are not read or written any more."""
        self.pool.free(slots)
        for slot in slots:
            use = self._aside.pop(slot, None)
            if use is not None:
                self._push(slot, use)

    def clear(self) -> None:
        """Forget everything, also what is read or written now."""
        for slot in list(self._uses):
            if self.pool.refs(slot):
                self.forget(slot)
        self.pool.clear()

    def _add(self, slot: int, use: Use) -> None:
        self._uses[slot] = use
        self._owned[use.owner] += 1
        self._push(slot, use)

    def _drop(self, slot: int) -> None:
        use = self._uses.pop(slot, None)
        if use is not None:
            self._owned[use.owner] -= 1
            if not self._owned[use.owner]:
                del self._owned[use.owner]

    def _push(self, slot: int, use: Use) -> None:
        self._serial += 1
        heap = self._heaps.setdefault(use.owner, [])
        heappush(heap, (self._rank(use), self._serial, slot, use))

    def _giver(self, comer: TenantId | None = None) -> TenantId | None:
        """Whose block is to go, for one of `comer`; none: no block may go. Nobody's go first."""
        if self._lowest("") is not None:
            return ""
        owned = dict(self._owned)
        if comer is not None:
            owned[comer] = owned.get(comer, 0) + 1
        while owned:
            owner = self._gives_up(owned)
            if owner == comer or self._lowest(owner) is not None:
                return owner
            del owned[owner]
        return None

    def _lowest(self, owner: TenantId) -> Rank | None:
        """The lowest rank that may go, on top of the owner's heap. An entry whose rank has grown is
        put where it belongs, one that is held aside."""
        heap = self._heaps.get(owner, [])
        while heap:
            rank, serial, slot, use = heap[0]
            if self._uses.get(slot) is not use or use.owner != owner:
                heappop(heap)
            elif (grown := self._rank(use)) != rank:
                heapreplace(heap, (grown, serial, slot, use))
            elif self.pool.refs(slot):
                heappop(heap)
                self._aside[slot] = use
            else:
                return rank
        return None

    def _victims(self, view: EvictView, count: int) -> list[int]:
        found: list[int] = []
        for _ in range(count):
            owner = self._giver(self._comer)
            assert owner is not None
            rank, _, slot, _ = heappop(self._heaps[owner])
            self._drop(slot)
            found.append(slot)
            self.floor = max(self.floor, rank[0])
        return found

    def check(self) -> None:
        """Every named slot has a use, and an entry to be found by."""
        self.pool.check()
        assert len(self._uses) == self.pool.cached_keys
        assert self._owned == Counter(use.owner for use in self._uses.values())
        entries = [
            slot for owner, heap in self._heaps.items() for _, _, slot, use in heap
            if self._uses.get(slot) is use and use.owner == owner
        ]  # fmt: skip
        aside = [slot for slot, use in self._aside.items() if self._uses.get(slot) is use]
        assert sorted(entries + aside) == sorted(self._uses)
        assert all(self.pool.refs(slot) for slot in aside)


class SharedNames:
    """`TierCache` for a tier that all share, which evicts by a rule of its own: the last
    `names_max` blocks that this worker stored or found there. They are not stored again; whether
    they are still there, only the tier knows."""

    def __init__(self, names_max: int) -> None:
        self.floor = 0.0
        self._names_max = names_max
        self._names: OrderedDict[BlockKey, None] = OrderedDict()

    def touch(
        self, key: BlockKey, tick: int, seconds: float, *, again: bool, owner: TenantId = ""
    ) -> bool:
        known = key in self._names
        if known:
            self._names.move_to_end(key)
        return known

    def reserve(self, use: Use, after: int | None = None) -> int:
        return NOWHERE

    def name(self, slot: int, key: BlockKey, use: Use) -> None:
        self.found((key,))

    def found(self, keys: Sequence[BlockKey]) -> None:
        """They are there."""
        for key in keys:
            self._names[key] = None
            self._names.move_to_end(key)
        while len(self._names) > self._names_max:
            self._names.popitem(last=False)

    def missed(self, keys: Sequence[BlockKey]) -> None:
        """They may not be there."""
        for key in keys:
            self._names.pop(key, None)

    def damaged(self, slot: int, key: BlockKey) -> None:
        self.missed((key,))

    def take(self, slots: Sequence[int]) -> None: ...

    def release(self, slots: Sequence[int]) -> None: ...

    def clear(self) -> None:
        self._names.clear()

    def check(self) -> None:
        assert len(self._names) <= self._names_max
