"""Frames over a non-blocking stream, read and written piecemeal. Knows no blocks."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from kvasir.transfer.frames import HEADER_BYTES, Header, unpack

SCRATCH_BYTES: Final = 256 * 1024
VIEWS_PER_CALL: Final = 256  # below IOV_MAX everywhere

Place = Callable[[Header], memoryview | None]
Arrived = Callable[[Header], None]


class FrameReader:
    """Asks `place(header)` where the inline payload goes (None: nowhere, it is drained), and says
    `arrived(header)` when it is there."""

    def __init__(
        self, recv_into: Callable[[memoryview], int], place: Place, arrived: Arrived
    ) -> None:
        self._recv_into = recv_into
        self._place = place
        self._arrived = arrived
        self._header_bytes = bytearray(HEADER_BYTES)
        self._scratch = memoryview(b"")
        self._header: Header | None = None
        self._sink: memoryview | None = memoryview(self._header_bytes)
        self._left = HEADER_BYTES

    def turn(self, budget_bytes: int) -> None:
        """Read until the stream is dry or the budget is used up.

        Raises ConnectionError at the end of the stream, OSError, and WireError.
        """
        while budget_bytes > 0:
            room = self._room()
            try:
                count = self._recv_into(room)
            except BlockingIOError:
                return
            if count == 0:
                raise ConnectionResetError("closed by the peer")
            budget_bytes -= count
            self._left -= count
            if self._left == 0:
                self._section_done()
            elif count < len(room):
                return  # most likely dry; to ask again would cost another call

    def discard(self) -> None:
        """Drain the rest of the payload that is being read."""
        assert self._header is not None
        self._sink = None

    def _room(self) -> memoryview:
        if self._sink is not None:
            return self._sink[len(self._sink) - self._left :]
        if not self._scratch:
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        return self._scratch[: self._left]

    def _section_done(self) -> None:
        if self._header is None:
            self._header = header = unpack(self._header_bytes)
            self._sink = self._place(header)
            self._left = header.payload_bytes
            assert self._sink is None or len(self._sink) == self._left
            if self._left:
                return
        header, self._header = self._header, None
        self._sink, self._left = memoryview(self._header_bytes), HEADER_BYTES
        self._arrived(header)


def send_some(sock: socket.socket, outbox: deque[memoryview]) -> int:
    """Send from the front of `outbox` what the socket takes; returns the bytes. Raises OSError."""
    try:
        sent = left = sock.sendmsg(list(islice(outbox, VIEWS_PER_CALL)))
    except BlockingIOError:
        return 0
    while left:
        head = outbox[0]
        if left < len(head):
            outbox[0] = head[left:]
            break
        left -= len(outbox.popleft())
    return sent
