"""Several streams side by side for one pair of workers, each with a thread and a connection of its
own at either end: one core copies into or out of a socket at a few GB/s, a network may do more.

Layer l goes over stream l modulo their number. Knows the contract of `base`, and ends that keep it;
a transfer is over when it is over on every stream, and fails on all when it fails on one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from kvasir.transfer.base import Key, Timeline

if TYPE_CHECKING:
    from kvasir.core.ids import BlockId, RequestId
    from kvasir.transfer.base import (
        OnOver,
        OnReceived,
        Planes,
        ReceiveResult,
        Trailer,
    )
    from kvasir.transfer.receiver import StreamReceiver
    from kvasir.transfer.sender import StreamSender

BETWEEN: Final = " "  # an address of several streams: theirs, in order


def dealt(planes: Planes, streams: int) -> list[Planes]:
    """Each stream's layers; no stream is without."""
    return [planes[i::streams] for i in range(min(streams, len(planes)))]


def share(layers: range, stream: int, streams: int) -> range:
    """Which of its own layers a stream has of `layers`, a range without gaps."""
    return range(
        (layers.start - stream + streams - 1) // streams,
        (layers.stop - stream + streams - 1) // streams,
    )


@dataclass(slots=True)
class Waits:
    """A transfer that is not over on `left` streams. `found`: what others said."""

    left: int
    reason: str = ""
    found: list[ReceiveResult] = field(default_factory=list)


class StripedSender:
    """`base.Sender`. `make(planes, on_over)` makes the end of one stream."""

    def __init__(
        self, planes: Planes, streams: int, make: Callable[[Planes, OnOver], StreamSender],
        on_over: OnOver,
    ) -> None:
        self._lock = threading.Lock()
        self._waits: dict[Key, Waits] = {}
        self._on_over = on_over
        parts = dealt(planes, streams)
        self._ends = [make(part, partial(self._over, i)) for i, part in enumerate(parts)]

    def open(self, request_id: RequestId, attempt: int, address: str, deadline_s: float) -> None:
        """A peer with another number of streams ends the transfer, not the worker."""
        addresses = address.split(BETWEEN)
        if len(addresses) != len(self._ends):
            reason = f"cannot connect: {len(self._ends)} streams here, {len(addresses)} at the peer"
            self._on_over(request_id, attempt, False, reason)
            return
        key = Key(request_id, attempt)
        with self._lock:
            self._waits[key] = Waits(len(self._ends))
        try:
            for end, one in zip(self._ends, addresses, strict=True):
                end.open(request_id, attempt, one, deadline_s)
        except BaseException:
            with self._lock:
                del self._waits[key]  # nobody hears of those that were opened
            self.stop(request_id, attempt)
            raise

    def push(
        self,
        request_id: RequestId,
        attempt: int,
        first_block: int,
        blocks: Sequence[BlockId],
        layers: range | int,
        coding: str = "",
        *,
        tell: bool = False,
    ) -> None:
        assert not coding and not tell, "several streams carry KV as it is"
        span = range(layers, layers + 1) if isinstance(layers, int) else layers
        for i, end in enumerate(self._ends):
            if mine := share(span, i, len(self._ends)):
                end.push(request_id, attempt, first_block, blocks, mine)

    def finish(self, request_id: RequestId, attempt: int, trailer: Trailer) -> None:
        for end in self._ends:
            end.finish(request_id, attempt, trailer)

    def stop(self, request_id: RequestId, attempt: int, reason: str = "stopped") -> None:
        for end in self._ends:
            end.stop(request_id, attempt, reason)

    def timeline(self, request_id: RequestId, attempt: int) -> Timeline | None:
        found = [t for end in self._ends if (t := end.timeline(request_id, attempt)) is not None]
        if len(found) < len(self._ends):
            return None
        firsts = [t.first_frame_s for t in found if t.first_frame_s is not None]
        lasts = [t.last_frame_s for t in found if t.last_frame_s is not None]
        overs = [t.over_s for t in found if t.over_s is not None]
        return Timeline(
            min(t.opened_s for t in found), min(firsts, default=None), max(lasts, default=None),
            max(overs) if len(overs) == len(found) else None, sum(t.bytes for t in found),
        )  # fmt: skip

    def close(self) -> None:
        for end in self._ends:
            end.close()

    def check(self) -> None:
        """Assert the invariants of every stream."""
        for end in self._ends:
            end.check()

    def _over(
        self, stream: int, request_id: RequestId, attempt: int, ok: bool, reason: str
    ) -> None:
        key = Key(request_id, attempt)
        with self._lock:
            waits = self._waits.get(key)
            if waits is None:
                return
            waits.left -= 1
            first = not ok and not waits.reason
            if first:
                waits.reason = reason
            last = not waits.left
            if last:
                del self._waits[key]
        if first:
            for i, end in enumerate(self._ends):
                if i != stream:
                    end.stop(request_id, attempt, reason)
        if last:
            self._on_over(request_id, attempt, not waits.reason, waits.reason)


class StripedReceiver:
    """`base.Receiver`. `make(planes, on_received)` makes the end of one stream."""

    def __init__(
        self, planes: Planes, streams: int, make: Callable[[Planes, OnReceived], StreamReceiver],
        on_received: OnReceived,
    ) -> None:
        self._lock = threading.Lock()
        self._waits: dict[Key, Waits] = {}
        self._on_received = on_received
        parts = dealt(planes, streams)
        self._ends = [make(part, partial(self._received, i)) for i, part in enumerate(parts)]

    @property
    def addresses(self) -> tuple[str, ...]:
        return (BETWEEN.join(end.addresses[0] for end in self._ends),)

    def expect(
        self,
        request_id: RequestId,
        attempt: int,
        first_block: int,
        blocks: Sequence[BlockId],
        layers_count: int,
        deadline_s: float,
    ) -> None:
        key = Key(request_id, attempt)
        with self._lock:
            self._waits[key] = Waits(len(self._ends))
        try:
            for i, end in enumerate(self._ends):
                mine = len(share(range(layers_count), i, len(self._ends)))
                end.expect(request_id, attempt, first_block, blocks, mine, deadline_s)
        except BaseException:
            with self._lock:
                del self._waits[key]
            self.forget(request_id, attempt)
            raise

    def forget(self, request_id: RequestId, attempt: int, reason: str = "released") -> None:
        for end in self._ends:
            end.forget(request_id, attempt, reason)

    def close(self) -> None:
        for end in self._ends:
            end.close()

    def check(self) -> None:
        """Assert the invariants of every stream."""
        for end in self._ends:
            end.check()

    def _received(self, stream: int, result: ReceiveResult) -> None:
        key = Key(result.request_id, result.attempt)
        with self._lock:
            waits = self._waits.get(key)
            if waits is None:
                return
            waits.left -= 1
            waits.found.append(result)
            first = not result.ok and not waits.reason
            if first:
                waits.reason = result.reason
            last = not waits.left
            if last:
                del self._waits[key]
        if first:
            for i, end in enumerate(self._ends):
                if i != stream:
                    end.forget(*key, result.reason)
        if last:
            self._on_received(joined(waits))


def joined(waits: Waits) -> ReceiveResult:
    """One result of all streams'; the trailer is the same on each."""
    found = waits.found
    return replace(
        found[0], ok=not waits.reason, reason=waits.reason, bytes=sum(r.bytes for r in found),
        seconds=max(r.seconds for r in found),
        transport=next((r.transport for r in found if r.transport), ""),
    )  # fmt: skip
