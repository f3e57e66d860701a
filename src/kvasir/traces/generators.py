"""Synthetic arrivals from a `WorkloadSpec` and a seed: the same pair always gives the same trace.

Everything is drawn through `Random.random()`, whose sequence Python keeps from version to version;
times, lengths and prefixes have a stream each, so that changing one leaves the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from kvasir.core.specs import LengthSpec, WorkloadSpec
from kvasir.traces.record import Arrival, Trace


def generate(spec: WorkloadSpec, block_size: int, seed: int) -> Trace:
    """`spec.requests` arrivals. Prefix sharing shows as `hash_ids` of `block_size` tokens each.

    A share `prefix_share` of the requests starts with the common prefix of one of `prefix_groups`;
    a prompt that is shorter than the prefix shares the blocks that it fills. Without sharing there
    are no `hash_ids`.
    """
    assert block_size > 0
    times = _times(spec, Random(f"{seed}:times"))
    inputs = _lengths(spec.input, Random(f"{seed}:input"))
    outputs = _lengths(spec.output, Random(f"{seed}:output"))
    prefixes = Prefixes(spec, block_size, Random(f"{seed}:prefix"))
    arrivals = []
    for _ in range(spec.requests):
        at_s, tokens, wanted = next(times), next(inputs), next(outputs)
        arrivals.append(Arrival(at_s, tokens, wanted, prefixes.ids(tokens)))
    note = f"{spec.kind} arrivals at {spec.rate:g} requests/s, generated (seed {seed})"
    return Trace(
        name="generated",
        block_size=block_size if prefixes.sharing else None,
        arrivals=tuple(arrivals),
        notes=(note,),
    )


class Prefixes:
    """Block ids of prompts: group g's prefix has the ids from g * prefix blocks on.

    Every other block gets an id that no other prompt has, a partial last block included.
    """

    def __init__(self, spec: WorkloadSpec, block_size: int, random: Random) -> None:
        self._share, self._groups = spec.prefix_share, spec.prefix_groups
        self._block_size, self._random = block_size, random
        self._prefix_blocks = spec.prefix_tokens // block_size
        self._own = self._groups * self._prefix_blocks  # the next id nobody has
        self.sharing = self._share > 0 and self._prefix_blocks > 0

    def ids(self, tokens: int) -> tuple[int, ...]:
        """One id for each block of a prompt of `tokens`; none when nothing is shared at all."""
        if not self.sharing:
            return ()
        shares = self._random.random() < self._share
        first = int(self._random.random() * self._groups) * self._prefix_blocks
        common = min(self._prefix_blocks, tokens // self._block_size) if shares else 0
        rest = -(-tokens // self._block_size) - common
        own, self._own = self._own, self._own + rest
        return (*range(first, first + common), *range(own, own + rest))


def _times(spec: WorkloadSpec, random: Random) -> Iterator[float]:
    """Seconds of each arrival, the first one gap after 0."""
    at_s = 0.0
    while True:
        at_s += (_exponential(random) if spec.kind == "poisson" else 1.0) / spec.rate
        yield at_s


def _lengths(spec: LengthSpec, random: Random) -> Iterator[int]:
    """Lognormal with mean `spec.mean` before clipping: E[exp(N(mu, s))] = exp(mu + s^2 / 2)."""
    mu = math.log(spec.mean) - spec.sigma**2 / 2
    while True:
        drawn = math.exp(mu + spec.sigma * _normal(random)) if spec.sigma else spec.mean
        yield min(max(round(drawn), spec.min), spec.max)


def _exponential(random: Random) -> float:
    return -math.log1p(-random.random())


def _normal(random: Random) -> float:
    """Box and Muller (1958); 1 - u keeps the logarithm off zero."""
    radius = math.sqrt(-2.0 * math.log(1.0 - random.random()))
    return radius * math.cos(math.tau * random.random())
