"""Seeded faults: late and lost messages, dying workers, clients that hang up, a bad network.

All randomness of a simulation is here, from one seed; without faults there is none. Knows times and
probabilities, nothing of what the messages say.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import msgspec

from kvasir.core.ids import WorkerId
from kvasir.world.sim.traffic import CrossTraffic, LinkFault


class FaultSpec(msgspec.Struct, frozen=True):
    """Probabilities are per message or per request; seconds are means or bounds.

    `until_s`: no new fault after it, so that a run can come to rest; `links` and `traffic` have
    times of their own.
    """

    loss: float = 0.0
    delay_s_max: float = 0.0
    deaths: int = 0
    down_s: float = 1.0
    cancel: float = 0.0
    cancel_s_max: float = 2.0
    until_s: float = float("inf")
    links: tuple[LinkFault, ...] = ()
    traffic: tuple[CrossTraffic, ...] = ()


class Death(NamedTuple):
    at: float
    worker: WorkerId
    back_at: float


class Faults:
    """One run's faults. Asked in the order of virtual time, so a seed gives one history."""

    def __init__(self, spec: FaultSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed
        self._random = random.Random(seed)

    def lost(self, now: float) -> bool:
        return now < self.spec.until_s and self._random.random() < self.spec.loss

    def delay(self, now: float) -> float:
        """Extra seconds for one message; messages may overtake one another."""
        if now >= self.spec.until_s:
            return 0.0
        return self._random.random() * self.spec.delay_s_max

    def deaths(self, workers: list[WorkerId], span_s: float) -> list[Death]:
        """When which worker dies, and when it is back."""
        found = []
        for _ in range(self.spec.deaths):
            at = self._random.random() * min(span_s, self.spec.until_s)
            back = at + self.spec.down_s * (0.5 + self._random.random())
            found.append(Death(at, self._random.choice(workers), back))
        return sorted(found)

    def hangup(self) -> float | None:
        """Seconds after arrival at which this client leaves; None: it stays."""
        if self._random.random() >= self.spec.cancel:
            return None
        return self._random.random() * self.spec.cancel_s_max
