"""Whole messages on a stream socket, each behind its length. Knows bytes only."""

from __future__ import annotations

import socket
import struct
from typing import Final

LENGTH: Final = struct.Struct("<Q")


def send(stream: socket.socket, data: bytes) -> None:
    stream.sendall(LENGTH.pack(len(data)))
    stream.sendall(data)


def receive(stream: socket.socket) -> bytearray:
    """Raises ConnectionError when the other side has gone."""
    (size,) = LENGTH.unpack(_exactly(stream, LENGTH.size))
    return _exactly(stream, size)


def _exactly(stream: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = stream.recv_into(view[at:])
        if not got:
            raise ConnectionError("the other side has gone")
        at += got
    return data
