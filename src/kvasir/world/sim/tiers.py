"""Tiers in virtual time: what `Store` and `Restore` take, and what slots hold.

Each tier of each worker does one thing after another, at its bytes a second. Host memory is lost
with its worker, a disk is found again. A tier that all share is one thing for all workers. Knows
keys and bytes; must not know why a node asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvasir.core.effects import Ask, Reopen, Restore, Store
from kvasir.core.ids import RequestId, WorkerId
from kvasir.core.message import Tier
from kvasir.core.tiers import Held, Moved, Restored, Stored, TierGone, TierReady
from kvasir.node.config import WorkerConfig
from kvasir.world.sim.holds import Holds, SharedHolds, SharedStore, SlotHolds

Schedule = Callable[[float, Callable[[], None]], None]
Tell = Callable[[WorkerId, TierReady | TierGone | Stored | Held | Restored], None]


@dataclass(slots=True, eq=False)
class Drive:
    """What does one thing after another. `free_at`: when it has done all that was asked of it;
    `lost`: why it does nothing any more."""

    bytes_per_s: float
    latency_s: float = 0.0
    free_at: float = 0.0
    lost: str = ""

    def begin(self, now: float) -> float:
        """When something that is asked for now begins."""
        return max(now, self.free_at)


@dataclass(slots=True, eq=False)
class Shelves:
    """One tier as one worker sees it; its drive may be that of others too."""

    drive: Drive
    block_bytes: int
    holds: Holds

    @property
    def block_s(self) -> float:
        return self.block_bytes / self.drive.bytes_per_s


class SimTiers:
    """The tiers of all workers, by worker and tier."""

    def __init__(self, schedule: Schedule, tell: Tell, clock: Callable[[], float]) -> None:
        self._schedule, self._tell, self._clock = schedule, tell, clock
        self._all: dict[WorkerId, dict[Tier, Shelves]] = {}
        self._lives: dict[WorkerId, int] = {}
        self._reads: dict[tuple[WorkerId, RequestId, int], Restore] = {}
        self._stores: dict[str, SharedStore] = {}  # shared ones, by name
        self._drives: dict[str, Drive] = {}

    def boot(self, worker: WorkerId, config: WorkerConfig) -> None:
        """A worker starts: with what its disk holds from an earlier life."""
        rules = config.tiers.tiers if config.tiers is not None else ()
        if not rules:
            return
        block_bytes = config.capacity.block_size * config.capacity.kv_token_bytes
        before = self._all.get(worker, {})
        mine: dict[Tier, Shelves] = {}
        for rule in rules:
            drive, old = Drive(rule.bytes_per_s, rule.latency_s), before.get(rule.tier)
            if rule.shared:  # where several pools name a store, its size and rates are the first's
                store = SharedStore(rule.blocks * block_bytes)
                store = self._stores.setdefault(rule.shared, store)
                drive = self._drives.setdefault(rule.shared, drive)
                kept: Holds = SharedHolds(store, config.model, block_bytes)
            else:
                kept = old.holds if rule.tier == "disk" and old is not None else SlotHolds()
            mine[rule.tier] = Shelves(drive, block_bytes, kept)
        self._all[worker] = mine
        self._lives[worker] = self._lives.get(worker, 0) + 1
        for tier in mine:
            self._open(worker, tier)

    def _open(self, worker: WorkerId, tier: Tier) -> None:
        shelves = self._all[worker][tier]
        if shelves.drive.lost:
            self._tell(worker, TierGone(tier, shelves.drive.lost))
        else:
            self._tell(worker, TierReady(tier, *shelves.holds.found()))

    def died(self, worker: WorkerId) -> None:
        """What is under way comes to nothing; a block that was being written is torn."""
        self._lives[worker] = self._lives.get(worker, 0) + 1
        for key in [key for key in self._reads if key[0] == worker]:
            del self._reads[key]

    def lose(self, worker: WorkerId, tier: Tier, reason: str) -> None:
        """A tier fails; one that is shared for all that share it."""
        drive = self._all[worker][tier].drive
        if not drive.lost:
            drive.lost = reason
            for other, mine in self._all.items():
                if tier in mine and mine[tier].drive is drive:
                    self._tell(other, TierGone(tier, reason))

    def mend(self, worker: WorkerId, tier: Tier) -> None:
        """A tier works again, for who tries it."""
        self._all[worker][tier].drive.lost = ""

    def damage(self, worker: WorkerId, tier: Tier) -> None:
        """All that a tier holds is no longer what it was."""
        self._all[worker][tier].holds.clear()

    def reopen(self, worker: WorkerId, effect: Reopen) -> None:
        self._open(worker, effect.tier)

    def ask(self, worker: WorkerId, effect: Ask) -> None:
        """Answered after the tier's latency, whatever else it does."""
        shelves, life = self._all[worker][effect.tier], self._lives[worker]

        def over() -> None:
            if self._lives[worker] == life:
                count = 0 if shelves.drive.lost else shelves.holds.asked(effect.keys)
                name = (effect.request_id, effect.attempt)
                self._tell(worker, Held(*name, effect.tier, count, shelves.drive.latency_s))

        self._schedule(self._clock() + shelves.drive.latency_s, over)

    def store(self, worker: WorkerId, effect: Store) -> None:
        shelves, life, now = self._all[worker][effect.tier], self._lives[worker], self._clock()
        drive = shelves.drive
        began = drive.begin(now)
        seconds = len(effect.slots) * shelves.block_s
        drive.free_at = began + seconds
        shelves.holds.blank(effect.slots)

        def over() -> None:
            if self._lives[worker] != life:
                return
            if drive.lost:
                self._tell(worker, Stored(effect.id, 0))
                return
            shelves.holds.put(effect.slots, effect.keys)
            nbytes = len(effect.slots) * shelves.block_bytes
            self._tell(worker, Stored(effect.id, len(effect.slots), nbytes, seconds))

        self._schedule(drive.free_at, over)

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
            drive = shelves.drive
            began = drive.begin(at)
            wanted = effect.keys[count : count + len(shelf.slots)]
            good = shelves.holds.leading(shelf.slots, wanted)
            in_time = max(0, int((effect.deadline - began) / shelves.block_s))
            came = 0 if drive.lost else min(good, in_time)
            at = min(began + came * shelves.block_s, max(effect.deadline, at))
            drive.free_at = max(drive.free_at, at)
            moved.append(Moved(shelf.tier, came * shelves.block_bytes, max(at - began, 0.0)))
            count += came
            if came < len(wanted):
                if drive.lost:
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
