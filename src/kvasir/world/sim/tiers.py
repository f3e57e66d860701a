"""Tiers in virtual time: what `Store` and `Restore` take, and what slots hold.

Each tier of each worker does one thing after another, at its bytes a second. Host memory is lost
with its worker, a disk is found again. Knows keys and bytes; must not know why a node asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvasir.core.effects import Restore, Store
from kvasir.core.ids import BlockKey, RequestId, WorkerId
from kvasir.core.message import Tier
from kvasir.core.tiers import Moved, Restored, Stored, TierGone, TierReady
from kvasir.node.config import WorkerConfig

Schedule = Callable[[float, Callable[[], None]], None]
Tell = Callable[[WorkerId, TierReady | TierGone | Stored | Restored], None]


@dataclass(slots=True, eq=False)
class Shelves:
    """One tier of one worker. `held`: what each slot holds; `free_at`: when it has done all that
    was asked of it; `lost`: why it does nothing any more."""

    bytes_per_s: float
    block_bytes: int
    held: dict[int, BlockKey] = field(default_factory=dict)
    free_at: float = 0.0
    lost: str = ""

    def begin(self, now: float) -> float:
        """When something that is asked for now begins."""
        return max(now, self.free_at)

    @property
    def block_s(self) -> float:
        return self.block_bytes / self.bytes_per_s


class SimTiers:
    """The tiers of all workers, by worker and tier."""

    def __init__(self, schedule: Schedule, tell: Tell, clock: Callable[[], float]) -> None:
        self._schedule, self._tell, self._clock = schedule, tell, clock
        self._all: dict[WorkerId, dict[Tier, Shelves]] = {}
        self._lives: dict[WorkerId, int] = {}
        self._reads: dict[tuple[WorkerId, RequestId, int], Restore] = {}

    def boot(self, worker: WorkerId, config: WorkerConfig) -> None:
        """A worker starts: with what its disk holds from an earlier life."""
        rules = config.tiers.tiers if config.tiers is not None else ()
        if not rules:
            return
        block_bytes = config.capacity.block_size * config.capacity.kv_token_bytes
        before = self._all.get(worker, {})
        mine: dict[Tier, Shelves] = {}
        for rule in rules:
            kept = before[rule.tier].held if rule.tier == "disk" and rule.tier in before else {}
            mine[rule.tier] = Shelves(rule.bytes_per_s, block_bytes, kept)
            self._tell(worker, TierReady(rule.tier, tuple(kept), tuple(kept.values())))
        self._all[worker] = mine
        self._lives[worker] = self._lives.get(worker, 0) + 1

    def died(self, worker: WorkerId) -> None:
        """What is under way comes to nothing; a block that was being written is torn."""
        self._lives[worker] = self._lives.get(worker, 0) + 1
        for key in [key for key in self._reads if key[0] == worker]:
            del self._reads[key]

    def lose(self, worker: WorkerId, tier: Tier, reason: str) -> None:
        """A tier fails."""
        shelves = self._all[worker][tier]
        if not shelves.lost:
            shelves.lost = reason
            self._tell(worker, TierGone(tier, reason))

    def damage(self, worker: WorkerId, tier: Tier) -> None:
        """All that a tier holds is no longer what it was."""
        self._all[worker][tier].held.clear()

    def store(self, worker: WorkerId, effect: Store) -> None:
        shelves, life, now = self._all[worker][effect.tier], self._lives[worker], self._clock()
        began = shelves.begin(now)
        seconds = len(effect.slots) * shelves.block_s
        shelves.free_at = began + seconds
        for slot in effect.slots:
            shelves.held.pop(slot, None)

        def over() -> None:
            if self._lives[worker] != life:
                return
            if shelves.lost:
                self._tell(worker, Stored(effect.id, 0))
                return
            shelves.held.update(zip(effect.slots, effect.keys, strict=True))
            nbytes = len(effect.slots) * shelves.block_bytes
            self._tell(worker, Stored(effect.id, len(effect.slots), nbytes, seconds))

        self._schedule(shelves.free_at, over)

    def restore(self, worker: WorkerId, effect: Restore) -> None:
        """Shelf after shelf, block after block, up to the deadline or to what is not there."""
        key, life = (worker, effect.request_id, effect.attempt), self._lives[worker]
        self._reads[key] = effect
        at, answer = self._read(worker, effect)

        def over() -> None:
            if self._lives[worker] == life and self._reads.get(key) is effect:
                del self._reads[key]
                self._tell(worker, answer)

        self._schedule(at, over)

    def _read(self, worker: WorkerId, effect: Restore) -> tuple[float, Restored]:
        at, count, moved = self._clock(), 0, list[Moved]()
        name = (effect.request_id, effect.attempt)
        for shelf in effect.shelves:
            shelves = self._all[worker][shelf.tier]
            began = shelves.begin(at)
            wanted = effect.keys[count : count + len(shelf.slots)]
            good = 0
            while good < len(wanted) and shelves.held.get(shelf.slots[good]) == wanted[good]:
                good += 1
            in_time = max(0, int((effect.deadline - began) / shelves.block_s))
            came = 0 if shelves.lost else min(good, in_time)
            at = min(began + came * shelves.block_s, max(effect.deadline, at))
            shelves.free_at = max(shelves.free_at, at)
            moved.append(Moved(shelf.tier, came * shelves.block_bytes, max(at - began, 0.0)))
            count += came
            if came < len(wanted):
                if shelves.lost:
                    return at, Restored(*name, count, tuple(moved), "gone")
                if came < good:
                    late = max(effect.deadline, at)
                    moved[-1] = Moved(shelf.tier, moved[-1].bytes, max(late - began, 0.0))
                    return late, Restored(*name, count, tuple(moved), "late")
                return at, Restored(*name, count, tuple(moved), "damaged")
        return at, Restored(*name, count, tuple(moved))

    def release(self, worker: WorkerId, request_id: RequestId, attempt: int) -> None:
        """Nobody wants it any more."""
        if self._reads.pop((worker, request_id, attempt), None) is not None:
            self._tell(worker, Restored(request_id, attempt, 0, (), "released"))
