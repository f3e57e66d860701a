"""Synthetic arrivals from a `WorkloadSpec` and a seed: the same pair always gives the same trace.

Everything is drawn through `Random.random()`, whose sequence Python keeps from version to version;
times, lengths, prefixes, adapters and turns have a stream each, so that changing one leaves the
others.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, count, islice
from random import Random
from typing import Final

from kvasir.core.errors import TraceError
from kvasir.core.specs import LengthSpec, WorkloadSpec
from kvasir.traces.record import Arrival, Trace

ZIPF_STEPS: Final = 40
ZIPF_EXPONENT_MAX: Final = 16.0


def generate(spec: WorkloadSpec, block_size: int, seed: int) -> Trace:
    """`spec.requests` arrivals. Prefix sharing shows as `hash_ids` of `block_size` tokens each.

    A share `prefix_share` of the requests, or sessions, starts with the common prefix of one of
    `prefix_groups`; a prompt that is shorter than the prefix shares the blocks that it fills.
    Without sharing there are no `hash_ids`. Raises TraceError for a mean that no Zipf law has.
    """
    assert block_size > 0
    drawn = _Draws(spec, block_size, seed)
    arrivals = _sessions(spec, drawn, seed) if spec.turns > 1 else _singles(spec, drawn)
    note = f"{spec.kind} arrivals at {spec.rate:g} requests/s, generated (seed {seed})"
    return Trace(
        name="generated",
        block_size=block_size if drawn.prefixes.sharing else None,
        arrivals=tuple(islice(arrivals, spec.requests)),
        notes=(note,),
    )


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Seconds of arrivals at `rate` per second, without end."""
    return _times(WorkloadSpec(rate=rate), Random(f"{seed}:times"), rate)


class _Draws:
    """The streams of one trace."""

    def __init__(self, spec: WorkloadSpec, block_size: int, seed: int) -> None:
        self.times = _times(spec, Random(f"{seed}:times"), spec.rate / spec.turns)
        self.inputs = _lengths(spec.input, Random(f"{seed}:input"))
        self.outputs = _lengths(spec.output, Random(f"{seed}:output"))
        self.prefixes = Prefixes(spec, block_size, Random(f"{seed}:prefix"))
        self.adapters = _adapters(spec, Random(f"{seed}:adapter"))


def _singles(spec: WorkloadSpec, drawn: _Draws) -> Iterator[Arrival]:
    for at_s in drawn.times:
        tokens, wanted = next(drawn.inputs), next(drawn.outputs)
        ids = drawn.prefixes.ids(tokens)
        yield Arrival(at_s, tokens, wanted, ids, adapter=next(drawn.adapters))


def _sessions(spec: WorkloadSpec, drawn: _Draws, seed: int) -> Iterator[Arrival]:
    """In order of time: a session's turns wait in a heap until no session can begin before them."""
    random = Random(f"{seed}:turns")
    waiting: list[tuple[float, int, Arrival]] = []
    serial = count()
    for number, begins in enumerate(drawn.times):
        while waiting and waiting[0][0] <= begins:
            yield heapq.heappop(waiting)[-1]
        for turn in _turns(spec, drawn, random, begins, f"s{number}"):
            heapq.heappush(waiting, (turn.at_s, next(serial), turn))


def _turns(
    spec: WorkloadSpec, drawn: _Draws, random: Random, at_s: float, session: str
) -> Iterator[Arrival]:
    """Their number is geometric. Full blocks of a prompt start the next one; the answer and the new
    tokens follow."""
    tokens, adapter = next(drawn.inputs), next(drawn.adapters)
    ids = drawn.prefixes.ids(tokens)
    while True:
        wanted = next(drawn.outputs)
        yield Arrival(at_s, tokens, wanted, ids, session, adapter)
        more = tokens + wanted + next(drawn.inputs)
        if random.random() < 1 / spec.turns or more > spec.context_max:
            return
        at_s += spec.think_s * _exponential(random)
        ids = drawn.prefixes.extended(ids, tokens, more)
        tokens = more


def _adapters(spec: WorkloadSpec, random: Random) -> Iterator[str | None]:
    while True:
        drawn = int(random.random() * spec.adapters)
        yield f"adapter-{drawn}" if spec.adapters else None


