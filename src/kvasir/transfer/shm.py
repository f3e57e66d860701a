"""Payloads in a ring of shared memory, everything else on a unix-domain socket.

    P: planes --copy--> slot 0 | slot 1 | ... | slot n-1 --copy--> planes :D
                        header with the slot ->, <- credit when it is free

The sender makes the ring as anonymous memory (memfd), seals its size and passes the descriptor over
the socket: when either process dies, however it dies, nothing stays behind but the socket's name in
the run directory, which the next receiver there sweeps away. Slots are used in order.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kvasir.core.errors import ConfigError, WireError
from kvasir.core.units import MIB
from kvasir.transfer.base import Key, Kind
from kvasir.transfer.frames import FrameKind, Hello, checksum, decode, encode, message
from kvasir.transfer.medium import Listening, Loaded

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes, Memory, Piece

SLOTS: Final = 8
SLOTS_MAX: Final = 1024
RING_BYTES_MAX: Final = 512 * MIB
SOCKET_PATH_BYTES_MAX: Final = 100  # sun_path holds 108, 104 on some systems
BACKLOG: Final = 128
_SCHEME: Final = "shm://"
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class RingOutlet:
    """The sender's end: makes the ring, copies pieces into its slots."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._slots, self._slot_bytes = slots, slot_bytes
        self._fd = os.memfd_create("kvasir-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, slots * slot_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self._fd, slots * slot_bytes)
        except OSError:
            os.close(self._fd)
            raise
        self._ring = np.frombuffer(self._map, np.uint8).reshape(slots, slot_bytes)
        self._next = 0
        self._in_use = 0

    def greet(self, sock: socket.socket) -> None:
        hello = encode(Hello(self._slots, self._slot_bytes))
        frame = message(FrameKind.HELLO, Key("", 0), 0, hello)
        if socket.send_fds(sock, [frame], [self._fd]) != len(frame):
            raise BrokenPipeError("the peer's socket does not take a greeting")
        self._close_fd()  # the mapping stays

    def has_room(self) -> bool:
        return self._in_use < self._slots

    def load(self, memory: Memory, piece: Piece) -> Loaded:
        assert self.has_room()
        size = len(piece.ids) * memory.block_bytes(piece.layer, piece.plane)
        slot, data = self._next, self._ring[self._next, :size]
        memory.gather(piece, data)
        self._next = (slot + 1) % self._slots
        self._in_use += 1
        return Loaded(checksum(data.data), slot, [])

    def credit(self, slots: int) -> None:
        if slots > self._in_use:
            raise WireError(f"credit for {slots} slots, {self._in_use} in use")
        self._in_use -= slots

    def close(self) -> None:
        self._close_fd()
        self._ring = np.empty((0, 0), np.uint8)
        self._map.close()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RingInlet:
    """The receiver's end: takes the peer's ring, read-only."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._ring: Bytes = np.empty((0, 0), np.uint8)

    def recv_into(self, buffer: memoryview) -> int:
        if self._map is not None:
            return self._sock.recv_into(buffer)  # a descriptor sent now is closed by the kernel
        data, fds, _, _ = socket.recv_fds(self._sock, len(buffer), 1, socket.MSG_CMSG_CLOEXEC)
        for fd in fds:
            self._close_fd()
            self._fd = fd
        buffer[: len(data)] = data
        return len(data)

    def hello(self, payload: bytes | bytearray) -> None:
        hello = decode(payload, Hello)
        if self._map is not None or self._fd < 0:
            raise WireError("a greeting without a ring, or a second one")
        if not 0 < hello.slots <= SLOTS_MAX or hello.slot_bytes <= 0:
            raise WireError(f"a ring of {hello.slots} slots of {hello.slot_bytes} bytes")
        size = hello.slots * hello.slot_bytes
        if size > RING_BYTES_MAX:
            raise WireError(f"a ring of {size} bytes, max {RING_BYTES_MAX}")
        self._map = _map_sealed(self._fd, size)
        self._ring = np.frombuffer(self._map, np.uint8).reshape(hello.slots, hello.slot_bytes)
        self._close_fd()

    def slot(self, index: int, size: int) -> Bytes:
        slots, slot_bytes = self._ring.shape
        if index >= slots or size > slot_bytes:
            raise WireError(f"{size} bytes in slot {index} of a {slots} x {slot_bytes} ring")
        return self._ring[index, :size]

    def close(self) -> None:
        self._close_fd()
        self._ring = np.empty((0, 0), np.uint8)
        if self._map is not None:
            self._map.close()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ShmMedium:
    """Addresses are `shm://` and a socket path; `bind` is the directory to make it in. Linux."""

    def __init__(self, slots: int = SLOTS) -> None:
        self._slots = slots

    @property
    def kind(self) -> Kind:
        return "shm"

    def connect(self, address: str) -> socket.socket:
        if not address.startswith(_SCHEME):
            raise WireError(f"{address!r} is not shm:// and a path")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(address.removeprefix(_SCHEME))
        except OSError:
            sock.close()
            raise
        return sock

    def listen(self, bind: str) -> Listening:
        """The socket gets its name only when it listens, so a name that nobody answers is stale."""
        folder = Path(bind)
        path = folder / f"kv-{os.getpid()}-{secrets.token_hex(4)}.sock"
        if not folder.is_dir() or len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"no socket can be made in {bind!r}",
                next_step=f"an existing directory, the path under {SOCKET_PATH_BYTES_MAX} bytes",
            )
        _sweep(folder)
        unnamed = path.with_suffix(".new")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.bind(str(unnamed))
            unnamed.chmod(0o600)
            sock.listen(BACKLOG)
            unnamed.rename(path)
        except OSError:
            sock.close()
            unnamed.unlink(missing_ok=True)
            raise
        return Listening(sock, f"{_SCHEME}{path}", str(path))

    def adopt(self, sock: socket.socket) -> None:
        sock.setblocking(False)

    def outlet(self, frame_bytes_max: int) -> RingOutlet:
        return RingOutlet(self._slots, frame_bytes_max)

    def inlet(self, sock: socket.socket) -> RingInlet:
        return RingInlet(sock)


def _map_sealed(fd: int, size: int) -> mmap.mmap:
    """Map a peer's memory. Raises WireError unless it has that size for good: a file that shrank
    under the mapping would kill this process."""
    try:
        found = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size or seals & _SEALS != _SEALS:
            raise WireError("the ring's memory is not sealed at its size")
        return mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise WireError(f"the ring cannot be mapped: {error}") from None


def _sweep(folder: Path) -> None:
    """Unlink the socket names of receivers that were killed."""
    for path in folder.glob("kv-*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                with contextlib.suppress(OSError):
                    path.unlink()
            except OSError:
                continue
