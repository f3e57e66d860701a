"""Cache memory that the peer maps, and a unix-domain socket for everything else.

    P: planes in an arena ---------- mapped, read-only -----------> D: copies into its own planes
       frame with the block ids and their checksum  -> socket ->       and compares checksums

One copy. The sender's arena is anonymous memory (memfd) of a sealed size; its descriptor goes over
the socket. When either process dies, however it dies, nothing stays behind but the socket's name in
the run directory, which the next receiver there sweeps away. Planes that stand in no arena travel
inline on the socket.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kvasir.core.errors import ConfigError, WireError
from kvasir.core.units import MIB
from kvasir.transfer.arena import Arena, map_sealed
from kvasir.transfer.base import Key, Kind
from kvasir.transfer.frames import FrameKind, Hello, PlaneAt, decode, encode, message
from kvasir.transfer.inline import InlineOutlet
from kvasir.transfer.medium import Listening, Loaded
from kvasir.transfer.memory import Limits, Memory

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes, Ids, Piece

LIMITS: Final = Limits(16 * MIB, 16 * MIB, 1 * MIB)
SOCKET_PATH_BYTES_MAX: Final = 100  # sun_path holds 108, 104 on some systems
BACKLOG: Final = 128
_SCHEME: Final = "shm://"


class MappedOutlet:
    """The sender's end: shows the peer its arena, and tells which blocks to take."""

    limits = LIMITS
    lends: bool = True
    one_sided: bool = False
    inline: bool = False

    def __init__(self, arena: Arena, planes: tuple[PlaneAt, ...]) -> None:
        self._arena, self._planes = arena, planes

    def greet(self, sock: socket.socket) -> None:
        hello = Hello(self._arena.size, self._planes)
        frame = message(FrameKind.HELLO, Key("", 0), 0, encode(hello))
        if socket.send_fds(sock, [frame], [self._arena.fd]) != len(frame):
            raise BrokenPipeError("the peer's socket does not take a greeting")

    def welcome(self, payload: bytes | bytearray) -> None:
        raise WireError(f"memory offered to a sender, in {len(payload)} bytes")

    def load(self, memory: Memory, piece: Piece, there: Ids | None) -> Loaded:
        _ = there  # the peer knows
        ids = piece.ids.astype("<u4")
        return Loaded(FrameKind.PLACED, [memoryview(ids.tobytes())])

    def close(self) -> None: ...


class MappedInlet:
    """The receiver's end: maps the peer's memory, read-only."""

    one_sided: bool = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._fd = -1
        self._peer: Memory | None = None

    def recv_into(self, buffer: memoryview) -> int:
        if self._peer is not None:
            return self._sock.recv_into(buffer)  # a descriptor sent now is closed by the kernel
        data, fds, _, _ = socket.recv_fds(self._sock, len(buffer), 1, socket.MSG_CMSG_CLOEXEC)
        for fd in fds:
            self._close_fd()
            self._fd = fd
        buffer[: len(data)] = data
        return len(data)

    def hello(self, payload: bytes | bytearray) -> bytes:
        hello = decode(payload, Hello)
        if self._peer is not None or self._fd < 0:
            raise WireError("a greeting without memory, or a second one")
        mapped = map_sealed(self._fd, hello.size)
        self._close_fd()
        try:
            self._peer = Memory([[_plane(mapped, at)] for at in hello.planes])
        except (ConfigError, ValueError) as error:
            raise WireError(f"the peer's planes do not stand in its memory: {error}") from None
        return b""

    def bring(self, memory: Memory, piece: Piece, payload: bytes | bytearray) -> int:
        peer, ids = self._peer, np.frombuffer(payload, "<u4").astype(np.int64)
        if peer is None or ids.size != piece.ids.size or not peer.holds(ids):
            raise WireError(f"{ids.size} blocks placed where the peer has none")
        for plane in range(piece.plane, piece.plane + piece.planes):
            if plane >= len(peer.planes) or peer.block_bytes(plane) != memory.block_bytes(plane):
                raise WireError(f"{memory.place_of(plane)} is another one at the peer")
        return memory.copy_from(peer, ids, piece)

    def close(self) -> None:
        self._close_fd()
        self._peer = None  # the mapping goes with its last view

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ShmMedium:
    """Addresses are `shm://` and a socket path. Linux.

    `run_dir`: the directory to listen in; `arena`: where a sender's planes stand, if peers may map
    them.
    """

    resumes: bool = False  # it breaks when a process ends, not before

    def __init__(self, run_dir: str = "", arena: Arena | None = None) -> None:
        self._run_dir, self._arena = run_dir, arena

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

    def listen(self) -> Listening:
        """The socket gets its name only when it listens, so a name that nobody answers is stale."""
        folder = Path(self._run_dir)
        path = folder / f"kv-{os.getpid()}-{secrets.token_hex(4)}.sock"
        fits = len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX
        if not self._run_dir or not folder.is_dir() or not fits:
            raise ConfigError(
                f"no socket can be made in {self._run_dir!r}",
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

    def outlet(self, memory: Memory, frame_bytes_max: int) -> MappedOutlet | InlineOutlet:
        if self._arena is not None:
            offsets = [self._arena.offset_of(plane) for plane in memory.planes]
            if None not in offsets:
                planes = (
                    PlaneAt(offset or 0, *plane.shape)
                    for offset, plane in zip(offsets, memory.planes, strict=True)
                )
                return MappedOutlet(self._arena, tuple(planes))
        return InlineOutlet(frame_bytes_max)

    def inlet(self, sock: socket.socket) -> MappedInlet:
        return MappedInlet(sock)


def _plane(mapped: Bytes, at: PlaneAt) -> Bytes:
    """Raises ValueError when it does not lie in the mapping."""
    if min(at.offset, at.blocks, at.block_bytes) < 0:
        raise ValueError(f"plane at {at.offset}")
    end = at.offset + at.blocks * at.block_bytes
    return mapped[at.offset : end].reshape(at.blocks, at.block_bytes)


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
