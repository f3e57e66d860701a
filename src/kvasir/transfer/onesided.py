"""Transports that write into the peer's cache memory: a TCP stream for frames, a mover for bytes.

    P: HELLO -> ............................ <- WELCOME: the mover's card, where planes stand :D
       BEGIN -> ............................ <- GRANT: which of its blocks are to be written
       write, when that is over PLACED -> D compares its checksum with its own blocks

Knows planes and blocks; a `Mover` knows how bytes travel. A receiver cannot stop a write that is
under way: a failed transfer is over there when the sender said ABORT, or when it is gone and its
last bytes had time to come in.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from kvasir.core.errors import WireError
from kvasir.core.units import MIB
from kvasir.transfer.base import Key, Kind
from kvasir.transfer.frames import FrameKind, PlaneAt, decode, encode, message
from kvasir.transfer.medium import Listening, Loaded
from kvasir.transfer.memory import Limits, pairs
from kvasir.transfer.tcp import TcpMedium

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes, Ids, Memory, Piece

LIMITS: Final = Limits(16 * MIB, 16 * MIB, 16 * MIB)

Flight = Callable[[], bool]


class Move(NamedTuple):
    """`size` bytes from an address here to one at the peer."""

    here: int
    there: int
    size: int


class Mover(Protocol):
    """A library that moves bytes between registered memories. One for a process."""

    @property
    def kind(self) -> Kind: ...

    def register(self, planes: Sequence[Bytes]) -> None:
        """Let peers write there. Raises ConfigError when it cannot be done."""

    def card(self) -> bytes:
        """What a peer has to know to write here."""

    def meet(self, card: bytes) -> str:
        """A peer's name, from its card. Raises OSError."""

    def write(self, peer: str, moves: Sequence[Move]) -> Flight:
        """Begin to write; the flight says whether all is there, and raises OSError when it will
        never be. This raises OSError too."""


class Welcome(msgspec.Struct, frozen=True, gc=False):
    """Where the receiver's planes stand: `offset` is an address of its process."""

    card: bytes
    planes: tuple[PlaneAt, ...]


class OneSidedOutlet:
    limits = LIMITS
    lends: bool = True
    one_sided: bool = True
    inline: bool = False

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._peer = ""
        self._planes: tuple[PlaneAt, ...] = ()

    def greet(self, sock: socket.socket) -> None:
        frame = message(FrameKind.HELLO, Key("", 0), 0)
        if sock.send(frame) != len(frame):
            raise BrokenPipeError("the peer's socket does not take a greeting")

    def welcome(self, payload: bytes | bytearray) -> None:
        found = decode(payload, Welcome)
        self._planes, self._peer = found.planes, self._mover.meet(found.card)

    def load(self, memory: Memory, piece: Piece, there: Ids | None) -> Loaded:
        if there is None or not self._peer:
            raise WireError("the peer granted no place")
        flight = self._mover.write(self._peer, self._moves(memory, piece, there))
        return Loaded(FrameKind.PLACED, [], memory.checksum(piece), flight)

    def close(self) -> None: ...

    def _moves(self, memory: Memory, piece: Piece, there: Ids) -> list[Move]:
        found = []
        for plane in range(piece.plane, piece.plane + piece.planes):
            size, start = memory.block_bytes(plane), memory.planes[plane].ctypes.data
            at = self._planes[plane] if plane < len(self._planes) else None
            if at is None or at.block_bytes != size or int(there.max()) >= at.blocks:
                raise WireError(f"{memory.place_of(plane)} is another one at the peer")
            for pair in pairs(piece.ids, there):
                move = Move(
                    start + pair.here * size, at.offset + pair.there * size, pair.blocks * size
                )
                found.append(move)
        return found


class OneSidedInlet:
    one_sided: bool = True

    def __init__(self, sock: socket.socket, mover: Mover, planes: Sequence[Bytes]) -> None:
        self._sock, self._mover, self._planes = sock, mover, planes

    def recv_into(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer)

    def hello(self, payload: bytes | bytearray) -> bytes:
        if payload:
            raise WireError("a sender that writes has no memory to show")
        planes = (PlaneAt(plane.ctypes.data, *plane.shape) for plane in self._planes)
        return encode(Welcome(self._mover.card(), tuple(planes)))

    def bring(self, memory: Memory, piece: Piece, payload: bytes | bytearray) -> int:
        _ = payload  # it stands here already
        return memory.checksum(piece)

    def close(self) -> None: ...


class OneSidedMedium:
    """Addresses are those of the frames' stream, `kind://host:port`; `bind` as of TCP."""

    resumes: bool = False

    def __init__(self, mover: Mover, planes: Sequence[Bytes], bind: str = "127.0.0.1:0") -> None:
        mover.register(planes)
        self._mover, self._planes = mover, planes
        self._stream = TcpMedium(bind, mover.kind)

    @property
    def kind(self) -> Kind:
        return self._mover.kind

    def connect(self, address: str) -> socket.socket:
        return self._stream.connect(address)

    def listen(self) -> Listening:
        return self._stream.listen()

    def adopt(self, sock: socket.socket) -> None:
        self._stream.adopt(sock)

    def outlet(self, memory: Memory, frame_bytes_max: int) -> OneSidedOutlet:
        _ = memory, frame_bytes_max  # registered already; nothing travels inline
        return OneSidedOutlet(self._mover)

    def inlet(self, sock: socket.socket) -> OneSidedInlet:
        return OneSidedInlet(sock, self._mover, self._planes)
