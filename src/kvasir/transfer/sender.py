"""The prefill side of every stream transport: one thread, one connection per receiver.

Knows parts, frames, pace and ends; `medium` knows how bytes travel. Never writes cache memory.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Final

from kvasir.core.codec import Sent
from kvasir.core.errors import ConfigError, TransferError, WireError
from kvasir.core.units import MIB
from kvasir.transfer.base import WHOLE, Key, OnOver, OnSent, Shard, Timeline, Trailer
from kvasir.transfer.frames import FRAME_BYTES_LIMIT, Header
from kvasir.transfer.link import Link, Outgoing, Push, unsent
from kvasir.transfer.loop import READ, WRITE, Loop
from kvasir.transfer.memory import Memory
from kvasir.transfer.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvasir.core.ids import BlockId, RequestId
    from kvasir.transfer.base import KvForm, Planes
    from kvasir.transfer.coder import Coder
    from kvasir.transfer.medium import Medium

FRAME_BYTES_MAX: Final = 1 * MIB
QUEUE_BYTES_MAX: Final = 64 * MIB  # of references: about 8 bytes a block and push
LINKS_MAX: Final = 1024
TIMELINES_MAX: Final = 1024
TURN_BYTES: Final = 4 * MIB  # what one connection may send before others get a turn
RESUME_S: Final = 2.0  # without a connection; the receiver waits a little longer
RESUME_PAUSE_S: Final = 0.05
POLL_S: Final = 0.0005
DRAIN_S: Final = 0.002
ANSWER_WAIT_S: Final = 2.0  # a peer that hangs: what it reads later has a wrong checksum
PART_BYTES: Final = 256  # what a queued push weighs besides its block ids

log = logging.getLogger("kvasir.transfer")


def coder_for(memory: Memory, form: KvForm | None) -> Coder | None:
    """The codec is imported where it is used. Raises ConfigError for KV that has no coded form."""
    if form is None:
        return None
    from kvasir.transfer.coder import Coder

    return Coder(memory, form)


class StreamSender:
    """`base.Sender` over media, one for each scheme of address. `bytes_per_s_max`: cap over all
    peers; None for none.

    `frame_bytes_max`: payload of one data frame, at least one block of one plane. Raises
    ConfigError for planes or limits that do not fit.
    """

    def __init__(
        self,
        planes: Planes,
        media: Sequence[Medium],
        *,
        on_over: OnOver,
        bytes_per_s_max: float | None = None,
        frame_bytes_max: int = FRAME_BYTES_MAX,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        shard: Shard = WHOLE,
        form: KvForm | None = None,
        on_sent: OnSent | None = None,
    ) -> None:
        self._memory = Memory(planes)
        self._coder = coder_for(self._memory, form)
        self._on_sent = on_sent
        self._media: dict[str, Medium] = {medium.kind: medium for medium in media}
        self._on_over = on_over
        self._shard = shard
        self._pace = Pace(bytes_per_s_max)
        self._frame_bytes = max(frame_bytes_max, self._memory.block_bytes_max)
        if self._frame_bytes > FRAME_BYTES_LIMIT:
            raise ConfigError(f"frames of {self._frame_bytes} bytes, max {FRAME_BYTES_LIMIT}")
        self._queue_bytes_max = queue_bytes_max
        self._queue_bytes = 0
        self._lock = threading.Lock()  # guards _open_now, _timelines and _queue_bytes
        self._open_now: dict[Key, Outgoing] = {}
        self._timelines: OrderedDict[Key, Timeline] = OrderedDict()
        self._serials = itertools.count(1)
        self._links: dict[str, Link] = {}
        self._loop = Loop("kv-send", self._on_exit)
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
        coding: str = "",
        *,
        tell: bool = False,
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
            push = Push(first_block, ids, span, coding, tell)
            full = self._queue_bytes + cost > self._queue_bytes_max
            if not full:
                self._queue_bytes += cost
                transfer.cost += cost
        if full:
            self._loop.call(partial(self._end, transfer, False, "queue full"))
        else:
            self._loop.call(partial(self._enqueue, transfer, push))

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
        if self._coder is not None:
            self._coder.close()

    def check(self) -> None:
        """Assert the invariants, on the thread."""
        self._loop.ask(self._check).result()

    # --- on the thread: transfers ---

    def _start(self, transfer: Outgoing) -> None:
        overdue = partial(self._end, transfer, False, "deadline")
        transfer.timer = self._loop.at(transfer.deadline_s, overdue)
        try:
            link = self._link(transfer.address)
            link.begin(transfer)
        except (OSError, WireError, UnicodeError) as error:
            self._over(transfer, False, f"cannot connect: {error}")
            return
        self._pump(link)

    def _enqueue(self, transfer: Outgoing, push: Push) -> None:
        if transfer.closing:
            return
        transfer.pushed.append(push)
        if transfer.link is not None:  # else all is queued when there is a connection again
            transfer.link.push(transfer, push)
            self._pump(transfer.link)

    def _enqueue_trailer(self, transfer: Outgoing, trailer: Trailer) -> None:
        if transfer.closing:
            return
        transfer.trailer = trailer
        if transfer.link is None:
            return
        try:
            transfer.link.trail(transfer, trailer)
        except WireError as error:
            self._end(transfer, False, str(error))
            return
        self._pump(transfer.link)

    def _end(self, transfer: Outgoing, ok: bool, reason: str) -> None:
        """Send nothing more for it. What the peer may still read is kept until it answers."""
        if transfer.closing:
            return
        link = transfer.link
        if ok or link is None or not transfer.begun or not link.outlet.lends:
            self._over(transfer, ok, reason)
            return
        transfer.ending = reason
        if transfer.timer is not None:
            transfer.timer.cancel()
        silent = partial(self._over, transfer, False, reason)
        transfer.timer = self._loop.at(time.monotonic() + ANSWER_WAIT_S, silent)
        link.withdraw(transfer, reason)
        self._pump(link)

    def _over(self, transfer: Outgoing, ok: bool, reason: str) -> None:
        """The one way out. Nothing of the cache is referenced any more when `on_over` is called."""
        if transfer.over:
            return
        transfer.over = True
        transfer.over_s = time.monotonic()
        if transfer.timer is not None:
            transfer.timer.cancel()
        link = transfer.link
        if link is not None:
            link.withdraw(transfer, "" if ok or transfer.ending else reason)
            link.transfers.pop(transfer.serial, None)
        with self._lock:
            self._queue_bytes -= transfer.cost
            transfer.cost = 0
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

    # --- on the thread: connections ---

    def _link(self, address: str) -> Link:
        """The connection to a peer, made on first use. Raises OSError, WireError."""
        link = self._links.get(address)
        if link is None:
            if len(self._links) >= LINKS_MAX:
                raise WireError(f"already {LINKS_MAX} peers")
            medium = self._media.get(address.partition("://")[0])
            if medium is None:
                raise WireError(f"no transport here for {address!r}, only {[*self._media]}")
            link = Link(
                address, medium, self._memory, self._shard,
                frame_bytes_max=self._frame_bytes, slice_bytes=self._pace.slice_bytes(),
                on_answer=self._on_answer, on_grant=self._on_grant,
                coder=self._coder, on_coded=self._on_coded,
            )  # fmt: skip
            self._links[address] = link
            self._loop.watch(link.sock, READ | WRITE, partial(self._on_ready, link))
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
            wants = self._send(link)
        except (OSError, WireError) as error:
            self._drop(link, f"connection lost: {error}")
            return
        self._loop.rewatch(link.sock, READ | WRITE if wants else READ)

    def _send(self, link: Link) -> bool:
        """One turn of sending. True when a socket with room is all that it waits for."""
        budget = TURN_BYTES
        while budget > 0:
            if not link.outbox:
                if not link.has_next():
                    self._drained(link)
                    return False
                self._tell_sent(link)
                if link.next_is_data():
                    wait_until_s = self._paced(link, time.monotonic())
                    if wait_until_s is not None:
                        self._wait(link, wait_until_s)
                        return False
                booked, loaded = link.booked, link.load_next()
                self._pace.spend(time.monotonic(), 0 if booked else loaded)
                budget -= loaded
            if link.in_flight():
                self._wait(link, time.monotonic() + POLL_S)
                return False
            if not link.flush():
                return True
        return True

    def _paced(self, link: Link, now: float) -> float | None:
        """When the next data frame may leave; None for now. One that is coded leaves whole, at the
        end of the time that it takes under the cap."""
        if self._coder is not None:
            link.meter.begin(now)
            coded = 0 if link.booked else link.coded_bytes()
            if coded:
                self._pace.spend(now, coded)
                link.booked = True
        return self._pace.wait_until_s(now)

    def _drained(self, link: Link) -> None:
        """Nothing waits here. What the peer's system has not got yet, the link still carries."""
        if not link.due and not link.meter.running:
            return
        if unsent(link.sock):
            self._wait(link, time.monotonic() + DRAIN_S)
            return
        link.meter.end(time.monotonic())
        self._tell_sent(link)

    def _tell_sent(self, link: Link) -> None:
        while link.due:
            transfer, first_block = link.due.popleft()
            if transfer.over or self._on_sent is None:
                continue
            left, transfer.wire_told = transfer.wire_bytes - transfer.wire_told, transfer.wire_bytes
            measured = link.meter.read(time.monotonic(), unsent(link.sock))
            self._on_sent(Sent(*transfer.key, first_block, left, *measured))

    def _on_coded(self, link: Link) -> None:
        """On the coder's thread."""
        self._loop.call(partial(self._pump, link))

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
        if transfer.ending:
            if not link.flies(transfer):  # else the answer to our abort is still to come
                self._over(transfer, False, transfer.ending)
        elif text and link.outlet.one_sided:
            self._end(transfer, False, text)
        elif text:
            self._over(transfer, False, text)
        elif transfer.trailed or transfer.broken_s is not None:
            self._over(transfer, True, "")
        else:
            raise WireError("an ack before the trailer")

    def _on_grant(self, link: Link, transfer: Outgoing) -> None:
        """The peer takes it, or goes on taking it."""
        transfer.broken_s = None
        self._pump(link)

    def _drop(self, link: Link, reason: str) -> None:
        """The connection is of no more use. What can go on over another one does."""
        if link.closed:
            return
        del self._links[link.address]
        self._loop.unwatch(link.sock)
        link.close()
        for transfer in list(link.transfers.values()):
            there_was = link.connected or transfer.broken_s is not None
            if link.resumes and there_was and not transfer.closing:
                self._broken(transfer, reason)
            else:
                self._over(transfer, False, transfer.ending or reason)

    def _broken(self, transfer: Outgoing, reason: str) -> None:
        """Without a connection: soon once more, unless that has gone on for too long."""
        now = time.monotonic()
        pause_s = 0.0 if transfer.broken_s is None else RESUME_PAUSE_S
        transfer.link = None
        transfer.broken_s = now if transfer.broken_s is None else transfer.broken_s
        if now - transfer.broken_s > RESUME_S:
            self._over(transfer, False, reason)
        else:
            self._loop.at(now + pause_s, partial(self._resume, transfer))

    def _resume(self, transfer: Outgoing) -> None:
        """Over a new connection, from where the peer says."""
        if transfer.closing:
            return
        try:
            link = self._link(transfer.address)
            link.begin(transfer, again=True)
        except (OSError, WireError) as error:
            self._broken(transfer, f"connection lost: {error}")
            return
        silent = partial(self._unanswered, transfer, transfer.broken_s)
        self._loop.at((transfer.broken_s or 0.0) + RESUME_S, silent)
        for push in transfer.pushed:
            link.push(transfer, push)
        if transfer.trailer is not None:
            link.trail(transfer, transfer.trailer)
        self._pump(link)

    def _unanswered(self, transfer: Outgoing, broken_s: float | None) -> None:
        """The peer took the new connection and does not say what it has."""
        if transfer.broken_s == broken_s:
            self._end(transfer, False, "connection lost: the peer does not go on")

    def _on_exit(self) -> None:
        for transfer in list(self._open_now.values()):
            self._over(transfer, False, transfer.ending or "closed")
        for link in list(self._links.values()):
            self._drop(link, "closed")

    def _check(self) -> None:
        with self._lock:
            assert 0 <= self._queue_bytes <= self._queue_bytes_max
            assert all(not t.over for t in self._open_now.values())
        for link in self._links.values():
            link.check()
            assert self._queue_bytes == sum(t.cost for t in self._open_now.values())
