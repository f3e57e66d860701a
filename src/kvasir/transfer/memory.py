"""Cache memory as a transfer sees it: whole blocks of planes, copied in runs. Knows no sockets.

Copies go through numpy, which lets go of the interpreter lock while it copies. Planes are counted
through all layers: those of layer 0, then those of layer 1, and so on.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvasir.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvasir.transfer.base import Plane, Planes

Ids = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

CACHED_BYTES: Final = 256 * 1024  # what a second pass still finds in a core's cache
RUN_BYTES_MIN: Final = 16 * 1024  # shorter runs are moved by index: fewer calls, one copy more


class Run(NamedTuple):
    """Consecutive physical blocks [first, end)."""

    first: int
    end: int


class Slot(NamedTuple):
    layer: int
    plane: int  # of that layer


class Piece(NamedTuple):
    """What one data frame carries: of `planes` planes from `plane` on, the logical blocks
    [first_block, first_block + len(ids)), plane after plane."""

    plane: int
    planes: int
    first_block: int
    ids: Ids


class Limits(NamedTuple):
    """Bytes of one data frame. `first`: of a push's first one, which the receiver waits for; each
    next one is twice as large, up to `frame`. `group`: of a frame that holds several planes."""

    frame: int
    group: int
    first: int


class Memory:
    """Checked planes. `planes[layer][plane]`: uint8 [blocks, block_bytes], C-contiguous.

    Raises ConfigError when the planes do not have that shape.
    """

    def __init__(self, planes: Planes) -> None:
        self.planes = [plane for layer in planes for plane in layer]
        self._flat = [_flat(plane) for plane in self.planes]
        self._firsts = [0, *accumulate(len(layer) for layer in planes)]  # plane, by layer
        counts = {plane.shape[0] for plane in self.planes}
        if len(counts) != 1:
            raise ConfigError(f"planes hold different numbers of blocks: {sorted(counts)}")
        self.blocks = counts.pop()
        self.layers = len(self._firsts) - 1
        self._before = [0, *accumulate(self.block_bytes(i) for i in range(len(self.planes)))]
        self.block_bytes_max = max(plane.shape[1] for plane in self.planes)

    def planes_of(self, layers: range) -> range:
        return range(self._firsts[layers.start], self._firsts[layers.stop])

    def block_bytes(self, plane: int) -> int:
        return int(self.planes[plane].shape[1])

    def slot_of(self, plane: int) -> Slot:
        layer = sum(first <= plane for first in self._firsts[1:])
        return Slot(layer, plane - self._firsts[min(layer, self.layers - 1)])

    def place_of(self, plane: int) -> str:
        """A plane in words."""
        slot = self.slot_of(plane)
        return f"layer {slot.layer} plane {slot.plane}"

    def size(self, plane: int, planes: int, blocks: int) -> int:
        """Bytes of a piece of that shape, which must lie in the planes."""
        return (self._before[plane + planes] - self._before[plane]) * blocks

    def ids(self, blocks: Sequence[int]) -> Ids:
        """Physical ids as an array [len(blocks)]; asserts that they lie in the planes."""
        ids = np.asarray(blocks, dtype=np.int64).reshape(-1)
        assert self.holds(ids), "no such block"
        return ids

    def holds(self, ids: Ids) -> bool:
        return not ids.size or bool(ids.min() >= 0 and ids.max() < self.blocks)

    def span(self, plane: int, run: Run) -> Bytes:
        """A flat view of a run's bytes."""
        size = self.block_bytes(plane)
        return self._flat[plane][run.first * size : run.end * size]

    def spans(self, piece: Piece) -> list[Bytes]:
        """Views on all of a piece, in order."""
        found = runs(piece.ids)
        return [self.span(plane, run) for plane in _planes(piece) for run in found]

    def gather(self, piece: Piece, out: Bytes) -> None:
        """Copy a piece's blocks into `out`, flat, of exactly its size."""
        run = whole_run(piece.ids)
        for plane, part in self._parts(piece, out):
            if run is not None:
                np.copyto(part, self.span(plane, run))
            else:
                rows = part.reshape(-1, self.block_bytes(plane))
                np.take(self.planes[plane], piece.ids, axis=0, out=rows, mode="clip")

    def scatter(self, piece: Piece, data: Bytes) -> None:
        """Copy `data`, flat, of exactly the piece's size, into its blocks."""
        run = whole_run(piece.ids)
        for plane, part in self._parts(piece, data):
            if run is not None:
                np.copyto(self.span(plane, run), part)
            else:
                self.planes[plane][piece.ids] = part.reshape(-1, self.block_bytes(plane))

    def checksum(self, piece: Piece) -> int:
        """xxh3_64 of a piece's bytes as they stand here."""
        state = xxhash.xxh3_64()
        found = runs(piece.ids)
        for plane in _planes(piece):
            if self._short(plane, piece.ids, found):
                for at, end in _steps(len(piece.ids), self.block_bytes(plane)):
                    state.update(np.take(self.planes[plane], piece.ids[at:end], axis=0).data)
            else:
                for run in found:
                    state.update(self.span(plane, run).data)
        return state.intdigest()

    def copy_from(self, source: Memory, source_ids: Ids, piece: Piece) -> int:
        """Fill a piece from a memory with equal planes; returns xxh3_64 of what stands here then.

        In steps that stay in a core's cache, so that the checksum costs little beside the copy.
        """
        state = xxhash.xxh3_64()
        found = pairs(piece.ids, source_ids)
        for plane in _planes(piece):
            size, here, there = self.block_bytes(plane), self.planes[plane], source.planes[plane]
            if self._short(plane, piece.ids, found):
                for at, end in _steps(len(piece.ids), size):
                    staged = np.take(there, source_ids[at:end], axis=0)
                    state.update(staged.data)
                    here[piece.ids[at:end]] = staged
                continue
            for first, other, blocks in found:
                for at, end in _steps(blocks, size):
                    target = here[first + at : first + end]
                    np.copyto(target, there[other + at : other + end])
                    state.update(target.data)
        return state.intdigest()

    def pieces(
        self, first_block: int, ids: Ids, layers: range, limits: Limits
    ) -> Iterator[Piece]:
        """Cut a push into frames, layer by layer: of at least one block of one plane, and of whole
        planes together while they are within the limits."""
        planes = self.planes_of(layers)
        at, frame_bytes = planes.start, limits.first
        while at < planes.stop:
            together, group_bytes = 1, min(frame_bytes, limits.group)
            while (
                at + together < planes.stop
                and self.size(at, together + 1, len(ids)) <= group_bytes
            ):
                together += 1
            first = 0
            while first < len(ids):
                end = first + max(1, frame_bytes // self.size(at, together, 1))
                yield Piece(at, together, first_block + first, ids[first:end])
                first, frame_bytes = end, min(2 * frame_bytes, limits.frame)
            at += together

    def coded_pieces(
        self, first_block: int, ids: Ids, layers: range, blocks: int, nbytes: int
    ) -> Iterator[Piece]:
        """Cut a push into what is coded together: runs of `blocks` blocks, of as many whole planes
        as are within `nbytes`, at least one."""
        planes = self.planes_of(layers)
        for first in range(0, len(ids), blocks):
            run, at = ids[first : first + blocks], planes.start
            while at < planes.stop:
                together = 1
                while (
                    at + together < planes.stop
                    and self.size(at, together + 1, len(run)) <= nbytes
                ):
                    together += 1
                yield Piece(at, together, first_block + first, run)
                at += together

    def _parts(self, piece: Piece, flat: Bytes) -> Iterator[tuple[int, Bytes]]:
        at = 0
        for plane in _planes(piece):
            end = at + self.block_bytes(plane) * len(piece.ids)
            yield plane, flat[at:end]
            at = end

    def _short(self, plane: int, ids: Ids, cuts: Sequence[object]) -> bool:
        return len(cuts) > 1 and len(ids) * self.block_bytes(plane) < RUN_BYTES_MIN * len(cuts)


def whole_run(ids: Ids) -> Run | None:
    """The run, if `ids` are consecutive and rising; None if not, or if there are none."""
    if not ids.size or ids[-1] - ids[0] != ids.size - 1:
        return None
    if ids.size > 2 and not bool((ids[1:] - ids[:-1] == 1).all()):
        return None
    return Run(int(ids[0]), int(ids[-1]) + 1)


def runs(ids: Ids) -> list[Run]:
    """`ids` cut into consecutive runs, in order."""
    if (run := whole_run(ids)) is not None:
        return [run]
    cuts = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), ids.size]
    return [Run(int(ids[a]), int(ids[b - 1]) + 1) for a, b in pairwise(cuts) if b > a]


