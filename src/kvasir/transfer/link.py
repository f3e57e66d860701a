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
from typing import TYPE_CHECKING

import msgspec

from kvasir.core.errors import WireError
from kvasir.transfer.base import Key, Shard, Timeline, Trailer
from kvasir.transfer.frames import (
    TRAILER_BYTES_MAX,
    FrameKind,
    Header,
    encode,
    message,
    pack,
    reason_payload,
)
from kvasir.transfer.stream import FrameReader, send_some

if TYPE_CHECKING:
    from kvasir.transfer.loop import Timer
    from kvasir.transfer.medium import Outlet
    from kvasir.transfer.memory import Memory, Piece


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
    trailed: bool = False  # the trailer is on its way
    over: bool = False
    first_frame_s: float | None = None
    last_frame_s: float | None = None
    over_s: float | None = None
    bytes: int = 0
    layers: set[int] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)

    def timeline(self) -> Timeline:
        return Timeline(
            self.opened_s, self.first_frame_s, self.last_frame_s, self.over_s, self.bytes
        )


@dataclass(eq=False, slots=True)
class Part:
    """A push that waits. `cost`: bytes that it weighs in the queue."""

    transfer: Outgoing
    pieces: deque[Piece]
    cost: int


@dataclass(eq=False, slots=True)
class Note:
    """A small frame that waits; made when it leaves."""

    transfer: Outgoing
    make: Callable[[], bytes]


class Link:
    """`on_answer(link, header, text)` hears acks (empty text) and nacks."""

    def __init__(
        self,
        address: str,
        sock: socket.socket,
        outlet: Outlet,
        memory: Memory,
        shard: Shard,
        on_answer: Callable[[Link, Header, str], None],
    ) -> None:
        self.address = address
        self.sock = sock
        self.reader = FrameReader(sock.recv_into, self._place, self._arrived)
        self.queue: deque[Part | Note] = deque()
        self.outbox: deque[memoryview] = deque()  # one frame, or what is left of it
        self.transfers: dict[int, Outgoing] = {}  # by serial
        self.connected = False
        self.closed = False
        self.waiting = False  # for the cap
        self._outlet = outlet
        self._memory = memory
        self._shard = shard
        self._on_answer = on_answer
        self._leaving: Outgoing | None = None  # whose data frame is in the outbox
        self._answer = bytearray()

    # --- what waits ---

    def begin(self, transfer: Outgoing) -> None:
        """Raises WireError when the transfer's name does not fit a frame."""
        frame = message(FrameKind.BEGIN, transfer.key, transfer.serial)
        transfer.link = self
        self.transfers[transfer.serial] = transfer
        self.queue.append(Note(transfer, partial(self._begin_frame, transfer, frame)))

    def trail(self, transfer: Outgoing, trailer: Trailer) -> None:
        """Raises WireError when the trailer is too big for a frame."""
        if len(encode(trailer)) > TRAILER_BYTES_MAX - 64:  # the totals are still to be filled in
            raise WireError(f"a trailer with {len(trailer.tokens)} tokens is too big")
        self.queue.append(Note(transfer, partial(self._trailer_frame, transfer, trailer)))

    def forget(self, transfer: Outgoing, reason: str) -> int:
        """Let go of the cache memory that waits or leaves for `transfer`; with a reason, tell the
        peer. Returns the queue cost that is free again."""
        self.transfers.pop(transfer.serial, None)
        gone = [item for item in self.queue if item.transfer is transfer]
        if gone:
            self.queue = deque(item for item in self.queue if item.transfer is not transfer)
        if self._leaving is transfer:
            self._detach()
        if reason and transfer.begun and not self.closed:
            abort = message(FrameKind.ABORT, transfer.key, transfer.serial, reason_payload(reason))
            self.queue.appendleft(Note(transfer, lambda: abort))
        return sum(item.cost for item in gone if isinstance(item, Part))

    def _detach(self) -> None:
        """Finish the frame that is half out from a copy, so that the stream stays in step."""
        rest = b"".join(self.outbox)
        self.outbox = deque([memoryview(rest)] if rest else [])
        self._leaving = None

    # --- what leaves ---

    def has_next(self) -> bool:
        """Whether something waits that could be loaded now, caps aside."""
        return bool(self.queue) and (not self.next_is_data() or self._outlet.has_room())

    def next_is_data(self) -> bool:
        return isinstance(self.queue[0], Part)

    def load_next(self, settle: Callable[[int], None]) -> int:
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
            settle(item.cost)
        return self._load_data(item.transfer, piece)

    def _load_data(self, transfer: Outgoing, piece: Piece) -> int:
        loaded = self._outlet.load(self._memory, piece)
        size = len(piece.ids) * self._memory.block_bytes(piece.layer, piece.plane)
        header = Header(
            FrameKind.DATA, *transfer.key, transfer.serial, piece.layer, piece.plane, self._shard,
            loaded.slot, piece.first_block, len(piece.ids), size, loaded.checksum,
        )  # fmt: skip
        self.outbox.append(memoryview(pack(header)))
        self.outbox.extend(loaded.inline)
        transfer.bytes += size
        self._leaving = transfer
        return size

    def flush(self) -> bool:
        """Send from the outbox; False when the socket takes no more. Raises OSError."""
        sent = send_some(self.sock, self.outbox)
        transfer = self._leaving
        if transfer is not None and sent:
            now = time.monotonic()
            transfer.first_frame_s = transfer.first_frame_s or now
            transfer.last_frame_s = now
            if not self.outbox:
                self._leaving = None
        return not self.outbox

    def _begin_frame(self, transfer: Outgoing, frame: bytes) -> bytes:
        transfer.begun = True
        return frame

    def _trailer_frame(self, transfer: Outgoing, trailer: Trailer) -> bytes:
        transfer.trailed = True
        whole = msgspec.structs.replace(
            trailer,
            blocks=len(transfer.blocks),
            layers=len(transfer.layers),
            bytes=transfer.bytes,
        )
        return message(FrameKind.TRAILER, transfer.key, transfer.serial, encode(whole))

    # --- connection ---

    def connect_done(self) -> None:
        """The socket became writable: connected, or refused (raises OSError)."""
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self._outlet.greet(self.sock)
        self.connected = True

    def close(self) -> None:
        self.closed = True
        self.outbox.clear()
        self._leaving = None
        self.sock.close()
        self._outlet.close()

    def _place(self, header: Header) -> memoryview | None:
        if header.kind not in {FrameKind.ACK, FrameKind.NACK, FrameKind.CREDIT}:
            raise WireError(f"{header.kind.name} is no answer")
        self._answer = bytearray(header.payload_bytes)
        return memoryview(self._answer)

    def _arrived(self, header: Header) -> None:
        if header.kind is FrameKind.CREDIT:
            self._outlet.credit(header.blocks)
        elif header.kind is FrameKind.ACK:
            self._on_answer(self, header, "")
        else:
            text = self._answer.decode(errors="replace")
            self._on_answer(self, header, text or "refused")

    def queue_cost(self) -> int:
        """Bytes that the waiting pushes weigh."""
        return sum(item.cost for item in self.queue if isinstance(item, Part))

    def check(self) -> None:
        """Whatever waits or leaves belongs to a transfer that is not over (aborts aside)."""
        for item in self.queue:
            assert isinstance(item, Note) or (item.pieces and not item.transfer.over)
        assert self._leaving is None or not self._leaving.over
        assert all(t.link is self and not t.over for t in self.transfers.values())
