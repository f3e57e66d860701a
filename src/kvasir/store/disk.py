"""Blocks in one file, each in the place of its slot: bounded, found again after a restart.

    0            4096            4096 + 64 n, rounded up to 4096
    +------------+----------------+--------------------------------+
    | what it is | label of slot 0, 1, ... n-1  | slot 0 | slot 1 | ...
    +------------+----------------+--------------------------------+
      JSON, sums   key, checksum of the block, checksum of the label

A label is blanked before its slot is written and written after it, so a block that was torn by a
crash is missing. If the system lost writes, or somebody changed bytes, checksums tell. Bytes go
through the page cache, and nothing waits for the disk: what is lost was only cached. The file grows
as it fills. Knows files and bytes; must not know what a fingerprint names.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec
import numpy as np
import xxhash

from kvasir.core.ids import BlockKey
from kvasir.core.keys import KEY_BYTES
from kvasir.store.base import Found, StoreError, checksum

if TYPE_CHECKING:
    from kvasir.store.base import Rows

FORMAT: Final = 1
PAGE: Final = 4096
LABEL: Final = struct.Struct(f"<{KEY_BYTES}sQQ")
LABEL_BYTES: Final = 64
BLANK: Final = bytes(LABEL_BYTES)


class Header(msgspec.Struct, frozen=True):
    """What a file's bytes mean. A file of another kind is emptied."""

    format: int
    fingerprint: str
    block_bytes: int
    slots: int


class DiskShelves:
    """`store.base.Shelves` in the file at `path`, which nobody else may use at the time.

    `fingerprint` names model and layout. Raises StoreError when the file cannot be used.
    """

    def __init__(self, path: Path, slots_count: int, block_bytes: int, fingerprint: str) -> None:
        self._path, self._slots, self._block_bytes = path, slots_count, block_bytes
        self._first = _pages(PAGE + slots_count * LABEL_BYTES)
        header = Header(FORMAT, fingerprint, block_bytes, slots_count)
        self._file = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.pread(self._file, PAGE, 0) != _page(header):
                self._begin(header)
        except BlockingIOError:
            self.close()
            raise StoreError("another process uses it", where=str(path)) from None
        except OSError as error:
            self.close()
            self._fail(error)

    def _begin(self, header: Header) -> None:
        """An empty file of this kind. A hole reads as zeros: blank labels."""
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self._first + self._slots * self._block_bytes)
        self._put(_page(header), 0)

    def write(self, slots: Sequence[int], keys: Sequence[BlockKey], rows: Rows) -> None:
        try:
            if os.fstat(self._file).st_nlink == 0:
                raise StoreError("the file was deleted", where=str(self._path))
            for slot in slots:
                self._put(BLANK, self._label_at(slot))
            for first, end in _runs(slots):
                self._put(rows[first:end].data.cast("B"), self._slot_at(slots[first]))
            for slot, key, row in zip(slots, keys, rows, strict=True):
                self._put(_label(key, checksum(row, key)), self._label_at(slot))
        except OSError as error:
            self._fail(error)

    def read(self, slots: Sequence[int], keys: Sequence[BlockKey], rows: Rows) -> int:
        try:
            for first, end in _runs(slots):
                view = rows[first:end].data.cast("B")
                got = os.preadv(self._file, [view], self._slot_at(slots[first]))
                end = first + got // self._block_bytes
                for i in range(first, end):
                    label = _label(keys[i], checksum(rows[i], keys[i]))
                    if os.pread(self._file, LABEL_BYTES, self._label_at(slots[i])) != label:
                        return i
                if got < len(view):
                    return end  # somebody cut the file
        except OSError as error:
            self._fail(error)
        return len(slots)

    def found(self) -> Iterator[Found]:
        """Slots whose labels are whole, at most one for a key."""
        try:
            labels = os.pread(self._file, self._slots * LABEL_BYTES, PAGE)
        except OSError as error:
            self._fail(error)
        known: set[BlockKey] = set()
        for slot in range(len(labels) // LABEL_BYTES):
            label = labels[slot * LABEL_BYTES : (slot + 1) * LABEL_BYTES]
            key, row_sum, _ = LABEL.unpack_from(label)
            if label != BLANK and label == _label(key, row_sum) and key not in known:
                known.add(key)
                yield Found(slot, key)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _put(self, data: bytes | memoryview, at: int) -> None:
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def _label_at(self, slot: int) -> int:
        return PAGE + slot * LABEL_BYTES

    def _slot_at(self, slot: int) -> int:
        assert 0 <= slot < self._slots, slot
        return self._first + slot * self._block_bytes

    def _fail(self, error: OSError) -> NoReturn:
        raise StoreError(error.strerror or str(error), where=str(self._path)) from None


def _label(key: BlockKey, row_sum: int) -> bytes:
    own = xxhash.xxh3_64_intdigest(key + row_sum.to_bytes(8, "little"))
    return LABEL.pack(key, row_sum, own).ljust(LABEL_BYTES, b"\0")


def _page(header: Header) -> bytes:
    return msgspec.json.encode(header).ljust(PAGE, b"\0")


def _pages(count: int) -> int:
    return -(-count // PAGE) * PAGE


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Where slots follow one another: [first, end) into `slots`."""
    ids = np.asarray(slots)
    cuts = (np.flatnonzero(np.diff(ids) != 1) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(slots)], strict=True))
