"""The cache of one tier: which slot holds which block, and which blocks go when room is needed.

A pool like the device's, whose blocks are slots, with an order of eviction that an ended copy does
not change. Knows keys, slots and how often something was used; must not know bytes, time or whom
the blocks belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush, heapreplace

from kvasir.core.ids import BlockKey
from kvasir.kv.pool import BlockPool, EvictView

Rank = tuple[float, ...]


class Use:
    """What is known of a block when one has to go. `tick`: when it was used last; `depth`: blocks
    before it in its prompt; `seconds`: what computing it again takes, as the dearest of the prompts
    that used it is computed; `floor`: the cache's, when it was used last."""

    __slots__ = ("depth", "floor", "seconds", "tick", "uses")

    def __init__(
        self, depth: int, tick: int, seconds: float, uses: int = 1, floor: float = 0.0
    ) -> None:
        self.depth, self.tick, self.seconds, self.uses = depth, tick, seconds, uses
        self.floor = floor


RankOf = Callable[[Use], Rank]


class TierCache:
    """`slots_count` slots. Blocks with the lowest rank go first; ranks grow with each use."""

    def __init__(self, slots_count: int, rank: RankOf) -> None:
        self.pool = BlockPool(slots_count, self._victims)
        self._rank = rank
        self._uses: dict[int, Use] = {}  # by slot
        self._heap: list[tuple[Rank, int, int, Use]] = []  # an entry for each named slot, but those
        self._aside: dict[int, Use] = {}  # that were held when their turn came
        self._serial = 0
        self.floor = 0.0  # the first part of the rank that was evicted last

    def find(self, key: BlockKey) -> int | None:
        """The slot that holds it."""
        return self.pool.find(key)

    def touch(self, key: BlockKey, tick: int, seconds: float, *, again: bool) -> bool:
        """It was used; `again` counts it as one use more. False: it is not here."""
        slot = self.pool.find(key)
        if slot is None:
            return False
        use = self._uses[slot]
        use.tick, use.floor = tick, self.floor
        use.seconds = max(use.seconds, seconds)
        use.uses += again
        return True

    def reserve(self, use: Use, after: int | None = None) -> int | None:
        """A slot to write into, the one behind `after` if it is free. None: all that could go for
        it are worth more, or are being read or written."""
        if not self.pool.free_count:
            lowest = self._lowest()
            if lowest is None or self._rank(use) <= lowest:
                return None
        (slot,) = self.pool.allocate(1, after)
        return slot

    def name(self, slot: int, key: BlockKey, use: Use) -> None:
        """A reserved slot holds this block now. Nothing changes where another slot has it."""
        if self.pool.find(key) is not None:
            return
        self.pool.commit(slot, key)
        self._uses[slot] = use
        self._push(slot, use)

    def adopt(self, found: Mapping[int, BlockKey]) -> None:
        """What slots of an empty cache hold already: older than all that comes."""
        slots = self.pool.allocate(self.pool.blocks_count)
        for slot, key in found.items():
            self.name(slot, key, Use(0, 0, 0.0))
        self.pool.free(slots)

    def forget(self, slot: int) -> None:
        """A held slot holds something else than its name says."""
        self.pool.forget(slot)
        self._uses.pop(slot, None)

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

    def _push(self, slot: int, use: Use) -> None:
        self._serial += 1
        heappush(self._heap, (self._rank(use), self._serial, slot, use))

    def _lowest(self) -> Rank | None:
        """The lowest rank that may go, on top of the heap. An entry whose rank has grown is put
        where it belongs, one that is held aside."""
        heap = self._heap
        while heap:
            rank, serial, slot, use = heap[0]
            if self._uses.get(slot) is not use:
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
            rank = self._lowest()
            assert rank is not None
            _, _, slot, _ = heappop(self._heap)
            del self._uses[slot]
            found.append(slot)
            self.floor = max(self.floor, rank[0])
        return found

    def check(self) -> None:
        """Every named slot has a use, and an entry to be found by."""
        self.pool.check()
        assert len(self._uses) == self.pool.cached_keys
        entries = [slot for _, _, slot, use in self._heap if self._uses.get(slot) is use]
        aside = [slot for slot, use in self._aside.items() if self._uses.get(slot) is use]
        assert sorted(entries + aside) == sorted(self._uses)
        assert all(self.pool.refs(slot) for slot in aside)
