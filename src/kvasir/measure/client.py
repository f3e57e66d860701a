"""A small HTTP/1.1 client for streams: sends one POST, gives the body's pieces as they come.

Knows HTTP and server-sent events, nothing of models. Connections are kept; every line, header block
and event has a limit. Thin on purpose: a load generator must cost less than its server.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from kvasir.core.errors import ConfigError

LINE_BYTES_MAX: Final = 64 * 1024
HEADERS_MAX: Final = 100
EVENT_BYTES_MAX: Final = 16 * 1024 * 1024
READ_BYTES: Final = 64 * 1024


class HttpError(Exception):
    """The peer broke the protocol, or closed too early."""


class Closed(HttpError):
    """The connection ended where something had to begin."""


class BaseUrl(NamedTuple):
    host: str
    port: int
    path: str
    tls: bool

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def parse_base_url(url: str) -> BaseUrl:
    """`http://host:8000/prefix` taken apart. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is not a base URL", next_step="write http://host:port")
    tls = parts.scheme == "https"
    return BaseUrl(parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/"), tls)


# --- responses ------------------------------------------------------------------------------------


class Response:
    """Status and headers (names in lower case) of one answer; its body is still to be read."""

    def __init__(
        self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader
    ) -> None:
        self.status, self.headers = status, headers
        self._reader = reader
        self._ended = False

    @property
    def reusable(self) -> bool:
        """The body was read to its end, and the server keeps the connection."""
        return self._ended and self.headers.get("connection", "").lower() != "close"

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, in pieces as they arrive. Raises HttpError when it ends early."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            chunks = Chunks()
            while not chunks.ended:
                yield chunks.feed(await self._some())
        elif "content-length" in self.headers:
            left = _number(self.headers["content-length"], 10)
            while left:
                piece = await self._some(left)
                left -= len(piece)
                yield piece
        else:
            while piece := await self._reader.read(READ_BYTES):
                yield piece
            return  # the end of the connection ends the body: nothing to keep
        self._ended = True

    async def _some(self, most: int = READ_BYTES) -> bytes:
        """What has arrived, at least one byte."""
        piece = await self._reader.read(min(most, READ_BYTES))
        if not piece:
            raise HttpError("the connection closed in the middle of the body")
        return piece

    async def text(self, bytes_max: int) -> str:
        """The first bytes of the body, as text."""
        data = b""
        async for piece in self.pieces():
            data += piece
            if len(data) >= bytes_max:
                break
        return data[:bytes_max].decode("utf-8", "replace")


class Chunks:
    """Chunked transfer coding taken off (RFC 9112, section 7.1); all that came is decoded at once.

    size CRLF data CRLF ... 0 CRLF trailers CRLF
    """

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""  # an unfinished line
        self._left = 0  # of the data of this chunk
        self._next = self._size

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`. Raises HttpError for what is not chunked."""
        data, at, parts = self._rest + data, 0, []
        while at < len(data) and not self.ended:
            if self._left:
                parts.append(data[at : at + self._left])
                at += len(parts[-1])
                self._left -= len(parts[-1])
                continue
            stop = data.find(b"\n", at)
            if stop < 0:
                break
            self._next(data[at:stop].rstrip(b"\r"))
            at = stop + 1
        self._rest = data[at:]
        if len(self._rest) > LINE_BYTES_MAX:
            raise HttpError(f"a line of more than {LINE_BYTES_MAX} bytes")
        return b"".join(parts)

    def _size(self, line: bytes) -> None:
        self._left = _number(line.partition(b";")[0], 16)
        self._next = self._gap if self._left else self._trailer

    def _gap(self, line: bytes) -> None:
        if line:
            raise HttpError("a chunk is longer than it said")
        self._next = self._size

    def _trailer(self, line: bytes) -> None:
        self.ended = not line


def _number(text: str | bytes, base: int) -> int:
    try:
        value = int(text, base)
    except ValueError:
        value = -1
    if value < 0:
        raise HttpError(f"{text[:40]!r} is not a length")
    return value


async def _line(reader: asyncio.StreamReader) -> bytes:
    """One line without its end. Raises HttpError for a line too long or cut off."""
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            raise Closed("the server closed the connection") from error
        raise HttpError("the connection closed in the middle of a line") from error
    except asyncio.LimitOverrunError as error:
        raise HttpError(f"a line of more than {LINE_BYTES_MAX} bytes") from error
    return line.rstrip(b"\r\n")


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    headers: dict[str, str] = {}
    for _ in range(HEADERS_MAX):
        line = await _line(reader)
        if not line:
            return headers
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    raise HttpError(f"more than {HEADERS_MAX} headers")


async def _status(reader: asyncio.StreamReader) -> int:
    parts = (await _line(reader)).split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1."):
        raise HttpError("the answer is not HTTP/1.1")
    return _number(parts[1], 10)


# --- requests -------------------------------------------------------------------------------------


class Connection(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Client:
    """POSTs to one server; at most `connections_max` at a time, the others wait their turn."""

    def __init__(
        self, base: BaseUrl, headers: Mapping[str, str] | None = None, connections_max: int = 4096
    ) -> None:
        own = {"Host": base.authority, "Content-Type": "application/json", **(headers or {})}
        if any(c in name + value for name, value in own.items() for c in "\r\n"):
            raise ConfigError("a header may not hold a line break")
        self._base = base
        self._head = "".join(f"{name}: {value}\r\n" for name, value in own.items())
        self._idle: list[Connection] = []
        self._slots = asyncio.Semaphore(connections_max)
        self._tls = ssl.create_default_context() if base.tls else None

    async def close(self) -> None:
        while self._idle:
            await _close(self._idle.pop())

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[Response]:
        """The answer to one request; leaving the block before its end drops the connection.

        Raises OSError when the server cannot be reached and HttpError when it breaks the protocol.
        """
        head = f"POST {self._base.path}{path} HTTP/1.1\r\n{self._head}"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        async with self._slots:
            connection, response = await self._send(request)
            try:
                yield response
            finally:
                if response.reusable:
                    self._idle.append(connection)
                else:
                    connection.writer.close()

    async def _send(self, request: bytes) -> tuple[Connection, Response]:
        """On a kept connection; if the server closed it meanwhile, once more on a new one."""
        while self._idle:
            connection = self._idle.pop()
            with suppress(ConnectionError, Closed):
                return connection, await _exchange(connection, request)
        connection = await self._connect()
        return connection, await _exchange(connection, request)

    async def _connect(self) -> Connection:
        base = self._base
        return Connection(
            *await asyncio.open_connection(
                base.host, base.port, ssl=self._tls, limit=LINE_BYTES_MAX
            )
        )


async def _exchange(connection: Connection, request: bytes) -> Response:
    """Closes the connection when no answer comes of it."""
    reader, writer = connection
    try:
        writer.write(request)
        await writer.drain()
        while (status := await _status(reader)) < 200:
            await _headers(reader)  # 100 Continue and the like: the answer is still to come
        return Response(status, await _headers(reader), reader)
    except BaseException:
        writer.close()
        raise


async def _close(connection: Connection) -> None:
    connection.writer.close()
    with suppress(OSError):
        await connection.writer.wait_closed()


# --- server-sent events ---------------------------------------------------------------------------


class SseParser:
    """Bytes in, the `data` of finished events out (WHATWG HTML, section 9.2.6)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Events that this piece completes. Raises HttpError for one over EVENT_BYTES_MAX."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > EVENT_BYTES_MAX:
            raise HttpError(f"an event of more than {EVENT_BYTES_MAX} bytes")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
