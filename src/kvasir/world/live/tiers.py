"""A worker's tiers, live: a thread for each copies blocks between planes and shelves.

Performs `Store` and `Restore`. Decides nothing. A block's bytes on a shelf are those of all planes,
layer by layer; each is checked before one byte of it reaches the device.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from kvasir.core.effects import Ask, Reopen, Restore, Store
from kvasir.core.ids import BlockKey, RequestId
from kvasir.core.message import Tier
from kvasir.core.tiers import Held, Moved, Restored, Stored, TierGone, TierReady
from kvasir.store.base import Shelves, StoreError
from kvasir.store.cluster import ClusterShelves

if TYPE_CHECKING:
    from kvasir.engine.base import Plane

CHUNK_BYTES: Final = 4 * 1024 * 1024  # copied in one go; between two of them a load may be given up
FOUND_KEYS: Final = 4096  # told in one message

Answer = TierReady | TierGone | Stored | Held | Restored
Tell = Callable[[Answer], None]
Fail = Callable[[BaseException], None]
Open = Callable[[], Shelves]
Key = tuple[RequestId, int]


class Blocks:
    """Whole blocks of a cache as rows of bytes."""

    def __init__(self, planes: Sequence[Sequence[Plane]]) -> None:
        self._planes = [plane for layer in planes for plane in layer]
        self.bytes = sum(plane.shape[1] for plane in self._planes)
        self.chunk = max(1, CHUNK_BYTES // self.bytes)

    def gather(self, blocks: Sequence[int], rows: Plane) -> None:
        ids, at = np.asarray(blocks, dtype=np.intp), 0
        for plane in self._planes:
            end = at + plane.shape[1]
            rows[:, at:end] = plane[ids]
            at = end

    def scatter(self, blocks: Sequence[int], rows: Plane) -> None:
        ids, at = np.asarray(blocks, dtype=np.intp), 0
        for plane in self._planes:
            end = at + plane.shape[1]
            plane[ids] = rows[:, at:end]
            at = end


class TierThread:
    """One tier. `tell` is called on this thread, and `fail` with what nobody foresaw."""

    def __init__(
        self, tier: Tier, open_shelves: Open, blocks: Blocks, tell: Tell, fail: Fail
    ) -> None:
        self.tier = tier
        self._on_failure = fail
        self._open, self._blocks, self._tell = open_shelves, blocks, tell
        self._shelves: Shelves | None = None
        self._rows = np.empty((blocks.chunk, blocks.bytes), dtype=np.uint8)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tier-{tier}", daemon=True)
        self._thread.start()

    def do(self, action: Callable[[], None]) -> None:
        self._queue.put(action)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            self._start()
            while (action := self._queue.get()) is not None:
                action()
        except Exception as error:
            self._on_failure(error)
        if self._shelves is not None:
            self._shelves.close()

    def _start(self) -> None:
        try:
            self._shelves = self._open()
            found = list(self._shelves.found())
        except StoreError as error:
            self._fail(error)
            return
        for first in range(0, max(len(found), 1), FOUND_KEYS):
            part = found[first : first + FOUND_KEYS]
            slots, keys = tuple(one.slot for one in part), tuple(one.key for one in part)
            self._tell(TierReady(self.tier, slots, keys, first + FOUND_KEYS >= len(found)))

    def _fail(self, error: StoreError) -> None:
        if self._shelves is not None:
            self._shelves.close()
            self._shelves = None
        self._tell(TierGone(self.tier, error.what))

    def reopen(self) -> None:
        """On this thread."""
        if self._shelves is None:
            self._start()

    def ask(self, effect: Ask, asked_at: float) -> None:
        """On this thread."""
        count = 0
        try:
            if isinstance(self._shelves, ClusterShelves):
                count = self._shelves.held(effect.keys)
        except StoreError as error:
            self._fail(error)
        seconds = time.monotonic() - asked_at
        self._tell(Held(effect.request_id, effect.attempt, self.tier, count, seconds))

    def store(self, effect: Store) -> None:
        """On this thread."""
        began, count, size = time.monotonic(), 0, self._blocks.chunk
        try:
            while count < len(effect.slots) and self._shelves is not None:
                part = slice(count, count + size)
                slots = effect.slots[part]
                rows = self._rows[: len(slots)]
                self._blocks.gather(effect.blocks[part], rows)
                self._shelves.write(slots, effect.keys[part], rows)
                count += len(slots)
        except StoreError as error:
            self._fail(error)
        seconds = time.monotonic() - began
        self._tell(Stored(effect.id, count, count * self._blocks.bytes, seconds))

    def load(
        self, slots: Sequence[int], keys: Sequence[BlockKey], blocks: Sequence[int],
        late: Callable[[], bool],
    ) -> int:  # fmt: skip
        """On this thread: how many leading blocks came, until it was `late` or one did not."""
        count, size = 0, self._blocks.chunk
        try:
            while count < len(slots) and self._shelves is not None and not late():
                part = slice(count, count + size)
                rows = self._rows[: len(slots[part])]
                good = self._shelves.read(slots[part], keys[part], rows)
                self._blocks.scatter(blocks[count : count + good], rows[:good])
                count += good
                if good < len(rows):
                    break
        except StoreError as error:
            self._fail(error)
        return count

    @property
    def works(self) -> bool:
        return self._shelves is not None


class LiveTiers:
    """All tiers of a worker. `tell` and `fail` are called on the tiers' threads."""

    def __init__(
        self, planes: Sequence[Sequence[Plane]], shelves: Mapping[Tier, Open], tell: Tell,
        fail: Fail,
    ) -> None:  # fmt: skip
        self._tell = tell
        self._unwanted: set[Key] = set()  # loads that were released
        self._reading: set[Key] = set()
        self._lock = threading.Lock()
        blocks = Blocks(planes) if shelves else None
        self._threads = {
            tier: TierThread(tier, opened, blocks, tell, fail)
            for tier, opened in shelves.items()
        } if blocks is not None else {}  # fmt: skip

    def store(self, effect: Store) -> None:
        thread = self._threads[effect.tier]
        thread.do(lambda: thread.store(effect))

    def ask(self, effect: Ask) -> None:
        thread, now = self._threads[effect.tier], time.monotonic()
        thread.do(lambda: thread.ask(effect, now))

    def reopen(self, effect: Reopen) -> None:
        thread = self._threads[effect.tier]
        thread.do(thread.reopen)

    def restore(self, effect: Restore) -> None:
        with self._lock:
            self._reading.add((effect.request_id, effect.attempt))
        self._shelf(effect, 0, 0, ())

    def _shelf(self, effect: Restore, index: int, first: int, moved: tuple[Moved, ...]) -> None:
        """Load the shelf at `index`, whose blocks are from `first` on; then the next one."""
        shelf = effect.shelves[index]
        thread = self._threads[shelf.tier]
        end = first + len(shelf.slots)

        def go() -> None:
            began = time.monotonic()
            blocks, keys = effect.blocks[first:end], effect.keys[first:end]
            count = thread.load(shelf.slots, keys, blocks, lambda: bool(self._stops(effect)))
            seconds = time.monotonic() - began
            nbytes = count * thread._blocks.bytes
            so_far = (*moved, Moved(shelf.tier, nbytes, seconds))
            whole = first + count == end
            if whole and index + 1 < len(effect.shelves):
                self._shelf(effect, index + 1, end, so_far)
            else:
                gone = "damaged" if thread.works else "gone"
                fault = "" if whole else self._stops(effect) or gone
                self._over(effect, first + count, so_far, fault)

        thread.do(go)

    def _stops(self, effect: Restore) -> str:
        """Why a load goes no further: empty if it does."""
        with self._lock:
            if (effect.request_id, effect.attempt) in self._unwanted:
                return "released"
        return "late" if time.monotonic() > effect.deadline else ""

    def _over(
        self, effect: Restore, count: int, moved: tuple[Moved, ...], fault: str
    ) -> None:
        key = (effect.request_id, effect.attempt)
        with self._lock:
            self._reading.discard(key)
            self._unwanted.discard(key)
        self._tell(Restored(*key, count, moved, fault))  # type: ignore[arg-type]

    def release(self, request_id: RequestId, attempt: int) -> None:
        with self._lock:
            if (request_id, attempt) in self._reading:
                self._unwanted.add((request_id, attempt))

    @property
    def idle(self) -> bool:
        return not self._reading

    def close(self) -> None:
        for thread in self._threads.values():
            thread.close()
