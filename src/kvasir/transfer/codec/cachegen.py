"""CacheGen (SIGCOMM'24, arXiv 2310.07240): KV to small integers by level, then entropy coding.

Knows floats of one chunk, tensor by tensor; must not know who sends them. Two forms:

    released   a token's values over its layer's largest |value|, in a number of bins (the code)
    delta      groups of ten tokens: the first is the anchor, 8 bits; of the others the difference
               to the anchor as it will be restored, in bins of the deltas' own width (the paper)

Where the paper's decoder has distributions profiled before, `entropy` sends them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvasir.core.errors import WireError
from kvasir.transfer.codec import entropy
from kvasir.transfer.codec.floats import (
    VALUE_MAX,
    Floats,
    check_range,
    short_above,
    short_floats,
)
from kvasir.transfer.codec.levels import GROUP_TOKENS, bins_of, width_of
from kvasir.transfer.codec.rans import Kernels, Symbols

LANES: Final = 4096  # tensors are coded together until they have as many channels
CODE_MAX: Final = np.float32(127)
SCALE_MIN: Final = np.float32(1e-30)  # of a token or a channel that is all zeros
_SIZE: Final = struct.Struct("<I")

Shorts = NDArray[np.uint16]


class Slot(NamedTuple):
    """Which tensor of the model: what its level depends on."""

    layer: int
    plane: int


# --- the released form ---------------------------------------------------------------------------


def pack_released(
    tensors: Sequence[Floats], slots: Sequence[Slot], layers: int, level: int, kernels: Kernels
) -> bytes:
    """`tensors`: float32 [tokens, channels] each.

    Raises TransferError for values that are no finite numbers, ConfigError for a level that there
    is not.
    """
    parts: list[bytes] = []
    for section in sections([t.shape[1] for t in tensors]):
        scaled = []
        for values, slot in zip(tensors[section], slots[section], strict=True):
            limit = bins_of(level, slot.layer, layers, slot.plane) // 2 - 1
            scales = _scales(values)
            parts += [bytes([limit]), scales.tobytes()]
            scaled.append(values * (np.float32(limit) / short_floats(scales))[:, None])
        parts.append(_packed(scaled, kernels))
    return b"".join(parts)


def unpack_released(
    data: memoryview, tokens: int, channels: Sequence[int], kernels: Kernels
) -> Iterator[Floats]:
    """What `pack_released` packed, tensor by tensor. Raises WireError."""
    reader = Reader(data)
    for section in sections(channels):
        steps = []
        for _ in channels[section]:
            limit = np.float32(max(1, reader.byte()))
            steps.append(reader.scales(tokens) / limit)
        coded = reader.coded(tokens, channels[section], kernels)
        for values, step in zip(coded, steps, strict=True):
            values *= step[:, None]
            yield values
    reader.end()


# --- the paper's form ----------------------------------------------------------------------------


def pack_delta(
    tensors: Sequence[Floats], slots: Sequence[Slot], layers: int, level: int, kernels: Kernels
) -> bytes:
    """As `pack_released`."""
    parts: list[bytes] = []
    for section in sections([t.shape[1] for t in tensors]):
        anchors, deltas = [], []
        for values, slot in zip(tensors[section], slots[section], strict=True):
            scales = _scales(values[::GROUP_TOKENS])
            step = (short_floats(scales) / CODE_MAX)[:, None]
            anchor: Floats = np.rint(values[::GROUP_TOKENS] / step)
            delta = _less(values, anchor * step)
            steps = _steps(delta, width_of(level, slot.layer, layers))
            parts += [scales.tobytes(), steps.tobytes()]
            anchors.append(anchor)
            deltas.append(delta / short_floats(steps))
        parts.append(_packed(anchors, kernels))
        if len(deltas[0]):
            parts.append(_packed(deltas, kernels))
    return b"".join(parts)


def unpack_delta(
    data: memoryview, tokens: int, channels: Sequence[int], kernels: Kernels
) -> Iterator[Floats]:
    """What `pack_delta` packed, tensor by tensor. Raises WireError."""
    reader = Reader(data)
    groups = -(-tokens // GROUP_TOKENS)
    for section in sections(channels):
        sides = [(reader.scales(groups), reader.scales(width)) for width in channels[section]]
        anchors = reader.coded(groups, channels[section], kernels)
        deltas: Iterator[Floats | None] = repeat(None)
        if tokens > groups:
            deltas = reader.coded(tokens - groups, channels[section], kernels)
        for anchor, delta, (scale, step) in zip(anchors, deltas, sides, strict=False):
            anchor *= (scale / CODE_MAX)[:, None]
            yield anchor if delta is None else _more(anchor, delta * step)
    reader.end()


def _less(values: Floats, anchors: Floats) -> Floats:
    """Deltas of all tokens but the anchors, float32 [tokens - groups, channels]."""
    rest = np.arange(len(values)) % GROUP_TOKENS != 0
    owner = np.arange(len(values)) // GROUP_TOKENS
    found: Floats = values[rest] - anchors[owner[rest]]
    return found


def _more(anchors: Floats, deltas: Floats) -> Floats:
    """The inverse of `_less`, anchors among the rest."""
    tokens = len(anchors) + len(deltas)
    rest = np.arange(tokens) % GROUP_TOKENS != 0
    values = np.repeat(anchors, GROUP_TOKENS, axis=0)[:tokens]
    values[rest] += deltas
    return values


# --- both ----------------------------------------------------------------------------------------


def sections(channels: Sequence[int]) -> Iterator[slice]:
    """Which tensors are coded together: as many as fit LANES, at least one."""
    first, lanes = 0, 0
    for at, width in enumerate(channels):
        if lanes and lanes + width > LANES:
            yield slice(first, at)
            first, lanes = at, 0
        lanes += width
    if lanes:
        yield slice(first, len(channels))


def _scales(values: Floats) -> Shorts:
    """Of each row the largest |value|, as bfloat16 bits, rounded up."""
    low, high = values.min(axis=1), values.max(axis=1)
    check_range(low, high)
    return short_above(np.maximum(np.maximum(high, -low), SCALE_MIN))


def _steps(deltas: Floats, width: float) -> Shorts:
    """Bin width of each channel, as bfloat16 bits: `width` standard deviations, or more if the
    largest delta would not fit 8 bits. Raises TransferError as `check_range`."""
    if not len(deltas):
        return short_above(np.full(deltas.shape[1], SCALE_MIN))
    low, high = deltas.min(axis=0), deltas.max(axis=0)
    check_range(low, high)
    wanted = np.float32(width) * np.sqrt(np.mean(deltas * deltas, axis=0))
    needed = np.maximum(high, -low) / CODE_MAX
    return short_above(np.maximum(np.maximum(wanted, needed), SCALE_MIN))


def _packed(scaled: Sequence[Floats], kernels: Kernels) -> bytes:
    """Each value's nearest integer, entropy-coded with its size before it."""
    symbols: Symbols = np.empty((len(scaled[0]), sum(s.shape[1] for s in scaled)), np.int8)
    at = 0
    for values in scaled:
        np.rint(values, out=symbols[:, at : at + values.shape[1]], casting="unsafe")
        at += values.shape[1]
    coded = entropy.pack(symbols, kernels)
    return _SIZE.pack(len(coded)) + coded


class Reader:
    """Takes parts off the front of a body. Every method raises WireError when it is too short."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def byte(self) -> int:
        return self._take(1)[0]

    def scales(self, count: int) -> Floats:
        """float32 [count], none negative."""
        found = short_floats(np.frombuffer(self._take(2 * count), "<u2"))
        if not bool((found >= 0).all() and (found <= VALUE_MAX).all()):
            raise WireError("a scale is no positive number")
        return found

    def coded(self, rows: int, channels: Sequence[int], kernels: Kernels) -> Iterator[Floats]:
        """The integers of each tensor, float32 [rows, channels]."""
        size = _SIZE.unpack(self._take(_SIZE.size))[0]
        places, whole = entropy.unpack(self._take(size), rows, sum(channels), kernels)
        shift = whole.astype(np.float32)
        at = 0
        for width in channels:
            columns = slice(at, at + width)
            yield np.add(places[:, columns], shift[columns], dtype=np.float32)
            at += width

    def end(self) -> None:
        if len(self._data):
            raise WireError(f"{len(self._data)} bytes more than the codec's body has")

    def _take(self, size: int) -> memoryview:
        if size > len(self._data):
            raise WireError("the codec's body is cut off")
        found, self._data = self._data[:size], self._data[size:]
        return found
