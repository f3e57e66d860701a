"""Uniform quantisation by groups of channels: 8 and 4 bits on the wire, floats again on arrival.

Knows floats and bits; must not know who sends them. A token's channels are cut into groups; each
has its lowest value and its step, as FlexGen does. ThunderServe has 4 bits on the wire only.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvasir.core.errors import WireError
from kvasir.transfer.codec.floats import (
    VALUE_MAX,
    Floats,
    check_range,
    short_above,
    short_below,
    short_floats,
)

GROUP: Final = 64  # channels; fewer where they do not divide
GROUP_MIN: Final = 16
STEP_MIN: Final = np.float32(1e-30)  # of a group whose values are all equal
SIDE_BITS: Final = 32  # of a group: lowest value and step, as bfloat16


class Grouped(NamedTuple):
    """`codes` uint8 [rows, groups, group]; `lowest`, `steps`: bfloat16 bits, [rows, groups]."""

    codes: NDArray[np.uint8]
    lowest: NDArray[np.uint16]
    steps: NDArray[np.uint16]


def group_of(channels: int) -> int:
    """How many channels share a step: 64, a smaller power of two that divides, or all of them."""
    found = math.gcd(channels, GROUP)
    return found if found >= GROUP_MIN else channels


def quantise(values: Floats, bits: int) -> Grouped:
    """`values`: float32 [rows, channels], to codes of `bits` bits. A restored value is off by at
    most half a step, which is (highest - lowest) / (2**bits - 1), rounded up to a bfloat16.

    Raises TransferError for values that are no finite numbers.
    """
    rows, channels = values.shape
    grid = values.reshape(rows, -1, group_of(channels))
    low, high = grid.min(axis=2), grid.max(axis=2)
    check_range(low, high)
    lowest = short_below(low)
    base = short_floats(lowest)
    top = (1 << bits) - 1
    steps = short_above(np.maximum((high - base) / np.float32(top), STEP_MIN))
    codes = grid - base[:, :, None]
    codes *= (1 / short_floats(steps))[:, :, None]
    np.rint(codes, out=codes)
    return Grouped(np.minimum(codes, top).astype(np.uint8), lowest, steps)


def restore(grouped: Grouped) -> Floats:
    """float32 [rows, channels]"""
    values = grouped.codes.astype(np.float32)
    values *= short_floats(grouped.steps)[:, :, None]
    values += short_floats(grouped.lowest)[:, :, None]
    return values.reshape(len(values), -1)


def wire_bits(channels: int, bits: int) -> float:
    """Bits a value of a row of `channels`, steps and lowest values among them."""
    return bits + SIDE_BITS / group_of(channels)


def pack(values: Floats, bits: int) -> bytes:
    """`bits`: 8 or 4."""
    grouped = quantise(values, bits)
    codes = grouped.codes.reshape(-1)
    if bits == 4:
        codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
        codes = codes[0::2] | codes[1::2] << np.uint8(4)
    return grouped.lowest.tobytes() + grouped.steps.tobytes() + codes.tobytes()


def unpack(data: memoryview, rows: int, channels: int, bits: int) -> Floats:
    """What `pack` packed, float32 [rows, channels]. Raises WireError."""
    groups = channels // group_of(channels)
    side, values = 2 * rows * groups, rows * channels
    if len(data) != 2 * side + (values * bits + 7) // 8:
        raise WireError(f"{len(data)} bytes are not {rows} x {channels} values of {bits} bits")
    lowest = np.frombuffer(data[:side], "<u2").reshape(rows, groups)
    steps = np.frombuffer(data[side : 2 * side], "<u2").reshape(rows, groups)
    codes: NDArray[np.uint8] = np.frombuffer(data[2 * side :], np.uint8)
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=1).reshape(-1)[:values].astype(np.uint8)
    grouped = Grouped(codes.reshape(rows, groups, -1), lowest, steps)
    if not bool((np.abs(short_floats(np.stack((lowest, steps)))) <= VALUE_MAX).all()):
        raise WireError("a step or a lowest value is no finite number")
    return restore(grouped)
