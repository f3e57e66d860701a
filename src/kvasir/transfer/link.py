"""One connection of a sender: the frames that wait for it, and the frame that is going out.

Knows the order of frames; not when they may be sent, nor what an end means to the caller.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import termios
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvasir.core.codec import PIECE_BYTES, RAW
from kvasir.core.errors import WireError
from kvasir.transfer.base import Key, Shard, Timeline, Trailer
from kvasir.transfer.frames import (
    TRAILER_BYTES_MAX,
    FrameKind,
    Grant,
    Header,
    checksum,
    decode,
    encode,
    message,
    pack,
    reason_payload,
)
from kvasir.transfer.medium import Loaded
from kvasir.transfer.memory import Limits, Piece
from kvasir.transfer.stream import FrameReader, send_some

if TYPE_CHECKING:
    from concurrent.futures import Future

    from kvasir.transfer.coder import Coder, Encoded
    from kvasir.transfer.loop import Timer
    from kvasir.transfer.medium import Medium, Outlet
    from kvasir.transfer.memory import Ids, Memory

CODED_AHEAD = 2  # pieces of a connection that are coded and have not left


class Push(NamedTuple):
    """What the caller pushed; kept until the transfer is over, in case the connection breaks."""

    first_block: int
    ids: Ids
    layers: range
    coding: str = ""
    tell: bool = False  # when it has left


@dataclass(eq=False, slots=True)
class Outgoing:
    """One transfer on the sender's side. Times in `time.monotonic()` seconds."""

    key: Key
    serial: int
    address: str
    deadline_s: float
    opened_s: float
    link: Link | None = None
    timer: Timer | None = None
    begun: bool = False  # the peer has heard of it
    finished: bool = False  # the caller will push nothing more
    trailer: Trailer | None = None
    trailed: bool = False  # the trailer is on its way
    grant: Grant | None = None
    broken_s: float | None = None  # since when it waits for a connection again
    ending: str = ""  # why it failed, while the peer has yet to say that it reads no more
    over: bool = False
    first_frame_s: float | None = None
    last_frame_s: float | None = None
    over_s: float | None = None
    bytes: int = 0
    wire_bytes: int = 0
    wire_told: int = 0  # of these, when a push that has left was told last
    told: set[int] = field(default_factory=set)  # first blocks of such pushes
    cost: int = 0  # bytes that its pushes weigh
    pushed: list[Push] = field(default_factory=list)

    @property
    def closing(self) -> bool:
        """Nothing more is to be sent for it."""
        return self.over or bool(self.ending)

    def totals(self, trailer: Trailer) -> Trailer:
        """The trailer with what was pushed and sent."""
        layers = {layer for push in self.pushed for layer in push.layers}
        blocks = {push.first_block + i for push in self.pushed for i in range(len(push.ids))}
        return msgspec.structs.replace(
            trailer, blocks=len(blocks), layers=len(layers), bytes=self.bytes
        )

    def timeline(self) -> Timeline:
        return Timeline(
            self.opened_s, self.first_frame_s, self.last_frame_s, self.over_s, self.bytes
        )


@dataclass(eq=False, slots=True)
class Part:
    """A push that waits. `coded`: pieces that are being coded, or are."""

    transfer: Outgoing
    push: Push
    pieces: deque[Piece]
    coded: deque[Coding] = field(default_factory=deque)

    @property
    def empty(self) -> bool:
        return not self.pieces and not self.coded


class Coding(NamedTuple):
    piece: Piece
    encoded: Future[Encoded]


class Summing(NamedTuple):
    """The checksum of placed blocks, which follows their frame: the peer reads them meanwhile."""

    transfer: Outgoing
    piece: Piece
    known: int | None

    def frame(self, memory: Memory) -> bytes:
        found = memory.checksum(self.piece) if self.known is None else self.known
        key, serial = self.transfer.key, self.transfer.serial
        return pack(Header(FrameKind.SUM, *key, serial, checksum=found))


@dataclass(eq=False, slots=True)
class Note:
    """A small frame that waits; made when it leaves."""

    transfer: Outgoing
    make: Callable[[], bytes]


