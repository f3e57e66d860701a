"""Rank 0's side: starts the other ranks, gives them their parts, computes in step with them.

Knows processes, sockets and sums; must not know requests. Ranks that die or hang are an
`Unavailable` of the next call; nothing is started again from here.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

import torch

from kvasir.core.errors import Unavailable
from kvasir.engine.attention import LatentCache, LayerCache, Span
from kvasir.engine.layers import LayerWeights, Matrix, Rotation
from kvasir.engine.parallel.cut import heads_of
from kvasir.engine.parallel.wire import (
    Failed,
    Forward,
    Group,
    Head,
    Link,
    Piece,
    PlaneAt,
    Rows,
    Setup,
    Told,
    name_of,
)  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvasir.engine.narrow import Narrow
    from kvasir.engine.native.kernel import Kernel

START_S: Final = 120.0  # until a rank is ready
STUCK_S: Final = 30.0  # that one rank waits for another, within a layer
STOP_S: Final = 5.0
GONE_S: Final = 1.0  # for a process whose socket is closed to end
MODULE: Final = "kvasir.engine.parallel.rank"


class Shared(Protocol):
    """Memory of one open file, `fd`, that another process can map; the cache stands in it."""

    fd: int

    def offset_of(self, memory: NDArray[np.uint8]) -> int | None:
        """Where a contiguous array stands in the file."""


class Team:
    """Satisfies `engine.decoder.Team`. `size` ranks, of which this process is the first.

    The others start at once, and import what they need while the model is read. Then `begin`, the
    weights, `ready`. `stop` ends them; so does the end of this process, however it ends.
    """

    def __init__(self, size: int, memory: Shared, *, stuck_s: float = STUCK_S) -> None:
        assert size > 1, "one rank needs no team"
        self.size, self._memory, self._stuck_s = size, memory, stuck_s
        self._folder = tempfile.mkdtemp(prefix="kvasir-ranks-")
        self._links: list[Link] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._group: Group | None = None
        self._written: Callable[[int], None] = _ignore
        self._layer: int | None = None  # whose KV this rank has written, and others may not have
        self._vocab = 0
        try:
            for _ in range(1, size):
                self._start()
        except OSError as error:
            self.stop()
            raise Unavailable(f"a rank's process cannot be started: {error}") from error

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._links.append(Link(ours))
        with theirs:
            fds = (theirs.fileno(), self._memory.fd)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", MODULE, *map(str, fds)],
                    stdin=subprocess.DEVNULL, pass_fds=fds,
                )
            )  # fmt: skip

    # --- the start --------------------------------------------------------------------------------

    def begin(
        self, caches: Sequence[LayerCache | LatentCache], block_size: int, dtype: torch.dtype,
        narrow: Narrow | None, kernel: Kernel | None,
    ) -> list[LayerCache | LatentCache]:  # fmt: skip
        """Tell the others what they will be; returns this rank's heads of `caches`. `kernel`: they
        attend by the same."""
        self._wait()  # until all are there: what follows has a shorter limit
        store = str(Path(self._folder) / "store")
        planes = tuple(tuple(map(self._at, cache)) for cache in caches)
        for rank in range(1, self.size):
            setup = Setup(
                rank, self.size, store, self._stuck_s, torch.get_num_threads(), planes,
                block_size, name_of(dtype), narrow,
                str(kernel.path) if kernel is not None else None,
            )  # fmt: skip
            self._tell(rank, setup, START_S)
        with self._working():
            self._group = Group(store, 0, self.size, self._stuck_s)
        return heads_of(caches, 0, self.size)

    def _at(self, plane: torch.Tensor) -> PlaneAt:
        offset = self._memory.offset_of(plane.view(-1).view(torch.uint8).numpy())
        assert offset is not None, "the cache is not in the memory that ranks share"
        slots, heads, width = plane.shape
        return PlaneAt(offset, (slots, heads, width), name_of(plane.dtype))

    def deal(self, layer: LayerWeights) -> LayerWeights:
        for rank in range(1, self.size):
            self._tell(rank, layer.part(rank, self.size), START_S)
        return layer.part(0, self.size)

    def deal_head(self, head: Matrix) -> Matrix:
        for rank in range(1, self.size):
            self._tell(rank, Head(head.outputs(rank, self.size)), START_S)
        self._vocab = len(head.weight)
        return head.outputs(0, self.size)

    def ready(self) -> None:
        """Until the others have their weights where they want them."""
        self._wait()
        shutil.rmtree(self._folder, ignore_errors=True)  # they have met

    def _wait(self) -> None:
        for rank, link in enumerate(self._links, 1):
            with self._working():
                answer = link.answered(START_S)
            if isinstance(answer, Failed):
                raise Unavailable(f"rank {rank} of {self.size} cannot start: {answer.why}")
            if answer is None:
                raise self._gone()

    # --- steps ------------------------------------------------------------------------------------

    def step(
        self, spans: Sequence[Span], block_size: int, written: Callable[[int], None]
    ) -> Callable[[int], None]:
        """Tell the others of a batch. Returns what is to be called when this rank has written a
        layer's KV; `written` is called when all ranks have."""
        pieces = [
            Piece(span.start, span.count, blocks, min(span.table.run, len(blocks)))
            for span in spans
            for blocks in (span.table.blocks[: -(-(span.start + span.count) // block_size)],)
        ]
        self._written, self._layer = written, None
        self._tell_all(Forward(pieces))
        return self._wrote

    def _wrote(self, layer: int) -> None:
        self._layer = layer

    def share(self, x: torch.Tensor, rotation: Rotation) -> None:
        both = torch.cat((x, *(one.flatten(1) for one in rotation)), dim=1)
        with self._working() as group:
            group.give_all(both)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        with self._working() as group:
            total = group.sum(x)
        if self._layer is not None:  # the others wrote it before they joined in
            layer, self._layer = self._layer, None
            self._written(layer)
        return total

    def ask(self, hidden: torch.Tensor) -> torch.Tensor:
        self._tell_all(Rows(len(hidden)))
        given = hidden.contiguous()
        with self._working() as group:
            group.give_all(given)
        return given

    def joined(self, logits: torch.Tensor) -> torch.Tensor:
        sizes = [len(part) for part in torch.arange(self._vocab).tensor_split(self.size)]
        parts = [logits.new_empty(len(logits), size) for size in sizes[1:]]
        with self._working() as group:
            group.take(parts)
        return torch.cat((logits, *parts), dim=1)

    # --- its end ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises Unavailable when a rank's process has ended. Any thread."""
        ended = [
            (status, rank, process.pid)
            for rank, process in enumerate(self.processes, 1)
            if (status := process.poll()) is not None
        ]
        if ended:  # one that was killed comes first: others end when they miss it
            status, rank, pid = min(ended)
            raise Unavailable(f"rank {rank} of {self.size} (process {pid}) {_words(status)}")

    def stop(self) -> None:
        """End the others: they see that their sockets are closed. Any thread, also while a call
        waits for them: it fails then."""
        for link in self._links:
            link.close()
        end = time.monotonic() + STOP_S
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tell_all(self, message: Told) -> None:
        for rank in range(1, self.size):
            self._tell(rank, message, self._stuck_s)

    def _tell(self, rank: int, message: Told, limit_s: float) -> None:
        with self._working():
            self._links[rank - 1].tell(message, limit_s)

    @contextlib.contextmanager
    def _working(self) -> Iterator[Group]:
        """Raises Unavailable where a rank is gone or late."""
        try:
            yield cast("Group", self._group)
        except (OSError, RuntimeError) as error:
            raise self._gone(str(error)) from error

    def _gone(self, why: str = "") -> Unavailable:
        """Which one it was: its process may take a moment to end."""
        end = time.monotonic() + GONE_S
        while time.monotonic() < end:
            try:
                self.check()
            except Unavailable as gone:
                return gone
            time.sleep(0.01)
        said = why.rpartition("] ")[2].splitlines() or ["nothing"]
        return Unavailable(f"a rank of {self.size} does not answer: {said[0]}")


def _words(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended ({status})"


def _ignore(layer: int) -> None:
    """Nobody waits."""
