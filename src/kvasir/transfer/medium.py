"""What differs between transports: how to connect, and where a data frame's blocks stand.

Everything else (order, acks, deadlines, ends) is the same and lives in sender.py and receiver.py.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvasir.transfer.base import Kind

if TYPE_CHECKING:
    from kvasir.transfer.frames import FrameKind
    from kvasir.transfer.memory import Ids, Limits, Memory, Piece


class Loaded(NamedTuple):
    """A piece, read and ready to leave. `kind`: DATA when `inline` holds its bytes, or PLACED; then
    the frame may leave when `flight`, if there is one, says that the bytes are there (it raises
    OSError when they will never be). `checksum` None: to be taken while the peer reads them."""

    kind: FrameKind
    inline: list[memoryview]
    checksum: int | None = None
    flight: Callable[[], bool] | None = None


class Listening(NamedTuple):
    sock: socket.socket
    address: str
    path: str  # a file to unlink at the end; empty for none


class Outlet(Protocol):
    """The sending end of one connection."""

    @property
    def limits(self) -> Limits:
        """How large frames are best, caps aside."""

    @property
    def lends(self) -> bool:
        """Whether the peer reads cache memory itself, so that only its answer ends a transfer."""

    @property
    def one_sided(self) -> bool:
        """Whether it writes into the peer's memory, and so has to be granted a place first."""

    @property
    def inline(self) -> bool:
        """Whether blocks travel in the frames, so that fewer bytes of them are sooner there."""

    def greet(self, sock: socket.socket) -> None:
        """Say what must be said first on a new connection. Raises OSError."""

    def welcome(self, payload: bytes | bytearray) -> None:
        """The peer's answer to the greeting. Raises WireError if it is not acceptable."""

    def load(self, memory: Memory, piece: Piece, there: Ids | None) -> Loaded:
        """Take a piece from the cache; `there`: the peer's block ids if it is
        one-sided. The views in `inline` may lie in cache memory; they are valid until the next
        `load`. Raises OSError, WireError."""

    def close(self) -> None: ...


class Inlet(Protocol):
    """The receiving end of one connection."""

    @property
    def one_sided(self) -> bool:
        """Whether the peer writes into our memory itself, and has to be granted a place."""

    def recv_into(self, buffer: memoryview) -> int:
        """As `socket.recv_into`."""

    def hello(self, payload: bytes | bytearray) -> bytes:
        """The peer's greeting; returns the payload of a welcome, empty for none. Raises WireError
        if it is not acceptable."""

    def bring(self, memory: Memory, piece: Piece, payload: bytes | bytearray) -> int:
        """Fill a piece from where it was placed; returns the checksum of what stands here then.
        Raises WireError if there is no such place."""

    def close(self) -> None: ...


class Medium(Protocol):
    """A transport for streams of frames. `connect` and `listen` give non-blocking sockets."""

    @property
    def kind(self) -> Kind: ...

    @property
    def resumes(self) -> bool:
        """Whether a connection may break while both ends live, so that going on makes sense."""

    def connect(self, address: str) -> socket.socket:
        """Start to connect. Raises OSError, or WireError for an address of another kind."""

    def listen(self) -> Listening:
        """Raises OSError, or ConfigError for a place that makes no sense."""

    def adopt(self, sock: socket.socket) -> None:
        """Set up a socket that was accepted."""

    def outlet(self, memory: Memory, frame_bytes_max: int) -> Outlet: ...

    def inlet(self, sock: socket.socket) -> Inlet: ...
