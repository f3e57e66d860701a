"""What a receiver keeps: a transfer that is expected, and a connection that frames come in on.

Knows what has arrived and where it goes; not what an end means to the caller.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvasir.core.errors import WireError
from kvasir.transfer.base import Key, Shard, Trailer
from kvasir.transfer.frames import (
    NO_SLOT,
    FrameKind,
    Header,
    message,
    pack,
    reason_payload,
)
from kvasir.transfer.memory import Bytes, Ids, Memory, Piece, whole_run
from kvasir.transfer.stream import FrameReader, send_some

if TYPE_CHECKING:
    from kvasir.transfer.loop import Timer
    from kvasir.transfer.medium import Inlet

ANSWERS_MAX: Final = 4096  # a peer that does not read its answers is not served


class Incoming:
    """One expected transfer. `ids`: physical blocks of logical ones from `first_block` on."""

    def __init__(
        self, memory: Memory, key: Key, first_block: int, ids: Ids, layers_count: int
    ) -> None:
        assert len(np.unique(ids)) == len(ids), f"{key}: a block is named twice"
        self.key = key
        self.conn: Conn | None = None
        self.serial = 0
        self.over = False
        self.bytes = 0
        self.first_frame_s: float | None = None
        self.timer: Timer | None = None
        self._memory = memory
        self._first_block = first_block
        self._ids = ids
        self._layers = layers_count
        self._missing = [  # [layer][plane] -> which blocks are still to come
            [np.ones(len(ids), np.bool_) for _ in range(memory.planes_in(layer))]
            for layer in range(layers_count)
        ]
        self._missing_count = len(ids) * sum(len(planes) for planes in self._missing)

    def refusal(self, header: Header, shard: Shard) -> str:
        """Why a data frame cannot be taken; empty if it can."""
        at = header.first_block - self._first_block
        if header.shard != shard:
            return f"the sender ships {header.shard}, {shard} is expected"
        if header.layer >= self._layers or header.plane >= len(self._missing[header.layer]):
            return f"layer {header.layer} plane {header.plane} is not expected"
        if at < 0 or header.blocks == 0 or at + header.blocks > len(self._ids):
            return f"blocks from {header.first_block}, {header.blocks} of them, are not expected"
        block_bytes = self._memory.block_bytes(header.layer, header.plane)
        if header.payload_bytes != header.blocks * block_bytes:
            return f"{header.payload_bytes} bytes for {header.blocks} blocks of {block_bytes}"
        if not self._missing[header.layer][header.plane][at : at + header.blocks].all():
            return f"layer {header.layer} plane {header.plane} came twice"
        return ""

    def piece(self, header: Header) -> Piece:
        at = header.first_block - self._first_block
        ids = self._ids[at : at + header.blocks]
        return Piece(header.layer, header.plane, header.first_block, ids)

    def note_arrival(self, header: Header) -> None:
        at = header.first_block - self._first_block
        self._missing[header.layer][header.plane][at : at + header.blocks] = False
        self._missing_count -= header.blocks
        self.bytes += header.payload_bytes

    def shortfall(self, trailer: Trailer) -> str:
        """What is wrong at the end; empty if everything is here."""
        if self._missing_count:
            return f"{self._missing_count} blocks of a plane never came"
        if trailer.bytes != self.bytes:
            return f"{self.bytes} bytes came, the sender counted {trailer.bytes}"
        if self.bytes and (trailer.blocks, trailer.layers) != (len(self._ids), self._layers):
            return f"the sender counted {trailer.blocks} blocks in {trailer.layers} layers"
        return ""

    def check(self) -> None:
        missing = sum(int(plane.sum()) for planes in self._missing for plane in planes)
        assert missing == self._missing_count
        assert self.conn is None or self.over or self in self.conn.incoming


class Landing(NamedTuple):
    """A data frame on its way in. `data`: its payload, flat; `direct`: that is the cache itself."""

    incoming: Incoming
    piece: Piece
    data: Bytes
    direct: bool


class Conn:
    """One accepted connection."""

    def __init__(
        self,
        sock: socket.socket,
        inlet: Inlet,
        memory: Memory,
        place: Callable[[Conn, Header], memoryview | None],
        arrived: Callable[[Conn, Header], None],
    ) -> None:
        self.sock = sock
        self.inlet = inlet
        self.reader = FrameReader(inlet.recv_into, partial(place, self), partial(arrived, self))
        self.incoming: set[Incoming] = set()  # bound to this connection and not over
        self.small = bytearray()  # payload of the last small frame
        self.closed = False
        self._memory = memory
        self._landing: Landing | None = None
        self._staging: Bytes = np.empty(0, np.uint8)
        self._outbox: deque[memoryview] = deque()
        self._slots_free = 0
        self._refused = (Key("", 0), 0)

    def small_payload(self, header: Header) -> memoryview:
        self.small = bytearray(header.payload_bytes)
        return memoryview(self.small)

    # --- payloads ---

    def land_at(self, incoming: Incoming, header: Header) -> memoryview | None:
        """The cache itself if the blocks are consecutive, else a buffer; None if the payload stands
        in the ring. Raises WireError for a slot that is none."""
        piece = incoming.piece(header)
        if header.slot != NO_SLOT:
            data = self.inlet.slot(header.slot, header.payload_bytes)
            self._landing = Landing(incoming, piece, data, False)
            return None
        run = whole_run(piece.ids)
        if run is not None:
            data = self._memory.span(piece.layer, piece.plane, run)
        else:
            data = self._staged(header.payload_bytes)
        self._landing = Landing(incoming, piece, data, run is not None)
        return data.data

    def take_landing(self) -> Landing | None:
        landing, self._landing = self._landing, None
        return landing

    def let_go(self, incoming: Incoming) -> None:
        """Write no more for it: the rest of its frame is drained."""
        self.incoming.discard(incoming)
        if self._landing is not None and self._landing.incoming is incoming:
            self.reader.discard()
            self._landing = None

    def return_slot(self, header: Header) -> None:
        self._slots_free += header.slot != NO_SLOT

    def _staged(self, size: int) -> Bytes:
        if self._staging.size < size:
            self._staging = np.empty(size, np.uint8)
        return self._staging[:size]

    # --- answers ---

    def answer(self, kind: FrameKind, incoming: Incoming, reason: str) -> None:
        if not self.closed:
            frame = message(kind, incoming.key, incoming.serial, reason_payload(reason))
            self._outbox.append(memoryview(frame))

    def refuse(self, header: Header, reason: str) -> None:
        """Tell the sender, once, and not for every frame that follows."""
        if self._refused != (header.key, header.serial):
            self._refused = (header.key, header.serial)
            frame = message(FrameKind.NACK, header.key, header.serial, reason_payload(reason))
            self._outbox.append(memoryview(frame))

    def flush(self) -> bool:
        """Send answers and credits; False when the socket takes no more.

        Raises OSError, and WireError when the peer has left too many unread.
        """
        if self._slots_free:
            credit = pack(Header(FrameKind.CREDIT, blocks=self._slots_free))
            self._outbox.append(memoryview(credit))
            self._slots_free = 0
        if len(self._outbox) > ANSWERS_MAX:
            raise WireError("the peer does not read its answers")
        while self._outbox and send_some(self.sock, self._outbox):
            pass
        return not self._outbox

    def close(self) -> None:
        self.closed = True
        self._landing = None
        self._outbox.clear()
        self.sock.close()
        self.inlet.close()

    def check(self) -> None:
        assert all(i.conn is self and not i.over for i in self.incoming)
        assert self._landing is None or not self._landing.incoming.over
