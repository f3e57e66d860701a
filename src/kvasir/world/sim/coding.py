"""Coding and decoding in virtual time: seconds of a worker's coder, and bytes that shrink.

Knows rates and ratios, and a part of a transfer as pieces that are coded, sent and decoded side by
side, each stage one piece at a time. Must not know flows or nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvasir.core.codec import CodecRules, Offer
from kvasir.core.ids import WorkerId
from kvasir.world.sim.network import Schedule


class Coders:
    """One coder and one decoder a worker: what comes while they are busy waits."""

    def __init__(self) -> None:
        self._offers: dict[WorkerId, dict[str, Offer]] = {}
        self._free_at: dict[tuple[WorkerId, str], float] = {}

    def boot(self, worker: WorkerId, rules: CodecRules | None) -> None:
        """A new life of a worker, with nothing to do."""
        if rules is not None:
            self._offers[worker] = {offer.name: offer for offer in rules.offers}
            for stage in ("encode", "decode"):
                self._free_at[worker, stage] = 0.0

    def wire_bytes(self, worker: WorkerId, form: str, nbytes: int) -> int:
        return max(1, round(nbytes * self._offers[worker][form].ratio))

    def encoded_at(self, worker: WorkerId, form: str, nbytes: int, now: float) -> float:
        return self._busy(worker, "encode", nbytes / self._offers[worker][form].encode_bytes_s, now)

    def decoded_at(self, worker: WorkerId, form: str, nbytes: int, now: float) -> float:
        return self._busy(worker, "decode", nbytes / self._offers[worker][form].decode_bytes_s, now)

    def _busy(self, worker: WorkerId, stage: str, seconds: float, now: float) -> float:
        done = max(now, self._free_at[worker, stage]) + seconds
        self._free_at[worker, stage] = done
        return done


class Piece(NamedTuple):
    kv_bytes: int
    ready_at: float  # when its KV stands


def pieces(nbytes: int, count: int, started: float, ends_at: float) -> list[Piece]:
    """`nbytes` in `count` equal pieces, whose KV stands one after another up to `ends_at`."""
    share, more = divmod(nbytes, count)
    step_s = (ends_at - started) / count
    return [Piece(share + (i < more), started + step_s * (i + 1)) for i in range(count)]


class Meter:
    """What goes from one worker to another, and the seconds in which something does."""

    __slots__ = ("bytes", "flows", "seconds", "since")

    def __init__(self) -> None:
        self.bytes = self.flows = 0
        self.seconds = self.since = 0.0

    def begin(self, now: float) -> None:
        if not self.flows:
            self.since = now
        self.flows += 1

    def end(self, now: float, nbytes: int) -> None:
        self.flows -= 1
        self.bytes += nbytes
        if not self.flows:
            self.seconds += now - self.since

    def read(self, now: float) -> Read:
        """What was counted since the last time."""
        found = Read(self.bytes, self.seconds + (now - self.since if self.flows else 0.0))
        self.bytes, self.seconds, self.since = 0, 0.0, now
        return found


class Read(NamedTuple):
    bytes: int
    seconds: float


class Way(Protocol):
    """What a coded part needs of the world around it."""

    def flow(self, wire_bytes: int, then: Callable[[], None]) -> None:
        """Send them, after what was given before; `then` at their end, unless the transfer was
        abandoned."""

    def gone(self) -> bool:
        """Whether the transfer was abandoned."""

    def left(self) -> None:
        """All is on the other side, still coded."""

    def over(self) -> None:
        """All is decoded."""


class CodedPart:
    """One `Send` in a form. `wire_bytes` so far."""

    def __init__(
        self, form: str, source: WorkerId, target: WorkerId, coders: Coders, schedule: Schedule,
        clock: Callable[[], float], way: Way,
    ) -> None:  # fmt: skip
        self.form, self.wire_bytes = form, 0
        self._source, self._target, self._coders = source, target, coders
        self._schedule, self._clock, self._way = schedule, clock, way
        self._to_send = self._to_decode = 0

    def start(self, parts: Sequence[Piece]) -> None:
        self._to_send = self._to_decode = len(parts)
        for piece in parts:
            self._then(max(self._clock(), piece.ready_at), lambda piece=piece: self._encode(piece))  # type: ignore[misc]

    def _encode(self, piece: Piece) -> None:
        now = self._clock()
        done = self._coders.encoded_at(self._source, self.form, piece.kv_bytes, now)
        self._then(done, lambda: self._send(piece))

    def _send(self, piece: Piece) -> None:
        wire_bytes = self._coders.wire_bytes(self._source, self.form, piece.kv_bytes)
        self.wire_bytes += wire_bytes
        self._way.flow(wire_bytes, lambda: self._came(piece))

    def _came(self, piece: Piece) -> None:
        self._to_send -= 1
        now = self._clock()
        done = self._coders.decoded_at(self._target, self.form, piece.kv_bytes, now)
        self._then(done, self._decoded)
        if not self._to_send:
            self._way.left()

    def _decoded(self) -> None:
        self._to_decode -= 1
        if not self._to_decode:
            self._way.over()

    def _then(self, at: float, action: Callable[[], None]) -> None:
        def unless_gone() -> None:
            if not self._way.gone():
                action()

        self._schedule(at, unless_gone)