class Pair(NamedTuple):
    """`blocks` blocks that are consecutive on both sides."""

    here: int
    there: int
    blocks: int


def pairs(here: Ids, there: Ids) -> list[Pair]:
    """Two lists of as many blocks, cut where either is not consecutive."""
    breaks = (np.diff(here) != 1) | (np.diff(there) != 1)
    cuts = [0, *(np.flatnonzero(breaks) + 1).tolist(), here.size]
    return [Pair(int(here[a]), int(there[a]), b - a) for a, b in pairwise(cuts) if b > a]


def _planes(piece: Piece) -> range:
    return range(piece.plane, piece.plane + piece.planes)


def _steps(count: int, size: int) -> Iterator[tuple[int, int]]:
    """[0, count) blocks of `size` bytes, cut to what stays in a cache."""
    step = max(1, CACHED_BYTES // size)
    for at in range(0, count, step):
        yield at, min(count, at + step)


def _flat(plane: Plane) -> Bytes:
    if plane.dtype != np.uint8 or plane.ndim != 2 or not plane.flags.c_contiguous:
        raise ConfigError(
            f"a plane of {plane.dtype}, shape {plane.shape} is not cache memory",
            next_step="pass a C-contiguous uint8 view [blocks, block_bytes]",
        )
    return plane.reshape(-1)
