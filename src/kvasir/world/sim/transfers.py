"""Hand-overs in the simulated world: what `Send`, `Fetch` and `Release` mean in virtual time.

A part that streams with a step leaves as the step's layers complete: its flow starts when the first
layer is done, and the last layer's share leaves when the step is. Answers every `Send` series with
one `SendOver` and every `Fetch` with one `Received`, as a live transport does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvasir.core.effects import Fetch, Send
from kvasir.core.ids import RequestId, WorkerId
from kvasir.core.messages import Location, PrefillReport, Received, SendOver
from kvasir.net.topology import Route
from kvasir.world.sim.network import Schedule, SimNetwork

Key = tuple[RequestId, int]
Tell = Callable[[WorkerId, Received | SendOver], None]


class Running(NamedTuple):
    """A step in virtual time."""

    step: int
    started: float
    ends_at: float


class Transfer:
    """One attempt's KV on its way. `parts` flows or delays are outstanding."""

    __slots__ = (
        "bytes", "fetch", "flows", "last", "parts", "report", "source", "started", "target",
    )  # fmt: skip

    def __init__(self) -> None:
        self.source: WorkerId = ""
        self.target: WorkerId = ""
        self.fetch: Fetch | None = None
        self.bytes = 0
        self.parts = 0
        self.flows: list[int] = []
        self.last = False
        self.report: PrefillReport | None = None
        self.started: float | None = None


class Transfers:
    """All hand-overs. `layers` is how many layers a model's KV is streamed in."""

    def __init__(
        self, network: SimNetwork, schedule: Schedule, locations: dict[WorkerId, Location],
        tell: Tell, layers: int, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._network = network
        self._schedule = schedule
        self._locations = locations
        self._tell = tell
        self._layers = max(layers, 1)
        self._clock = clock
        self._all: dict[Key, Transfer] = {}
        self._streams: dict[tuple[WorkerId, int], list[Send]] = {}

    def fetch(self, now: float, worker: WorkerId, effect: Fetch) -> None:
        transfer = self._all.setdefault((effect.request_id, effect.attempt), Transfer())
        transfer.target, transfer.fetch = worker, effect

    def send(
        self, now: float, worker: WorkerId, effect: Send, running: Running | None = None
    ) -> None:
        """`running`: the step that the worker runs now, if any."""
        transfer = self._all.get((effect.request_id, effect.attempt))
        if transfer is None or transfer.target != effect.to:
            self._tell(worker, SendOver(effect.request_id, effect.attempt, False))
            return
        transfer.source = worker
        transfer.parts += 1
        if running is not None and running.step == effect.step:
            self._stream(effect, running.started, running.ends_at)
            return
        if effect.step is not None:
            self._streams.setdefault((worker, effect.step), []).append(effect)
            return
        transfer.last = transfer.last or effect.last
        transfer.report = effect.report or transfer.report
        key = (effect.request_id, effect.attempt)
        self._flow(key, transfer, effect.bytes, lambda: self._part_over(key, transfer))

    def step_begins(self, now: float, worker: WorkerId, step: int, ends_at: float) -> None:
        """Streams that wait for this step start when its first layer is done."""
        for effect in self._streams.pop((worker, step), ()):
            self._stream(effect, now, ends_at)

    def _stream(self, effect: Send, started: float, ends_at: float) -> None:
        """All layers but the last while the step computes, the last one when it is done."""
        key = (effect.request_id, effect.attempt)
        transfer = self._all.get(key)
        tail = effect.bytes // self._layers

        def begin() -> None:
            self._flow(key, transfer, effect.bytes - tail, wait)

        def wait() -> None:
            self._schedule(max(self._clock(), ends_at), finish)

        def finish() -> None:
            self._flow(key, transfer, tail, lambda: self._part_over(key, transfer))

        first_layer = started + (ends_at - started) / self._layers
        self._schedule(max(self._clock(), first_layer), begin)

    def _flow(
        self, key: Key, transfer: Transfer | None, nbytes: int, then: Callable[[], None]
    ) -> None:
        """Bytes after the path's latency; `then` at their end, unless the transfer is abandoned."""
        if transfer is None or self._all.get(key) is not transfer:
            return
        transfer.bytes += nbytes
        now = self._clock()
        if transfer.started is None:
            transfer.started = now
        route = self._route(key, transfer)

        def begin() -> None:
            if self._all.get(key) is not transfer:
                return
            if nbytes:
                flow = self._network.start(self._clock(), route, nbytes, over)
                transfer.flows.append(flow)
            else:
                over()

        def over() -> None:
            if self._all.get(key) is transfer:
                then()

        self._schedule(now + route.latency_s, begin)

    def _part_over(self, key: Key, transfer: Transfer | None) -> None:
        assert transfer is not None
        transfer.parts -= 1
        if transfer.parts or not transfer.last:
            return
        del self._all[key]
        seconds = self._clock() - (transfer.started or 0.0)
        self._tell(
            transfer.target,
            Received(*key, True, transfer.bytes, seconds, "sim", report=transfer.report),
        )
        self._tell(transfer.source, SendOver(*key, True))

    def release(self, worker: WorkerId, request_id: RequestId, attempt: int) -> None:
        """One side forgets: both learn that it is over."""
        transfer = self._all.get((request_id, attempt))
        if transfer is not None and worker in (transfer.source, transfer.target):
            by_sender = worker == transfer.source
            self._abandon((request_id, attempt), transfer, "released", by_sender=by_sender)

    def worker_died(self, worker: WorkerId) -> None:
        """Connections break; the other side learns it."""
        for key, transfer in list(self._all.items()):
            awaited = transfer.fetch.source if transfer.fetch is not None else ""
            if worker in (transfer.source, transfer.target, awaited):
                self._abandon(key, transfer, "peer lost")
        for stream in [s for s in self._streams if s[0] == worker]:
            del self._streams[stream]

    def _abandon(
        self, key: Key, transfer: Transfer, reason: str, *, by_sender: bool = False
    ) -> None:
        del self._all[key]
        for flow in transfer.flows:
            self._network.stop(self._clock(), flow)
        if transfer.fetch is not None:
            self._tell(transfer.target, Received(*key, False, reason=reason, by_sender=by_sender))
        if transfer.source:
            self._tell(transfer.source, SendOver(*key, False))

    def _route(self, key: Key, transfer: Transfer) -> Route:
        here, there = self._locations[transfer.source], self._locations[transfer.target]
        return self._network.route(here, there, f"{key[0]}/{key[1]}")

    def __len__(self) -> int:
        return len(self._all)
