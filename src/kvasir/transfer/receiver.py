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
from functools import partial
from typing import TYPE_CHECKING, Final

from kvasir.core.errors import TransferError, WireError
from kvasir.core.units import MIB
from kvasir.transfer.base import GIVEN_UP, WHOLE, Key, OnReceived, ReceiveResult, Shard, Trailer
from kvasir.transfer.frames import FrameKind, Header, checksum, decode
from kvasir.transfer.inbound import Conn, Incoming
from kvasir.transfer.loop import READ, WRITE, Loop
from kvasir.transfer.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvasir.core.ids import BlockId, RequestId
    from kvasir.transfer.base import Planes
    from kvasir.transfer.medium import Medium

CONNECTIONS_MAX: Final = 1024
TURN_BYTES: Final = 4 * MIB
ACCEPT_PAUSE_S: Final = 0.1

log = logging.getLogger("kvasir.transfer")


class StreamReceiver:
    """`base.Receiver` over a medium. `bind`: `host:port` for tcp, a directory for shm.

    Raises ConfigError for planes or a `bind` that do not fit, OSError when it cannot listen.
    """

    def __init__(
        self,
        planes: Planes,
        medium: Medium,
        *,
        bind: str,
        on_received: OnReceived,
        shard: Shard = WHOLE,
    ) -> None:
        self._memory = Memory(planes)
        self._medium = medium
        self._on_received = on_received
        self._shard = shard
        self._lock = threading.Lock()  # guards the membership of _expected
        self._expected: dict[Key, Incoming] = {}
        self._conns: set[Conn] = set()
        self._listening = medium.listen(bind)
        self._loop = Loop(f"kv-recv-{medium.kind}", self._on_exit)
        self._listen(True)
        self._loop.start()

    # --- from any thread ---

    @property
    def address(self) -> str:
        return self._listening.address

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

    def check(self) -> None:
        """Assert the invariants, on the thread."""
        self._loop.ask(self._check).result()

    # --- on the thread: transfers ---

    def _set_deadline(self, incoming: Incoming, deadline_s: float) -> None:
        if not incoming.over:
            overdue = partial(self._end, incoming, "deadline")
            incoming.timer = self._loop.at(deadline_s, overdue)

    def _end(self, incoming: Incoming, reason: str, trailer: Trailer | None = None) -> None:
        """The one way out; no reason means success. Nothing is written once this was called."""
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
        with self._lock:
            if self._expected.pop(incoming.key, None) is None:
                return  # `expect` raises: the receiver closed under it
        result = ReceiveResult(
            *incoming.key,
            ok=not reason,
            bytes=incoming.bytes,
            seconds=0.0 if incoming.first_frame_s is None else now - incoming.first_frame_s,
            transport=self._medium.kind,
            reason=reason,
            trailer=trailer,
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
        if incoming is None or incoming.over:
            return None
        if incoming.conn is None:
            incoming.conn, incoming.serial = conn, header.serial
            conn.incoming.add(incoming)
        if incoming.conn is not conn or incoming.serial != header.serial:
            return None
        return incoming

    def _place(self, conn: Conn, header: Header) -> memoryview | None:
        """Where the inline payload of a frame goes. Raises WireError."""
        if header.kind is not FrameKind.DATA:
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
            case FrameKind.DATA:
                self._landed(conn, header)
            case FrameKind.HELLO:
                conn.inlet.hello(conn.small)
            case FrameKind.BEGIN:
                self._expected_on(conn, header)
            case FrameKind.TRAILER:
                self._trailer(conn, header)
            case FrameKind.ABORT:
                incoming = self._expected_on(conn, header)
                if incoming is not None:
                    text = conn.small.decode(errors="replace")
                    self._end(incoming, f"{GIVEN_UP}: {text}")
            case _:
                raise WireError(f"{header.kind.name} sent to a receiver")

    def _landed(self, conn: Conn, header: Header) -> None:
        landing = conn.take_landing()
        if landing is not None and not landing.incoming.over:
            if checksum(landing.data.data) != header.checksum:
                self._end(landing.incoming, f"checksum of {describe(header)} does not match")
            else:
                if not landing.direct:
                    self._memory.scatter(landing.piece, landing.data)
                landing.incoming.note_arrival(header)
        conn.return_slot(header)

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

    def _listen(self, on: bool) -> None:
        if on:
            self._loop.watch(self._listening.sock, READ, self._accept)
        else:
            self._loop.unwatch(self._listening.sock)

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listening.sock.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors: give others time to end
            log.warning("cannot accept a peer: %s", error)
            self._listen(False)
            self._loop.at(time.monotonic() + ACCEPT_PAUSE_S, partial(self._listen, True))
            return
        if len(self._conns) >= CONNECTIONS_MAX:
            log.warning("already %d peers", CONNECTIONS_MAX)
            sock.close()
            return
        try:
            self._medium.adopt(sock)
        except OSError:  # gone already
            sock.close()
            return
        conn = Conn(sock, self._medium.inlet(sock), self._memory, self._place, self._arrived)
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
            self._end(incoming, reason)

    def _on_exit(self) -> None:
        for incoming in list(self._expected.values()):
            self._end(incoming, "closed")
        for conn in list(self._conns):
            self._drop(conn, "closed")
        self._listening.sock.close()
        if self._listening.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._listening.path)

    def _check(self) -> None:
        with self._lock:
            expected = set(self._expected.values())
        for conn in self._conns:
            assert conn.incoming <= expected
            conn.check()
        for incoming in expected:
            incoming.check()


def describe(header: Header) -> str:
    end = header.first_block + header.blocks
    return f"layer {header.layer} plane {header.plane} blocks {header.first_block}..{end - 1}"
