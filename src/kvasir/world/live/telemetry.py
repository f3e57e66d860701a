"""Switch counters of a real network as readings: files that count bytes, read each period.

Knows links, files and the clock. Must not know requests or who listens; the simulator's counterpart
is `world/sim/telemetry.py`, and both say a tier's utilisation in the same sense.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.messages import NetReading
from kvasir.core.specs import TopologySpec
from kvasir.core.specs.topology import TIERS, TelemetrySpec
from kvasir.net.topology import Topology

UNKNOWN = -1.0


class Counters:
    """Bytes by link, and what they say of tiers: the share of all links' capacity, both ways, that
    was used since the last reading.

    A tier is unknown while one of its links has no counter, or one cannot be read or went back:
    half of a tier's links would say too little of it. Raises ConfigError for a link that is not
    there.
    """

    def __init__(self, topology: Topology, paths: Mapping[str, str]) -> None:
        names = {link.name: i for i, link in enumerate(topology.links)}
        for name in paths:
            if name not in names:
                where = "topology.telemetry.counters"
                raise ConfigError(
                    f"no link {name!r}", where=where, nearest=nearest(name, names)
                )  # fmt: skip
        self._files = [Path(paths[link.name]) if link.name in paths else None
                       for link in topology.links]  # fmt: skip
        self._tiers = [link.tier for link in topology.links]
        self._capacities = [topology.tier_capacity(tier) for tier in range(len(TIERS))]
        self._last: list[int | None] = [None] * len(self._files)
        self._last_s = 0.0

    def read(self, now: float) -> tuple[float, ...]:
        """Utilisation by tier since the last call, in [0, 1], or UNKNOWN."""
        counts = [_bytes_in(path) if path is not None else None for path in self._files]
        moved = [0.0] * len(TIERS)
        known = [capacity > 0 for capacity in self._capacities]
        for tier, before, after in zip(self._tiers, self._last, counts, strict=True):
            if before is None or after is None or after < before:
                known[tier] = False
            else:
                moved[tier] += after - before
        seconds = now - self._last_s
        self._last, self._last_s = counts, now
        return tuple(
            min(sent / (capacity * seconds), 1.0) if sure and seconds > 0 else UNKNOWN
            for sent, capacity, sure in zip(moved, self._capacities, known, strict=True)
        )


class Telemetry:
    """A reading to `tell` each period, from `start` to `close`; none where no counter is named."""

    def __init__(self, topology: TopologySpec, tell: Callable[[NetReading], None]) -> None:
        self._spec = topology.telemetry or TelemetrySpec()
        paths = self._spec.counters
        self._counters = Counters(Topology(topology), paths) if paths else None
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._counters is not None:
            self._counters.read(time.monotonic())
            self._timer = self._loop.call_later(self._spec.period_s, self._due, self._counters)

    def _due(self, counters: Counters) -> None:
        now = time.monotonic()
        self._tell(NetReading(now, counters.read(now)))
        self._timer = self._loop.call_later(self._spec.period_s, self._due, counters)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _bytes_in(path: Path) -> int | None:
    """None: it cannot be read now, or holds no number."""
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):
        return None
