"""Interleaved rANS over many lanes: one vector step codes one symbol of every lane.

Knows lanes of small integers and their frequencies; must not know KV, levels or floats.

    symbols [rows, lanes]     a lane has one table for all its rows
       row 0   s s s s ...    decoding goes down the rows, encoding up
       row 1   s s s s ...    states: one a lane, 32 bits; words: 16 bits, shared by all lanes

rANS: Duda, arXiv 1311.2540; interleaving: Giesen, arXiv 1402.3392. A state lies in [2**16, 2**32)
and gives up or takes in at most one 16-bit word a symbol. States are kept in float64 while
encoding, where the division by a frequency is exact enough: see `_quotient`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvasir.core.errors import WireError

PROB_BITS: Final = 12
TOTAL: Final = 1 << PROB_BITS  # what the frequencies of one table add up to
LOWEST: Final = 1 << 16  # of a state
WORD: Final = float(1 << 16)

Symbols = NDArray[np.int8]
Indices = NDArray[np.uint8]
Lanes = NDArray[np.int64]
Frequencies = NDArray[np.uint16]
States = NDArray[np.uint32]
Words = NDArray[np.uint16]


class Coded(NamedTuple):
    """`states` [lanes], the decoder's first ones; `words` in the order the decoder takes them."""

    states: States
    words: Words


class Steps(NamedTuple):
    """Per entry of the flattened tables, float64 [tables * alphabet]: what one step computes with.

    `limit`: a state from there on gives up a word first. Then
    state += floor(state / frequency) * (TOTAL - frequency) + start.
    """

    limit: NDArray[np.float64]
    inverse: NDArray[np.float64]
    complement: NDArray[np.float64]
    start: NDArray[np.float64]


class Kernels(NamedTuple):
    """The two inner loops. Any two implementations give the same bytes.

    encode(symbols [rows, lanes], base [lanes], steps, words, states [lanes]) -> first used word:
    a lane's symbol s has entry base + s; words are filled from their end, the first one is spare.
    decode(base [lanes], slots, words, states [lanes], out [rows, lanes]) -> words used, or -1 when
    they do not suffice. The last `lanes` of `words` are padding, so that no row looks beyond them.
    `slots`: uint32 [tables * TOTAL], symbol << 24 | frequency << 12 | offset.
    """

    name: str
    encode: Callable[[Symbols, Lanes, Steps, Words, NDArray[np.float64]], int]
    decode: Callable[[Lanes, NDArray[np.uint32], Words, States, Indices], int]


def encode(symbols: Symbols, base: Lanes, frequencies: Frequencies, kernels: Kernels) -> Coded:
    """Code `symbols` [rows, lanes]. `base` [lanes]: entry of symbol 0 in the flattened tables
    `frequencies` [tables, alphabet], whose rows add up to TOTAL and hold no entry equal to it. The
    entry of each symbol that occurs must not be 0."""
    rows, lanes = symbols.shape
    states = np.full(lanes, float(LOWEST))
    words = np.empty(1 + rows * lanes, np.uint16)
    first = kernels.encode(symbols, base, _steps(frequencies), words, states)
    return Coded(states.astype(np.uint32), words[first:])


def decode(
    coded: Coded, rows: int, tables: NDArray[np.uint8], frequencies: Frequencies, kernels: Kernels
) -> Indices:
    """Places in the alphabet, uint8 [rows, lanes]. `tables` [lanes]: which table a lane has.

    Raises WireError when states or words are not what an encoder made with these tables.
    """
    states = coded.states.copy()
    if states.size and int(states.min()) < LOWEST:
        raise WireError("a state of the entropy coder is out of range")
    out = np.empty((rows, len(states)), np.uint8)
    base = tables.astype(np.int64) * TOTAL
    words = np.concatenate((coded.words, np.zeros(len(states), np.uint16)))
    used = kernels.decode(base, _slots(frequencies), words, states, out)
    if used != coded.words.size or bool((states != LOWEST).any()):
        raise WireError("the entropy-coded symbols are damaged")
    return out


def _steps(frequencies: Frequencies) -> Steps:
    counts = frequencies.astype(np.float64)
    start = np.cumsum(counts, axis=1) - counts
    inverse = 1.0 / np.maximum(counts, 1.0)
    limit = counts * float(1 << (32 - PROB_BITS))
    flat = (limit.ravel(), inverse.ravel(), (TOTAL - counts).ravel(), start.ravel())
    return Steps(*flat)


def _slots(frequencies: Frequencies) -> NDArray[np.uint32]:
    """What each of the TOTAL values of a state's low bits means, table after table."""
    tables, alphabet = frequencies.shape
    counts = frequencies.ravel()
    owner = np.repeat(np.arange(counts.size, dtype=np.uint32), counts)
    start = (np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies).ravel()
    place = np.tile(np.arange(TOTAL, dtype=np.uint32), tables)
    symbol = owner % np.uint32(alphabet)
    frequency = counts[owner].astype(np.uint32)
    return (symbol << 24 | frequency << PROB_BITS | (place - start[owner])).astype(np.uint32)


def _encode(
    symbols: Symbols, base: Lanes, steps: Steps, words: Words, states: NDArray[np.float64]
) -> int:
    rows, lanes = symbols.shape
    entry, at = np.empty(lanes, np.int64), words.size
    value, part = np.empty(lanes), np.empty(lanes)
    full = np.empty(lanes, np.bool_)
    for row in range(rows - 1, -1, -1):
        np.add(base, symbols[row], out=entry)
        np.take(steps.limit, entry, out=value, mode="clip")
        np.greater_equal(states, value, out=full)
        which = np.flatnonzero(full)
        if which.size:
            over = states[which]
            high = np.floor(over / WORD)
            words[at - which.size : at] = over - high * WORD
            at -= which.size
            states[which] = high
        np.take(steps.inverse, entry, out=value, mode="clip")
        _quotient(states, value, part)
        np.take(steps.complement, entry, out=value, mode="clip")
        part *= value
        states += part
        np.take(steps.start, entry, out=value, mode="clip")
        states += value
    return at


def _quotient(
    states: NDArray[np.float64], inverse: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    """floor(state / frequency) by the inverse. The half keeps (state + 0.5) / frequency at least
    2**-13 away from an integer, and the product's error is under 2**-19: exact."""
    np.add(states, 0.5, out=out)
    out *= inverse
    np.floor(out, out=out)


def _decode(
    base: Lanes, slots: NDArray[np.uint32], words: Words, states: States, out: Indices
) -> int:
    lanes, used = len(base), 0
    entry, low = np.empty(lanes, np.int64), np.empty(lanes, np.uint32)
    slot, empty = np.empty(lanes, np.uint32), np.empty(lanes, np.bool_)
    for row in out:
        if used > words.size - lanes:
            return -1
        np.bitwise_and(states, TOTAL - 1, out=low)
        np.add(base, low, out=entry)
        np.take(slots, entry, out=slot, mode="clip")
        np.right_shift(slot, 24, out=row, casting="unsafe")
        states >>= PROB_BITS
        np.right_shift(slot, PROB_BITS, out=low)
        low &= TOTAL - 1
        states *= low
        slot &= TOTAL - 1
        states += slot
        np.less(states, LOWEST, out=empty)
        which = np.flatnonzero(empty)
        states[which] = states[which] << 16 | words[used : used + which.size]
        used += which.size
    return used


NUMPY: Final = Kernels("numpy", _encode, _decode)
