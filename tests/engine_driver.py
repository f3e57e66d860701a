"""Drives a Runner from prompts to tokens: what a scheduler would do, without one.

Knows the Runner contract only; must not know which runner it drives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from kvasir.core.effects import Row, Step
from kvasir.core.messages import RowDone
from kvasir.core.request import Sampling, Steering
from kvasir.engine.base import Runner, Sampled, StepResult

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
SALT = b"salt"

_step_ids = count(1)


@dataclass
class Hooks:
    """Records what a step tells; `cut_after` iterations it asks for the end."""

    layers: list[int] = field(default_factory=list)
    batches: list[list[Sampled]] = field(default_factory=list)
    cut_after: int | None = None
    on_layer: Callable[[int], None] | None = None

    def layer_done(self, layer: int) -> None:
        self.layers.append(layer)
        if self.on_layer:
            self.on_layer(layer)

    def sampled(self, batch: Sequence[Sampled]) -> None:
        self.batches.append(list(batch))

    def cut(self) -> bool:
        return self.cut_after is not None and len(self.batches) >= self.cut_after


@dataclass
class Job:
    """One attempt as the driver sees it. `free` supplies its blocks; `held` of them are in use.

    `computed` positions have KV already. `output` holds tokens drawn anywhere so far.
    """

    name: str
    prompt: list[int]
    n: int
    free: list[int]
    attempt: int = 1
    sampling: Sampling | None = GREEDY
    computed: int = 0
    held: int = 0
    output: list[int] = field(default_factory=list)
    end: str = ""
    fresh: bool = False
    keys: list[bytes] = field(default_factory=list)
    steering: Steering | None = None
    drawn: list[Sampled] = field(default_factory=list)
    draft: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output)


class Driver:
    """Runs jobs together: each step gives every unfinished job a chunk of its next tokens."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.size = runner.spec.block_size

    def open(self, job: Job, keys_count: int | None = None) -> Job:
        known = len(job.prompt) // self.size if keys_count is None else keys_count
        tokens = [*job.prompt, *job.output]
        self.runner.open(job.name, job.attempt, tokens, known, SALT, job.steering)
        return job

    def row(self, job: Job, chunk: int, steps: int = 1, sample: bool = True) -> Row:
        """The job's next row, with the blocks that it needs for `steps` iterations."""
        tokens = min(chunk, job.known - job.computed)
        draws = sample and job.computed + tokens == job.known
        draft = job.draft if draws and tokens == 1 else 0
        ahead = min(steps * (1 + draft), max(1, job.n - len(job.output)))
        needed = -(-(job.computed + tokens - 1 + ahead) // self.size)
        new = tuple(job.free[: max(0, needed - job.held)])
        del job.free[: len(new)]
        job.held += len(new)
        row = Row(
            request_id=job.name,
            attempt=job.attempt,
            start=job.computed,
            count=tokens,
            blocks=new,
            fresh=job.fresh,
            sample=draws,
            index=len(job.output) if draws else -1,
            end_at=job.n,
            gateway="gateway-0",
            sampling=job.sampling,
            draft=draft,
        )
        job.fresh = False
        return row

    def step(self, jobs: Sequence[Job], chunk: int = 512, steps: int = 1, sample: bool = True,
             hooks: Hooks | None = None) -> StepResult:  # fmt: skip
        hooks = hooks or Hooks()
        decode = all(job.known - job.computed == 1 for job in jobs) and sample
        most = min([steps, *(job.n - len(job.output) for job in jobs)]) if decode else 1
        rows = tuple(self.row(job, chunk, most, sample) for job in jobs)
        result = self.runner.step(Step(next(_step_ids), rows, most), hooks)
        drawn = [one for batch in hooks.batches for one in batch]
        for job, row, done in zip(jobs, rows, result.rows, strict=True):
            mine = [s for s in drawn if s.request_id == job.name]
            job.drawn += mine
            job.output += [s.token for s in mine]
            assert len(mine) == done.sampled
            job.computed += row.count + max(done.sampled, 1) - 1
            job.drafted, job.accepted = job.drafted + done.drafted, job.accepted + done.accepted
            job.end, job.keys = done.end, [*job.keys, *done.keys]
        return result

    def run(self, jobs: Iterable[Job], chunk: int = 512, steps: int = 8) -> list[list[int]]:
        """Until every job ended; the outputs in order."""
        jobs = list(jobs)
        while live := [job for job in jobs if not job.end]:
            self.step(live, chunk, steps)
        return [job.output for job in jobs]

    def prefill(self, job: Job, chunk: int = 512, hooks: Hooks | None = None) -> None:
        """KV of all known tokens but draw nothing."""
        while job.computed < job.known:
            self.step([job], chunk, sample=False, hooks=hooks)


def close(runner: Runner, jobs: Iterable[Job]) -> None:
    for job in jobs:
        runner.close(job.name, job.attempt)


def row_of(result: StepResult) -> RowDone:
    (row,) = result.rows
    return row


def scattered(blocks: Iterable[int]) -> list[int]:
    """The same blocks in an order where no two that follow one another are neighbours."""
    every = sorted(blocks)
    return [*every[1::2][::-1], *every[0::2][::-1]]


def copy_blocks(source: Runner, target: Runner, pairs: Iterable[tuple[int, int]]) -> None:
    """What a transfer does: whole blocks, every layer and plane."""
    for source_block, target_block in pairs:
        for from_layer, to_layer in zip(source.planes(), target.planes(), strict=True):
            for from_plane, to_plane in zip(from_layer, to_layer, strict=True):
                to_plane[target_block] = from_plane[source_block]
