"""A closed loop: so many users, each sending its next request when the last one has ended.

Draws lengths from a seed. Knows nothing of who serves them: it is told that a request ended and
answers with the next arrival.
"""

from __future__ import annotations

import math
from random import Random

from kvasir.core.specs.base import Spec
from kvasir.traces.record import Arrival


class ClosedSpec(Spec):
    """`users` send `requests` in all, lengths uniform in [length_min_share x length, length].

    The first ones come `spread_s` apart; a user waits `think_s` before each.
    """

    users: int
    requests: int
    input_tokens: int
    output_tokens: int
    length_min_share: float = 1.0
    think_s: float = 0.0
    spread_s: float = 0.0


class ClosedLoop:
    """Arrivals of one run: `first()` once, then `again(now)` for each request that ended."""

    def __init__(self, spec: ClosedSpec, seed: int) -> None:
        self._spec = spec
        self._inputs, self._outputs = Random(f"{seed}:input"), Random(f"{seed}:output")
        self.sent = 0

    def first(self) -> list[Arrival]:
        """One arrival a user, in order of time."""
        spec = self._spec
        count = min(spec.users, spec.requests)
        return [self._next(spec.think_s + i * spec.spread_s) for i in range(count)]

    def again(self, now: float) -> Arrival | None:
        """The next request of a user whose last one ended at `now`; None when all are sent."""
        if self.sent >= self._spec.requests:
            return None
        return self._next(now + self._spec.think_s)

    def _next(self, at_s: float) -> Arrival:
        self.sent += 1
        spec = self._spec
        return Arrival(
            at_s,
            _uniform(self._inputs, spec.input_tokens, spec.length_min_share),
            _uniform(self._outputs, spec.output_tokens, spec.length_min_share),
        )


def _uniform(random: Random, most: int, share: float) -> int:
    least = max(1, math.floor(most * share))
    return least + int(random.random() * (most - least + 1))
