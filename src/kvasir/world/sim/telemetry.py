"""Switch counters on their way to the conductor: read each period, late, perhaps lost, not exact.

Knows the network's counters and virtual time. Must not know who listens, nor show them anything but
readings: what the conductor sees is a log of events, never the network's state.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from kvasir.core.messages import NetReading
from kvasir.core.specs.topology import TelemetrySpec
from kvasir.world.sim.network import Schedule, SimNetwork


class Telemetry:
    """Reads `network` from now on for ever; `tell` gets each reading when it arrives.

    `measured_at` of a reading is when the counters were read. Errors and losses come from `seed`.
    """

    def __init__(
        self, spec: TelemetrySpec, network: SimNetwork, schedule: Schedule,
        tell: Callable[[NetReading], None], seed: int,
    ) -> None:  # fmt: skip
        self._spec = spec
        self._network = network
        self._schedule = schedule
        self._tell = tell
        self._random = random.Random(f"{seed} telemetry")
        schedule(spec.period_s, partial(self._read, spec.period_s))

    def _read(self, now: float) -> None:
        used = self._network.utilisation(now)  # a lost reading's window is over all the same
        if not (self._spec.loss and self._random.random() < self._spec.loss):
            reading = NetReading(now, tuple(self._seen(c) for c in used))
            if self._spec.delay_s:
                self._schedule(now + self._spec.delay_s, partial(self._tell, reading))
            else:
                self._tell(reading)
        then = now + self._spec.period_s
        self._schedule(then, partial(self._read, then))

    def _seen(self, utilisation: float) -> float:
        """What the counters say of a tier, in [0, 1]."""
        spec = self._spec
        if not spec.error and not spec.bias:
            return utilisation
        off = spec.bias + self._random.uniform(-spec.error, spec.error)
        return min(max(utilisation + off, 0.0), 1.0)
