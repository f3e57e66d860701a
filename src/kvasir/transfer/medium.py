"""What differs between transports: how to connect, and where a data frame's payload stands.

Everything else (order, acks, deadlines, ends) is the same and lives in sender.py and receiver.py.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvasir.transfer.base import Kind

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes, Memory, Piece


class Loaded(NamedTuple):
    """A piece, read and ready to leave: `inline` follows the header, unless it stands in `slot`."""

    checksum: int
    slot: int
    inline: list[memoryview]


class Listening(NamedTuple):
    sock: socket.socket
    address: str
    path: str  # a file to unlink at the end; empty for none


class Outlet(Protocol):
    """The sending end of one connection."""

    def greet(self, sock: socket.socket) -> None:
        """Say what must be said first on a new connection. Raises OSError."""

    def has_room(self) -> bool:
        """Whether a piece can be loaded now. False: wait for `credit`."""

    def load(self, memory: Memory, piece: Piece) -> Loaded:
        """Read a piece and its checksum from the cache. The views in `inline` may lie in cache
        memory; they are valid until the next `load`."""

    def credit(self, slots: int) -> None:
        """The peer is done with `slots` more payloads. Raises WireError if that cannot be."""

    def close(self) -> None: ...


class Inlet(Protocol):
    """The receiving end of one connection."""

    def recv_into(self, buffer: memoryview) -> int:
        """As `socket.recv_into`."""

    def hello(self, payload: bytes | bytearray) -> None:
        """The peer's greeting. Raises WireError if it is not acceptable."""

    def slot(self, index: int, size: int) -> Bytes:
        """The first `size` bytes of a ring slot. Raises WireError if there is none."""

    def close(self) -> None: ...


class Medium(Protocol):
    """A transport for streams of frames. `connect` and `listen` give non-blocking sockets."""

    @property
    def kind(self) -> Kind: ...

    def connect(self, address: str) -> socket.socket:
        """Start to connect. Raises OSError, or WireError for an address of another kind."""

    def listen(self, bind: str) -> Listening:
        """Raises OSError, or ConfigError for a `bind` that makes no sense."""

    def adopt(self, sock: socket.socket) -> None:
        """Set up a socket that was accepted."""

    def outlet(self, frame_bytes_max: int) -> Outlet: ...

    def inlet(self, sock: socket.socket) -> Inlet: ...
