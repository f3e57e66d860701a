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
import numpy.typing as npt

from kvasir.core.codec import RAW, Coded
from kvasir.core.errors import WireError
from kvasir.transfer.base import Key, Shard, Trailer
from kvasir.transfer.frames import (
    FrameKind,
    Grant,
    Header,
    checksum,
    message,
    reason_payload,
)
from kvasir.transfer.memory import Bytes, Ids, Memory, Piece, whole_run
from kvasir.transfer.stream import FrameReader, send_some

if TYPE_CHECKING:
    from kvasir.transfer.coder import Coder
    from kvasir.transfer.loop import Timer
    from kvasir.transfer.medium import Medium

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
        self.lost_s: float | None = None  # since when its connection is gone
        self.ending = ""  # why it failed, while the peer may still write here
        self.over = False
        self.transport = ""  # the way that its bytes take, once that is known
        self.bytes = 0
        self.wire_bytes = 0
        self.forms: set[str] = set()
        self.first_frame_s: float | None = None
        self.timer: Timer | None = None
        self._memory = memory
        self._first_block = first_block
        self._ids = ids
        self._layers = layers_count
        planes = memory.planes_of(range(layers_count)).stop
        self._missing = np.ones((planes, len(ids)), np.bool_)  # still to come
        self._missing_count = self._missing.size

    def refusal(self, header: Header, shard: Shard) -> str:
        """Why a data frame cannot be taken; empty if it can."""
        at = header.first_block - self._first_block
        if header.shard != shard:
            return f"the sender ships {header.shard}, {shard} is expected"
        if header.planes == 0 or header.plane + header.planes > len(self._missing):
            return f"{self.describe(header)}: no such plane is expected"
        if at < 0 or header.blocks == 0 or at + header.blocks > len(self._ids):
            return f"blocks from {header.first_block}, {header.blocks} of them, are not expected"
        size = self._size(header)
        if header.kind is FrameKind.DATA and header.payload_bytes != size:
            return f"{header.payload_bytes} bytes where {size} are expected"
        if header.kind is FrameKind.CODED and not 0 < header.payload_bytes < size:
            return f"{header.payload_bytes} coded bytes where fewer than {size} are expected"
        if not self._region(header).all():
            return f"{self.describe(header)} came twice"
        return ""

    def piece(self, header: Header) -> Piece:
        at = header.first_block - self._first_block
        ids = self._ids[at : at + header.blocks]
        return Piece(header.plane, header.planes, header.first_block, ids)

    def note_arrival(self, header: Header, form: str) -> None:
        size = self._size(header)
        self._region(header)[:] = False
        self._missing_count -= header.planes * header.blocks
        self.bytes += size
        self.wire_bytes += size if header.kind is FrameKind.PLACED else header.payload_bytes
        self.forms.add(form)

    @property
    def coded(self) -> Coded | None:
        """How it came, if any of it was coded."""
        if not self.forms - {RAW}:
            return None
        return Coded("+".join(sorted(self.forms)), self.wire_bytes)

    def describe(self, header: Header) -> str:
        where = self._memory.place_of(header.plane)
        return f"{where} blocks {header.first_block}..{header.first_block + header.blocks - 1}"

    def _region(self, header: Header) -> npt.NDArray[np.bool_]:
        at = header.first_block - self._first_block
        return self._missing[header.plane : header.plane + header.planes, at : at + header.blocks]

    def _size(self, header: Header) -> int:
        return self._memory.size(header.plane, header.planes, header.blocks)

    def grant(self, one_sided: bool) -> Grant:
        """What the sender has to know: where blocks go if it writes them, and what is here."""
        ids = self._ids.astype("<u4").tobytes() if one_sided else b""
        have = tuple(np.packbits(~row).tobytes() for row in self._missing) if self.bytes else ()
        return Grant(self._first_block, ids, len(self._ids), have, self.bytes)

    @property
    def closing(self) -> bool:
        return self.over or bool(self.ending)

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
        assert int(self._missing.sum()) == self._missing_count
        assert self.conn is None or self.over or self in self.conn.incoming


class Landing(NamedTuple):
    """A data frame on its way in. `data`: its payload, flat, None when it is placed; `direct`: that
    is the cache itself; `coded`: it is in a form."""

    incoming: Incoming
    piece: Piece
    data: Bytes | None
    direct: bool
    coded: bool = False


class Settled(NamedTuple):
    """The form in which a frame came, or what is wrong with it; `{}`: where."""

    form: str = RAW
    problem: str = ""


WRONG: Final = Settled(problem="checksum of {} does not match")


class Arrival(NamedTuple):
    """A data frame that is here, and the checksum of what is; of placed blocks the right one is
    still to come."""

    header: Header
    landing: Landing
    found: int


