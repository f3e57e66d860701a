"""Cache memory as a transfer sees it: whole blocks of planes, copied in runs. Knows no sockets.

Copies go through numpy, which lets go of the interpreter lock while it copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from kvasir.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvasir.transfer.base import Plane, Planes

Ids = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class Run(NamedTuple):
    """Consecutive physical blocks [first, end)."""

    first: int
    end: int


class Piece(NamedTuple):
    """What one data frame carries: logical blocks [first_block, first_block + len(ids))."""

    layer: int
    plane: int
    first_block: int
    ids: Ids


class Memory:
    """Checked planes. `planes[layer][plane]`: uint8 [blocks, block_bytes], C-contiguous.

    Raises ConfigError when the planes do not have that shape.
    """

    def __init__(self, planes: Planes) -> None:
        self._planes = [list(layer) for layer in planes]
        self._flat = [[_flat(plane) for plane in layer] for layer in self._planes]
        counts = {plane.shape[0] for layer in self._planes for plane in layer}
        if len(counts) != 1:
            raise ConfigError(f"planes hold different numbers of blocks: {sorted(counts)}")
        self.blocks = counts.pop()
        self.layers = len(self._planes)
        self.block_bytes_max = max(p.shape[1] for layer in self._planes for p in layer)

    def planes_in(self, layer: int) -> int:
        return len(self._planes[layer])

    def block_bytes(self, layer: int, plane: int) -> int:
        return int(self._planes[layer][plane].shape[1])

    def ids(self, blocks: Sequence[int]) -> Ids:
        """Physical ids as an array [len(blocks)]; asserts that they lie in the planes."""
        ids = np.asarray(blocks, dtype=np.int64).reshape(-1)
        assert not ids.size or (ids.min() >= 0 and ids.max() < self.blocks), "no such block"
        return ids

    def span(self, layer: int, plane: int, run: Run) -> Bytes:
        """A flat view of a run's bytes."""
        size = self.block_bytes(layer, plane)
        return self._flat[layer][plane][run.first * size : run.end * size]

    def gather(self, piece: Piece, out: Bytes) -> None:
        """Copy a piece's blocks into `out`, flat, of exactly its size."""
        plane = self._planes[piece.layer][piece.plane]
        if (run := whole_run(piece.ids)) is not None:
            np.copyto(out, self.span(piece.layer, piece.plane, run))
        else:
            np.take(plane, piece.ids, axis=0, out=out.reshape(-1, plane.shape[1]), mode="clip")

    def scatter(self, piece: Piece, data: Bytes) -> None:
        """Copy `data`, flat, of exactly the piece's size, into its blocks."""
        plane = self._planes[piece.layer][piece.plane]
        if (run := whole_run(piece.ids)) is not None:
            np.copyto(self.span(piece.layer, piece.plane, run), data)
        else:
            plane[piece.ids] = data.reshape(-1, plane.shape[1])

    def pieces(
        self, first_block: int, ids: Ids, layers: range, frame_bytes: int
    ) -> Iterator[Piece]:
        """Cut a push into frames of at most `frame_bytes` (at least one block), layer by layer."""
        for layer in layers:
            for plane in range(self.planes_in(layer)):
                step = max(1, frame_bytes // self.block_bytes(layer, plane))
                for at in range(0, len(ids), step):
                    yield Piece(layer, plane, first_block + at, ids[at : at + step])


def whole_run(ids: Ids) -> Run | None:
    """The run, if `ids` are consecutive and rising; None if not, or if there are none."""
    if not ids.size or ids[-1] - ids[0] != ids.size - 1:
        return None
    if ids.size > 2 and not bool((ids[1:] - ids[:-1] == 1).all()):
        return None
    return Run(int(ids[0]), int(ids[-1]) + 1)


def runs(ids: Ids) -> list[Run]:
    """`ids` cut into consecutive runs, in order."""
    if not ids.size:
        return []
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    starts = [0, *cuts.tolist()]
    ends = [*cuts.tolist(), ids.size]
    return [Run(int(ids[a]), int(ids[b - 1]) + 1) for a, b in zip(starts, ends, strict=True)]


def _flat(plane: Plane) -> Bytes:
    if plane.dtype != np.uint8 or plane.ndim != 2 or not plane.flags.c_contiguous:
        raise ConfigError(
            f"a plane of {plane.dtype}, shape {plane.shape} is not cache memory",
            next_step="pass a C-contiguous uint8 view [blocks, block_bytes]",
        )
    return plane.reshape(-1)
