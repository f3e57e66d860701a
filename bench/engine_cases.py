"""What the engine benches compute: the model's shape, the prompts, and our side's loop over steps.

Our side goes through the runner as a worker does: Steps with rows and blocks, a token budget that
decode rows come first in, runs of decode iterations when nothing waits.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Final, NamedTuple

from kvasir.core.effects import Row, Step
from kvasir.core.request import Sampling
from kvasir.engine.base import Runner, Sampled
from kvasir.engine.tiny import make_tiny

GREEDY: Final = Sampling(temperature=0.0, ignore_eos=True)
BUDGET: Final = 2048  # tokens of one iteration, as vLLM's max_num_batched_tokens
BLOCK: Final = 16
OUTPUTS: Final = 64
CONTEXT: Final = 2048
SHAPE: Final = {
    "layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "intermediate": 1536,
    "vocab": 32_000, "tied": True, "initializer_range": 0.12,
}  # fmt: skip
SHAPE_WORDS: Final = "Qwen3, 41.6 M random parameters, 8 layers, hidden 512, vocabulary 32,000"


class Case(NamedTuple):
    """Prompts of these lengths, the first `shared` tokens of all being the same."""

    name: str
    lengths: tuple[int, ...]
    shared: int = 0
    outputs: int = OUTPUTS

    def prompts(self, seed: int) -> list[list[int]]:
        random = Random(f"{self.name} {seed}")
        prefix = random.choices(range(300, SHAPE["vocab"]), k=self.shared)
        return [
            prefix + random.choices(range(300, SHAPE["vocab"]), k=length - self.shared)
            for length in self.lengths
        ]


class Timing(NamedTuple):
    """Seconds of all outputs, and of one output each: the prompts' part."""

    whole_s: float
    first_s: float


class Prompts(NamedTuple):
    """To warm up with, to draw one output each from, and all outputs."""

    warm: list[list[int]]
    first: list[list[int]]
    whole: list[list[int]]


def prompts_of(case: Case, seed: int) -> Prompts:
    """New ones for each seed."""
    return Prompts(*(case.prompts(3 * seed + i) for i in range(3)))


def timed(
    run: Callable[[list[list[int]], int], object], case: Case, seed: int
) -> dict[str, Timing]:
    """`run(prompts, outputs)`, twice, after a short run that warms; "wall" and "cpu" seconds."""
    prompts = prompts_of(case, seed)
    run(prompts.warm, 2)
    stamps = [(time.perf_counter(), time.process_time())]
    for asked, outputs in ((prompts.first, 1), (prompts.whole, case.outputs)):
        run(asked, outputs)
        stamps.append((time.perf_counter(), time.process_time()))
    first, whole = (
        [b - a for a, b in zip(before, after, strict=True)] for before, after in pairwise(stamps)
    )
    return {"wall": Timing(whole[0], first[0]), "cpu": Timing(whole[1], first[1])}


class Speed(NamedTuple):
    """Medians over repeats. `per_s`: outputs over seconds, prompts included."""

    per_s: float
    per_s_min: float
    per_s_max: float
    step_ms: float
    prefill_per_s: float


def speed_of(case: Case, timings: Sequence[Timing]) -> Speed:
    outputs = len(case.lengths) * case.outputs
    rates = [outputs / one.whole_s for one in timings]
    steps = [(one.whole_s - one.first_s) / (case.outputs - 1) * 1e3 for one in timings]
    return Speed(
        median(rates), min(rates), max(rates), median(steps),
        median(sum(case.lengths) / one.first_s for one in timings),
    )  # fmt: skip


RAGGED: Final = tuple(range(100, 1601, 100))
CASES: Final = {
    case.name: case
    for case in (
        Case("1 x 128", (128,)), Case("8 x 128", (128,) * 8), Case("16 x 128", (128,) * 16),
        Case("ragged 16", RAGGED), Case("prefix 16", (1088,) * 16, shared=1024),
    )
}  # fmt: skip


def processor() -> str:
    """Its name, where Linux tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def make_model(folder: Path) -> Path:
    return make_tiny(folder, "qwen3", context_max=CONTEXT, **SHAPE)  # type: ignore[arg-type]


@dataclass
class Going:
    """One prompt on its way: `computed` positions have KV, in the first of `blocks`."""

    name: str
    tokens: list[int]
    blocks: tuple[int, ...]
    outputs: int
    computed: int = 0
    output: list[int] = field(default_factory=list)
    placed: bool = False  # its runner knows the blocks

    def row(self, room: int) -> Row:
        """Its next positions, `room` of them at most."""
        known = len(self.tokens) + len(self.output)
        count = min(room, known - self.computed)
        draws = self.computed + count == known
        row = Row(
            self.name, 1, self.computed, count, () if self.placed else self.blocks,
            fresh=not self.placed, sample=draws, index=len(self.output) if draws else -1,
            end_at=self.outputs, sampling=GREEDY,
        )  # fmt: skip
        self.placed = True
        return row

    @property
    def decodes(self) -> bool:
        return bool(self.output)

    @property
    def left(self) -> int:
        return self.outputs - len(self.output)


class Heard:
    """`engine.base.StepHooks` that keep what was drawn."""

    def __init__(self) -> None:
        self.drawn: list[Sampled] = []

    def layer_done(self, layer: int) -> None: ...

    def sampled(self, batch: Sequence[Sampled]) -> None:
        self.drawn += batch

    def cut(self) -> bool:
        return False


class Generator:
    """Runs prompts on `runner` together, as a worker's batch would."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self._size, self._steps = runner, runner.spec.block_size, 0

    def generate(self, prompts: list[list[int]], outputs: int, shared: int = 0) -> list[list[int]]:
        """Greedy tokens. `shared`: leading tokens whose blocks all prompts have in common; they are
        computed with the first prompt, and hit by the others."""
        every = self._placed(prompts, outputs, shared)
        for one in every:
            self._runner.open(one.name, 1, one.tokens, 0, b"")
        if shared:
            while not every[0].decodes:
                self._step(every[:1])
            for one in every[1:]:
                one.computed = shared
        while live := [one for one in every if one.left]:
            self._step(live)
        for one in every:
            self._runner.close(one.name, 1)
        return [one.output for one in every]

    def _placed(self, prompts: list[list[int]], outputs: int, shared: int) -> list[Going]:
        """Each prompt's blocks one after the other, as a pool hands them out when it can."""
        prefix = tuple(range(shared // self._size))
        at, every = len(prefix), []
        for i, tokens in enumerate(prompts):
            count = -(-(len(tokens) + outputs) // self._size) - len(prefix)
            blocks = (*prefix, *range(at, at + count))
            every.append(Going(f"r{i}", tokens, blocks, outputs))
            at += count
        return every

    def _step(self, live: Sequence[Going]) -> None:
        """Decode rows first, then prompts up to the budget. Only decode rows: until one ends."""
        rows, room = [], BUDGET
        steps = min(one.left for one in live) if all(one.decodes for one in live) else 1
        for one in sorted(live, key=lambda one: not one.decodes):
            if room:
                rows.append((one, one.row(room)))
                room -= rows[-1][1].count
        self._steps += 1
        heard = Heard()
        done = self._runner.step(Step(self._steps, tuple(row for _, row in rows), steps), heard)
        for one, row in rows:
            one.computed += row.count + done.steps_done - 1
        by_name = {one.name: one for one, _ in rows}
        for drawn in heard.drawn:
            by_name[drawn.request_id].output.append(drawn.token)


def blocks_for(case: Case) -> int:
    return sum(-(-(length + case.outputs) // BLOCK) for length in case.lengths) + 1
