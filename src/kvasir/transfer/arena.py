"""Cache memory that a peer on this host can map: one anonymous file, mapped here once.

Knows pages and offsets; not what stands in them. Linux only (`Arena` raises UnsupportedEffect).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import sys
from typing import TYPE_CHECKING, Final

import numpy as np

from kvasir.core.errors import TransferError, UnsupportedEffect, WireError

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes

SEALS: Final = 0 if sys.platform != "linux" else fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Arena:
    """`size`: bytes of address space, by default as many as there is memory; pages that nobody
    writes to cost nothing. Sealed from the start: no peer's mapping can lose its file."""

    def __init__(self, size: int | None = None) -> None:
        if sys.platform != "linux":
            raise UnsupportedEffect("memory that peers can map needs Linux")
        pages = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
        self.size = pages if size is None else size
        self.fd = os.memfd_create("kvasir-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        self._bytes: Bytes = np.frombuffer(mmap.mmap(self.fd, self.size), np.uint8)
        self._base = self._bytes.ctypes.data
        self._taken = 0

    def take(self, count: int) -> Bytes:
        """`count` zeroed bytes, uint8 [count], page-aligned, for good. Raises TransferError when
        there are not as many."""
        end = self._taken + count
        if end > self.size:
            raise TransferError(f"{count} bytes of {self.size - self._taken} that are left")
        found = self._bytes[self._taken : end]
        self._taken = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        return found

    def offset_of(self, memory: Bytes) -> int | None:
        """Where a contiguous array stands in the file; None if it is not from here."""
        offset = memory.ctypes.data - self._base
        return offset if 0 <= offset <= self.size - memory.nbytes else None

    def close(self) -> None:
        """No more peers; what was taken stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_sealed(fd: int, size: int) -> Bytes:
    """A peer's arena, read-only, uint8 [size]. Raises WireError unless its size is for good."""
    try:
        found = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size or seals & SEALS != SEALS:
            raise WireError("the peer's memory is not sealed at its size")
        return np.frombuffer(mmap.mmap(fd, size, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise WireError(f"the peer's memory cannot be mapped: {error}") from None


def arena_for(kind: str) -> Arena | None:
    """Where a worker's cache is to stand for that kind of transport; None for anywhere."""
    return Arena() if kind in {"shm", "auto"} and sys.platform == "linux" else None
