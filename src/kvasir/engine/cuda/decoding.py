"""Decode iterations on a device: one static set of inputs, a captured CUDA graph for each number of
rows, and the next iteration under way before the host has seen the last one's tokens.

Knows rows, tokens and streams; must not know schedulers, or when a row ends.

    host     load | launch 0 | launch 1 | wait for 0, tell | launch 2 | wait for 1, tell
    device          [ iteration 0 ][ iteration 1           ][ iteration 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from kvasir.engine.attention import LayerCache
from kvasir.engine.cuda.batch import DeviceBatch, Singles, tables_of, to_device
from kvasir.engine.cuda.sample import draw_on_device
from kvasir.engine.decoder import Decoder
from kvasir.engine.sampler import Draw
from kvasir.engine.steps import DEFAULT_SAMPLING, Work

ROWS_MAX: Final = 256
WARM_RUNS: Final = 2  # before a capture: kernels compile, libraries take their workspaces

Key = tuple[tuple[str, int, int], ...]  # request, attempt, output index of each row


class Captured(NamedTuple):
    """A graph, and where its logits stand after a replay, float32 [rows, vocab]."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class Flight(NamedTuple):
    """An iteration under way: its rows, and their tokens on the host once `event` is reached."""

    key: Key
    tokens: torch.Tensor
    event: torch.cuda.Event | None

    def landed(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return [int(token) for token in self.tokens.tolist()]


class Decoding:
    """`scratch`: the block after all that attempts have; rows that fill a graph up write there.

    `graphs`: capture and replay, with 1, 2, 4, ... up to `rows_max` rows; else kernels are started
    one by one. A graph is captured when it is first needed.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[LayerCache],
        block_size: int,
        scratch: int,
        context_max: int,
        graphs: bool,
        rows_max: int = ROWS_MAX,
    ) -> None:
        self._decoder, self._caches, self._block_size = decoder, caches, block_size
        self._scratch = scratch
        self._context_max = context_max = min(context_max, scratch * block_size)
        self._device = caches[0].key.device
        self._rows_max = rows_max
        self._captured: dict[int, Captured] | None = {} if graphs else None
        self._pool: Any = None  # of memory, one for all graphs
        blocks = -(-context_max // block_size)
        self._tokens = torch.zeros(rows_max, dtype=torch.int64, device=self._device)
        self._positions = torch.zeros(rows_max, dtype=torch.int64, device=self._device)
        self._tables = torch.full(
            (rows_max, blocks), scratch, dtype=torch.int32, device=self._device
        )
        self._ahead: Flight | None = None
        self.replays = 0  # iterations that a graph ran
        self.ahead = 0  # iterations that were under way before they were asked for

    def takes(self, works: Sequence[Work]) -> bool:
        """Rows of one token that draw, without guesses or an adapter, and not too many."""
        return len(works) <= self._rows_max and all(
            work.count == 1 and work.row.sample and work.attempt.adapter is None for work in works
        )

    def forget(self) -> None:
        """What is under way is not asked for any more: rows and blocks may have changed. It goes on
        and writes only into blocks that its rows had, before anything that is started later."""
        self._ahead = None

    def logits(self, works: Sequence[Work]) -> torch.Tensor:
        """float32 [rows, vocab], until the next call of anything here."""
        self.forget()
        self._load(works)
        return self._forward(len(works))

    def tokens(self, works: Sequence[Work], more: bool) -> list[int]:
        """One token for each work. `more`: if no row ends here, the next iteration will be asked
        for, with the same rows."""
        key = _key(works, 0)
        flight, self._ahead = self._ahead, None
        if flight is None or flight.key != key:
            self._load(works)
            flight = self._launch(works, 0)
        else:
            self.ahead += 1
        if more and all(work.index + 1 < work.row.end_at for work in works):
            self._ahead = self._launch(works, 1)
        return flight.landed()

    def _launch(self, works: Sequence[Work], later: int) -> Flight:
        """Starts the iteration that the inputs stand at, `later` than that of `works`; they stand
        at the next one afterwards."""
        rows = len(works)
        logits = self._forward(rows)
        draws = [
            Draw(work.row.request_id, work.index + later, work.row.sampling or DEFAULT_SAMPLING)
            for work in works
        ]
        tokens = draw_on_device(logits, draws)
        self._tokens[:rows].copy_(tokens)
        if self._device.type != "cuda":
            return Flight(_key(works, later), tokens, None)
        host = torch.empty(rows, dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Flight(_key(works, later), host, event)

    def _load(self, works: Sequence[Work]) -> None:
        rows = len(works)
        padded = self._padded(rows)
        if self._captured is not None and padded not in self._captured:
            self._captured[padded] = self._capture(padded)
        most = self._tables.shape[1]  # more blocks than the longest context has are not read
        blocks = tables_of([work.attempt.table.blocks[:most] for work in works])
        self._tables[:rows, : blocks.shape[1]] = to_device(blocks, self._device)
        last = np.array([work.attempt.tokens[work.start] for work in works])
        self._tokens[:rows] = to_device(last, self._device)
        self._positions[:rows] = to_device(np.array([work.start for work in works]), self._device)
        self._idle(rows, padded)

    def _idle(self, first: int, last: int) -> None:
        """Rows [first, last) stand at the start of the scratch block, and stay in it."""
        self._tables[first:last] = self._scratch
        self._tokens[first:last] = 0
        self._positions[first:last] = 0

    def _padded(self, rows: int) -> int:
        """Rows of the graph that runs so many: the next power of two."""
        return rows if self._captured is None else min(1 << (rows - 1).bit_length(), self._rows_max)

    def _forward(self, rows: int) -> torch.Tensor:
        if self._captured is None:
            return self._step(rows)
        found = self._captured[self._padded(rows)]
        found.graph.replay()
        self.replays += 1
        return found.logits[:rows]

    def _step(self, rows: int) -> torch.Tensor:
        """What a graph holds: logits of the rows' tokens; positions move on by one."""
        tokens, positions = self._tokens[:rows], self._positions[:rows]
        tables, size = self._tables[:rows], self._block_size
        blocks = tables.gather(1, (positions // size).unsqueeze(1)).squeeze(1)
        slots = blocks.long() * size + positions % size
        singles = Singles(None, tables, (positions + 1).int())
        batch = DeviceBatch(self._caches, size, slots, singles, None, self._context_max)
        logits = self._decoder.logits(self._decoder.forward(tokens, positions, batch))
        positions.add_(1)
        return logits

    def _capture(self, rows: int) -> Captured:
        """Other threads may go on using the device meanwhile."""
        now = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        self._idle(0, rows)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                self._step(rows)
        now.wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._step(rows)
        return Captured(graph, logits)


def _key(works: Sequence[Work], later: int) -> Key:
    return tuple((work.row.request_id, work.row.attempt, work.index + later) for work in works)
