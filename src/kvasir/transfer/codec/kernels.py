"""The loops of the entropy coder and the quantisers, compiled by numba (extra `codec`).

Knows the arrays of `rans` and nothing else. Their bytes equal numpy's.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kvasir.transfer.codec.rans import LOWEST, PROB_BITS, TOTAL, Kernels, Steps

_LOW = np.uint32(TOTAL - 1)
_LOWEST = np.uint32(LOWEST)
_BITS = np.uint32(PROB_BITS)
_WORD_BITS, _SYMBOL_AT, _FOUR = np.uint32(16), np.uint32(24), np.uint32(4)


@numba.njit(nogil=True, cache=True)
def _encode_rows(
    symbols: Any, base: Any, limit: Any, inverse: Any, complement: Any, start: Any,
    words: Any, states: Any,
) -> int:  # fmt: skip
    rows, lanes = symbols.shape
    at: int = words.size
    entries = np.empty(lanes, np.int32)
    for row in range(rows - 1, -1, -1):
        for lane in range(lanes):
            entries[lane] = base[lane] + symbols[row, lane]
        for lane in range(lanes - 1, -1, -1):  # without branches: which lanes are full is chance
            state = states[lane]
            full = state >= limit[entries[lane]]
            bits = np.uint32(state)
            words[at - 1] = np.uint16(bits)
            at -= full
            states[lane] = float(bits >> _WORD_BITS) if full else state
        for lane in range(lanes):
            entry = entries[lane]
            state = states[lane]
            whole = np.floor((state + 0.5) * inverse[entry])
            states[lane] = state + whole * complement[entry] + start[entry]
    return at


@numba.njit(nogil=True, cache=True)
def _decode_rows(base: Any, slots: Any, words: Any, states: Any, out: Any) -> int:
    rows, lanes = out.shape
    used: Any = 0
    limit = words.size - lanes
    for row in range(rows):
        if used > limit:
            return -1
        for lane in range(lanes):
            state = states[lane]
            slot = slots[base[lane] + (state & _LOW)]
            out[row, lane] = slot >> _SYMBOL_AT
            state = (slot >> _BITS & _LOW) * (state >> _BITS) + (slot & _LOW)
            empty = np.uint32(state < _LOWEST)
            states[lane] = (state << (empty << _FOUR)) | np.uint32(words[used]) * empty
            used += empty
    return used


def _encode(symbols: Any, base: Any, steps: Steps, words: Any, states: Any) -> int:
    return int(_encode_rows(symbols, base.astype(np.int32), *steps, words, states))


def _decode(base: Any, slots: Any, words: Any, states: Any, out: Any) -> int:
    return int(_decode_rows(base.astype(np.uint32), slots, words, states, out))


NUMBA = Kernels("numba", _encode, _decode)
