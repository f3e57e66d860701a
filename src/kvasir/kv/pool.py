"""The block pool of one worker: which physical blocks are free, held, or cached.

Knows block ids and keys; knows nothing of requests, tensors or time. Every block is in exactly one
of three states:

    free     in `_runs`, no key
    held     refcount > 0; has a key once it is full and committed
    cached   refcount 0 but its key is still findable; in eviction order

    free --allocate--> held --free (no key)--> free
                       held --free (key)--> cached --evict--> free
                       held <--take-- cached

A block that is read without being held (copied to a tier) is pinned: as long as it is, it is not
evicted, and its place in the order stays what it is.

Held blocks of one sequence lie in contiguous runs where possible, so that attention reads views and
a transfer is a few large copies. Blocks are released tail first, so a chain loses its tail before
its head (vLLM v1; RadixAttention evicts leaves first).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from kvasir.core.ids import BlockId, BlockKey, TenantId

UNWEIGHTED: Final[Mapping[TenantId, float]] = MappingProxyType({})


class EvictView(Protocol):
    """What an eviction policy may look at: evictable blocks, oldest release first, of everybody or
    of one owner; how many named blocks each owner has that is known; what owners weigh."""

    def in_order(self, owner: TenantId = "") -> Iterator[BlockId]: ...
    def owned(self) -> Mapping[TenantId, int]: ...
    @property
    def weights(self) -> Mapping[TenantId, float]: ...


Victims = Callable[[EvictView, int], Sequence[BlockId]]  # as many different ones as asked for



class BlockPool:
    """`blocks_count` physical blocks. Costs are O(blocks touched), plus log of the free runs. A
    block may have an owner, whoever named it first; `weights` of owners are 1 unless given."""

    def __init__(
        self, blocks_count: int, victims: Victims, weights: Mapping[TenantId, float] = UNWEIGHTED
    ) -> None:
        assert blocks_count > 0
        self.blocks_count = blocks_count
        self._victims = victims
        self.weights = weights
        self._owner: dict[BlockId, TenantId] = {}  # of named blocks that have one
        self._owned: dict[TenantId, int] = {}
        self._cached_of: dict[TenantId, OrderedDict[BlockId, None]] = {}  # parts of `_cached`
        self._refs = [0] * blocks_count
        self._key: list[BlockKey | None] = [None] * blocks_count
        self._by_key: dict[BlockKey, BlockId] = {}
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # oldest release first
        self._runs = FreeRuns(blocks_count)
        self._pins: dict[BlockId, int] = {}
        self.idle_pins = 0  # pinned blocks that nobody holds
        self.added: list[BlockKey] = []  # since the last `changes()`
        self.removed: list[BlockKey] = []

    # --- reading ----------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now: free ones and evictable ones."""
        return self._runs.count + len(self._cached) - self.idle_pins

    @property
    def free_count(self) -> int:
        """Blocks that hold nothing at all."""
        return self._runs.count

    @property
    def held(self) -> int:
        return self.blocks_count - self.available - self.idle_pins

    @property
    def cached_keys(self) -> int:
        return len(self._by_key)

    def match(self, keys: Sequence[BlockKey]) -> list[BlockId]:
        """Blocks of the longest leading run of `keys` that is cached or held."""
        found: list[BlockId] = []
        by_key = self._by_key
        for key in keys:
            block = by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def missing_for(self, hits: Sequence[BlockId], blocks_needed: int) -> int:
        """How many more blocks must be available to `take(hits)` and then allocate the rest."""
        refs, pins = self._refs, self._pins
        revived = sum(1 for b in hits if not refs[b] and b not in pins)
        return blocks_needed - len(hits) + revived - self.available

    def find(self, key: BlockKey) -> BlockId | None:
        return self._by_key.get(key)

    def in_order(self, owner: TenantId = "") -> Iterator[BlockId]:
        cached: Iterable[BlockId] = self._cached_of.get(owner, ()) if owner else self._cached
        if not self.idle_pins:
            return iter(cached)
        return (block for block in cached if block not in self._pins)

    def owned(self) -> Mapping[TenantId, int]:
        return self._owned

    def refs(self, block: BlockId) -> int:
        return self._refs[block]

    def all_keys(self) -> list[BlockKey]:
        return list(self._by_key)

    # --- changing ---------------------------------------------------------------------------------

    def take(self, blocks: Sequence[BlockId]) -> None:
        """One more reference on each block (found by `match`)."""
        refs = self._refs
        for block in blocks:
            if refs[block] == 0:
                del self._cached[block]
                if block in self._owner:
                    del self._cached_of[self._owner[block]][block]
                self.idle_pins -= block in self._pins
            refs[block] += 1

    def allocate(self, count: int, after: BlockId | None = None) -> list[BlockId]:
        """`count` fresh blocks with one reference each, continuing the run after `after` if it can.

        Evicts cached blocks, oldest first, when the free ones do not suffice. The caller checks
        `available` first: asking for more is a programmer's error.
        """
        assert 0 <= count <= self.available, (count, self.available)
        if count > self._runs.count:
            self._evict(count - self._runs.count)
        blocks = self._runs.take(count, after)
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def commit(self, block: BlockId, key: BlockKey, owner: TenantId = "") -> None:
        """Name a held, full block. A key that another block has already keeps that one."""
        assert self._refs[block] > 0, block
        if self._key[block] is None and key not in self._by_key:
            self._key[block] = key
            self._by_key[key] = block
            self.added.append(key)
            if owner:
                self._owner[block] = owner
                self._owned[owner] = self._owned.get(owner, 0) + 1

    def free(self, blocks: Sequence[BlockId]) -> None:
        """Drop one reference on each block, last block first."""
        refs, keys, cached = self._refs, self._key, self._cached
        loose: list[BlockId] = []
        for block in reversed(blocks):
            count = refs[block] - 1
            assert count >= 0, block
            refs[block] = count
            if not count:
                if keys[block] is None:
                    loose.append(block)
                else:
                    cached[block] = None
                    if block in self._owner:
                        self._cached_of.setdefault(self._owner[block], OrderedDict())[block] = None
                    self.idle_pins += block in self._pins
        self._runs.give(loose)

    def pin(self, blocks: Sequence[BlockId]) -> None:
        """Keep named blocks from being evicted until as many `unpin`."""
        for block in blocks:
            assert self._key[block] is not None, block
            pins = self._pins.get(block, 0)
            self._pins[block] = pins + 1
            self.idle_pins += not pins and not self._refs[block]

    def unpin(self, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            pins = self._pins.pop(block) - 1
            if pins:
                self._pins[block] = pins
            else:
                self.idle_pins -= not self._refs[block]

    def forget(self, block: BlockId) -> None:
        """Take the name of a held block away: its content is not what it says."""
        assert self._refs[block] > 0, block
        key, self._key[block] = self._key[block], None
        if key is not None:
            del self._by_key[key]
            self.removed.append(key)
            self._disown(block)

    def clear(self) -> None:
        """Forget every cached block that nobody holds."""
        self._evict(len(self._cached) - self.idle_pins)

    def changes(self) -> tuple[tuple[BlockKey, ...], tuple[BlockKey, ...]]:
        """Keys (added, removed) since the last call. A key in both came and went, or went and came:
        the pool's present state decides which, so each key is listed on one side only."""
        if not self.added and not self.removed:
            return (), ()
        by_key = self._by_key
        if self.removed and self.added:
            touched = dict.fromkeys([*self.added, *self.removed])
            added = tuple(k for k in touched if k in by_key)
            removed = tuple(k for k in touched if k not in by_key)
        else:
            added = tuple(k for k in self.added if k in by_key)
            removed = tuple(self.removed)
        self.added.clear()
        self.removed.clear()
        return added, removed

    def _evict(self, count: int) -> None:
        keys, by_key, cached = self._key, self._by_key, self._cached
        blocks = list(self._victims(self, count))
        for block in blocks:
            del cached[block]
            key = keys[block]
            assert key is not None
            del by_key[key]
            keys[block] = None
            self.removed.append(key)
            self._disown(block)
        blocks.sort(reverse=True)
        self._runs.give(blocks)

    def _disown(self, block: BlockId) -> None:
        """Its name is gone, and with it its owner."""
        owner = self._owner.pop(block, "")
        if not owner:
            return
        cached = self._cached_of.get(owner)
        if cached is not None:
            cached.pop(block, None)
        self._owned[owner] -= 1
        if not self._owned[owner]:
            del self._owned[owner]
            self._cached_of.pop(owner, None)

    def check(self) -> None:
        """Every block in exactly one state; keys, owners and refcounts agree."""
        free = self._runs.check()
        assert self._owned == Counter(self._owner.values())
        for owner, cached in self._cached_of.items():
            own = [b for b in self._cached if self._owner.get(b) == owner]
            assert own == list(cached), owner
        assert len(free) + len(self._cached) + self.held == self.blocks_count
        assert self.idle_pins == sum(block in self._cached for block in self._pins)
        for block in range(self.blocks_count):
            refs, key = self._refs[block], self._key[block]
            states = (block in free) + (block in self._cached) + (refs > 0)
            assert states == 1, (block, states)
            assert refs >= 0
            assert key is None or self._by_key[key] == block
            assert block not in free or key is None
            assert block not in self._cached or key is not None
        assert len(self._by_key) == sum(k is not None for k in self._key)


class FreeRuns:
    """Free blocks as maximal runs [start, end), so that neighbours are handed out together."""

    def __init__(self, blocks_count: int) -> None:
        self.count = blocks_count
        self._starts: list[int] = [0]
        self._end: dict[int, int] = {0: blocks_count}
        self._start_of_end: dict[int, int] = {blocks_count: 0}

    def take(self, count: int, after: int | None) -> list[int]:
        """`count` blocks: first those right after `after`, then the smallest run that fits, else
        the largest runs."""
        assert count <= self.count
        self.count -= count
        taken: list[int] = []
        if after is not None and count and after + 1 in self._end:
            taken += self._cut(after + 1, count)
        while len(taken) < count:
            taken += self._cut(self._choose(count - len(taken)), count - len(taken))
        return taken

    def give(self, blocks: Sequence[int]) -> None:
        """Put blocks back, neighbours that follow one another downwards as one run."""
        self.count += len(blocks)
        at, count = 0, len(blocks)
        while at < count:
            start = end = blocks[at]
            at += 1
            while at < count and blocks[at] == start - 1:
                start -= 1
                at += 1
            self._join(start, end + 1)

    def _join(self, start: int, end: int) -> None:
        """A run that became free, joined with its neighbours."""
        if start in self._start_of_end:
            start = self._start_of_end.pop(start)
        else:
            insort(self._starts, start)
        if end in self._end:
            self._starts.pop(bisect_left(self._starts, end))
            end = self._end.pop(end)
        self._end[start] = end
        self._start_of_end[end] = start

    def _choose(self, count: int) -> int:
        best, best_size = -1, 0
        for start in self._starts:
            size = self._end[start] - start
            fits, best_fits = size >= count, best_size >= count
            if best < 0 or (fits, -size if fits else size) > (
                best_fits, -best_size if best_fits else best_size
            ):  # fmt: skip
                best, best_size = start, size
        return best

    def _cut(self, start: int, count: int) -> list[int]:
        end = self._end.pop(start)
        stop = min(start + count, end)
        i = bisect_left(self._starts, start)
        if stop == end:
            self._starts.pop(i)
            del self._start_of_end[end]
        else:
            self._starts[i] = stop
            self._end[stop] = end
            self._start_of_end[end] = stop
        return list(range(start, stop))

    def check(self) -> set[int]:
        free: set[int] = set()
        assert self._starts == sorted(self._end)
        for start in self._starts:
            end = self._end[start]
            assert start < end
            assert end not in self._end, "two runs touch"
            assert self._start_of_end[end] == start
            free.update(range(start, end))
        assert len(free) == self.count
        return free
