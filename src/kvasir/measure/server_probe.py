"""Times the steps of a server from outside, by requests to its OpenAI endpoints.

Knows lengths, concurrency and when tokens came. Must not know the engine. One prompt at a time
gives TTFT by length, which has a request's own time in it; n streams at once give the gaps between
tokens by batch and context, counted only while all n decode. Prompts are random, so that no prefix
cache has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from statistics import median
from typing import Final, NamedTuple

from kvasir.core.errors import ConfigError
from kvasir.measure.engine_probe import Extent, Probed, spread
from kvasir.measure.fit import Sample, ladder
from kvasir.measure.loadgen import Answer, Target, fire
from kvasir.measure.rounds import Clock, Rounds
from kvasir.measure.shots import random_shots

VOCAB: Final = range(10, 250)  # ids that every vocabulary has, even one of bytes
SHORTEST: Final = 8
GAPS: Final = 16  # that a decode sample should hold at least
CHECKS: Final = 6


class Ask(NamedTuple):
    """`streams` requests at once, each of `prompt` tokens; one stream of one token is a TTFT."""

    streams: int
    prompt: int
    output: int = 1


def asks(extent: Extent) -> list[Ask]:
    """The grid: what is fitted."""
    lengths = ladder(SHORTEST, extent.tokens)
    contexts = [min(c, extent.tokens) for c in spread(extent.context)]
    batches = [*ladder(1, extent.batch)[::2], extent.batch]
    decodes = [Ask(b, c, GAPS) for b in dict.fromkeys(batches) for c in dict.fromkeys(contexts)]
    return [*(Ask(1, n) for n in lengths), *decodes]


def checks(extent: Extent, seed: int) -> list[Ask]:
    """Off the grid: what a fit is judged by."""
    random = Random(seed)
    found = [Ask(1, random.randint(SHORTEST, extent.tokens)) for _ in range(CHECKS)]
    for _ in range(CHECKS):
        streams = random.randint(1, extent.batch)
        found.append(Ask(streams, random.randint(SHORTEST, extent.tokens), GAPS))
    return list(dict.fromkeys(found))


async def probe_server(
    target: Target,
    extent: Extent,
    *,
    rounds: int,
    seconds_max: float,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    progress: Callable[[float], None] = lambda share: None,
) -> Probed:
    """Ask grid and checks up to `rounds` times, and no new round after `seconds_max`.

    Raises ConfigError: a request that fails, not even one round within `seconds_max`, or streams
    that never decode together.
    """
    if extent.tokens <= SHORTEST or extent.batch < 1 or extent.context < extent.tokens:
        raise ConfigError(
            f"nothing to ask: prompts of {SHORTEST} to {extent.tokens} tokens, "
            f"{extent.batch} streams, context {extent.context}",
            next_step="--tokens-max, --batch-max and --context-max with more",
        )
    grid, held_out = asks(extent), checks(extent, seed)
    found: dict[Ask, list[Sample]] = {ask: [] for ask in (*grid, *held_out)}
    prober = _Prober(target, extent.context, seed, clock)
    reference = grid[0]
    await prober.samples(reference)  # warm-up
    visits = Rounds([*found], rounds, seconds_max, seed=seed, clock=clock, progress=progress)
    for ask in visits:
        found[ask] += await prober.samples(ask)
    first = [sample.seconds for sample in found[reference]]
    return Probed(
        _medians(grid, found), _medians(held_out, found), visits.done, (min(first), max(first))
    )


def _medians(group: Sequence[Ask], found: dict[Ask, list[Sample]]) -> tuple[Sample, ...]:
    """One sample for each ask that has any: the median time, at the shape in the middle."""
    many = [sorted(found[ask], key=lambda s: s.seconds) for ask in group]
    return tuple(
        some[len(some) // 2]._replace(seconds=median(s.seconds for s in some))
        for some in many if some
    )  # fmt: skip


class _Prober:
    def __init__(self, target: Target, context_max: int, seed: int, clock: Clock) -> None:
        self._target, self._clock, self._context_max = target, clock, context_max
        self._seed = seed
        self._ttft_s: dict[int, float] = {}  # by prompt length, as last seen
        self._gap_s = 0.0

    async def samples(self, ask: Ask) -> list[Sample]:
        """One sample, or none when the streams never decoded together."""
        self._seed += 1
        output = self._output(ask)
        shots = random_shots(
            ask.streams, input_tokens=ask.prompt, output_tokens=output, vocab=VOCAB,
            text=self._target.endpoint == "chat", seed=self._seed,
        )  # fmt: skip
        answers: list[Answer] = []
        load = await fire(self._target, shots, clock=self._clock, on_answer=answers.append)
        for outcome in load.outcomes:
            if not outcome.ok:
                raise ConfigError(
                    f"a request of {ask.prompt} tokens failed: {outcome.error}",
                    where=self._target.base_url,
                    next_step="a smaller --tokens-max, or kvasir bench to look closer",
                )
        prompt = round(median(o.prompt_tokens for o in load.outcomes))
        if ask.output == 1:
            self._ttft_s[ask.prompt] = seconds = load.outcomes[0].ttft_s
            return [Sample(((prompt, 0),), seconds, request=True)]
        return self._decoded(prompt, [answer.token_times() for answer in answers])

    def _decoded(self, prompt: int, times: list[list[float]]) -> list[Sample]:
        seen = together(times)
        if not seen.gaps:
            return []
        self._gap_s = seconds = median(seen.gaps)
        return [Sample(((1, prompt + seen.output),) * len(times), seconds)]

    def _output(self, ask: Ask) -> int:
        """Enough tokens for the first stream to still decode when the last prompt is through."""
        if ask.output == 1 or not self._gap_s:
            return ask.output
        known = [n for n in self._ttft_s if n >= ask.prompt]
        prefill_s = self._ttft_s[min(known)] if known else max(self._ttft_s.values(), default=0.0)
        wanted = ask.output + int((ask.streams - 1) * prefill_s / self._gap_s)
        return max(ask.output, min(wanted, self._context_max - ask.prompt))


class Together(NamedTuple):
    """Gaps between tokens while all streams decoded, and the mean number of output tokens then."""

    gaps: list[float]
    output: int


def together(times: Sequence[Sequence[float]]) -> Together:
    """`times`: of each stream's tokens. From the last stream's first token to the first one's end.

    The first gap of each stream is left out: another step may have come before it.
    """
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    gaps: list[float] = []
    indices: list[int] = []
    for stream in times:
        for index, (before, after) in enumerate(pairwise(stream)):
            if index and before >= begin and after <= end:
                gaps.append(after - before)
                indices.append(index)
    return Together(gaps, round(sum(indices) / len(indices)) if indices else 0)