class Conn:
    """One accepted connection."""

    def __init__(
        self,
        sock: socket.socket,
        medium: Medium,
        memory: Memory,
        place: Callable[[Conn, Header], memoryview | None],
        arrived: Callable[[Conn, Header], None],
        coder: Coder | None = None,
    ) -> None:
        self.sock = sock
        self.medium = medium
        self.inlet = medium.inlet(sock)
        read = self.inlet.recv_into
        self.reader = FrameReader(read, partial(place, self), partial(arrived, self))
        self.incoming: set[Incoming] = set()  # bound to this connection and not over
        self.small = bytearray()  # payload of the last small frame
        self.closed = False
        self._memory = memory
        self._coder = coder
        self._landing: Landing | None = None
        self._arrival: Arrival | None = None  # its sum is still to come
        self._staging: Bytes = np.empty(0, np.uint8)
        self._outbox: deque[memoryview] = deque()
        self._refused = (Key("", 0), 0)

    def small_payload(self, header: Header) -> memoryview:
        self.small = bytearray(header.payload_bytes)
        return memoryview(self.small)

    # --- payloads ---

    def land_at(self, incoming: Incoming, header: Header) -> memoryview:
        """The cache itself where it takes the payload in one run, else a buffer."""
        piece = incoming.piece(header)
        self._arrival = None
        if header.kind is FrameKind.PLACED:
            self._landing = Landing(incoming, piece, None, False)
            return self.small_payload(header)
        coded = header.kind is FrameKind.CODED
        run = whole_run(piece.ids) if piece.planes == 1 and not coded else None
        if run is not None:
            data = self._memory.span(piece.plane, run)
        else:
            data = self._staged(header.payload_bytes)
        self._landing = Landing(incoming, piece, data, run is not None, coded)
        return data.data

    def landed(self, header: Header) -> Arrival | None:
        """A data frame is here. What was placed is brought, and waits for its sum: None. Raises
        WireError for a place that is none."""
        landing, self._landing = self._landing, None
        if landing is None or landing.incoming.closing:
            return None
        if landing.data is not None:
            return Arrival(header, landing, checksum(landing.data.data))
        found = self.inlet.bring(self._memory, landing.piece, self.small)
        self._arrival = Arrival(header, landing, found)
        return None

    def take_arrival(self, header: Header) -> Arrival | None:
        """What the sum in `header` is of; None when nothing arrived, or that is over. Raises
        WireError for a sum of something else."""
        arrival, self._arrival = self._arrival, None
        if arrival is None or arrival.landing.incoming.closing:
            return None
        if (arrival.header.key, arrival.header.serial) != (header.key, header.serial):
            raise WireError("a sum of another transfer than the data before it")
        return arrival

    def settle(self, arrival: Arrival, wanted: int) -> Settled:
        """Into the cache with it, if its checksum is the wanted one."""
        landing = arrival.landing
        if arrival.found != wanted:
            return WRONG
        if landing.data is None or landing.direct:
            return Settled()
        if landing.coded:
            return self._settle_coded(landing.piece, landing.data)
        self._memory.scatter(landing.piece, landing.data)
        return Settled()


    def _settle_coded(self, piece: Piece, data: Bytes) -> Settled:
        if self._coder is None:
            return Settled(problem="{} is coded, and there is no codec here")
        try:
            form, plain = self._coder.decode(piece, data.data)
        except WireError as error:
            return Settled(problem=f"{{}}: {error}")
        self._memory.scatter(piece, plain)
        return Settled(form)

    def let_go(self, incoming: Incoming, *, bound: bool = False) -> None:
        """Write no more for it: the rest of its frame is drained. `bound`: its end is still to
        come."""
        if not bound:
            self.incoming.discard(incoming)
        if self._landing is not None and self._landing.incoming is incoming:
            self.reader.discard()
            self._landing = None
        if self._arrival is not None and self._arrival.landing.incoming is incoming:
            self._arrival = None

    def _staged(self, size: int) -> Bytes:
        if self._staging.size < size:
            self._staging = np.empty(size, np.uint8)
        return self._staging[:size]

    # --- answers ---

    def answer(self, kind: FrameKind, incoming: Incoming, reason: str) -> None:
        if not self.closed:
            self.say(kind, incoming.key, incoming.serial, reason_payload(reason))

    def say(self, kind: FrameKind, key: Key, serial: int, payload: bytes = b"") -> None:
        self._outbox.append(memoryview(message(kind, key, serial, payload)))

    def refuse(self, header: Header, reason: str) -> None:
        """Tell the sender, once, and not for every frame that follows."""
        if self._refused != (header.key, header.serial):
            self._refused = (header.key, header.serial)
            self.say(FrameKind.NACK, header.key, header.serial, reason_payload(reason))

    def flush(self) -> bool:
        """Send answers; False when the socket takes no more.

        Raises OSError, and WireError when the peer has left too many unread.
        """
        if len(self._outbox) > ANSWERS_MAX:
            raise WireError("the peer does not read its answers")
        while self._outbox and send_some(self.sock, self._outbox):
            pass
        return not self._outbox

    def close(self) -> None:
        self.closed = True
        self._landing = self._arrival = None
        self._outbox.clear()
        self.sock.close()
        self.inlet.close()

    def check(self) -> None:
        assert all(i.conn is self and not i.over for i in self.incoming)
        assert self._landing is None or not self._landing.incoming.over
