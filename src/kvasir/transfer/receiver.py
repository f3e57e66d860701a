"""The decode side of every stream transport: one thread for all peers.

Knows who is expected, what has arrived and when it ends; `medium` knows how bytes travel. A peer
may send anything: what it may break is its own connection and the transfers that run over it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from kvasir.core.errors import ConfigError, TransferError, WireError
from kvasir.core.units import MIB
from kvasir.transfer.base import GIVEN_UP, WHOLE, Key, OnReceived, ReceiveResult, Shard, Trailer
from kvasir.transfer.frames import FrameKind, Header, checksum, decode, encode
from kvasir.transfer.inbound import Arrival, Conn, Incoming
from kvasir.transfer.loop import READ, WRITE, Loop
from kvasir.transfer.memory import Memory
from kvasir.transfer.sender import coder_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvasir.core.ids import BlockId, RequestId
    from kvasir.transfer.base import KvForm, Planes
    from kvasir.transfer.medium import Listening, Medium

CONNECTIONS_MAX: Final = 1024
TURN_BYTES: Final = 4 * MIB
ACCEPT_PAUSE_S: Final = 0.1
ENDED_MAX: Final = 1024
RESUME_S: Final = 2.5  # for a peer whose connection broke; it tries for less
QUIET_S: Final = 1.0  # after which nothing of a dead peer is on its way into this memory
ANSWER_WAIT_S: Final = 2.0  # for a peer to stop writing; then its connection ends

DATA: Final = frozenset({FrameKind.DATA, FrameKind.PLACED, FrameKind.CODED})

log = logging.getLogger("kvasir.transfer")


class Ended(NamedTuple):
    """How a transfer ended; no reason means well."""

    serial: int
    reason: str


class Door(NamedTuple):
    """A place where peers of one medium come in."""

    medium: Medium
    listening: Listening

    def close(self) -> None:
        self.listening.sock.close()
        if self.listening.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.listening.path)


def _open_doors(media: Sequence[Medium]) -> list[Door]:
    """All or none. Raises as `Medium.listen`."""
    doors: list[Door] = []
    try:
        for medium in media:
            doors.append(Door(medium, medium.listen()))
    except (OSError, ConfigError):
        for door in doors:
            door.close()
        raise
    return doors


def _named(header: Header) -> tuple[Key, int]:
    return header.key, header.serial


class StreamReceiver:
    """`base.Receiver` over media, each with an address of its own.

    Raises ConfigError for planes or places that do not fit, OSError when it cannot listen.
    """

    def __init__(
        self,
        planes: Planes,
        media: Sequence[Medium],
        *,
        on_received: OnReceived,
        shard: Shard = WHOLE,
        form: KvForm | None = None,
    ) -> None:
        self._memory = Memory(planes)
        self._coder = coder_for(self._memory, form)
        self._on_received = on_received
        self._shard = shard
        self._lock = threading.Lock()  # guards the membership of _expected
        self._expected: dict[Key, Incoming] = {}
        self._ended: OrderedDict[Key, Ended] = OrderedDict()  # for peers whose connection broke
        self._conns: set[Conn] = set()
        self._doors = _open_doors(media)
        self._loop = Loop("kv-recv", self._on_exit)
        for door in self._doors:
            self._listen(door, True)
        self._loop.start()

    # --- from any thread ---

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(door.listening.address for door in self._doors)

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
        ids = self._memory.ids(blocks)
        assert 0 <= layers_count <= self._memory.layers, f"no such layers: {layers_count}"
        incoming = Incoming(self._memory, key, first_block, ids, layers_count)
        # Known at once, not when the thread gets to it: the peer's frames may come first.
        with self._lock:
            assert key not in self._expected, f"{key} is already expected"
            self._expected[key] = incoming
        if not self._loop.call(partial(self._set_deadline, incoming, deadline_s)):
            with self._lock:
                unheard = self._expected.pop(key, None)
            if unheard is not None:
                raise TransferError("the receiver is closed")

    def forget(self, request_id: RequestId, attempt: int, reason: str = "released") -> None:
        with self._lock:
            incoming = self._expected.get(Key(request_id, attempt))
        if incoming is not None:
            self._loop.call(partial(self._end, incoming, reason))

    def close(self) -> None:
        self._loop.close()
        if self._coder is not None:
            self._coder.close()

    def check(self) -> None:
        """Assert the invariants, on the thread."""
        self._loop.ask(self._check).result()

    # --- on the thread: transfers ---

    def _set_deadline(self, incoming: Incoming, deadline_s: float) -> None:
        if not incoming.over:
            overdue = partial(self._end, incoming, "deadline")
            incoming.timer = self._loop.at(deadline_s, overdue)

    def _end(self, incoming: Incoming, reason: str, trailer: Trailer | None = None) -> None:
        """Take nothing more; no reason means success. Over at once, unless the peer may still write
        here: then when it says that it does not, or is gone."""
        conn = incoming.conn
        if incoming.closing:
            return
        if not reason or conn is None or not conn.inlet.one_sided:
            self._over(incoming, reason, trailer)
            return
        incoming.ending = reason
        if incoming.timer is not None:
            incoming.timer.cancel()
        silent = partial(self._drop, conn, "the peer does not answer")
        incoming.timer = self._loop.at(time.monotonic() + ANSWER_WAIT_S, silent)
        conn.let_go(incoming, bound=True)
        conn.answer(FrameKind.NACK, incoming, reason)
        self._flush(conn)

    def _over(self, incoming: Incoming, reason: str, trailer: Trailer | None = None) -> None:
        """The one way out. Nothing is written once this was called."""
        if incoming.over:
            return
        incoming.over = True
        now = time.monotonic()
        if incoming.timer is not None:
            incoming.timer.cancel()
        conn = incoming.conn
        if conn is not None:
            conn.let_go(incoming)
            conn.answer(FrameKind.NACK if reason else FrameKind.ACK, incoming, reason)
            self._ended[incoming.key] = Ended(incoming.serial, reason)
            while len(self._ended) > ENDED_MAX:
                self._ended.popitem(last=False)
        with self._lock:
            if self._expected.pop(incoming.key, None) is None:
                return  # `expect` raises: the receiver closed under it
        result = ReceiveResult(
            *incoming.key,
            ok=not reason,
            bytes=incoming.bytes,
            seconds=0.0 if incoming.first_frame_s is None else now - incoming.first_frame_s,
            transport=incoming.transport,
            reason=reason,
            trailer=trailer,
            coded=incoming.coded,
        )
        if conn is not None:
            self._flush(conn)
        try:
            self._on_received(result)
        except Exception:
            log.exception("on_received failed for %s", incoming.key)

    def _expected_on(self, conn: Conn, header: Header) -> Incoming | None:
        """The transfer that a frame belongs to, bound to the first connection that names it."""
        incoming = self._expected.get(header.key)
        if incoming is None or incoming.closing:
            return None
        if incoming.conn is None and incoming.lost_s is None:
            self._bind(incoming, conn, header)
        if incoming.conn is not conn or incoming.serial != header.serial:
            return None
        return incoming

    def _bind(self, incoming: Incoming, conn: Conn, header: Header) -> None:
        incoming.conn, incoming.serial = conn, header.serial
        incoming.lost_s = None
        incoming.transport = conn.medium.kind
        conn.incoming.add(incoming)

    def _begin(self, conn: Conn, header: Header) -> None:
        incoming = self._expected_on(conn, header)
        if not conn.inlet.one_sided:
            return  # its first data will show whether anybody expects it
        if incoming is None:
            conn.refuse(header, "nobody expects it here")
            return
        conn.say(FrameKind.GRANT, *_named(header), encode(incoming.grant(True)))

    def _resume(self, conn: Conn, header: Header) -> None:
        """A transfer on a new connection: the old one is gone, whether that was seen or not."""
        incoming = self._expected.get(header.key)
        if incoming is None or incoming.closing or incoming.serial != header.serial:
            ended = self._ended.get(header.key)
            if ended is not None and ended == (header.serial, ""):
                conn.say(FrameKind.ACK, *_named(header))
            elif incoming is not None and not incoming.closing and not incoming.serial:
                self._bind(incoming, conn, header)  # it broke before a frame of it came
                conn.say(FrameKind.GRANT, *_named(header), encode(incoming.grant(False)))
            else:
                conn.refuse(header, ended.reason if ended else "nobody expects it here")
            return
        if incoming.conn is not None and incoming.conn is not conn:
            self._drop(incoming.conn, "connection lost: the peer has a new one")
        self._bind(incoming, conn, header)
        conn.say(FrameKind.GRANT, *_named(header), encode(incoming.grant(False)))

    def _aborted(self, conn: Conn, header: Header) -> None:
        """The peer touches no memory for it any more, on either side."""
        incoming = self._expected.get(header.key)
        if incoming is not None and incoming.conn is conn and incoming.ending:
            self._over(incoming, incoming.ending)
        elif (incoming := self._expected_on(conn, header)) is not None:
            self._over(incoming, f"{GIVEN_UP}: {conn.small.decode(errors='replace')}")
        else:
            conn.refuse(header, "nobody expects it here")

    def _place(self, conn: Conn, header: Header) -> memoryview | None:
        """Where the inline payload of a frame goes. Raises WireError."""
        if header.kind not in DATA:
            return conn.small_payload(header)
        incoming = self._expected_on(conn, header)
        if incoming is None:
            conn.refuse(header, "nobody expects it here")
            return None
        if incoming.first_frame_s is None:
            incoming.first_frame_s = time.monotonic()
        problem = incoming.refusal(header, self._shard)
        if problem:
            self._end(incoming, problem)
            return None
        return conn.land_at(incoming, header)

    def _arrived(self, conn: Conn, header: Header) -> None:
        """A whole frame is here. Raises WireError."""
        match header.kind:
            case FrameKind.DATA | FrameKind.PLACED | FrameKind.CODED:
                self._settle(conn, conn.landed(header), header.checksum)
            case FrameKind.SUM:
                self._settle(conn, conn.take_arrival(header), header.checksum)
            case FrameKind.HELLO:
                if welcome := conn.inlet.hello(conn.small):
                    conn.say(FrameKind.WELCOME, *_named(header), welcome)
            case FrameKind.BEGIN:
                self._begin(conn, header)
            case FrameKind.RESUME:
                self._resume(conn, header)
            case FrameKind.TRAILER:
                self._trailer(conn, header)
            case FrameKind.ABORT:
                self._aborted(conn, header)
            case _:
                raise WireError(f"{header.kind.name} sent to a receiver")

    def _settle(self, conn: Conn, arrival: Arrival | None, wanted: int) -> None:
        if arrival is None:
            return
        incoming = arrival.landing.incoming
        form, problem = conn.settle(arrival, wanted)
        if problem:
            self._end(incoming, problem.format(incoming.describe(arrival.header)))
        else:
            incoming.note_arrival(arrival.header, form)

    def _trailer(self, conn: Conn, header: Header) -> None:
        incoming = self._expected_on(conn, header)
        if incoming is None:
            conn.refuse(header, "nobody expects it here")
        elif checksum(conn.small) != header.checksum:
            self._end(incoming, "checksum of the trailer does not match")
        else:
            trailer = decode(conn.small, Trailer)
            self._end(incoming, incoming.shortfall(trailer), trailer)

    # --- on the thread: connections ---

    def _listen(self, door: Door, on: bool) -> None:
        if on:
            self._loop.watch(door.listening.sock, READ, partial(self._accept, door))
        else:
            self._loop.unwatch(door.listening.sock)

    def _accept(self, door: Door, _events: int) -> None:
        try:
            sock, _ = door.listening.sock.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors: give others time to end
            log.warning("cannot accept a peer: %s", error)
            self._listen(door, False)
            self._loop.at(time.monotonic() + ACCEPT_PAUSE_S, partial(self._listen, door, True))
            return
        if len(self._conns) >= CONNECTIONS_MAX:
            log.warning("already %d peers", CONNECTIONS_MAX)
            sock.close()
            return
        try:
            door.medium.adopt(sock)
        except OSError:  # gone already
            sock.close()
            return
        conn = Conn(sock, door.medium, self._memory, self._place, self._arrived, self._coder)
        self._conns.add(conn)
        self._loop.watch(sock, READ, partial(self._on_ready, conn))

    def _on_ready(self, conn: Conn, events: int) -> None:
        try:
            if events & READ:
                conn.reader.turn(TURN_BYTES)
        except (OSError, WireError) as error:
            self._drop(conn, f"connection lost: {error}")
        self._flush(conn)

    def _flush(self, conn: Conn) -> None:
        if conn.closed:
            return
        try:
            done = conn.flush()
        except (OSError, WireError) as error:
            self._drop(conn, f"connection lost: {error}")
            return
        self._loop.rewatch(conn.sock, READ if done else READ | WRITE)

    def _drop(self, conn: Conn, reason: str) -> None:
        if conn.closed:
            return
        self._conns.discard(conn)
        self._loop.unwatch(conn.sock)
        conn.close()
        for incoming in list(conn.incoming):
            self._lost(incoming, conn, reason)

    def _lost(self, incoming: Incoming, conn: Conn, reason: str) -> None:
        """Its connection is gone. Where the peer may come back, or what it wrote may still be on
        its way into this memory, the end waits for that."""
        waits_s = RESUME_S if conn.medium.resumes else QUIET_S if conn.inlet.one_sided else 0.0
        conn.let_go(incoming)
        incoming.conn = None
        if not waits_s:
            self._over(incoming, incoming.ending or reason)
            return
        incoming.lost_s = time.monotonic()
        if not conn.medium.resumes:
            incoming.ending = incoming.ending or reason
        still = partial(self._still_lost, incoming, incoming.lost_s, reason)
        self._loop.at(incoming.lost_s + waits_s, still)

    def _still_lost(self, incoming: Incoming, lost_s: float, reason: str) -> None:
        if incoming.lost_s == lost_s:
            self._over(incoming, incoming.ending or reason)

    def _on_exit(self) -> None:
        for incoming in list(self._expected.values()):
            self._over(incoming, incoming.ending or "closed")
        for conn in list(self._conns):
            self._drop(conn, "closed")
        for door in self._doors:
            door.close()

    def _check(self) -> None:
        with self._lock:
            expected = set(self._expected.values())
        for conn in self._conns:
            assert conn.incoming <= expected
            conn.check()
        for incoming in expected:
            incoming.check()

