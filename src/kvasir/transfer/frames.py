"""The bytes of a transfer on the wire: header, limits, checksum, trailer. Knows no sockets.

    header (182 B, little-endian)              payload
    +-------------------------------------+   +-------------------------------+
    | magic version kind | serial         |   | data: blocks, plane by plane  |
    |                                     |   | coded: the same, in a form    |
    | attempt request id | plane range    |   | placed: the sender's block    |
    | shard | block range                 |   |   ids, or nothing             |
    | payload bytes | checksum of payload |   | trailer, hello: msgpack       |
    |   (sum: of the placed blocks)       |   | abort, nack: reason, UTF-8    |
    | checksum of the header itself       |   |                               |
    +-------------------------------------+   +-------------------------------+

A header that cannot be read raises WireError, and its connection is closed: what follows a broken
header cannot be found. A broken payload fails one transfer only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvasir.core.errors import WireError
from kvasir.core.units import MIB
from kvasir.transfer.base import WHOLE, Key, Shard

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from kvasir.transfer.memory import Ids, Piece

MAGIC: Final = b"KVTR"
VERSION: Final = 3
REQUEST_ID_BYTES_MAX: Final = 128
FRAME_BYTES_LIMIT: Final = 64 * MIB  # the largest data frame that a receiver takes
TRAILER_BYTES_MAX: Final = 64 * 1024
HELLO_BYTES_MAX: Final = 1 * MIB
GRANT_BYTES_MAX: Final = 4 * MIB  # four bytes a block, and a bit for each of its planes
IDS_BYTES_MAX: Final = 4 * 64 * 1024  # of one placed frame, four bytes a block
REASON_BYTES_MAX: Final = 512

_BODY: Final = struct.Struct("<4sBBHQIHHHHHIIIQ128s")
_SUM: Final = struct.Struct("<I")
HEADER_BYTES: Final = _BODY.size + _SUM.size

_T = TypeVar("_T")


class FrameKind(IntEnum):
    HELLO = 1  # P -> D, first on a connection that shares memory
    BEGIN = 2  # P -> D, first of a transfer: binds it to the connection
    DATA = 3
    PLACED = 4  # as DATA, but the blocks stand in memory that both sides see
    TRAILER = 5
    ABORT = 6  # always answered: until then the sender's memory may be read
    RESUME = 7  # as BEGIN, on a new connection: answered by GRANT, or as it had ended
    ACK = 8  # D -> P
    NACK = 9
    WELCOME = 10  # answers HELLO where the sender writes into our memory
    GRANT = 11  # answers RESUME, and there BEGIN: where blocks go, and what is here already
    CODED = 12  # as DATA, but the payload is a chunk of `codec`; the checksum is the payload's
    SUM = 13  # follows each PLACED: the checksum of its blocks, taken while the peer reads them


_PAYLOAD_MAX: Final = {
    FrameKind.HELLO: HELLO_BYTES_MAX,
    FrameKind.BEGIN: 0,
    FrameKind.DATA: FRAME_BYTES_LIMIT,
    FrameKind.SUM: 0,
    FrameKind.PLACED: IDS_BYTES_MAX,
    FrameKind.TRAILER: TRAILER_BYTES_MAX,
    FrameKind.ABORT: REASON_BYTES_MAX,
    FrameKind.RESUME: 0,
    FrameKind.ACK: 0,
    FrameKind.NACK: REASON_BYTES_MAX,
    FrameKind.WELCOME: HELLO_BYTES_MAX,
    FrameKind.GRANT: GRANT_BYTES_MAX,
    FrameKind.CODED: FRAME_BYTES_LIMIT,
}


class Header(msgspec.Struct, frozen=True, gc=False):
    """One frame's header. `serial` numbers the sender's transfers; answers repeat it."""

    kind: FrameKind
    request_id: str = ""
    attempt: int = 0
    serial: int = 0
    plane: int = 0
    planes: int = 0
    shard: Shard = WHOLE
    first_block: int = 0
    blocks: int = 0
    payload_bytes: int = 0
    checksum: int = 0

    @property
    def key(self) -> Key:
        return Key(self.request_id, self.attempt)


class PlaneAt(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Where a plane [blocks, block_bytes] stands in memory that is shared."""

    offset: int
    blocks: int
    block_bytes: int


