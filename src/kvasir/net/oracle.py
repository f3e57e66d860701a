"""The network cost oracle: how long would these bytes take from here to there?

Knows places, its own transfers in flight, switch readings and measured times. Must not know
requests or policy, and reads no clock: `now` is an argument.

    seconds = latency + s * (1 + n) / (B * (1 - c'))      NetKV, arXiv 2606.03910

s: bytes per shard pair. B: what one pair gets on an idle network. n: own transfers in flight, the
larger of those from this source over this tier and those to this destination (incast). c': measured
utilisation of the tier less what own transfers put there, which n counts already.

That is arm `tier`; `self` leaves c' out, `static` n too. Arm `path` takes the narrowest share over
the links of the path instead, with n counted on each, and `exact_maxmin` solves the whole network.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from kvasir.core.ids import WorkerId
from kvasir.core.messages import Location, NetReading
from kvasir.core.specs.topology import TIERS, TelemetrySpec
from kvasir.net.fabric import NODE
from kvasir.net.own import OwnFlows
from kvasir.net.topology import Route, Topology

Arm = Literal["static", "self", "tier", "path", "exact_maxmin"]
Key = TypeVar("Key")
UTILISATION_MAX = 0.95  # a saturated tier still moves: c near 1 is not "no bandwidth"
RATIO_MIN, RATIO_MAX = 0.1, 10.0  # as Mooncake's transfer engine bounds its measured bandwidth
RATIO_WEIGHT = 0.2  # of the newest report in the running mean


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """Seconds of a transfer. [lo, hi] spans the arm's answer and what past transfers suggest.

    `source` says where the bandwidth came from: the arm's name, or `static(stale)` and
    `static(unknown)` when `tier` had no usable reading, `path(stale)` and `path(unknown)` when
    `path` knew of own transfers alone.
    """

    seconds: float
    lo: float
    hi: float
    source: str


class InFlight(msgspec.Struct):
    """Own transfers under one counter."""

    transfers: int = 0
    bytes: int = 0


class _Pair(msgspec.Struct, frozen=True):
    """What is fixed between two workers: `byte_s` is seconds per byte of the whole bundle, of which
    each is counted `crossings` times on each tier's links."""

    route: Route
    tier: int
    latency_s: float
    byte_s: float
    crossings: tuple[float, ...]
    from_key: tuple[WorkerId, int]
    to_key: tuple[WorkerId, bool]


class _Transfer(msgspec.Struct, frozen=True):
    pair: _Pair
    src: WorkerId
    dst: WorkerId
    bytes: int
    started_s: float


