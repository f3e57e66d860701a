"""Blocks inline on a stream: from the planes to the socket and back without a copy, where they are
consecutive. Knows neither addresses nor transfers."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import numpy as np

from kvasir.core.errors import WireError
from kvasir.transfer.frames import FrameKind, checksum, checksum_of
from kvasir.transfer.medium import Loaded
from kvasir.transfer.memory import CACHED_BYTES, Limits

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes, Ids, Memory, Piece

SPANS_MAX: Final = 64  # more than that are gathered first: one copy beats many small views


class InlineOutlet:
    """Sends straight from the planes; many short runs go through one reused buffer."""

    lends: bool = False
    one_sided: bool = False
    inline: bool = True

    def __init__(self, frame_bytes_max: int) -> None:
        # Planes that travel together are copied once more at the receiver.
        self.limits = Limits(frame_bytes_max, CACHED_BYTES, frame_bytes_max)
        self._staging: Bytes = np.empty(0, np.uint8)
        self._frame_bytes_max = frame_bytes_max

    def greet(self, sock: socket.socket) -> None:
        _ = sock  # nothing to say

    def welcome(self, payload: bytes | bytearray) -> None:
        raise WireError(f"memory offered over a plain stream, in {len(payload)} bytes")

    def load(self, memory: Memory, piece: Piece, there: Ids | None) -> Loaded:
        _ = there  # the peer knows
        spans = memory.spans(piece)
        if len(spans) > SPANS_MAX:
            staged = self._staged(memory.size(piece.plane, piece.planes, len(piece.ids)))
            memory.gather(piece, staged)
            return Loaded(FrameKind.DATA, [staged.data], checksum(staged.data))
        views = [span.data for span in spans]
        return Loaded(FrameKind.DATA, views, checksum_of(views))

    def close(self) -> None:
        self._staging = np.empty(0, np.uint8)

    def _staged(self, size: int) -> Bytes:
        if self._staging.size < size:
            self._staging = np.empty(max(size, self._frame_bytes_max), np.uint8)
        return self._staging[:size]


class InlineInlet:
    one_sided: bool = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def recv_into(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer)

    def hello(self, payload: bytes | bytearray) -> bytes:
        raise WireError(f"memory offered over a plain stream, in {len(payload)} bytes")

    def bring(self, memory: Memory, piece: Piece, payload: bytes | bytearray) -> int:
        where = memory.place_of(piece.plane)
        raise WireError(f"{where} placed ({len(payload)} bytes) over a plain stream")

    def close(self) -> None: ...
