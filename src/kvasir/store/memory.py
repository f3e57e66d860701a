"""Blocks in host memory: one array, taken page by page as it fills. Knows slots, keys and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvasir.core.ids import BlockKey
from kvasir.store.base import Found, checksum

if TYPE_CHECKING:
    from kvasir.store.base import Rows


class HostShelves:
    """`store.base.Shelves` in this process. Starts empty."""

    def __init__(self, slots_count: int, block_bytes: int) -> None:
        self._rows: Rows = np.empty((slots_count, block_bytes), dtype=np.uint8)
        self._labels: dict[int, tuple[BlockKey, int]] = {}  # of whole blocks: key, checksum

    def write(self, slots: Sequence[int], keys: Sequence[BlockKey], rows: Rows) -> None:
        for slot in slots:
            self._labels.pop(slot, None)
        self._rows[np.asarray(slots, dtype=np.intp)] = rows
        for slot, key, row in zip(slots, keys, rows, strict=True):
            self._labels[slot] = (key, checksum(row, key))

    def read(self, slots: Sequence[int], keys: Sequence[BlockKey], rows: Rows) -> int:
        np.take(self._rows, np.asarray(slots, dtype=np.intp), axis=0, out=rows, mode="clip")
        for i, (slot, key) in enumerate(zip(slots, keys, strict=True)):
            if self._labels.get(slot) != (key, checksum(rows[i], key)):
                self._labels.pop(slot, None)
                return i
        return len(slots)

    def found(self) -> Iterator[Found]:
        return iter(())

    def close(self) -> None:
        self._labels.clear()
