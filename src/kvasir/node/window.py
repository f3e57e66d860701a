"""The batch policy's view of a worker: its own state, read-only, nothing copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvasir.node.blocks import Blocks
from kvasir.node.cohort import Cohort
from kvasir.node.config import WorkerConfig
from kvasir.node.work import Work
from kvasir.policy.batch import Admission
from kvasir.policy.speculate import iterations_max

if TYPE_CHECKING:
    from kvasir.node.steps import Steps


class Window:
    """Satisfies `policy.batch.BatchView`."""

    __slots__ = ("_blocks", "_config", "_steps")

    def __init__(self, steps: Steps, blocks: Blocks, config: WorkerConfig) -> None:
        self._steps, self._blocks, self._config = steps, blocks, config

    @property
    def running(self) -> Sequence[Work]:
        self._steps.cohort.settle_all()
        return self._steps.running

    @property
    def decoding(self) -> Cohort | None:
        cohort, running = self._steps.cohort, self._steps.running
        return cohort if running and len(cohort) == len(running) else None

    @property
    def waiting(self) -> Sequence[Work]:
        return self._steps.waiting

    @property
    def blocks_available(self) -> int:
        return self._blocks.pool.available

    @property
    def block_size(self) -> int:
        return self._blocks.size

    @property
    def batch_max(self) -> int:
        return self._config.capacity.batch_max

    @property
    def batch_tokens_max(self) -> int:
        return self._config.capacity.batch_tokens_max

    @property
    def chunk_tokens(self) -> int:
        return self._config.chunk_tokens

    @property
    def steps_max(self) -> int:
        """One, while a sequence that runs wants single steps; few, while one guesses."""
        steps, rule = self._steps, self._config.speculate
        singles = steps.cohort.singles > 0
        if not singles and self.decoding is None:
            singles = any(work.single_step for work in steps.running)
        if singles or rule is None:
            return 1 if singles else self._config.steps_max
        guessing = self.decoding is None and any(work.draft for work in steps.running)
        most = iterations_max(rule, len(steps.running), guessing=guessing)
        return min(most, self._config.steps_max)

    def admission(self, index: int) -> Admission:
        blocks = self._blocks
        work = self._steps.waiting[index]
        hits = blocks.hits(work)
        missing = blocks.pool.missing_for(hits, blocks.count(work.known))
        return Admission(len(hits) * blocks.size, missing + blocks.pool.available)
