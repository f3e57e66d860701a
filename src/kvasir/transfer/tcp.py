"""Blocks inline on a TCP stream. Knows addresses and sockets, not transfers.

Peers are not authenticated here: bind to loopback, or to a network that only workers can reach.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from kvasir.core.errors import ConfigError, WireError
from kvasir.transfer.base import Kind
from kvasir.transfer.inline import InlineInlet, InlineOutlet
from kvasir.transfer.medium import Listening

if TYPE_CHECKING:
    from kvasir.transfer.memory import Memory

BACKLOG: Final = 128

# A peer whose host vanished without a word is given up after about 15 s.
LIVENESS: Final = {
    "TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 15_000,
}  # fmt: skip


class TcpMedium:
    """Addresses are `tcp://host:port`. `bind`: where to listen, `host:port`, port 0 for any.

    A host name is looked up on the sender's thread: prefer numbers.
    """

    resumes: bool = True

    def __init__(self, bind: str = "127.0.0.1:0", kind: Kind = "tcp") -> None:
        self._bind, self._kind = bind, kind

    @property
    def kind(self) -> Kind:
        return self._kind

    def connect(self, address: str) -> socket.socket:
        url = urlsplit(address)
        if url.scheme != self.kind or not url.hostname or not _port(url.netloc):
            raise WireError(f"{address!r} is not {self.kind}://host:port")
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

    def listen(self) -> Listening:
        bind = self._bind
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
        return Listening(sock, f"{self.kind}://{shown}:{sock.getsockname()[1]}", "")

    def adopt(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in LIVENESS.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def outlet(self, memory: Memory, frame_bytes_max: int) -> InlineOutlet:
        _ = memory  # any will do
        return InlineOutlet(frame_bytes_max)

    def inlet(self, sock: socket.socket) -> InlineInlet:
        return InlineInlet(sock)


def _port(netloc: str) -> int:
    """0 when there is none that could be connected to."""
    port = netloc.rpartition(":")[2]
    return int(port) if port.isdecimal() and int(port) < 65536 else 0
