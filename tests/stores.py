"""Stores of cluster tiers for tests: a Redis that misbehaves on demand, and real ones."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

WAIT_S = 20.0


class FakeRedis(socketserver.ThreadingTCPServer):
    """PING, MSET, MGET and EXISTS over RESP 2. `mode`: `ok`; `hangs` answers nothing; `resets` ends
    connections; `full` refuses writes; `raves` answers with rubbish; `lies` changes a byte of what
    it gives; `swaps` gives each value under the next name; `cuts` gives half of it; `forgets` gives
    nothing of what it said it held."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.mode = "ok"
        self.values: dict[bytes, bytes] = {}
        self.reads = 0
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), _Talk)
        self._thread = threading.Thread(target=lambda: self.serve_forever(0.02), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.server_address[1]}/0"

    def stop(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def answer(self, words: list[bytes]) -> bytes:
        command, names = words[0].upper(), words[1:]
        if command == b"MSET":
            if self.mode == "full":
                return b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
            self.values |= dict(zip(names[::2], names[1::2], strict=True))
            return b"+OK\r\n"
        if command == b"EXISTS":
            return b":%d\r\n" % sum(name in self.values for name in names)
        if command == b"MGET":
            self.reads += 1
            given = [self._given(names, i) for i in range(len(names))]
            parts = [b"$-1\r\n" if v is None else b"$%d\r\n%s\r\n" % (len(v), v) for v in given]
            return b"*%d\r\n" % len(parts) + b"".join(parts)
        return b"+PONG\r\n" if command == b"PING" else b"+OK\r\n"

    def _given(self, names: list[bytes], i: int) -> bytes | None:
        value = self.values.get(names[i])
        if value is None or self.mode == "forgets":
            return None
        if self.mode == "lies":
            return value[:-7] + bytes([value[-7] ^ 1]) + value[-6:]
        if self.mode == "swaps":
            return self.values.get(names[(i + 1) % len(names)])
        return value[: len(value) // 2] if self.mode == "cuts" else value


class _Talk(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server = cast(FakeRedis, self.server)
        with contextlib.suppress(OSError):
            while words := _words(cast(BinaryIO, self.rfile)):
                if server.mode == "hangs":
                    server.ended.wait()
                    return
                if server.mode == "resets":
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                    )
                    return
                raves = server.mode == "raves" and words[0].upper() != b"PING"
                self.wfile.write(b"?what\r\n" if raves else server.answer(words))


def _words(stream: BinaryIO) -> list[bytes]:
    line = stream.readline()
    found = []
    for _ in range(int(line[1:]) if line else 0):
        size = int(stream.readline()[1:])
        found.append(stream.read(size + 2)[:size])
    return found


# --- real ones ------------------------------------------------------------------------------------


class RealStore:
    """A process that serves at `url`."""

    def __init__(self, command: list[str], url: str, port: int, folder: Path) -> None:
        self.url, self._port = url, port
        self._log = (folder / f"store-{port}.log").open("ab")
        self._command = command
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        eventually(self._up, "the store listens")

    def _up(self) -> bool:
        assert self.process.poll() is None, Path(self._log.name).read_text()[-2000:]
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            return True
        return False

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.thaw()
            self.process.kill()
            self.process.wait()
        self._log.close()


def missing(kind: str) -> str:
    """What is not here of a real store; empty if all is."""
    if importlib.util.find_spec(kind) is None:
        return f"the Python package of {kind} is not installed"
    if kind == "redis" and shutil.which("redis-server") is None:
        return "no redis-server (Debian: redis-server)"
    if kind == "mooncake":
        try:
            importlib.import_module("mooncake.store")
        except ImportError as error:
            return f"mooncake does not load (Debian: libibverbs1 librdmacm1): {error}"
    return ""


@contextlib.contextmanager
def real_store(kind: str, folder: Path, *more: str) -> Iterator[RealStore]:
    port = free_port()
    if kind == "redis":
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "",
                   "--appendonly", "no", "--dir", str(folder), *more]  # fmt: skip
        url = f"redis://127.0.0.1:{port}/0"
    else:
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None and spec.origin is not None
        command = [str(Path(spec.origin).parent / "mooncake_master"), "--rpc_address=127.0.0.1",
                   f"--rpc_port={port}", "--metrics_host=127.0.0.1",
                   f"--metrics_port={free_port()}", *more]  # fmt: skip
        url = f"mooncake://127.0.0.1:{port}"
    store = RealStore(command, url, port, folder)
    try:
        yield store
    finally:
        store.stop()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def eventually(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)
