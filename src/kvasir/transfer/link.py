"""One connection of a sender: the frames that wait for it, and the frame that is going out.

Knows the order of frames; not when they may be sent, nor what an end means to the caller.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvasir.core.errors import WireError
from kvasir.transfer.base import Key, Shard, Timeline, Trailer
from kvasir.transfer.frames import (
    TRAILER_BYTES_MAX,
    FrameKind,
    Grant,
    Header,
    decode,
    encode,
    message,
    pack,
    reason_payload,
)
from kvasir.transfer.memory import Limits, Piece
from kvasir.transfer.stream import FrameReader, send_some

if TYPE_CHECKING:
    from kvasir.transfer.loop import Timer
    from kvasir.transfer.medium import Medium, Outlet
    from kvasir.transfer.memory import Ids, Memory


class Push(NamedTuple):
    """What the caller pushed; kept until the transfer is over, in case the connection breaks."""

    first_block: int
    ids: Ids
    layers: range


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
    """A push that waits."""

    transfer: Outgoing
    pieces: deque[Piece]


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
    ) -> None:
        """Starts to connect. Raises OSError, WireError."""
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
        self.waiting = False  # for the cap, or for a flight
        self._limits = Limits(*(min(slice_bytes, limit) for limit in self.outlet.limits))
        self._memory = memory
        self._shard = shard
        self._on_answer = on_answer
        self._on_grant = on_grant
        self._leaving: Outgoing | None = None  # whose data frame is in the outbox
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
        pieces = self._memory.pieces(push.first_block, push.ids, push.layers, self._limits)
        self.queue.append(Part(transfer, deque(pieces)))

    def trail(self, transfer: Outgoing, trailer: Trailer) -> None:
        """Raises WireError when the trailer is too big for a frame."""
        if len(encode(trailer)) > TRAILER_BYTES_MAX - 64:  # the totals are still to be filled in
            raise WireError(f"a trailer with {len(trailer.tokens)} tokens is too big")
        self.queue.append(Note(transfer, partial(self._trailer_frame, transfer, trailer)))

    def withdraw(self, transfer: Outgoing, reason: str) -> None:
        """Let go of the cache memory that waits or leaves for `transfer`; with a reason, tell the
        peer."""
        self.queue = deque(item for item in self.queue if item.transfer is not transfer)
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
        self._leaving = None

    # --- what leaves ---

    def has_next(self) -> bool:
        """Whether something waits that could be loaded now, caps aside."""
        if not self.queue:
            return False
        first = self.queue[0]
        return first.transfer.closing or not first.transfer.begun or (
            first.transfer.grant is not None
        )  # fmt: skip

    def next_is_data(self) -> bool:
        return isinstance(self.queue[0], Part)

    def load_next(self) -> int:
        """Put the next frame into the outbox; returns its payload bytes if it is data."""
        assert not self.outbox
        item = self.queue[0]
        if isinstance(item, Note):
            self.queue.popleft()
            self.outbox.append(memoryview(item.make()))
            return 0
        piece = item.pieces.popleft()
        if not item.pieces:
            self.queue.popleft()
        if item.transfer.grant is not None and item.transfer.grant.has(piece):
            return 0
        return self._load_data(item.transfer, piece)

    def _load_data(self, transfer: Outgoing, piece: Piece) -> int:
        there = transfer.grant.ids_of(piece) if self.outlet.one_sided and transfer.grant else None
        loaded = self.outlet.load(self._memory, piece, there)
        header = Header(
            loaded.kind, *transfer.key, transfer.serial, piece.plane, piece.planes, self._shard,
            piece.first_block, len(piece.ids), sum(map(len, loaded.inline)), loaded.checksum,
        )  # fmt: skip
        self.outbox.append(memoryview(pack(header)))
        self.outbox.extend(loaded.inline)
        size = self._memory.size(piece.plane, piece.planes, len(piece.ids))
        transfer.bytes += size
        transfer.first_frame_s = transfer.first_frame_s or time.monotonic()
        self._leaving, self._flight = transfer, loaded.flight
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
                self._leaving = None
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
        self._leaving = self._flight = None
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
            assert isinstance(item, Note) or (item.pieces and not item.transfer.over)
        assert self._leaving is None or not self._leaving.over
        assert all(t.link is self and not t.over for t in self.transfers.values())


ANSWERS = {FrameKind.ACK, FrameKind.NACK, FrameKind.WELCOME, FrameKind.GRANT}
NOTHING_THERE = Grant()
