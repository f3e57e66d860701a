"""One chunk of KV as one stream of bytes that describes itself: head, then the form's body.

    magic version | bytes of the head, of the body | checksum of both | head (msgpack) | body

Knows forms and shapes; must not know transfers. A chunk is decoded without any other one. A damaged
stream raises WireError before anything of it is used, and memory is made only for what the reader
allows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
import numpy as np
import xxhash

from kvasir.core.errors import WireError
from kvasir.core.units import MIB
from kvasir.transfer.codec import cachegen, groups, lossless
from kvasir.transfer.codec.cachegen import Slot
from kvasir.transfer.codec.floats import Bytes, Floats, bytes_of, floats_of, item_bytes
from kvasir.transfer.codec.rans import NUMPY, Kernels

MAGIC: Final = b"KVCX"
VERSION: Final = 1
HEAD_BYTES_MAX: Final = 64 * 1024
PLAIN_BYTES_MAX: Final = 256 * MIB  # of one chunk, decoded
_FRAME: Final = struct.Struct("<4sBIQQ")

Form = Literal["lossless", "int8", "int4", "cachegen", "cachegen_delta"]
FORMS: Final[tuple[Form, ...]] = ("lossless", "int8", "int4", "cachegen", "cachegen_delta")
LEVELLED: Final = ("cachegen", "cachegen_delta")
_BITS: Final = {"int8": 8, "int4": 4}

_Small = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Coding(NamedTuple):
    """A form and, for CacheGen's, its level (1 loses least); 0 for the others."""

    form: Form
    level: int = 0

    def __str__(self) -> str:
        return f"{self.form}-{self.level}" if self.level else self.form


class Tensor(NamedTuple):
    """One plane of one layer. `data`: uint8 [tokens, bytes a token], C-contiguous."""

    layer: int
    plane: int
    data: Bytes


class Chunk(NamedTuple):
    """Tensors of the same tokens and dtype. `layers`: of the whole model; levels depend on it."""

    dtype: str
    layers: int
    tensors: Sequence[Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.data.size for tensor in self.tensors)


class Part(msgspec.Struct, frozen=True, array_like=True):
    layer: _Small
    plane: _Small
    channels: _Count


class Head(msgspec.Struct, frozen=True):
    """What a stream says of itself."""

    form: Form
    level: _Small
    dtype: Literal["bfloat16", "float16", "float32"]
    layers: _Count
    tokens: _Count
    parts: tuple[Part, ...]

    @property
    def plain_bytes(self) -> int:
        return self.tokens * sum(p.channels for p in self.parts) * item_bytes(self.dtype)


