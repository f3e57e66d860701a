"""The bytes of a transfer on the wire: header, limits, checksum, trailer. Knows no sockets.

    header (184 B, little-endian)              payload
    +-------------------------------------+   +-------------------------------+
    | magic version kind | serial         |   | data: blocks of one plane,    |
    | attempt request id | layer plane    |   |   or nothing if `slot` says   |
    | shard | block range | slot          |   |   where it stands in a ring   |
    | payload bytes | payload checksum    |   | trailer, hello: msgpack       |
    | checksum of the header itself       |   | abort, nack: reason, UTF-8    |
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
import xxhash

from kvasir.core.errors import WireError
from kvasir.core.units import MIB
from kvasir.transfer.base import WHOLE, Key, Shard

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAGIC: Final = b"KVTR"
VERSION: Final = 1
REQUEST_ID_BYTES_MAX: Final = 128
NO_SLOT: Final = 0xFFFF
FRAME_BYTES_LIMIT: Final = 64 * MIB  # the largest data frame that a receiver takes
TRAILER_BYTES_MAX: Final = 64 * 1024
REASON_BYTES_MAX: Final = 512

_BODY: Final = struct.Struct("<4sBBHQIHHHHHHIIIQ128s")
_SUM: Final = struct.Struct("<I")
HEADER_BYTES: Final = _BODY.size + _SUM.size

_T = TypeVar("_T")


class FrameKind(IntEnum):
    HELLO = 1  # P -> D, first on a connection with a ring
    BEGIN = 2  # P -> D, first of a transfer: binds it to the connection
    DATA = 3
    TRAILER = 4
    ABORT = 5
    ACK = 6  # D -> P
    NACK = 7
    CREDIT = 8  # `blocks` ring slots are free again


_PAYLOAD_MAX: Final = {
    FrameKind.HELLO: 256,
    FrameKind.BEGIN: 0,
    FrameKind.DATA: FRAME_BYTES_LIMIT,
    FrameKind.TRAILER: TRAILER_BYTES_MAX,
    FrameKind.ABORT: REASON_BYTES_MAX,
    FrameKind.ACK: 0,
    FrameKind.NACK: REASON_BYTES_MAX,
    FrameKind.CREDIT: 0,
}


class Header(msgspec.Struct, frozen=True, gc=False):
    """One frame's header. `serial` numbers the sender's transfers; answers repeat it."""

    kind: FrameKind
    request_id: str = ""
    attempt: int = 0
    serial: int = 0
    layer: int = 0
    plane: int = 0
    shard: Shard = WHOLE
    slot: int = NO_SLOT
    first_block: int = 0
    blocks: int = 0
    payload_bytes: int = 0
    checksum: int = 0

    @property
    def key(self) -> Key:
        return Key(self.request_id, self.attempt)

    @property
    def inline_bytes(self) -> int:
        """Payload bytes that follow on the stream: none if they stand in a ring slot."""
        return self.payload_bytes if self.slot == NO_SLOT else 0


class Hello(msgspec.Struct, frozen=True, gc=False):
    """The shape of the ring whose file descriptor travels with this frame."""

    slots: int
    slot_bytes: int


def pack(header: Header) -> bytes:
    """HEADER_BYTES bytes. Raises WireError when a field does not fit the format."""
    name = header.request_id.encode()
    if len(name) > REQUEST_ID_BYTES_MAX:
        raise WireError(f"a request id of {len(name)} bytes does not fit a frame")
    try:
        body = _BODY.pack(
            MAGIC, VERSION, header.kind, len(name), header.serial, header.attempt,
            header.layer, header.plane, *header.shard, header.slot,
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
    (_, _, kind, name_bytes, serial, attempt, layer, plane, rank, head_first, head_end, slot,
     first_block, blocks, payload_bytes, checksum, name) = _BODY.unpack(body)  # fmt: skip
    if kind not in _PAYLOAD_MAX or name_bytes > REQUEST_ID_BYTES_MAX:
        raise WireError(f"unknown frame kind {kind} or id of {name_bytes} bytes")
    kind = FrameKind(kind)
    if payload_bytes > _PAYLOAD_MAX[kind]:
        raise WireError(f"{kind.name} frame of {payload_bytes} bytes, max {_PAYLOAD_MAX[kind]}")
    if slot != NO_SLOT and kind is not FrameKind.DATA:
        raise WireError(f"{kind.name} frame names a ring slot")
    try:
        request_id = name[:name_bytes].decode()
    except UnicodeDecodeError:
        raise WireError("a frame's request id is not UTF-8") from None
    return Header(
        kind, request_id, attempt, serial, layer, plane, Shard(rank, head_first, head_end), slot,
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