class Prefixes:
    """Block ids of prompts: group g's prefix has the ids from g * prefix blocks on.

    Every other block gets an id that no other prompt has, a partial last block included.
    """

    def __init__(self, spec: WorkloadSpec, block_size: int, random: Random) -> None:
        self._share, self._groups = spec.prefix_share, spec.prefix_groups
        self._block_size, self._random = block_size, random
        self._prefix_blocks = spec.prefix_tokens // block_size
        self._own = self._groups * self._prefix_blocks  # the next id nobody has
        self.sharing = spec.turns > 1 or (self._share > 0 and self._prefix_blocks > 0)

    def ids(self, tokens: int) -> tuple[int, ...]:
        """One id for each block of a prompt of `tokens`; none when nothing is shared at all."""
        if not self.sharing:
            return ()
        shares = self._random.random() < self._share
        first = int(self._random.random() * self._groups) * self._prefix_blocks
        common = min(self._prefix_blocks, tokens // self._block_size) if shares else 0
        return self._fresh(tuple(range(first, first + common)), tokens)

    def extended(self, ids: tuple[int, ...], held: int, tokens: int) -> tuple[int, ...]:
        """Of a prompt of `tokens` that starts with the `held` tokens that `ids` name."""
        return self._fresh(ids[: held // self._block_size], tokens)

    def _fresh(self, common: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        rest = -(-tokens // self._block_size) - len(common)
        own, self._own = self._own, self._own + rest
        return (*common, *range(own, own + rest))


# --- times ----------------------------------------------------------------------------------------


def _times(spec: WorkloadSpec, random: Random, rate: float) -> Iterator[float]:
    """Seconds of each arrival, the first one gap after 0."""
    if spec.kind == "on_off":
        yield from _on_off(spec, random, rate)
        return
    at_s = 0.0
    while True:
        at_s += _gap(spec, random) / rate
        yield at_s


def _gap(spec: WorkloadSpec, random: Random) -> float:
    """Of mean 1."""
    if spec.kind == "gamma":
        return _gamma(random, spec.burstiness) / spec.burstiness
    return _exponential(random) if spec.kind == "poisson" else 1.0


def _on_off(spec: WorkloadSpec, random: Random, rate: float) -> Iterator[float]:
    """Interrupted Poisson process: time counts while it is on; silences are put in between."""
    inside = rate * (spec.on_s + spec.off_s) / spec.on_s
    at_s = 0.0
    left_s = spec.on_s * _exponential(random)
    while True:
        gap_s = _exponential(random) / inside
        while gap_s > left_s:
            gap_s -= left_s
            at_s += left_s + spec.off_s * _exponential(random)
            left_s = spec.on_s * _exponential(random)
        left_s -= gap_s
        at_s += gap_s
        yield at_s


# --- lengths --------------------------------------------------------------------------------------


def _lengths(spec: LengthSpec, random: Random) -> Iterator[int]:
    """Lognormal with mean `spec.mean` before clipping: E[exp(N(mu, s))] = exp(mu + s^2 / 2)."""
    if spec.kind == "zipf":
        yield from _zipf(spec, random)
        return
    mu = math.log(spec.mean) - spec.sigma**2 / 2
    varies = spec.kind == "lognormal" and spec.sigma
    while True:
        drawn = math.exp(mu + spec.sigma * _normal(random)) if varies else spec.mean
        yield min(max(round(drawn), spec.min), spec.max)


def _zipf(spec: LengthSpec, random: Random) -> Iterator[int]:
    """By inversion of the summed weights."""
    values = range(spec.min, spec.max + 1)
    exponent = _zipf_exponent(values, spec.mean)
    sums = list(accumulate(float(n) ** -exponent for n in values))
    while True:
        yield values[bisect_left(sums, random.random() * sums[-1])]


def _zipf_exponent(values: range, mean: float) -> float:
    """Bisection: the mean falls as the exponent grows, from the middle of `values` on."""
    if not values or not values[0] < mean <= (values[0] + values[-1]) / 2:
        raise TraceError(
            f"no Zipf law over [{values.start}, {values.stop - 1}] has a mean of {mean:g}",
            next_step="a mean above min and up to the middle of min and max",
        )
    low, high = 0.0, ZIPF_EXPONENT_MAX
    for _ in range(ZIPF_STEPS):
        middle = (low + high) / 2
        weights = [float(n) ** -middle for n in values]
        if math.fsum(map(float.__mul__, weights, map(float, values))) > mean * math.fsum(weights):
            low = middle
        else:
            high = middle
    return low


# --- draws ----------------------------------------------------------------------------------------


def _exponential(random: Random) -> float:
    return -math.log1p(-random.random())


def _normal(random: Random) -> float:
    """Box and Muller (1958); 1 - u keeps the logarithm off zero."""
    radius = math.sqrt(-2.0 * math.log(1.0 - random.random()))
    return radius * math.cos(math.tau * random.random())


def _gamma(random: Random, shape: float) -> float:
    """Marsaglia and Tsang (2000); a shape below 1 is one above, times U ** (1 / shape)."""
    if shape < 1:
        return _gamma(random, shape + 1) * math.pow(1.0 - random.random(), 1 / shape)
    d = shape - 1 / 3
    while True:
        x = _normal(random)
        v = (1 + x / math.sqrt(9 * d)) ** 3
        if v > 0 and math.log(1.0 - random.random()) < x * x / 2 + d - d * v + d * math.log(v):
            return d * v