class Oracle:
    """Estimates for pairs of known workers. One writer; reads change nothing but a cache."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._telemetry = topology.spec.telemetry or TelemetrySpec()  # none: nothing is read by it
        self._locations: dict[WorkerId, Location] = {}
        self._pairs: dict[tuple[WorkerId, WorkerId], _Pair] = {}
        self._transfers: dict[str, _Transfer] = {}
        self._flows = OwnFlows(topology)
        self._from: dict[tuple[WorkerId, int], InFlight] = {}
        self._to: dict[tuple[WorkerId, bool], InFlight] = {}
        self._measured_at: float | None = None
        self._others: tuple[float | None, ...] = ()
        self._ratios = [1.0] * len(TIERS)

    # --- workers ----------------------------------------------------------------------------------

    def add_worker(self, worker: WorkerId, location: Location) -> None:
        """A worker stands at `location`; what was known under its name before is dropped.

        Raises ConfigError for a location outside the topology.
        """
        self.topology.route(location, location)
        self.remove_worker(worker)
        self._locations[worker] = location

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker and its transfers. An unknown one is ignored."""
        if self._locations.pop(worker, None) is None:
            return
        for name in [n for n, t in self._transfers.items() if worker in (t.src, t.dst)]:
            self.end(name)
        self._pairs = {key: pair for key, pair in self._pairs.items() if worker not in key}

    def location(self, worker: WorkerId) -> Location | None:
        return self._locations.get(worker)

    def tier(self, src: WorkerId, dst: WorkerId) -> int:
        """0 to 3. Raises KeyError for an unknown worker, as `estimate` does."""
        return self._pair(src, dst).tier

    # --- own transfers ----------------------------------------------------------------------------

    def begin(
        self, transfer_id: str, src: WorkerId, dst: WorkerId, nbytes: int, now: float
    ) -> None:
        """A transfer was decided. The same id again replaces it; an unknown worker is ignored."""
        self.end(transfer_id)
        if src not in self._locations or dst not in self._locations:
            return
        pair = self._pair(src, dst)
        self._transfers[transfer_id] = _Transfer(pair, src, dst, nbytes, now)
        self._flows.add(transfer_id, pair.route)
        for counter in (
            self._from.setdefault(pair.from_key, InFlight()),
            self._to.setdefault(pair.to_key, InFlight()),
        ):
            counter.transfers += 1
            counter.bytes += nbytes

    def end(self, transfer_id: str) -> None:
        """A transfer is over, for better or worse. Idempotent; an unknown id is ignored."""
        transfer = self._transfers.pop(transfer_id, None)
        if transfer is None:
            return
        self._flows.remove(transfer_id)
        _less(self._from, transfer.pair.from_key, transfer.bytes)
        _less(self._to, transfer.pair.to_key, transfer.bytes)

    def in_flight(self, src: WorkerId, tier: int) -> InFlight:
        """Own transfers from `src` over `tier`, as a copy."""
        return msgspec.structs.replace(self._from.get((src, tier), InFlight()))

    def inbound(self, dst: WorkerId) -> InFlight:
        """Own transfers to `dst` over any tier, as a copy."""
        found = [self._to.get((dst, local), InFlight()) for local in (False, True)]
        return InFlight(sum(f.transfers for f in found), sum(f.bytes for f in found))

    # --- measurements -----------------------------------------------------------------------------

    def reading(self, reading: NetReading) -> None:
        """Take in switch counters; one older than the last is ignored. A tier without a value, or
        with one below 0, is unknown."""
        if self._measured_at is not None and reading.measured_at < self._measured_at:
            return
        own = self._own_utilisation(reading.measured_at)
        self._measured_at = reading.measured_at
        self._others = tuple(
            min(max(c - mine, 0.0), UTILISATION_MAX) if c >= 0 else None
            for c, mine in zip(reading.utilisation, own, strict=False)
        )

    def _own_utilisation(self, measured_at: float) -> list[float]:
        """What own transfers in flight put on each tier's links during the window that ended then.

        A transfer counts what it can have moved at best, on every link that it crosses.
        """
        window = self._telemetry.period_s
        moved = [0.0] * len(TIERS)
        for transfer in self._transfers.values():
            pair = transfer.pair
            seconds = min(max(measured_at - transfer.started_s, 0.0), window)
            sent = min(float(transfer.bytes), seconds / pair.byte_s)
            for tier, times in enumerate(pair.crossings):
                moved[tier] += times * sent
        capacities = [self.topology.tier_capacity(tier) for tier in range(len(TIERS))]
        return [m / (c * window) if m else 0.0 for m, c in zip(moved, capacities, strict=True)]

    def report(self, src: WorkerId, dst: WorkerId, nbytes: int, seconds: float) -> None:
        """A transfer took `seconds`. Only moves the intervals; unknown workers are ignored."""
        if nbytes <= 0 or src not in self._locations or dst not in self._locations:
            return
        pair = self._pair(src, dst)
        ratio = seconds / (pair.latency_s + nbytes * pair.byte_s)
        ratio = min(max(ratio, RATIO_MIN), RATIO_MAX)
        self._ratios[pair.tier] += RATIO_WEIGHT * (ratio - self._ratios[pair.tier])

    def ratio(self, tier: int) -> float:
        """Measured over static seconds of past transfers of a tier; 1 before the first."""
        return self._ratios[tier]

    # --- the question -----------------------------------------------------------------------------

    def estimate(self, src: WorkerId, dst: WorkerId, nbytes: int, now: float, arm: Arm) -> Estimate:
        """Seconds that `nbytes` (of all shards) from `src` to `dst` would take if sent now.

        Without a reading younger than `telemetry.ttl_s`, `tier` uses the static bandwidth and says
        so; its own share 1 / (1 + n) stays, since n is never stale. No bytes take the latency.
        Raises KeyError for an unknown worker. O(1), except `path`: O(path length), and
        `exact_maxmin`: one solve.
        """
        pair = self._pair(src, dst)
        idle_s = nbytes * pair.byte_s
        moving_s, source = self._moving(pair, nbytes, now, arm) if nbytes else (0.0, arm)
        seconds = pair.latency_s + moving_s
        if not nbytes:
            return Estimate(seconds, seconds, seconds, source)
        learned = (pair.latency_s + idle_s) * self._ratios[pair.tier]
        return Estimate(seconds, min(seconds, learned), max(seconds, learned), source)

    def _moving(self, pair: _Pair, nbytes: int, now: float, arm: Arm) -> tuple[float, str]:
        """Seconds after the latency, and where they come from."""
        idle_s = nbytes * pair.byte_s
        if arm == "static":
            return idle_s, arm
        if arm == "self":
            return idle_s * (1 + self._crowd(pair)), arm
        if arm == "tier":
            free, source = self._free(pair.tier, now)
            return idle_s * (1 + self._crowd(pair)) / free, source
        if arm == "path":
            state = self._trouble(now)
            others = () if state else self._others
            rate = self._flows.bottleneck_rate(pair.route, others)
            return nbytes / rate, f"path({state})" if state else arm
        assert arm == "exact_maxmin", f"no arm {arm!r}"
        return nbytes / self._flows.exact_rate(pair.route), arm

    def _crowd(self, pair: _Pair) -> int:
        out, into = self._from.get(pair.from_key), self._to.get(pair.to_key)
        return max(out.transfers if out else 0, into.transfers if into else 0)

    def _free(self, tier: int, now: float) -> tuple[float, str]:
        """The share of a tier that others leave, and where that is known from."""
        others = self._others[tier] if tier < len(self._others) else None
        if others is None:
            return 1.0, "static(unknown)"
        state = self._trouble(now)
        return (1.0, f"static({state})") if state else (1.0 - others, "tier")

    def _trouble(self, now: float) -> str:
        """What is wrong with the newest reading; "" when it can be used."""
        if self._measured_at is None:
            return "unknown"
        return "stale" if now - self._measured_at > self._telemetry.ttl_s else ""

    def _pair(self, src: WorkerId, dst: WorkerId) -> _Pair:
        pair = self._pairs.get((src, dst))
        if pair is None:
            route = self.topology.route(self._locations[src], self._locations[dst])
            rate = pair_bandwidth(self.topology, route) * route.multiplicity
            pair = _Pair(
                route=route,
                tier=route.tier,
                latency_s=route.latency_s,
                byte_s=1.0 / rate,
                crossings=self._crossings(route),
                from_key=(src, route.tier),
                to_key=(dst, route.tier == NODE),
            )
            self._pairs[src, dst] = pair
        return pair

    def _crossings(self, route: Route) -> tuple[float, ...]:
        """How many links of each tier a byte of the bundle crosses, on average over its pairs."""
        pairs = [0] * len(TIERS)
        for link, count in route.pairs_by_link():
            pairs[self.topology.links[link].tier] += count
        return tuple(count / route.multiplicity for count in pairs)

    def check(self) -> None:
        """Assert that the counters are what the transfers in flight add up to."""
        outs: dict[tuple[WorkerId, int], InFlight] = {}
        ins: dict[tuple[WorkerId, bool], InFlight] = {}
        for transfer in self._transfers.values():
            assert transfer.src in self._locations and transfer.dst in self._locations
            for counter in (
                outs.setdefault(transfer.pair.from_key, InFlight()),
                ins.setdefault(transfer.pair.to_key, InFlight()),
            ):
                counter.transfers += 1
                counter.bytes += transfer.bytes
        assert self._from == outs, f"counted from sources {self._from}, in flight {outs}"
        assert self._to == ins, f"counted to destinations {self._to}, in flight {ins}"
        self._flows.check(self._transfers)
        assert all(RATIO_MIN <= r <= RATIO_MAX for r in self._ratios), self._ratios


def pair_bandwidth(topology: Topology, route: Route) -> float:
    """Bytes per second of one shard pair on an idle network: NetKV's B_tau.

    The tier's cap, and where links are narrower than that for the bundle alone, they.
    """
    narrowest = min(topology.capacities[link] / pairs for link, pairs in route.pairs_by_link())
    return narrowest if route.flow_cap is None else min(route.flow_cap, narrowest)


def _less(counters: dict[Key, InFlight], key: Key, nbytes: int) -> None:
    counter = counters[key]
    counter.transfers -= 1
    counter.bytes -= nbytes
    if not counter.transfers:
        del counters[key]
