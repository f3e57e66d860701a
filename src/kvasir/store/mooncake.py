"""A Mooncake Store as a cluster tier's store (extra `mooncake`; Debian libibverbs1, librdmacm1).

Its client runs in a process of its own (`store.mooncake_client`): beside a master that hangs it can
stop every thread of its process, and it takes a minute and a half to find that nobody is there. So
it is killed instead, with the memory that it lent. Knows names and values; must not know what they
mean.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final, Literal, NoReturn
from urllib.parse import parse_qs, urlsplit

import msgspec

from kvasir.store.base import StoreError
from kvasir.store.frames import receive, send

BUFFER_BYTES: Final = 32 * 1024 * 1024  # for values on their way, at least
BLOCKS: Final = 4  # of which it holds so many
PORT: Final = 50051
OPEN_S: Final = 15.0  # a client may take so long to begin: memory that it lends is made ready,
CLOSE_S: Final = 0.5  # and so long to end


class Setup(msgspec.Struct, frozen=True):
    """What the client is started with. `local`: by what address others reach it."""

    master: str
    local: str
    protocol: str
    device: str
    lend_bytes: int
    buffer_bytes: int


class Call(msgspec.Struct, frozen=True):
    what: Literal["put", "get", "held"]
    names: Sequence[str]
    values: Sequence[bytes] = ()


class Done(msgspec.Struct, frozen=True):
    """`fault`: why it was not done. A value that is not there is empty."""

    fault: str = ""
    values: Sequence[bytes] = ()
    held: Sequence[bool] = ()


class MooncakeStore:
    """`store.cluster.Client`. `url`: mooncake://host:port?protocol=tcp&device=&local=127.0.0.1.
    Raises StoreError when there is no master, and when one does not answer within `timeout_s`."""

    def __init__(self, url: str, lend_bytes: int, block_bytes: int, timeout_s: float) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port or PORT
        more = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
        except OSError as error:
            raise StoreError(f"mooncake master: {error.strerror or error}", where=url) from None
        setup = Setup(
            f"{host}:{port}", more.get("local", "127.0.0.1"), more.get("protocol", "tcp"),
            more.get("device", ""), lend_bytes, max(BUFFER_BYTES, BLOCKS * block_bytes),
        )  # fmt: skip
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvasir.store.mooncake_client", str(theirs.fileno()),
                 msgspec.json.encode(setup).decode()],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        self._socket.settimeout(max(timeout_s, OPEN_S))
        self._answer()
        self._socket.settimeout(timeout_s)

    def put(self, names: Sequence[str], values: Sequence[bytes]) -> None:
        """A name that is there already keeps its value."""
        self._do(Call("put", names, values))

    def get(self, names: Sequence[str]) -> Sequence[bytes | None]:
        return [value or None for value in self._do(Call("get", names)).values]

    def held(self, names: Sequence[str]) -> Sequence[bool]:
        return self._do(Call("held", names)).held

    def close(self) -> None:
        """The client takes what it lent out of the store, if the master lets it do so in time."""
        self._socket.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _do(self, call: Call) -> Done:
        try:
            send(self._socket, msgspec.msgpack.encode(call))
        except OSError as error:
            self._broken(error)
        return self._answer()

    def _answer(self) -> Done:
        try:
            done = msgspec.msgpack.decode(receive(self._socket), type=Done)
        except OSError as error:
            self._broken(error)
        if done.fault:
            self.close()
            raise StoreError(f"mooncake: {done.fault}")
        return done

    def _broken(self, error: OSError) -> NoReturn:
        self.close()
        hangs = isinstance(error, TimeoutError)
        raise StoreError("mooncake: did not answer" if hangs else "mooncake: its client died")
