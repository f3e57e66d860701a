"""Hand-overs in the simulated world: what `Send`, `Fetch` and `Release` mean in virtual time.

A part that streams with a step leaves as the step's layers complete: its flow starts when the first
layer is done, and the last layer's share leaves when the step is. What is coded goes in pieces
(`coding.py`). Answers every `Send` series with one `SendOver`, each part that names a codec with a
`Sent`, and every `Fetch` with one `Received`, as a live transport does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from kvasir.core.codec import RAW, CodecRules, Coded, Sent, pieces_of
from kvasir.core.effects import Fetch, Send
from kvasir.core.ids import RequestId, WorkerId
from kvasir.core.messages import Location, PrefillReport, Received, SendOver
from kvasir.net.topology import Route
from kvasir.world.sim.coding import CodedPart, Coders, Meter, pieces
from kvasir.world.sim.network import Schedule, SimNetwork

Key = tuple[RequestId, int]
Tell = Callable[[WorkerId, Received | SendOver | Sent], None]
STREAMED_PIECES: Final = 8  # of a part that is coded while a step computes it: groups of layers


class Running(NamedTuple):
    """A step in virtual time."""

    step: int
    started: float
    ends_at: float


class Waiting(NamedTuple):
    """Bytes that leave when those before them have."""

    nbytes: int
    then: Callable[[], None]


class Transfer:
    """One attempt's KV on its way. `parts` flows or delays are outstanding."""

    __slots__ = (
        "bytes", "fetch", "flows", "forms", "last", "line", "parts", "report", "source", "started",
        "target", "wire_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.source: WorkerId = ""
        self.target: WorkerId = ""
        self.fetch: Fetch | None = None
        self.bytes = 0
        self.wire_bytes = 0
        self.forms: set[str] = set()
        self.line: deque[Waiting] = deque()  # the first of them is on its way
        self.parts = 0
        self.flows: dict[int, Meter] = {}  # those that go on
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
        self._coders = Coders()
        self._meters: dict[tuple[WorkerId, WorkerId], Meter] = {}

    def boot(self, worker: WorkerId, rules: CodecRules | None) -> None:
        """A new life of a worker, which may code KV."""
        self._coders.boot(worker, rules)

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
        transfer.bytes += effect.bytes
        if running is not None and running.step == effect.step:
            self._leave(effect, running.started, running.ends_at)
            return
        if effect.step is not None:
            self._streams.setdefault((worker, effect.step), []).append(effect)
            return
        transfer.last = transfer.last or effect.last
        transfer.report = effect.report or transfer.report
        if effect.codec not in ("", RAW):
            self._code(effect, pieces_of(effect.bytes), now, now)
            return
        key, over = (effect.request_id, effect.attempt), partial(self._raw_over, effect, transfer)
        if effect.codec:
            self._queue(key, transfer, effect.bytes, over)
        else:
            self._flow(key, transfer, effect.bytes, over)

    def step_begins(self, now: float, worker: WorkerId, step: int, ends_at: float) -> None:
        """Streams that wait for this step start when its first layer is done."""
        for effect in self._streams.pop((worker, step), ()):
            self._leave(effect, now, ends_at)

    def _leave(self, effect: Send, started: float, ends_at: float) -> None:
        """While a step that ends then computes it."""
        if effect.codec in ("", RAW):
            self._stream(effect, started, ends_at)
        else:
            self._code(effect, min(self._layers, STREAMED_PIECES), started, ends_at)

    def _code(self, effect: Send, count: int, started: float, ends_at: float) -> None:
        transfer = self._all.get((effect.request_id, effect.attempt))
        if transfer is None:
            return
        transfer.forms.add(effect.codec)
        way = _Way(self, effect, transfer)
        part = way.part = CodedPart(
            effect.codec, transfer.source, transfer.target, self._coders, self._schedule,
            self._clock, way,
        )  # fmt: skip
        part.start(pieces(effect.bytes, count, started, ends_at))

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
            self._flow(key, transfer, tail, lambda: self._raw_over(effect, transfer))

        first_layer = started + (ends_at - started) / self._layers
        self._schedule(max(self._clock(), first_layer), begin)

    def _queue(
        self, key: Key, transfer: Transfer, nbytes: int, then: Callable[[], None]
    ) -> None:
        """Pieces leave one after another, as over one connection, and the latency counts once."""
        transfer.line.append(Waiting(nbytes, then))
        if len(transfer.line) == 1:
            self._next_piece(key, transfer, latency=transfer.started is None)

    def _next_piece(self, key: Key, transfer: Transfer, *, latency: bool = False) -> None:
        piece = transfer.line[0]

        def over() -> None:
            transfer.line.popleft()
            if transfer.line:
                self._next_piece(key, transfer)
            piece.then()

        self._flow(key, transfer, piece.nbytes, over, latency=latency)

    def _flow(
        self, key: Key, transfer: Transfer | None, nbytes: int, then: Callable[[], None],
        *, latency: bool = True,
    ) -> None:  # fmt: skip
        """Bytes after the path's latency; `then` at their end, unless the transfer is abandoned."""
        if transfer is None or self._all.get(key) is not transfer:
            return
        transfer.wire_bytes += nbytes
        now = self._clock()
        meter = self._meters.setdefault((transfer.source, transfer.target), Meter())
        if transfer.started is None:
            transfer.started = now
        route = self._route(key, transfer)

        def begin() -> None:
            if self._all.get(key) is not transfer:
                return
            if not nbytes:
                then()
                return
            meter.begin(self._clock())
            flow = self._network.start(self._clock(), route, nbytes, lambda: over(flow))
            transfer.flows[flow] = meter

        def over(flow: int) -> None:
            meter.end(self._clock(), nbytes)
            del transfer.flows[flow]
            then()

        self._schedule(now + (route.latency_s if latency else 0.0), begin)

    def _raw_over(self, effect: Send, transfer: Transfer | None) -> None:
        assert transfer is not None
        if effect.codec:
            transfer.forms.add(RAW)
            self._sent(effect, transfer, effect.bytes)
        self._part_over((effect.request_id, effect.attempt), transfer)

    def _sent(self, effect: Send, transfer: Transfer, wire_bytes: int) -> None:
        counted = self._meters[transfer.source, transfer.target].read(self._clock())
        said = Sent(effect.request_id, effect.attempt, effect.first_block, wire_bytes, *counted)
        self._tell(transfer.source, said)

    def _part_over(self, key: Key, transfer: Transfer | None) -> None:
        assert transfer is not None
        transfer.parts -= 1
        if transfer.parts or not transfer.last:
            return
        del self._all[key]
        seconds = self._clock() - (transfer.started or 0.0)
        coded = None
        if transfer.forms - {RAW}:
            coded = Coded("+".join(sorted(transfer.forms)), transfer.wire_bytes)
        self._tell(
            transfer.target,
            Received(
                *key, True, transfer.bytes, seconds, "sim", report=transfer.report, coded=coded
            ),
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
        for flow, meter in transfer.flows.items():
            self._network.stop(self._clock(), flow)
            meter.end(self._clock(), 0)
        transfer.flows.clear()
        if transfer.fetch is not None:
            self._tell(transfer.target, Received(*key, False, reason=reason, by_sender=by_sender))
        if transfer.source:
            self._tell(transfer.source, SendOver(*key, False))

    def _route(self, key: Key, transfer: Transfer) -> Route:
        here, there = self._locations[transfer.source], self._locations[transfer.target]
        return self._network.route(here, there, f"{key[0]}/{key[1]}")

    def __len__(self) -> int:
        return len(self._all)


class _Way:
    """`coding.Way` of one part."""

    part: CodedPart

    def __init__(self, transfers: Transfers, effect: Send, transfer: Transfer) -> None:
        self._all, self._effect, self._transfer = transfers, effect, transfer
        self._key = (effect.request_id, effect.attempt)

    def flow(self, wire_bytes: int, then: Callable[[], None]) -> None:
        self._all._queue(self._key, self._transfer, wire_bytes, then)

    def gone(self) -> bool:
        return self._all._all.get(self._key) is not self._transfer

    def left(self) -> None:
        self._all._sent(self._effect, self._transfer, self.part.wire_bytes)

    def over(self) -> None:
        self._all._part_over(self._key, self._transfer)
