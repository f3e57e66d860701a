"""KV bytes as float32 and back. Knows bit patterns; must not know codecs.

bfloat16 has no numpy type: it is the upper half of a float32.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvasir.core.errors import ConfigError, TransferError, nearest

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

ITEM_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_HALF: Final = np.uint32(0x8000)
HALF_MAX: Final = 65504.0  # the largest float16; a restored value may be a bin above it
VALUE_MAX: Final = 1e30  # far from where a difference of two overflows


def item_bytes(dtype: str) -> int:
    """Raises ConfigError for a dtype that is no float of two or four bytes."""
    found = ITEM_BYTES.get(dtype)
    if found is None:
        raise ConfigError(f"no codec for KV of {dtype}", nearest=nearest(dtype, ITEM_BYTES))
    return found


def floats_of(data: Bytes, dtype: str) -> Floats:
    """`data`: uint8 [rows, bytes], C-contiguous. Returns float32 [rows, values]; for float32 a view
    on the same memory."""
    if dtype == "bfloat16":
        return _wider(data.view(np.uint16))
    if dtype == "float16":
        return data.view(np.float16).astype(np.float32)
    return data.view(np.float32)


def bytes_of(values: Floats, dtype: str) -> Bytes:
    """uint8 [rows, bytes] of float32 [rows, values], C-contiguous and finite; halves round up. For
    float32 a view."""
    if dtype == "bfloat16":
        return ((values.view(np.uint32) + _HALF) >> 16).astype(np.uint16).view(np.uint8)
    if dtype == "float16":
        return np.clip(values, -HALF_MAX, HALF_MAX).astype(np.float16).view(np.uint8)
    return values.view(np.uint8)


def check_range(low: Floats, high: Floats) -> None:
    """Raises TransferError unless all values between are usable: finite, and not huge."""
    if not bool((low >= -VALUE_MAX).all() and (high <= VALUE_MAX).all()):
        raise TransferError("KV holds values that are no finite numbers")


def short_below(values: Floats) -> NDArray[np.uint16]:
    """Bits of the largest bfloat16 that is not above each value; |values| <= VALUE_MAX."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (bits >> 31) * np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def short_above(values: Floats) -> NDArray[np.uint16]:
    """Bits of the smallest bfloat16 that is not below each value; |values| <= VALUE_MAX."""
    return short_below(-values) ^ np.uint16(0x8000)


def short_floats(bits: NDArray[np.uint16]) -> Floats:
    """float32 of bfloat16 bits."""
    return _wider(bits)


def _wider(bits: NDArray[np.uint16]) -> Floats:
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
