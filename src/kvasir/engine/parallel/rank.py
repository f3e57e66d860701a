"""A rank's process, `python -m kvasir.engine.parallel.rank SOCKET MEMORY` (file descriptors).

Computes its part of the layers when rank 0 says so, on its heads of the cache that they share.
Knows layers and a cache; must not know requests or tokens. Ends when rank 0's end of the socket
does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from kvasir.core.errors import WireError
from kvasir.engine.attention import LayerCache, PagedBatch, Span
from kvasir.engine.layers import Layer, LayerWeights, Stack, linear_from
from kvasir.engine.narrow import Narrow
from kvasir.engine.native.kernel import Kernel
from kvasir.engine.parallel.cut import heads_of
from kvasir.engine.parallel.wire import (
    Failed,
    Forward,
    Group,
    Head,
    Link,
    PlaneAt,
    Ready,
    Rows,
    Setup,
    dtype_of,
)  # fmt: skip
from kvasir.engine.steps import BlockTable

START_S = 120.0  # for each frame until it is ready


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is rank 0's to handle
    link = Link(socket.socket(fileno=int(argv[1])))
    try:
        link.tell(Ready(), START_S)
        rank = Rank(link, int(argv[2]))
        link.tell(Ready(), START_S)
    except Exception as error:
        with contextlib.suppress(OSError):  # rank 0 may be gone itself
            link.tell(Failed(_words(error)), START_S)
        return 1
    try:
        rank.serve()
    except Exception as error:
        print(f"rank {rank.rank}: {_words(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


class Rank:
    """Reads everything that it needs from `link`; the cache stands in the file `memory`."""

    def __init__(self, link: Link, memory: int) -> None:
        self._link = link
        setup = link.told(START_S)
        if not isinstance(setup, Setup):
            raise WireError("no setup")
        self.rank, self._setup = setup.rank, setup
        torch.set_num_threads(setup.threads)
        self._dtype, self._narrow = dtype_of(setup.dtype), cast("Narrow | None", setup.narrow)
        self._caches = heads_of(mapped(setup.planes, memory), setup.rank, setup.size)
        self._kernel = Kernel(Path(setup.native)) if setup.native is not None else None
        self._group = Group(setup.store, setup.rank, setup.size, setup.limit_s)
        layers = [Layer.of(self._told(LayerWeights)) for _ in range(setup.layers_count)]
        self._stack = Stack(layers, self._group.sum)
        head = self._told(Head).matrix
        self._dim, self._hidden = layers[0].dim, head.weight.shape[1]
        self._head = linear_from("plain", head)

    def _told(self, kind: type[Any]) -> Any:
        message = self._link.told(START_S)
        if not isinstance(message, kind):
            raise WireError(f"{type(message).__name__} in place of {kind.__name__}")
        return message

    def serve(self) -> None:
        """Until rank 0 is gone. Raises RuntimeError when another rank is."""
        with torch.inference_mode():
            while (told := self._link.told(None)) is not None:
                if isinstance(told, Forward):
                    self._forward(told)
                elif isinstance(told, Rows):
                    rows = torch.empty(told.count, self._hidden, dtype=self._dtype)
                    self._group.give(self._head(self._group.given(rows)))
                else:
                    raise WireError(f"{type(told).__name__} after the start")

    def _forward(self, told: Forward) -> None:
        spans = [Span(p.start, p.count, BlockTable(p.blocks, p.run)) for p in told.pieces]
        paged = PagedBatch(
            self._caches, self._setup.block_size, spans, _ignore, self._narrow, self._dtype,
            self._kernel,
        )  # fmt: skip
        hidden, dim = self._hidden, self._dim
        tokens = sum(span.count for span in spans)
        both = self._group.given(torch.empty(tokens, hidden + 2 * dim, dtype=self._dtype))
        x, cos, sin = both.split((hidden, dim, dim), dim=1)
        self._stack(x.contiguous(), (cos.unsqueeze(1), sin.unsqueeze(1)), paged)


def mapped(planes: tuple[tuple[PlaneAt, ...], ...], memory: int) -> list[LayerCache]:
    """The caches of all ranks, where rank 0 has them."""
    data = np.frombuffer(mmap.mmap(memory, os.fstat(memory).st_size), np.uint8)

    def plane(at: PlaneAt) -> torch.Tensor:
        dtype = dtype_of(at.dtype)
        count = at.shape[0] * at.shape[1] * at.shape[2] * dtype.itemsize
        return torch.from_numpy(data[at.offset : at.offset + count]).view(dtype).view(at.shape)

    return [LayerCache(*map(plane, layer)) for layer in planes]


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _ignore(layer: int) -> None:
    """Rank 0 tells when a layer's KV stands: after the sum in which this rank takes part."""


if __name__ == "__main__":
    status = main(sys.argv)
    sys.stderr.flush()
    os._exit(status)  # threads of a group whose peers are gone cannot be joined
