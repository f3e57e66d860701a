"""KV bytes without loss: the bytes of floats sorted by place, then zstd (extra `codec`).

Knows bytes; must not know levels. Exponents of KV repeat, mantissas do not: bits turn left by one,
so that the exponent fills a byte of its own and the sign joins the mantissa's last.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np

from kvasir.core.errors import UnsupportedEffect, WireError
from kvasir.transfer.codec.floats import Bytes

ZSTD_LEVEL: Final = 1
_SIZE: Final = struct.Struct("<I")


def pack(data: Bytes, item_bytes: int) -> bytes:
    """`data`: uint8 [rows, bytes] of floats of `item_bytes`. Raises UnsupportedEffect without
    zstandard."""
    compressor = _zstd().ZstdCompressor(level=ZSTD_LEVEL)
    kind = np.dtype(f"<u{item_bytes}").type
    items = data.reshape(-1).view(kind)
    turned = (items << kind(1)) | (items >> kind(8 * item_bytes - 1))
    places = turned.view(np.uint8).reshape(-1, item_bytes)
    parts = []
    for place in range(item_bytes):
        part = compressor.compress(np.ascontiguousarray(places[:, place]).data)
        parts += [_SIZE.pack(len(part)), part]
    return b"".join(parts)


def unpack(data: memoryview, rows: int, row_bytes: int, item_bytes: int) -> Bytes:
    """What `pack` packed, uint8 [rows, row_bytes]. Raises WireError, and UnsupportedEffect without
    zstandard."""
    items_count = rows * row_bytes // item_bytes
    places = np.empty((items_count, item_bytes), np.uint8)
    for place in range(item_bytes):
        if len(data) < _SIZE.size:
            raise WireError("a lossless part is cut off")
        size = _SIZE.unpack_from(data)[0]
        part, data = data[_SIZE.size : _SIZE.size + size], data[_SIZE.size + size :]
        places[:, place] = np.frombuffer(_plain(part, items_count), np.uint8)
    if len(data):
        raise WireError("a lossless part is too long")
    kind = np.dtype(f"<u{item_bytes}").type
    turned = places.reshape(-1).view(kind)
    items: Bytes = ((turned >> kind(1)) | (turned << kind(8 * item_bytes - 1))).view(np.uint8)
    return items.reshape(rows, row_bytes)


def _plain(part: memoryview, size: int) -> bytes:
    """Exactly `size` bytes. What the frame says of its size is checked before room is made."""
    zstd = _zstd()
    try:
        if zstd.get_frame_parameters(part).content_size != size:
            raise WireError(f"a lossless part is not {size} bytes")
        plain: bytes = zstd.ZstdDecompressor().decompress(part, max_output_size=size)
    except zstd.ZstdError as error:
        raise WireError(f"a lossless part is damaged: {error}") from None
    if len(plain) != size:
        raise WireError(f"a lossless part is not {size} bytes")
    return plain


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UnsupportedEffect(
            "lossless needs zstandard", next_step="pip install 'kvasir-llm[codec]'"
        ) from None
    return zstandard