class Link:
    """`on_answer(link, header, text)` hears acks (empty text) and nacks; `on_grant` what a peer
    grants. `slice_bytes`: no frame should be larger."""

    def __init__(
        self,
        address: str,
        medium: Medium,
        memory: Memory,
        shard: Shard,
        *,
        frame_bytes_max: int,
        slice_bytes: int,
        on_answer: Callable[[Link, Header, str], None],
        on_grant: Callable[[Link, Outgoing], None],
        coder: Coder | None = None,
        on_coded: Callable[[Link], None] | None = None,
    ) -> None:
        """Starts to connect. `on_coded`, on any thread: what waited for the coder may leave. Raises
        OSError, WireError."""
        self.address = address
        self.sock = medium.connect(address)
        try:
            self.outlet: Outlet = medium.outlet(memory, frame_bytes_max)
        except OSError:
            self.sock.close()
            raise
        self.resumes = medium.resumes
        self.reader = FrameReader(self.sock.recv_into, self._place, self._arrived)
        self.queue: deque[Part | Note] = deque()
        self.outbox: deque[memoryview] = deque()  # one frame, or what is left of it
        self.transfers: dict[int, Outgoing] = {}  # by serial
        self.connected = False
        self.closed = False
        self.waiting = False  # for the cap, for a flight, or for the peer to have it all
        self.booked = False  # the cap's share of the frame that leaves next is taken
        self.meter = Meter()
        self.due: deque[tuple[Outgoing, int]] = deque()  # pushes that have left and are to be told
        self._coder = coder if self.outlet.inline else None
        self._on_coded = on_coded
        self._limits = Limits(*(min(slice_bytes, limit) for limit in self.outlet.limits))
        self._memory = memory
        self._shard = shard
        self._on_answer = on_answer
        self._on_grant = on_grant
        self._leaving: Outgoing | None = None  # whose data frame is in the outbox
        self._summing: Summing | None = None  # of that frame
        self._flight: Callable[[], bool] | None = None  # must be over before the outbox may leave
        self._payload = bytearray()

    # --- what waits ---

    def begin(self, transfer: Outgoing, *, again: bool = False) -> None:
        """`again`: on a new connection; the peer is asked what it has. Raises WireError when the
        transfer's name does not fit a frame."""
        kind = FrameKind.RESUME if again else FrameKind.BEGIN
        frame = message(kind, transfer.key, transfer.serial)
        transfer.link, transfer.grant = self, None
        transfer.begun = transfer.trailed = False
        self.transfers[transfer.serial] = transfer
        self.queue.append(Note(transfer, partial(self._begin_frame, transfer, frame)))
        if not again and not self.outlet.one_sided:
            transfer.grant = NOTHING_THERE

    def push(self, transfer: Outgoing, push: Push) -> None:
        if self._codes(push) and self._coder is not None:
            blocks = self._coder.piece_blocks
            pieces = self._memory.coded_pieces(*push[:3], blocks, PIECE_BYTES)
        else:
            pieces = self._memory.pieces(*push[:3], self._limits)
        self.queue.append(Part(transfer, push, deque(pieces)))

    def _codes(self, push: Push) -> bool:
        return self._coder is not None and push.coding not in ("", RAW)

    def trail(self, transfer: Outgoing, trailer: Trailer) -> None:
        """Raises WireError when the trailer is too big for a frame."""
        if len(encode(trailer)) > TRAILER_BYTES_MAX - 64:  # the totals are still to be filled in
            raise WireError(f"a trailer with {len(trailer.tokens)} tokens is too big")
        self.queue.append(Note(transfer, partial(self._trailer_frame, transfer, trailer)))

    def withdraw(self, transfer: Outgoing, reason: str) -> None:
        """Let go of the cache memory that waits or leaves for `transfer`; with a reason, tell the
        peer."""
        self.queue = deque(item for item in self.queue if item.transfer is not transfer)
        self.booked = False
        if self._leaving is transfer and self._flight is None:
            self._detach()
        if reason and transfer.begun and not self.closed:
            abort = message(FrameKind.ABORT, transfer.key, transfer.serial, reason_payload(reason))
            self.queue.appendleft(Note(transfer, lambda: abort))

    def flies(self, transfer: Outgoing) -> bool:
        """Whether its memory is being read right now, by hardware or a library."""
        return self._flight is not None and self._leaving is transfer

    def _detach(self) -> None:
        """Finish the frame that is half out from a copy, so that the stream stays in step."""
        rest = b"".join(self.outbox)
        self.outbox = deque([memoryview(rest)] if rest else [])
        self._leaving = self._summing = None

    # --- what leaves ---

    def has_next(self) -> bool:
        """Whether something waits that could be loaded now, caps aside."""
        self._code_ahead()
        if not self.queue:
            return False
        first = self.queue[0]
        if isinstance(first, Part) and first.coded and not first.coded[0].encoded.done():
            return False
        return first.transfer.closing or not first.transfer.begun or (
            first.transfer.grant is not None
        )  # fmt: skip

    def _code_ahead(self) -> None:
        """Have the coder work on what leaves next, and drop what is done with."""
        if self._coder is None:
            return
        room = CODED_AHEAD
        for item in self.queue:
            if not isinstance(item, Part) or not self._codes(item.push):
                continue
            grant, room = item.transfer.grant, room - len(item.coded)
            while item.pieces and room > 0 and grant is not None:
                piece = item.pieces.popleft()
                if not grant.has(piece):
                    future = self._coder.submit(piece, item.push.coding, self._coder_done)
                    item.coded.append(Coding(piece, future))
                    room -= 1
            if room <= 0:
                break
        while self.queue and isinstance(first := self.queue[0], Part) and first.empty:
            self._part_left(first)

    def _coder_done(self) -> None:
        if self._on_coded is not None:
            self._on_coded(self)

    def _part_left(self, part: Part) -> None:
        self.queue.popleft()
        push, told = part.push, part.transfer.told
        if push.tell and push.first_block not in told:
            told.add(push.first_block)
            self.due.append((part.transfer, push.first_block))

    def next_is_data(self) -> bool:
        return isinstance(self.queue[0], Part)

    def coded_bytes(self) -> int:
        """Of the next frame, if it is coded: such a frame leaves whole."""
        first = self.queue[0]
        if not isinstance(first, Part) or not first.coded:
            return 0
        return len(first.coded[0].encoded.result().data)

    def load_next(self) -> int:
        """Put the next frame into the outbox; returns the bytes that it moves if it is data."""
        assert not self.outbox
        item, self.booked = self.queue[0], False
        if isinstance(item, Note):
            self.queue.popleft()
            self.outbox.append(memoryview(item.make()))
            return 0
        count = self._load_coded(item) if item.coded else self._load_next_piece(item)
        if item.empty:
            self._part_left(item)
        return count

    def _load_next_piece(self, item: Part) -> int:
        piece = item.pieces.popleft()
        if item.transfer.grant is not None and item.transfer.grant.has(piece):
            return 0
        return self._load_data(item.transfer, piece)

    def _load_coded(self, item: Part) -> int:
        piece, future = item.coded.popleft()
        encoded, transfer = future.result(), item.transfer
        if transfer.grant is not None and transfer.grant.has(piece):
            return 0
        kind = FrameKind.DATA if encoded.form == RAW else FrameKind.CODED
        loaded = Loaded(kind, [encoded.data], checksum(encoded.data))
        self._load(transfer, piece, loaded)
        return len(encoded.data)

    def _load_data(self, transfer: Outgoing, piece: Piece) -> int:
        there = transfer.grant.ids_of(piece) if self.outlet.one_sided and transfer.grant else None
        return self._load(transfer, piece, self.outlet.load(self._memory, piece, there))

    def _load(self, transfer: Outgoing, piece: Piece, loaded: Loaded) -> int:
        """Returns the bytes of KV."""
        placed, inline_bytes = loaded.kind is FrameKind.PLACED, sum(map(len, loaded.inline))
        header = Header(
            loaded.kind, *transfer.key, transfer.serial, piece.plane, piece.planes, self._shard,
            piece.first_block, len(piece.ids), inline_bytes, 0 if placed else loaded.checksum or 0,
        )  # fmt: skip
        self.outbox.append(memoryview(pack(header)))
        self.outbox.extend(loaded.inline)
        size = self._memory.size(piece.plane, piece.planes, len(piece.ids))
        moved = size if placed else inline_bytes
        transfer.bytes += size
        transfer.wire_bytes += moved
        self.meter.bytes += moved
        transfer.first_frame_s = transfer.first_frame_s or time.monotonic()
        self._leaving, self._flight = transfer, loaded.flight
        self._summing = Summing(transfer, piece, loaded.checksum) if placed else None
        return size

    def in_flight(self) -> bool:
        """Whether the outbox has to wait. Raises OSError when the flight failed."""
        if self._flight is not None and self._flight():
            self._flight = None
            if self._leaving is not None and self._leaving.closing:
                self._leaving = None
        return self._flight is not None

    def flush(self) -> bool:
        """Send from the outbox; False when the socket takes no more. Raises OSError."""
        sent = send_some(self.sock, self.outbox)
        transfer = self._leaving
        if transfer is not None and sent:
            transfer.last_frame_s = time.monotonic()
            if not self.outbox:
                self._leaving, summing, self._summing = None, self._summing, None
                if summing is not None:
                    self.outbox.append(memoryview(summing.frame(self._memory)))
                    send_some(self.sock, self.outbox)
        return not self.outbox

    def _begin_frame(self, transfer: Outgoing, frame: bytes) -> bytes:
        transfer.begun = True
        return frame

    def _trailer_frame(self, transfer: Outgoing, trailer: Trailer) -> bytes:
        transfer.trailed = True
        whole = encode(transfer.totals(trailer))
        return message(FrameKind.TRAILER, transfer.key, transfer.serial, whole)

    # --- connection ---

    def connect_done(self) -> None:
        """The socket became writable: connected, or refused (raises OSError)."""
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self.outlet.greet(self.sock)
        self.connected = True

    def close(self) -> None:
        self.closed = True
        self.outbox.clear()
        self._leaving = self._summing = self._flight = None
        self.sock.close()
        self.outlet.close()

    def _place(self, header: Header) -> memoryview | None:
        if header.kind not in ANSWERS:
            raise WireError(f"{header.kind.name} is no answer")
        self._payload = bytearray(header.payload_bytes)
        return memoryview(self._payload)

    def _arrived(self, header: Header) -> None:
        match header.kind:
            case FrameKind.ACK:
                self._on_answer(self, header, "")
            case FrameKind.WELCOME:
                self.outlet.welcome(self._payload)
            case FrameKind.GRANT:
                self._granted(header)
            case _:
                text = self._payload.decode(errors="replace")
                self._on_answer(self, header, text or "refused")

    def _granted(self, header: Header) -> None:
        transfer = self.transfers.get(header.serial)
        if transfer is None or transfer.key != header.key or transfer.closing:
            return
        transfer.grant = decode(self._payload, Grant)
        transfer.bytes = transfer.grant.nbytes
        self._on_grant(self, transfer)

    def check(self) -> None:
        """Whatever waits or leaves belongs to a transfer that is not over (aborts aside)."""
        for item in self.queue:
            assert isinstance(item, Note) or not item.transfer.over
            assert isinstance(item, Note) or not item.empty or self._codes(item.push)
        assert self._leaving is None or not self._leaving.over
        assert all(t.link is self and not t.over for t in self.transfers.values())


class Meter:
    """What a connection carried, and for how long it had something to carry."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self, now: float) -> None:
        self._since = now if self._since is None else self._since

    def end(self, now: float) -> None:
        if self._since is not None:
            self._seconds, self._since = self._seconds + now - self._since, None

    @property
    def running(self) -> bool:
        return self._since is not None

    def read(self, now: float, waits: int) -> tuple[int, float]:
        """Bytes, less those that still wait on this side, and seconds since the last time."""
        if self._since is not None:
            self._seconds, self._since = self._seconds + now - self._since, now
        found = max(0, self.bytes - waits), self._seconds
        self.bytes, self._seconds = min(waits, self.bytes), 0.0
        return found


def unsent(sock: socket.socket) -> int:
    """Bytes that the peer's system has not acknowledged; 0 where that cannot be known."""
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


ANSWERS = {FrameKind.ACK, FrameKind.NACK, FrameKind.WELCOME, FrameKind.GRANT}
NOTHING_THERE = Grant()
