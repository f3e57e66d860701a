"""The batch policy's view of a worker: its own state, read-only, nothing copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvasir.node.cohort import Cohort
from kvasir.node.work import Work
from kvasir.policy.batch import Admission

if TYPE_CHECKING:
    from kvasir.node.worker import Worker


class Window:
    """The batch policy's view: the worker's own state, read-only, nothing copied."""

    __slots__ = ("_worker",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def running(self) -> Sequence[Work]:
        self._worker.cohort.settle_all()
        return self._worker.running

    @property
    def decoding(self) -> Cohort | None:
        cohort, running = self._worker.cohort, self._worker.running
        return cohort if running and len(cohort) == len(running) else None

    @property
    def waiting(self) -> Sequence[Work]:
        return self._worker.waiting

    @property
    def blocks_available(self) -> int:
        return self._worker.pool.available

    @property
    def block_size(self) -> int:
        return self._worker.blocks.size

    @property
    def batch_max(self) -> int:
        return self._worker.config.capacity.batch_max

    @property
    def batch_tokens_max(self) -> int:
        return self._worker.config.capacity.batch_tokens_max

    @property
    def chunk_tokens(self) -> int:
        return self._worker.config.chunk_tokens

    @property
    def steps_max(self) -> int:
        """One, while a sequence that runs wants single steps."""
        worker = self._worker
        singles = worker.cohort.singles > 0
        if not singles and self.decoding is None:
            singles = any(work.single_step for work in worker.running)
        return 1 if singles else worker.config.steps_max

    def admission(self, index: int) -> Admission:
        blocks = self._worker.blocks
        work = self._worker.waiting[index]
        hits = blocks.hits(work)
        missing = blocks.pool.missing_for(hits, blocks.count(work.known))
        return Admission(len(hits) * blocks.size, missing + blocks.pool.available)
