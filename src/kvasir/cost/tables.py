"""Measured kernel times of one system: a compact form, and look-ups that say how they were found.

Knows operators, axes and logarithms. Must not know models, batches, or where the bytes come from:
`measure/calibration.py` reads them. The format is written by `tools/make_cost_tables.py`.

A latency is kept as a 16-bit code on a logarithmic scale, so neighbours are interpolated in log
space by interpolating codes. Code 0 is a point that was not measured. Single measurements that a
disturbance made slower than a larger problem of the same kind count as that one: whoever can do
more rows in less time pads to them (`settle`).
"""

from __future__ import annotations

import math
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

import msgspec

FLOOR_S: Final = 1e-7  # code 1 stands for just above it
CODE_STEP: Final = math.log(1e8) / 65535  # up to 10 s, in steps of 0.028 %

Key = tuple[str | int, ...]


def encode(seconds: float) -> int:
    """The nearest code, 1 to 65535. Raises ValueError outside of 0.1 us to 10 s."""
    code = round(math.log(seconds / FLOOR_S) / CODE_STEP)
    if not 0 < code <= 65535:
        raise ValueError(f"{seconds} s is not between 0.1 us and 10 s")
    return code


def decode(code: float) -> float:
    """Seconds of a code, or of a point between two codes."""
    return FLOOR_S * math.exp(code * CODE_STEP)


class Source(IntEnum):
    """How a time was found, best first."""

    MEASURED = 0
    INTERPOLATED = 1  # between measured points
    OUTSIDE = 2  # beyond the measured range
    ROOFLINE = 3  # no table has the operator


class Part(NamedTuple):
    """One operator of a model and how its time is found."""

    operator: str
    source: Source


class Shares(msgspec.Struct, frozen=True):
    """Shares of some seconds by how they were found, 1 in all.

    `measured`: operators of these very sizes, as many tokens as were measured; `interpolated`:
    between measured sizes; `outside`: beyond measured sizes or tokens, or scaled from other sizes;
    `roofline`: from data sheets.
    """

    measured: float
    interpolated: float
    outside: float
    roofline: float


def shares_of(times: Iterable[tuple[float, Source]]) -> Shares:
    """Shares of seconds that were found so. All roofline when there are none."""
    seconds = [0.0] * len(Source)
    for s, source in times:
        seconds[source] += s
    whole = math.fsum(seconds)
    return Shares(*(s / whole for s in seconds)) if whole else Shares(0.0, 0.0, 0.0, 1.0)


class Table(msgspec.Struct, frozen=True, array_like=True):
    """One operator. `codes` holds a full grid over `axes` (last axis fastest) for each key."""

    op: str
    key_names: tuple[str, ...]
    axis_names: tuple[str, ...]
    axes: tuple[tuple[int, ...], ...]
    keys: tuple[Key, ...]
    codes: bytes  # little-endian uint16

    @property
    def size(self) -> int:
        """Points of one key's grid."""
        return math.prod(map(len, self.axes))


class Packed(msgspec.Struct, frozen=True):
    """One system's file."""

    system: str
    source: str
    tables: tuple[Table, ...]


def settle(codes: Sequence[int]) -> list[int]:
    """Codes along a growing axis, none above a later one; 0 stays 0."""
    settled, least = [0] * len(codes), 65535
    for i in range(len(codes) - 1, -1, -1):
        if codes[i]:
            settled[i] = least = min(least, codes[i])
    return settled


class Curve:
    """Seconds over one positive variable: linear between logarithms, and beyond both ends.

    Before the first point the time is that of the first (kernels have a floor); after the last one
    it grows as between the last two that are a factor of 1.5 apart, at most in proportion.
    """

    __slots__ = ("_logs", "_slope", "_xs", "_ys")

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        assert points, "a curve needs a point"
        self._xs = [x for x, _ in points]
        self._logs = [math.log(x) for x, _ in points]
        self._ys = [math.log(y) for _, y in points]
        before = next((i for i in range(len(points) - 1, -1, -1)
                       if self._xs[i] * 1.5 <= self._xs[-1]), None)  # fmt: skip
        self._slope = 1.0
        if before is not None:
            rise = (self._ys[-1] - self._ys[before]) / (self._logs[-1] - self._logs[before])
            self._slope = min(1.0, max(0.0, rise))

    @property
    def range(self) -> tuple[float, float]:
        return self._xs[0], self._xs[-1]

    def __call__(self, x: float) -> float:
        xs, ys = self._xs, self._ys
        at = bisect_left(xs, x)
        if at == len(xs):
            return math.exp(ys[-1] + self._slope * (math.log(x) - self._logs[-1]))
        if at == 0 or xs[at] == x:
            return math.exp(ys[at])
        low, high = self._logs[at - 1], self._logs[at]
        share = (math.log(x) - low) / (high - low)
        return math.exp(ys[at - 1] + share * (ys[at] - ys[at - 1]))

    def source(self, x: float) -> Source:
        """How the time at `x` is found."""
        at = bisect_left(self._xs, x)
        if at < len(self._xs) and self._xs[at] == x:
            return Source.MEASURED
        return Source.INTERPOLATED if 0 < at < len(self._xs) else Source.OUTSIDE


