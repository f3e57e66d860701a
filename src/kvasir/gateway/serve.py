"""An HTTP server as one task of a running event loop. Knows uvicorn and sockets; no route.

The loop is the caller's: run it under uvloop for speed. Signals are the caller's too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from kvasir.core.errors import ConfigError

BACKLOG: Final = 2048
KEEP_ALIVE_S: Final = 75  # longer than clients' own, so that they close first
GRACE_S: Final = 5.0


async def serve_http(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    on_bound: Callable[[int], None] | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Serve until this task is cancelled, then let answers end for at most `grace_s` seconds.

    `on_bound` hears the port once connections are taken (useful with port 0). Raises ConfigError
    when the address cannot be had.
    """
    with listen(host, port) as sock:
        server = _Server(_config(app, grace_s))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.001)
            if on_bound is not None and server.started:
                on_bound(sock.getsockname()[1])
            await asyncio.shield(serving)
        finally:
            server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await serving


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A bound TCP socket. Raises ConfigError: what, where, next step."""
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"no such address to listen on: {error}", where=where, next_step="--host 127.0.0.1"
        ) from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError as error:
            raise _unbound(error, where) from error
        sock.setblocking(False)
        yield sock


def _unbound(error: OSError, where: str) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            "the port is already in use",
            where=where,
            next_step="another --port, 0 for any free one, or stop what listens there",
        )
    if error.errno == errno.EACCES:
        return ConfigError(
            "listening there needs more rights", where=where, next_step="a --port from 1024 up"
        )
    return ConfigError(f"cannot listen there: {error.strerror}", where=where)


def _config(app: ASGIApp, grace_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
