"""Symbols of many lanes as bytes: a centre and a table for each lane, then rANS.

Knows integers only. CacheGen gives every layer and channel a distribution of its own, profiled
before. Here a lane has a centre of its own (its rounded mean) and shares its table with lanes of a
like spread, and both travel with the symbols: there is nothing to profile, and a table is worth its
bytes after some thousand symbols.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvasir.core.errors import WireError
from kvasir.transfer.codec import rans
from kvasir.transfer.codec.rans import TOTAL, Coded, Frequencies, Kernels, Symbols

TABLES_MAX: Final = 32
ALPHABET_MAX: Final = 256
TABLE_SYMBOLS: Final = 1 << 14  # a table for each so many symbols: fewer would not pay for it
SAMPLE_ROWS: Final = 96  # of all rows, evenly spread, that centres and frequencies are taken from
_HEAD: Final = struct.Struct("<HHhII")  # tables, alphabet, lowest, bytes of the model, words


class Model(NamedTuple):
    """How lanes are distributed. `centres` int8 [lanes], `tables` uint8 [lanes]: a symbol s stands
    at place s - centre - lowest of its table's `frequencies`, uint16 [tables, alphabet]."""

    centres: NDArray[np.int8]
    tables: NDArray[np.uint8]
    frequencies: Frequencies
    lowest: int

    @property
    def shift(self) -> NDArray[np.int64]:
        """int64 [lanes]: what is to be added to a place to get the symbol."""
        return self.centres.astype(np.int64) + self.lowest


class Places(NamedTuple):
    """Decoded: symbol = places [rows, lanes] + shift [lanes]."""

    places: NDArray[np.uint8]
    shift: NDArray[np.int64]


def pack(symbols: Symbols, kernels: Kernels) -> bytes:
    """Bytes of `symbols`, int8 [rows, lanes] without -128; neither count may be 0."""
    model = _fit(symbols)
    base = model.tables.astype(np.int64) * model.frequencies.shape[1] - model.shift
    coded = rans.encode(symbols, base, model.frequencies, kernels)
    told = zlib.compress(
        model.centres.tobytes() + model.tables.tobytes() + model.frequencies.tobytes(), 6
    )
    head = _HEAD.pack(*model.frequencies.shape, model.lowest, len(told), coded.words.size)
    return b"".join((head, told, coded.states.tobytes(), coded.words.tobytes()))


def unpack(data: memoryview, rows: int, lanes: int, kernels: Kernels) -> Places:
    """What `pack` packed. Raises WireError; what is allocated depends on rows and lanes alone."""
    model, coded = _read(data, lanes)
    return Places(rans.decode(coded, rows, model.tables, model.frequencies, kernels), model.shift)


def _fit(symbols: Symbols) -> Model:
    rows, lanes = symbols.shape
    sample = symbols[:: -(-rows // SAMPLE_ROWS)].astype(np.int16)
    low, high = symbols.min(axis=0).astype(np.int16), symbols.max(axis=0).astype(np.int16)
    centres = np.rint(sample.mean(axis=0, dtype=np.float32)).astype(np.int16)
    if int((high - centres).max() - (low - centres).min()) >= ALPHABET_MAX:
        centres[:] = 0
    lowest = int((low - centres).min())
    alphabet = max(2, int((high - centres).max()) - lowest + 1)
    sample -= centres
    spread = np.abs(sample).sum(axis=0, dtype=np.int32)
    count = int(np.clip(symbols.size // TABLE_SYMBOLS, 1, min(TABLES_MAX, lanes)))
    tables = np.empty(lanes, np.uint8)
    tables[np.argsort(spread, kind="stable")] = np.arange(lanes) * count // lanes
    entries = sample + (tables * np.int64(alphabet) - lowest)
    counts = np.bincount(entries.ravel(), minlength=count * alphabet)
    frequencies = _frequencies(counts.reshape(count, alphabet))
    return Model(centres.astype(np.int8), tables, frequencies, lowest)


def _frequencies(counts: NDArray[np.int64]) -> Frequencies:
    """Each row scaled to TOTAL; no entry is 0, as the sample need not hold every symbol."""
    alphabet = counts.shape[1]
    sums = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    found = 1 + counts * (TOTAL - alphabet) // sums
    rows = np.arange(len(found))
    found[rows, found.argmax(axis=1)] += TOTAL - found.sum(axis=1)
    scaled: Frequencies = found.astype(np.uint16)
    return scaled


def _read(data: memoryview, lanes: int) -> tuple[Model, Coded]:
    if len(data) < _HEAD.size:
        raise WireError("the entropy-coded part is cut off")
    tables, alphabet, lowest, told, words = _HEAD.unpack_from(data)
    states_at = _HEAD.size + told
    words_at = states_at + 4 * lanes
    if words_at + 2 * words != len(data):
        raise WireError(f"the entropy-coded part has {len(data)} bytes, its head says otherwise")
    if not (1 <= tables <= TABLES_MAX and 2 <= alphabet <= ALPHABET_MAX):
        raise WireError(f"{tables} tables of {alphabet} symbols are not possible")
    model = _model(data[_HEAD.size : states_at], lanes, tables, alphabet, lowest)
    states = np.frombuffer(data[states_at:words_at], "<u4")
    return model, Coded(states, np.frombuffer(data[words_at:], "<u2"))


def _model(told: memoryview, lanes: int, tables: int, alphabet: int, lowest: int) -> Model:
    size = 2 * lanes + 2 * tables * alphabet
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(told, size + 1)
    except zlib.error as error:
        raise WireError(f"the tables of the entropy coder are damaged: {error}") from None
    if len(plain) != size:
        raise WireError(f"the tables of the entropy coder are not {size} bytes")
    centres = np.frombuffer(plain, np.int8, lanes)
    owner = np.frombuffer(plain, np.uint8, lanes, lanes)
    frequencies = np.frombuffer(plain, "<u2", tables * alphabet, 2 * lanes)
    frequencies = frequencies.reshape(tables, alphabet)
    sums = frequencies.sum(axis=1, dtype=np.int64)
    if int(owner.max()) >= tables or bool((sums != TOTAL).any()) or int(frequencies.max()) >= TOTAL:
        raise WireError("the tables of the entropy coder do not add up")
    return Model(centres, owner, frequencies, lowest)