class Found(NamedTuple):
    curve: Curve
    source: Source


class Bracket(NamedTuple):
    """`x` on an axis: between points `low` and `high`, `share` of the way (above 1: beyond)."""

    low: int
    high: int
    share: float
    source: Source


def bracket(axis: Sequence[int], x: float) -> Bracket:
    """Where `x` is on an ascending axis, in logarithms; below the first point is the first."""
    at = bisect_left(axis, x)
    if at < len(axis) and axis[at] == x:
        return Bracket(at, at, 0.0, Source.MEASURED)
    if at == 0:
        return Bracket(0, 0, 0.0, Source.OUTSIDE)
    source = Source.INTERPOLATED if at < len(axis) else Source.OUTSIDE
    high = min(at, len(axis) - 1)
    low = high - 1
    share = math.log(x / axis[low]) / math.log(axis[high] / axis[low])
    return Bracket(low, high, share, source)


class SystemTables:
    """Look-ups in one system's tables. Times are of one operator on one accelerator."""

    def __init__(self, packed: Packed) -> None:
        self.system = packed.system
        self.source = packed.source
        self._tables: Mapping[str, Table] = {t.op: t for t in packed.tables}
        self._codes: dict[str, array[int]] = {}
        self._index = {t.op: {key: i for i, key in enumerate(t.keys)} for t in packed.tables}
        for table in packed.tables:
            codes = array("H")
            codes.frombytes(table.codes)
            if sys.byteorder == "big":
                codes.byteswap()
            assert len(codes) == table.size * len(table.keys), table.op
            self._codes[table.op] = codes

    def keys(self, op: str) -> tuple[Key, ...]:
        """All keys of an operator; none when it was not measured."""
        table = self._tables.get(op)
        return table.keys if table is not None else ()

    def curve(self, op: str, key: Key) -> Curve | None:
        """The curve over the only axis of an operator (`moe`: tokens, `all_reduce`: elements)."""
        codes = self._grid(op, key)
        return self._as_curve(op, codes) if codes is not None else None

    def gemm(self, dtype: str, n: int, k: int) -> Found | None:
        """Seconds over m of an m x k by k x n product."""
        codes = self._grid("gemm", (dtype,))
        if codes is None:
            return None
        n_axis, k_axis, m_axis = self._tables["gemm"].axes
        in_n, in_k = bracket(n_axis, n), bracket(k_axis, k)
        starts = [(a * len(k_axis) + b) * len(m_axis)
                  for a in (in_n.low, in_n.high) for b in (in_k.low, in_k.high)]  # fmt: skip
        corners = [settle(codes[at : at + len(m_axis)]) for at in starts]
        points = []
        for m, ll, lh, hl, hh in zip(m_axis, *corners, strict=True):
            if ll and lh and hl and hh:
                low, high = ll + in_k.share * (lh - ll), hl + in_k.share * (hh - hl)
                points.append((float(m), decode(low + in_n.share * (high - low))))
        return Found(Curve(points), max(in_n.source, in_k.source)) if points else None

    def by_batch(self, op: str, key: Key) -> list[tuple[int, Curve]]:
        """Attention: for each measured batch size, ascending, the curve over its lengths."""
        codes = self._grid(op, key)
        if codes is None:
            return []
        batches, lengths = self._tables[op].axes
        rows = (codes[i * len(lengths) : (i + 1) * len(lengths)] for i in range(len(batches)))
        return [(b, self._points(lengths, row)) for b, row in zip(batches, rows, strict=True)
                if any(row)]  # fmt: skip

    def _grid(self, op: str, key: Key) -> array[int] | None:
        at = self._index.get(op, {}).get(key)
        if at is None:
            return None
        size = self._tables[op].size
        return self._codes[op][at * size : (at + 1) * size]

    def _as_curve(self, op: str, codes: Sequence[int]) -> Curve | None:
        (axis,) = self._tables[op].axes
        return self._points(axis, codes) if any(codes) else None

    @staticmethod
    def _points(axis: Sequence[int], codes: Sequence[int]) -> Curve:
        settled = settle(codes)
        return Curve([(float(x), decode(c)) for x, c in zip(axis, settled, strict=True) if c])
