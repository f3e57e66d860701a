"""Payloads inline on a TCP stream: from the planes to the socket and back without a copy, where
blocks are consecutive. Knows addresses and sockets, not transfers.

Peers are not authenticated here: bind to loopback, or to a network that only workers can reach.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import numpy as np

from kvasir.core.errors import ConfigError, WireError
from kvasir.transfer.base import Kind
from kvasir.transfer.frames import NO_SLOT, checksum, checksum_of
from kvasir.transfer.medium import Listening, Loaded
from kvasir.transfer.memory import runs

if TYPE_CHECKING:
    from kvasir.transfer.memory import Bytes, Memory, Piece

RUNS_DIRECT_MAX: Final = 64  # more than that are gathered first: one copy beats many small views
BACKLOG: Final = 128

# A peer whose host vanished without a word is given up after about 15 s.
LIVENESS: Final = {
    "TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 15_000,
}  # fmt: skip


class TcpOutlet:
    """Sends straight from the planes; many short runs go through one reused buffer."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._staging: Bytes = np.empty(0, np.uint8)
        self._frame_bytes_max = frame_bytes_max

    def greet(self, sock: socket.socket) -> None:
        _ = sock  # TCP needs no greeting

    def has_room(self) -> bool:
        return True

    def load(self, memory: Memory, piece: Piece) -> Loaded:
        found = runs(piece.ids)
        if len(found) > RUNS_DIRECT_MAX:
            staged = self._staged(len(piece.ids) * memory.block_bytes(piece.layer, piece.plane))
            memory.gather(piece, staged)
            return Loaded(checksum(staged.data), NO_SLOT, [staged.data])
        views = [memory.span(piece.layer, piece.plane, run).data for run in found]
        return Loaded(checksum_of(views), NO_SLOT, views)

    def credit(self, slots: int) -> None:
        raise WireError(f"credit for {slots} slots without a ring")

    def close(self) -> None:
        self._staging = np.empty(0, np.uint8)

    def _staged(self, size: int) -> Bytes:
        if self._staging.size < size:
            self._staging = np.empty(max(size, self._frame_bytes_max), np.uint8)
        return self._staging[:size]


class TcpInlet:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def recv_into(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer)

    def hello(self, payload: bytes | bytearray) -> None:
        raise WireError(f"a ring of {len(payload)} bytes offered over TCP")

    def slot(self, index: int, size: int) -> Bytes:
        raise WireError(f"a frame of {size} bytes in slot {index} without a ring")

    def close(self) -> None: ...


class TcpMedium:
    """Addresses are `tcp://host:port`; `bind` is `host:port`, port 0 for any.

    A host name is looked up on the sender's thread: prefer numbers.
    """

    @property
    def kind(self) -> Kind:
        return "tcp"

    def connect(self, address: str) -> socket.socket:
        url = urlsplit(address)
        if url.scheme != "tcp" or not url.hostname or not _port(url.netloc):
            raise WireError(f"{address!r} is not tcp://host:port")
        family, _, _, _, target = socket.getaddrinfo(
            url.hostname, _port(url.netloc), type=socket.SOCK_STREAM
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            self.adopt(sock)
            sock.connect_ex(target)  # its outcome shows when the socket becomes writable
        except OSError:
            sock.close()
            raise
        return sock

    def listen(self, bind: str) -> Listening:
        host, colon, port = bind.rpartition(":")
        host = host.strip("[]")
        if not colon or not host or not port.isdecimal():
            raise ConfigError(f"{bind!r} is not host:port", next_step="bind 127.0.0.1:0")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            sock = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
        except OSError as error:
            what = f"KV cannot come in there: {error.strerror}"
            raise ConfigError(what, where=bind, next_step="an address of this host") from error
        sock.setblocking(False)
        shown = f"[{host}]" if ":" in host else host
        return Listening(sock, f"tcp://{shown}:{sock.getsockname()[1]}", "")

    def adopt(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in LIVENESS.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def outlet(self, frame_bytes_max: int) -> TcpOutlet:
        return TcpOutlet(frame_bytes_max)

    def inlet(self, sock: socket.socket) -> TcpInlet:
        return TcpInlet(sock)


def _port(netloc: str) -> int:
    """0 when there is none that could be connected to."""
    port = netloc.rpartition(":")[2]
    return int(port) if port.isdecimal() and int(port) < 65536 else 0
