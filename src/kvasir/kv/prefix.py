"""The cluster's prefix index: which worker holds which block. Lives in the conductor.

Built from each worker's sequence-numbered KvEvents. A gap means that this one worker's part is not
to be trusted: it is dropped, stays empty until all of it has been told anew, and what was overtaken
says nothing any more. Knows keys and worker ids, nothing of load.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvasir.core.ids import BlockKey, Incarnation, WorkerId


class PrefixIndex:
    """Keys map to a bit mask of workers, so that one walk over a prompt serves all workers."""

    def __init__(self) -> None:
        self._mask: dict[BlockKey, int] = {}
        self._bit: dict[WorkerId, int] = {}
        self._free_bits: list[int] = []
        self._seq: dict[WorkerId, tuple[Incarnation, int]] = {}  # the newest that came
        self._broken: dict[WorkerId, None] = {}  # a gap, and no reset since
        self._keys: dict[WorkerId, dict[BlockKey, None]] = {}

    def join(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """Start a worker from nothing; what an older incarnation held is forgotten."""
        self.leave(worker)
        self._bit[worker] = self._free_bits.pop() if self._free_bits else len(self._bit)
        self._seq[worker] = (incarnation, 0)
        self._keys[worker] = {}

    def leave(self, worker: WorkerId) -> None:
        if worker in self._bit:
            self._drop(worker, list(self._keys[worker]))
            self._free_bits.append(self._bit.pop(worker))
            self._broken.pop(worker, None)
            del self._keys[worker], self._seq[worker]

    def apply(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        added: Iterable[BlockKey],
        removed: Iterable[BlockKey],
        *,
        reset: bool = False,
    ) -> bool:
        """Fold one event message in. False: the worker's part is empty until a newer reset."""
        known = self._seq.get(worker)
        if known is None or known[0] != incarnation:
            return True  # not a member, or a message of a past life: nothing to repair
        if seq <= known[1]:
            return worker not in self._broken  # a duplicate, or overtaken
        self._seq[worker] = (incarnation, seq)
        if reset:
            self._broken.pop(worker, None)
        elif seq != known[1] + 1:
            self._broken[worker] = None
        whole = worker not in self._broken
        if reset or not whole:
            self._drop(worker, list(self._keys[worker]))
        if whole:
            self._drop(worker, removed)
            self._add(worker, added)
        return whole

    def match(self, keys: Sequence[BlockKey]) -> dict[WorkerId, int]:
        """Leading blocks that each worker holds; workers with none are left out."""
        alive = 0
        depth: dict[int, int] = {}  # bit -> length of the leading run
        masks = self._mask
        for i, key in enumerate(keys):
            mask = masks.get(key, 0)
            now = mask if i == 0 else alive & mask
            gone = alive & ~now
            while gone:
                low = gone & -gone
                depth[low.bit_length() - 1] = i
                gone ^= low
            alive = now
            if not alive:
                break
        while alive:
            low = alive & -alive
            depth[low.bit_length() - 1] = len(keys)
            alive ^= low
        if not depth:
            return {}
        return {w: depth[b] for w, b in self._bit.items() if b in depth}

    def blocks_of(self, worker: WorkerId) -> int:
        return len(self._keys.get(worker, ()))

    def _add(self, worker: WorkerId, keys: Iterable[BlockKey]) -> None:
        bit, own = 1 << self._bit[worker], self._keys[worker]
        for key in keys:
            own[key] = None
            self._mask[key] = self._mask.get(key, 0) | bit

    def _drop(self, worker: WorkerId, keys: Iterable[BlockKey]) -> None:
        clear, own = ~(1 << self._bit[worker]), self._keys[worker]
        for key in keys:
            if own.pop(key, 0) is None:
                left = self._mask[key] & clear
                if left:
                    self._mask[key] = left
                else:
                    del self._mask[key]

    def check(self) -> None:
        bits = [*self._bit.values(), *self._free_bits]
        assert sorted(bits) == list(range(len(bits)))
        count = sum(m.bit_count() for m in self._mask.values())
        assert count == sum(len(k) for k in self._keys.values())
        for worker, keys in self._keys.items():
            bit = 1 << self._bit[worker]
            assert all(self._mask[k] & bit for k in keys)
            assert not keys or worker not in self._broken
