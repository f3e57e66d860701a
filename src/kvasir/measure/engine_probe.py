"""Times steps of a runner: the same calls that a worker makes, over a grid of shapes.

Knows shapes, a runner and a clock. Must not know what will be fitted to the times, or which engine
it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random
from statistics import median
from typing import Final, NamedTuple

from kvasir.core.effects import Row, Step
from kvasir.core.errors import ConfigError
from kvasir.core.request import Sampling
from kvasir.cost import step
from kvasir.engine.base import Runner, Sampled
from kvasir.measure.fit import Sample, ladder
from kvasir.measure.rounds import Clock, Rounds

Shape = tuple[step.Row, ...]  # new tokens and context of each row

GREEDY: Final = Sampling(temperature=0.0, ignore_eos=True)
DECODE_RUN: Final = 3  # iterations of a decode step; its shape is that of the middle one
CHECKS: Final = 20
WARM_UPS: Final = 3
PROMPT_TOKENS: Final = range(10, 250)  # ids that every vocabulary has, even one of bytes


class Extent(NamedTuple):
    """The largest step of the grid: new tokens, decode rows, and context of any row."""

    tokens: int
    batch: int
    context: int


class Probed(NamedTuple):
    """Medians over `rounds`. `steady`: one step's fastest and slowest round, seconds; None: there
    were no rounds."""

    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    rounds: int
    steady: tuple[float, float] | None


def grid(extent: Extent) -> list[Shape]:
    """Prompts alone, with and without context; decode batches; some of both in one step."""
    tokens = ladder(2, extent.tokens)
    contexts = spread(extent.context)
    shapes: list[Shape] = [((n, 0),) for n in tokens]
    shapes += [((n, c),) for n in tokens[1::3] for c in contexts if n + c <= extent.context]
    shapes += [((1, c - 1),) * b for b in ladder(1, extent.batch) for c in contexts]
    shapes += [
        ((n, 0), *((1, contexts[0]),) * b) for n in tokens[3::3] for b in (2, extent.batch // 2)
    ]
    shapes += [((n // 3, 0),) * 3 for n in tokens[4::3]]
    return list(dict.fromkeys(shapes))


def checks(extent: Extent, seed: int) -> list[Shape]:
    """Steps as a server runs them, off the grid: what a fit is judged by."""
    random = Random(seed)
    shapes: list[Shape] = []
    for i in range(CHECKS):
        rows = random.randint(1, extent.batch)
        decoding = [(1, random.randrange(extent.context)) for _ in range(rows)]
        new = random.randint(2, extent.tokens)
        prompt = (new, random.randint(0, extent.context - new) if i % 4 == 0 else 0)
        kinds = ([prompt], decoding, [prompt, *decoding[: extent.batch // 2]])
        shapes.append(tuple(kinds[i % 3]))
    return list(dict.fromkeys(shapes))


def spread(most: int) -> list[int]:
    """A short, a middle and the longest context."""
    return sorted({max(2, most // 16), max(2, most // 4), most - DECODE_RUN})


class Prober:
    """Runs steps on `runner`, which serves nobody else. KV lies in random places of the cache, each
    row in one run of blocks, as a pool hands them out when it can."""

    def __init__(self, runner: Runner, seed: int, clock: Clock = time.perf_counter) -> None:
        self._runner, self._clock, self._random = runner, clock, Random(seed)
        self._step = 0

    def seconds(self, shape: Shape) -> float:
        """One step; of a decode shape, an iteration in a run of them."""
        self._step += 1
        plain = all(new == 1 for new, _ in shape)
        steps = DECODE_RUN if plain else 1
        rows = self._rows(shape, steps)
        began = self._clock()
        self._runner.step(Step(self._step, rows, steps), QUIET)
        took_s = self._clock() - began
        for row in rows:
            self._runner.close(row.request_id, row.attempt)
        return took_s / steps

    def _rows(self, shape: Shape, steps: int) -> tuple[Row, ...]:
        """Open an attempt for each row. A decode run begins so that its middle has the shape."""
        size = self._runner.spec.block_size
        starts = [max(0, before - steps // 2) for _, before in shape]
        ends = [start + new + steps for (new, _), start in zip(shape, starts, strict=True)]
        blocks = [-(-end // size) for end in ends]
        at = self._random.randrange(self._runner.spec.blocks_count - sum(blocks) + 1)
        rows = []
        for i, ((new, _), start) in enumerate(zip(shape, starts, strict=True)):
            name = f"probe-{self._step}-{i}"
            prompt = self._random.choices(PROMPT_TOKENS, k=start + new)
            self._runner.open(name, 1, prompt, 0, b"")
            table = tuple(range(at, at + blocks[i]))
            at += blocks[i]
            rows.append(
                Row(name, 1, start, new, table, True, True, 0, steps + 1, "", GREEDY)
            )
        return tuple(rows)


def room(extent: Extent, block_size: int) -> int:
    """Blocks that the largest shape of the grid and of the checks needs."""
    row = -(-(extent.context + DECODE_RUN) // block_size)
    return row * (extent.batch + 1)


def probe(
    runner: Runner,
    extent: Extent,
    *,
    rounds: int,
    seconds_max: float,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    stopwatch: Clock | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Probed:
    """Time grid and checks up to `rounds` times, and no new round after `seconds_max`.

    `stopwatch` times the steps, if not `clock`: the CPU time of the thread tells what a step that
    computes on it alone takes on a core of its own, also where others share the core now.

    Raises ConfigError when not even one round fits into `seconds_max`, or for an extent that the
    runner has no memory or context for.
    """
    _fits(runner, extent)
    prober = Prober(runner, seed, stopwatch or clock)
    shapes, held_out = grid(extent), checks(extent, seed)
    times: dict[Shape, list[float]] = {shape: [] for shape in (*shapes, *held_out)}
    reference = shapes[0]
    for _ in range(WARM_UPS):
        prober.seconds(reference)
    visits = Rounds([*times], rounds, seconds_max, seed=seed, clock=clock, progress=progress)
    for shape in visits:
        times[shape].append(prober.seconds(shape))
    steady = (min(times[reference]), max(times[reference]))
    return Probed(_samples(shapes, times), _samples(held_out, times), visits.done, steady)


def _samples(
    shapes: Sequence[Shape], times: dict[Shape, list[float]]
) -> tuple[Sample, ...]:
    return tuple(Sample(shape, median(times[shape])) for shape in shapes)


def _fits(runner: Runner, extent: Extent) -> None:
    spec = runner.spec
    if min(extent) < 2 or extent.tokens > extent.context:
        raise ConfigError(
            f"nothing to time: {extent.tokens} tokens, {extent.batch} rows, context "
            f"{extent.context}",
            next_step="each at least 2, and no more tokens than context",
        )
    if extent.context + DECODE_RUN > spec.context_max:
        raise ConfigError(
            f"context {extent.context} is too long for a model of {spec.context_max} positions",
            next_step=f"--context-max {spec.context_max - DECODE_RUN}",
        )
    if room(extent, spec.block_size) > spec.blocks_count:
        raise ConfigError(
            f"{extent.batch} rows of {extent.context} tokens need "
            f"{room(extent, spec.block_size)} blocks of KV, there are {spec.blocks_count}",
            next_step="a smaller --batch-max or --context-max",
        )


class _Quiet:
    """`engine.base.StepHooks` that hear nothing."""

    def layer_done(self, layer: int) -> None:
        pass

    def sampled(self, batch: Sequence[Sampled]) -> None:
        pass

    def cut(self) -> bool:
        return False


QUIET: Final = _Quiet()