def encode(chunk: Chunk, coding: Coding, kernels: Kernels = NUMPY) -> bytes:
    """Any kernels give the same bytes.

    Raises ConfigError for a dtype or level that there is not, TransferError for values that are no
    finite numbers (they can be sent lossless), UnsupportedEffect for lossless without zstandard.
    """
    size = item_bytes(chunk.dtype)
    parts = tuple(Part(t.layer, t.plane, t.data.shape[1] // size) for t in chunk.tensors)
    tokens = {len(t.data) for t in chunk.tensors}
    assert len(tokens) == 1 and min(tokens), "tensors of a chunk hold the same tokens"
    body = _body(chunk, coding, kernels)
    head = msgspec.msgpack.encode(
        Head(coding.form, coding.level, chunk.dtype, chunk.layers, tokens.pop(), parts)  # type: ignore[arg-type]
    )
    return _FRAME.pack(MAGIC, VERSION, len(head), len(body), _checksum(head, body)) + head + body


def read_head(data: bytes | memoryview) -> Head:
    """What a stream holds. Raises WireError; nothing of its body is checked."""
    return _open(memoryview(data))[0]


def decode(
    data: bytes | memoryview, kernels: Kernels = NUMPY, bytes_max: int = PLAIN_BYTES_MAX
) -> Chunk:
    """The chunk of a stream of at most `bytes_max` decoded bytes.

    Raises WireError for one that is damaged or larger.
    """
    head, body, checksum = _open(memoryview(data))
    if head.plain_bytes > bytes_max:
        raise WireError(f"a chunk of {head.plain_bytes} bytes, max {bytes_max}")
    if checksum != _checksum(memoryview(data)[_FRAME.size : -len(body) or None], body):
        raise WireError("the checksum of a coded chunk does not match")
    datas = list(_datas(head, body, kernels))
    tensors = [Tensor(p.layer, p.plane, d) for p, d in zip(head.parts, datas, strict=True)]
    return Chunk(head.dtype, head.layers, tensors)


def _body(chunk: Chunk, coding: Coding, kernels: Kernels) -> bytes:
    datas = [tensor.data for tensor in chunk.tensors]
    if coding.form == "lossless":
        return _joined([lossless.pack(data, item_bytes(chunk.dtype)) for data in datas])
    values = [floats_of(data, chunk.dtype) for data in datas]
    if coding.form in _BITS:
        return _joined([groups.pack(v, _BITS[coding.form]) for v in values])
    slots = [Slot(tensor.layer, tensor.plane) for tensor in chunk.tensors]
    pack = cachegen.pack_delta if coding.form == "cachegen_delta" else cachegen.pack_released
    return pack(values, slots, chunk.layers, coding.level, kernels)


def _datas(head: Head, body: memoryview, kernels: Kernels) -> Iterator[Bytes]:
    size = item_bytes(head.dtype)
    if head.form == "lossless":
        for part, piece in zip(head.parts, _pieces(body, len(head.parts)), strict=True):
            yield lossless.unpack(piece, head.tokens, part.channels * size, size)
        return
    for values in _values(head, body, kernels):
        yield bytes_of(np.ascontiguousarray(values), head.dtype)


def _values(head: Head, body: memoryview, kernels: Kernels) -> Iterator[Floats]:
    channels = [part.channels for part in head.parts]
    if head.form in _BITS:
        for width, piece in zip(channels, _pieces(body, len(channels)), strict=True):
            yield groups.unpack(piece, head.tokens, width, _BITS[head.form])
    elif head.form == "cachegen_delta":
        yield from cachegen.unpack_delta(body, head.tokens, channels, kernels)
    else:
        yield from cachegen.unpack_released(body, head.tokens, channels, kernels)


def _open(data: memoryview) -> tuple[Head, memoryview, int]:
    if len(data) < _FRAME.size:
        raise WireError("a coded chunk is cut off")
    magic, version, head_bytes, body_bytes, checksum = _FRAME.unpack_from(data)
    if magic != MAGIC:
        raise WireError("not a coded chunk of KV")
    if version != VERSION:
        raise WireError(f"codec version {version}, this side speaks {VERSION}")
    if head_bytes > HEAD_BYTES_MAX or len(data) != _FRAME.size + head_bytes + body_bytes:
        raise WireError(f"a coded chunk has {len(data)} bytes, its frame says otherwise")
    body = data[_FRAME.size + head_bytes :]
    try:
        head = msgspec.msgpack.decode(data[_FRAME.size : _FRAME.size + head_bytes], type=Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"the head of a coded chunk cannot be read: {error}") from None
    if not head.parts:
        raise WireError("a coded chunk without tensors")
    return head, body, checksum


def _joined(pieces: Sequence[bytes]) -> bytes:
    sizes = struct.pack(f"<{len(pieces)}Q", *map(len, pieces))
    return b"".join((sizes, *pieces))


def _pieces(body: memoryview, count: int) -> Iterator[memoryview]:
    sizes = struct.Struct(f"<{count}Q")
    if len(body) < sizes.size:
        raise WireError("a coded chunk is cut off")
    at = sizes.size
    for size in sizes.unpack_from(body):
        if at + size > len(body):
            raise WireError("a coded chunk is cut off")
        yield body[at : at + size]
        at += size
    if at != len(body):
        raise WireError(f"{len(body) - at} bytes more than a coded chunk has")


def _checksum(head: bytes | memoryview, body: bytes | memoryview) -> int:
    hashed = xxhash.xxh3_64(head)
    hashed.update(body)
    return hashed.intdigest()
