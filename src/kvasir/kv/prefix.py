"""The cluster's prefix index: which worker and tier holds which block. Lives in the conductor.

Built from each worker's sequence-numbered KvEvents. A gap means that this one worker's part is not
to be trusted: it is dropped, stays empty until all of it has been told anew, and what was overtaken
says nothing any more. Of a worker that sends no events it holds a guess instead (`kv/guess.py`).
Knows keys and worker ids, nothing of load.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Final, NamedTuple

from kvasir.core.ids import BlockKey, Incarnation, WorkerId
from kvasir.core.message import Tier
from kvasir.kv.guess import Guess, GuessedCache
from kvasir.kv.runs import Runs

TIERS: Final[dict[Tier, int]] = {"device": 0, "host": 1, "disk": 2}  # fastest first
FEW: Final = 8  # workers; up to here it is quicker to look for each bit
BITS: Final = bytes.maketrans(b"01", b"\0\1")


class TierHits(NamedTuple):
    """Leading blocks that a worker holds, each counted at the fastest tier that has it."""

    device: int
    host: int
    disk: int


class Source:
    """One worker as the index knows it. Its bits in a mask are `3 * slot + tier`."""

    __slots__ = ("blocks", "broken", "guessed", "incarnation", "seq", "slot")

    def __init__(self, incarnation: Incarnation, slot: int, guess: Guess | None) -> None:
        self.incarnation = incarnation
        self.slot = slot
        self.seq = 0  # the newest that came
        self.broken = False  # a gap, and no reset since
        self.blocks = [0] * len(TIERS)
        self.guessed = GuessedCache(guess) if guess is not None else None

    def bit(self, tier: int) -> int:
        return 1 << (len(TIERS) * self.slot + tier)


class PrefixIndex:
    """One walk over a prompt serves all workers and tiers. Of at most `blocks_max` distinct blocks
    it knows the holders; it never names a worker that did not say, or is not guessed, to hold."""

    def __init__(self, blocks_max: int = 1 << 24) -> None:
        self._runs = Runs(blocks_max)
        self._sources: dict[WorkerId, Source] = {}
        self._slots: list[WorkerId] = []  # "" for one that is free
        self._free_slots: list[int] = []
        self._first_tiers = 0  # the device bits of all slots
        self._below = 0  # blocks on other tiers than the first

    @property
    def blocks(self) -> int:
        """Distinct blocks that somebody holds."""
        return self._runs.blocks

    @property
    def tiered(self) -> bool:
        """Whether any block is on another tier than the device."""
        return self._below > 0

    @property
    def blocks_refused(self) -> int:
        """How often a block was not taken in because the index was full."""
        return self._runs.refused

    # --- changing ---------------------------------------------------------------------------------

    def join(
        self, worker: WorkerId, incarnation: Incarnation, guess: Guess | None = None
    ) -> None:
        """Start a worker from nothing; what an older incarnation held is forgotten. `guess`: it
        sends no events."""
        self.leave(worker)
        if not self._free_slots:
            self._free_slots.append(len(self._slots))
            self._slots.append("")
        source = Source(incarnation, self._free_slots.pop(), guess)
        self._sources[worker] = source
        self._slots[source.slot] = worker
        self._first_tiers |= source.bit(0)

    def leave(self, worker: WorkerId) -> None:
        source = self._sources.pop(worker, None)
        if source is not None:
            self._clear(source)
            self._slots[source.slot] = ""
            self._free_slots.append(source.slot)

    def apply(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        added: Sequence[BlockKey],
        removed: Sequence[BlockKey],
        *,
        tier: Tier = "device",
        reset: bool = False,
    ) -> bool:
        """Fold one event message in. False: the worker's part is empty until a newer reset. A
        `reset` clears all tiers, whichever it is of."""
        source = self._sources.get(worker)
        if source is None or source.incarnation != incarnation or source.guessed is not None:
            return True  # not a member, or a message of a past life: nothing to repair
        if seq <= source.seq:
            return not source.broken  # a duplicate, or overtaken
        follows = seq == source.seq + 1
        source.seq = seq
        source.broken = not reset and (source.broken or not follows)
        if reset or source.broken:
            self._clear(source)
        if not source.broken:
            self._fold(source, TIERS[tier], added, removed)
        return not source.broken

    def expect(self, worker: WorkerId, keys: Sequence[BlockKey], now: float) -> None:
        """A prompt was sent to `worker`. Says something of those only that tell nothing."""
        source = self._sources.get(worker)
        if source is not None and source.guessed is not None:
            self._fold(source, 0, *source.guessed.use(keys, now))

    def expire(self, now: float) -> None:
        """Forget guesses that are too old. Call it every now and then."""
        for source in self._sources.values():
            if source.guessed is not None:
                self._fold(source, 0, (), source.guessed.expire(now))

    def _fold(
        self, source: Source, tier: int, added: Sequence[BlockKey], removed: Sequence[BlockKey]
    ) -> None:
        bit = source.bit(tier)
        change = -self._runs.remove(bit, removed) if removed else 0
        change += self._runs.add(bit, added) if added else 0
        source.blocks[tier] += change
        if tier:
            self._below += change

    def _clear(self, source: Source) -> None:
        if any(source.blocks):
            self._runs.drop(source.bit(0) | source.bit(1) | source.bit(2))
            self._below -= sum(source.blocks[1:])
            source.blocks = [0] * len(TIERS)

    # --- reading ----------------------------------------------------------------------------------

    def match(self, keys: Sequence[BlockKey]) -> dict[WorkerId, int]:
        """Leading blocks that each worker holds, at any tier; workers with none are left out."""
        depths: dict[WorkerId, int] = {}
        at, alive = 0, -1
        for end, mask in self._runs.walk(keys):
            now = alive & (self._at_any_tier(mask) if self._below else mask)
            if now != alive:
                if at:
                    depths.update(dict.fromkeys(self._names(alive ^ now), at))
                alive = now
                if not alive:
                    break
            at = end
        if at and alive:
            depths.update(dict.fromkeys(self._names(alive), at))
        return depths

    def tiers(self, keys: Sequence[BlockKey]) -> dict[WorkerId, TierHits]:
        """`match`, with where the blocks are: one that is not on the device must be loaded."""
        hits = {w: TierHits(depth, 0, 0) for w, depth in self.match(keys).items()}
        at = 0
        for end, mask in self._runs.walk(keys) if self._below else ():
            more = end - at
            host = mask >> 1 & self._first_tiers & ~mask
            disk = mask >> 2 & self._first_tiers & ~mask & ~host
            for worker in self._names(host):
                hit = hits.get(worker)
                if hit is not None and sum(hit) >= end:
                    hits[worker] = TierHits(hit.device - more, hit.host + more, hit.disk)
            for worker in self._names(disk):
                hit = hits.get(worker)
                if hit is not None and sum(hit) >= end:
                    hits[worker] = TierHits(hit.device - more, hit.host, hit.disk + more)
            at = end
        return hits

    def blocks_of(self, worker: WorkerId, tier: Tier | None = None) -> int:
        """Blocks that `worker` holds at `tier`; at all tiers together unless one is named."""
        source = self._sources.get(worker)
        if source is None:
            return 0
        return sum(source.blocks) if tier is None else source.blocks[TIERS[tier]]

    def _at_any_tier(self, mask: int) -> int:
        return (mask | mask >> 1 | mask >> 2) & self._first_tiers

    def _names(self, mask: int) -> list[WorkerId]:
        """The workers whose device bits are in `mask`."""
        if mask.bit_count() > FEW:
            picks = bin(mask)[:1:-1][:: len(TIERS)].encode().translate(BITS)
            return list(compress(self._slots, picks))
        names: list[WorkerId] = []
        while mask:
            low = mask & -mask
            names.append(self._slots[(low.bit_length() - 1) // len(TIERS)])
            mask ^= low
        return names

    def check(self) -> None:
        held = [slot for slot, worker in enumerate(self._slots) if worker]
        assert sorted(held + self._free_slots) == list(range(len(self._slots)))
        assert all(self._slots[s.slot] == w for w, s in self._sources.items())
        assert len(held) == len(self._sources)
        blocks = [sum(s.blocks[tier] for s in self._sources.values()) for tier in TIERS.values()]
        assert self._runs.check() == sum(blocks)
        assert self._below == sum(blocks[1:])
        assert not any(s.broken and any(s.blocks) for s in self._sources.values())