class Grant(msgspec.Struct, frozen=True, gc=False):
    """Where the receiver puts logical blocks from `first_block` on (`ids`: "<u4" each), where the
    sender writes them itself, and which of them are there: `have`, one bit a block by plane, after
    a connection broke. `nbytes` of those."""

    first_block: int = 0
    ids: bytes = b""
    blocks: int = 0
    have: tuple[bytes, ...] = ()
    nbytes: int = 0

    def ids_of(self, piece: Piece) -> Ids:
        """Raises WireError where nothing was granted."""
        at = piece.first_block - self.first_block
        found = np.frombuffer(self.ids, "<u4", offset=0)[max(at, 0) : at + len(piece.ids)]
        if at < 0 or len(found) != len(piece.ids):
            raise WireError(f"blocks from {piece.first_block}, {len(piece.ids)}, are not expected")
        return found.astype(np.int64)

    def has(self, piece: Piece) -> bool:
        """Whether the receiver has all of a piece."""
        at = piece.first_block - self.first_block
        if not self.have or at < 0 or piece.plane + piece.planes > len(self.have):
            return False
        planes = (self.have[i] for i in range(piece.plane, piece.plane + piece.planes))
        return all(
            bool(_bits(plane, self.blocks)[at : at + len(piece.ids)].all()) for plane in planes
        )


def _bits(packed: bytes, count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(np.bool_)


class Hello(msgspec.Struct, frozen=True, gc=False):
    """The sender's memory, `size` bytes, whose file descriptor travels with this frame."""

    size: int
    planes: tuple[PlaneAt, ...]


def pack(header: Header) -> bytes:
    """HEADER_BYTES bytes. Raises WireError when a field does not fit the format."""
    name = header.request_id.encode()
    if len(name) > REQUEST_ID_BYTES_MAX:
        raise WireError(f"a request id of {len(name)} bytes does not fit a frame")
    try:
        body = _BODY.pack(
            MAGIC, VERSION, header.kind, len(name), header.serial, header.attempt,
            header.plane, header.planes, *header.shard,
            header.first_block, header.blocks, header.payload_bytes, header.checksum, name,
        )  # fmt: skip
    except struct.error as error:
        raise WireError(f"a header field does not fit: {error}") from None
    return body + _SUM.pack(xxhash.xxh32_intdigest(body))


def unpack(data: bytes | bytearray | memoryview) -> Header:
    """Read and check HEADER_BYTES bytes. Raises WireError: nothing in them is to be trusted."""
    body = bytes(data[: _BODY.size])
    if len(data) != HEADER_BYTES or body[:4] != MAGIC:
        raise WireError("not a frame of a KV transfer")
    if body[4] != VERSION:
        raise WireError(f"frame version {body[4]}, this side speaks {VERSION}")
    if _SUM.unpack(data[_BODY.size :])[0] != xxhash.xxh32_intdigest(body):
        raise WireError("the checksum of a frame header does not match")
    (_, _, kind, name_bytes, serial, attempt, plane, planes, rank, head_first, head_end,
     first_block, blocks, payload_bytes, checksum, name) = _BODY.unpack(body)  # fmt: skip
    if kind not in _PAYLOAD_MAX or name_bytes > REQUEST_ID_BYTES_MAX:
        raise WireError(f"unknown frame kind {kind} or id of {name_bytes} bytes")
    kind = FrameKind(kind)
    if payload_bytes > _PAYLOAD_MAX[kind]:
        raise WireError(f"{kind.name} frame of {payload_bytes} bytes, max {_PAYLOAD_MAX[kind]}")
    try:
        request_id = name[:name_bytes].decode()
    except UnicodeDecodeError:
        raise WireError("a frame's request id is not UTF-8") from None
    return Header(
        kind, request_id, attempt, serial, plane, planes, Shard(rank, head_first, head_end),
        first_block, blocks, payload_bytes, checksum,
    )  # fmt: skip


def message(kind: FrameKind, key: Key, serial: int, payload: bytes = b"") -> bytes:
    """A whole small frame. Raises WireError when the payload is over the kind's limit."""
    if len(payload) > _PAYLOAD_MAX[kind]:
        raise WireError(f"{kind.name} of {len(payload)} bytes, max {_PAYLOAD_MAX[kind]}")
    header = Header(
        kind, key.request_id, key.attempt, serial,
        payload_bytes=len(payload), checksum=checksum(payload),
    )  # fmt: skip
    return pack(header) + payload


def reason_payload(reason: str) -> bytes:
    """UTF-8, cut to the limit of abort and nack frames."""
    return reason.encode()[:REASON_BYTES_MAX]


def encode(value: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(value)


def decode(payload: ReadableBuffer, kind: type[_T]) -> _T:
    """Raises WireError when the payload is not a `kind`."""
    try:
        return msgspec.msgpack.decode(bytes(payload), type=kind)
    except msgspec.MsgspecError as error:
        raise WireError(f"a {kind.__name__} that cannot be read: {error}") from None


def checksum(data: ReadableBuffer) -> int:
    """xxh3_64 of one contiguous buffer."""
    return xxhash.xxh3_64_intdigest(data)


def checksum_of(parts: Iterable[ReadableBuffer]) -> int:
    """xxh3_64 of the parts in order, as if they were one buffer."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()
