"""The prefill side of every stream transport: one thread, one connection per receiver.

Knows parts, frames, pace and ends; `medium` knows how bytes travel. Never writes cache memory.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from functools import partial
from typing import TYPE_CHECKING, Final

from kvasir.core.errors import ConfigError, TransferError, WireError
from kvasir.core.units import MIB
from kvasir.transfer.base import WHOLE, Key, OnOver, Shard, Timeline, Trailer
from kvasir.transfer.frames import FRAME_BYTES_LIMIT, Header
from kvasir.transfer.link import Link, Outgoing, Part
from kvasir.transfer.loop import READ, WRITE, Loop
from kvasir.transfer.memory import Ids, Memory
from kvasir.transfer.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvasir.core.ids import BlockId, RequestId
    from kvasir.transfer.base import Planes
    from kvasir.transfer.medium import Medium

FRAME_BYTES_MAX: Final = 1 * MIB
QUEUE_BYTES_MAX: Final = 64 * MIB  # of references: about 8 bytes a block and push
LINKS_MAX: Final = 1024
TIMELINES_MAX: Final = 1024
TURN_BYTES: Final = 4 * MIB  # what one connection may send before others get a turn
PART_BYTES: Final = 256  # what a queued push weighs besides its block ids

log = logging.getLogger("kvasir.transfer")


class StreamSender:
    """`base.Sender` over a medium. `bytes_per_s_max`: cap over all peers; None for none.

    `frame_bytes_max`: payload of one data frame, at least one block of one plane. Raises
    ConfigError for planes or limits that do not fit.
    """

    def __init__(
        self,
        planes: Planes,
        medium: Medium,
        *,
        on_over: OnOver,
        bytes_per_s_max: float | None = None,
        frame_bytes_max: int = FRAME_BYTES_MAX,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        shard: Shard = WHOLE,
    ) -> None:
        self._memory = Memory(planes)
        self._medium = medium
        self._on_over = on_over
        self._shard = shard
        self._pace = Pace(bytes_per_s_max)
        self._frame_bytes = max(
            self._pace.frame_bytes(frame_bytes_max), self._memory.block_bytes_max
        )
        if self._frame_bytes > FRAME_BYTES_LIMIT:
            raise ConfigError(f"frames of {self._frame_bytes} bytes, max {FRAME_BYTES_LIMIT}")
        self._queue_bytes_max = queue_bytes_max
        self._queue_bytes = 0
        self._lock = threading.Lock()  # guards _open_now, _timelines and _queue_bytes
        self._open_now: dict[Key, Outgoing] = {}
        self._timelines: OrderedDict[Key, Timeline] = OrderedDict()
        self._serials = itertools.count(1)
        self._links: dict[str, Link] = {}
        self._loop = Loop(f"kv-send-{medium.kind}", self._on_exit)
        self._loop.start()

    # --- from any thread ---

    def open(self, request_id: RequestId, attempt: int, address: str, deadline_s: float) -> None:
        key = Key(request_id, attempt)
        transfer = Outgoing(key, next(self._serials), address, deadline_s, time.monotonic())
        with self._lock:
            assert key not in self._open_now, f"{key} is already open"
            self._open_now[key] = transfer
        if not self._loop.call(partial(self._start, transfer)):
            with self._lock:
                unheard = self._open_now.pop(key, None)
            if unheard is not None:  # else the thread ended it on its way out
                raise TransferError("the sender is closed")

    def push(
        self,
        request_id: RequestId,
        attempt: int,
        first_block: int,
        blocks: Sequence[BlockId],
        layers: range | int,
    ) -> None:
        assert first_block >= 0
        ids = self._memory.ids(blocks)
        span = range(layers, layers + 1) if isinstance(layers, int) else layers
        assert all(0 <= layer < self._memory.layers for layer in span), f"no such layer: {layers}"
        cost = PART_BYTES + ids.nbytes
        with self._lock:
            transfer = self._open_now.get(Key(request_id, attempt))
            if transfer is None or not ids.size or not span:
                return
            assert not transfer.finished, f"{transfer.key}: push after finish"
            full = self._queue_bytes + cost > self._queue_bytes_max
            self._queue_bytes += 0 if full else cost
        if full:
            self._loop.call(partial(self._end, transfer, False, "queue full"))
        elif not self._loop.call(partial(self._enqueue, transfer, first_block, ids, span, cost)):
            self._settle(cost)

    def finish(self, request_id: RequestId, attempt: int, trailer: Trailer) -> None:
        with self._lock:
            transfer = self._open_now.get(Key(request_id, attempt))
            if transfer is None:
                return
            assert not transfer.finished, f"{transfer.key}: finished twice"
            transfer.finished = True
        self._loop.call(partial(self._enqueue_trailer, transfer, trailer))

    def stop(self, request_id: RequestId, attempt: int, reason: str = "stopped") -> None:
        with self._lock:
            transfer = self._open_now.get(Key(request_id, attempt))
        if transfer is not None:
            self._loop.call(partial(self._end, transfer, False, reason))

    def timeline(self, request_id: RequestId, attempt: int) -> Timeline | None:
        key = Key(request_id, attempt)
        with self._lock:
            transfer = self._open_now.get(key)
            return transfer.timeline() if transfer else self._timelines.get(key)

    def close(self) -> None:
        self._loop.close()

    def check(self) -> None:
        """Assert the invariants, on the thread."""
        self._loop.ask(self._check).result()

    # --- on the thread: transfers ---

    def _start(self, transfer: Outgoing) -> None:
        try:
            link = self._link(transfer.address)
            link.begin(transfer)
        except (OSError, WireError, UnicodeError) as error:
            self._end(transfer, False, f"cannot connect: {error}")
            return
        overdue = partial(self._end, transfer, False, "deadline")
        transfer.timer = self._loop.at(transfer.deadline_s, overdue)
        self._pump(link)

    def _enqueue(
        self, transfer: Outgoing, first_block: int, ids: Ids, layers: range, cost: int
    ) -> None:
        if transfer.over or transfer.link is None:
            self._settle(cost)
            return
        pieces = deque(self._memory.pieces(first_block, ids, layers, self._frame_bytes))
        transfer.layers.update(layers)
        transfer.blocks.update(range(first_block, first_block + len(ids)))
        transfer.link.queue.append(Part(transfer, pieces, cost))
        self._pump(transfer.link)

    def _enqueue_trailer(self, transfer: Outgoing, trailer: Trailer) -> None:
        if transfer.over or transfer.link is None:
            return
        try:
            transfer.link.trail(transfer, trailer)
        except WireError as error:
            self._end(transfer, False, str(error))
            return
        self._pump(transfer.link)

    def _end(self, transfer: Outgoing, ok: bool, reason: str) -> None:
        """The one way out. Nothing of the cache is referenced any more when `on_over` is called."""
        if transfer.over:
            return
        transfer.over = True
        transfer.over_s = time.monotonic()
        if transfer.timer is not None:
            transfer.timer.cancel()
        link = transfer.link
        if link is not None:
            self._settle(link.forget(transfer, "" if ok else reason))
        with self._lock:
            if self._open_now.pop(transfer.key, None) is None:
                return  # `open` raises: the sender closed under it
            self._timelines[transfer.key] = transfer.timeline()
            while len(self._timelines) > TIMELINES_MAX:
                self._timelines.popitem(last=False)
        try:
            self._on_over(*transfer.key, ok, reason)
        except Exception:
            log.exception("on_over failed for %s", transfer.key)
        if link is not None and link.address in self._links:
            self._pump(link)

    def _settle(self, cost: int) -> None:
        with self._lock:
            self._queue_bytes -= cost

    # --- on the thread: connections ---

    def _link(self, address: str) -> Link:
        """The connection to a peer, made on first use. Raises OSError, WireError."""
        link = self._links.get(address)
        if link is None:
            if len(self._links) >= LINKS_MAX:
                raise WireError(f"already {LINKS_MAX} peers")
            sock = self._medium.connect(address)
            try:
                outlet = self._medium.outlet(self._frame_bytes)
            except OSError:
                sock.close()
                raise
            link = Link(address, sock, outlet, self._memory, self._shard, self._on_answer)
            self._links[address] = link
            self._loop.watch(sock, READ | WRITE, partial(self._on_ready, link))
        return link

    def _on_ready(self, link: Link, events: int) -> None:
        try:
            if not link.connected and events & WRITE:
                link.connect_done()
            if link.connected and events & READ:
                link.reader.turn(TURN_BYTES)
        except (OSError, WireError) as error:
            self._drop(link, f"connection lost: {error}")
        self._pump(link)

    def _pump(self, link: Link) -> None:
        """Send what may be sent now; decide what to wait for."""
        if link.closed or not link.connected:
            return
        try:
            throttled = self._send(link)
        except (OSError, WireError) as error:
            self._drop(link, f"connection lost: {error}")
            return
        wants = bool(link.outbox) or (link.has_next() and not throttled)
        self._loop.rewatch(link.sock, READ | WRITE if wants else READ)

    def _send(self, link: Link) -> bool:
        """One turn of sending. True when only the cap holds the next frame back."""
        budget = TURN_BYTES
        while budget > 0:
            if not link.outbox:
                if not link.has_next():
                    return False
                if link.next_is_data():
                    wait_until_s = self._pace.wait_until_s(time.monotonic())
                    if wait_until_s is not None:
                        self._wait(link, wait_until_s)
                        return True
                loaded = link.load_next(self._settle)
                self._pace.spend(time.monotonic(), loaded)
                budget -= loaded
            if not link.flush():
                return False
        return False

    def _wait(self, link: Link, until_s: float) -> None:
        if not link.waiting:
            link.waiting = True
            self._loop.at(until_s, partial(self._wait_over, link))

    def _wait_over(self, link: Link) -> None:
        link.waiting = False
        self._pump(link)

    def _on_answer(self, link: Link, header: Header, text: str) -> None:
        """An ack or a nack. One for a transfer that is over already comes too late: ignored."""
        transfer = link.transfers.get(header.serial)
        if transfer is None or transfer.key != header.key:
            return
        if text:
            self._end(transfer, False, text)
        elif transfer.trailed:
            self._end(transfer, True, "")
        else:
            raise WireError("an ack before the trailer")

    def _drop(self, link: Link, reason: str) -> None:
        """The connection is of no more use: everything on it fails."""
        if link.closed:
            return
        del self._links[link.address]
        self._loop.unwatch(link.sock)
        link.close()
        for transfer in list(link.transfers.values()):
            self._end(transfer, False, reason)

    def _on_exit(self) -> None:
        for transfer in list(self._open_now.values()):
            self._end(transfer, False, "closed")
        for link in list(self._links.values()):
            self._drop(link, "closed")

    def _check(self) -> None:
        with self._lock:
            assert 0 <= self._queue_bytes <= self._queue_bytes_max
            assert all(not t.over for t in self._open_now.values())
        for link in self._links.values():
            link.check()
        waiting = sum(link.queue_cost() for link in self._links.values())
        assert waiting <= self._queue_bytes, "the queue weighs more than its account says"
