"""Bytes of a trace file: lines with their numbers, packed or not, or the whole of a document.

Knows files and gzip; knows no format.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

from kvasir.core.errors import TraceError

LINE_BYTES_MAX: Final = 16 * 1024 * 1024
DOCUMENT_BYTES_MAX: Final = 1 << 30
GZIP_MAGIC: Final = b"\x1f\x8b"
Source = str | Path | BinaryIO


class Line(NamedTuple):
    """`number` in the file, from 1."""

    number: int
    data: bytes


def name_of(source: Source) -> str:
    """A file's own name, without its folder."""
    path = source if isinstance(source, str | Path) else getattr(source, "name", "stream")
    return Path(str(path)).name


def broken(what: str, name: str, number: int | None = None) -> TraceError:
    return TraceError(what, where=name if number is None else f"{name}:{number}")


def lines(source: Source, name: str) -> Iterator[Line]:
    """Every line that is not blank. Raises TraceError for what cannot be read."""
    with _readable(source, name) as stream:
        number = 0
        while line := stream.readline(LINE_BYTES_MAX + 1):
            number += 1
            if len(line) > LINE_BYTES_MAX:
                raise broken(f"a line of more than {LINE_BYTES_MAX} bytes", name, number)
            if stripped := line.strip():
                yield Line(number, stripped)


def document(source: Source, name: str) -> bytes:
    """All of it. Raises TraceError for what cannot be read, or is over DOCUMENT_BYTES_MAX."""
    with _readable(source, name) as stream:
        data = stream.read(DOCUMENT_BYTES_MAX + 1)
    if len(data) > DOCUMENT_BYTES_MAX:
        raise broken(f"a document of more than {DOCUMENT_BYTES_MAX} bytes", name)
    return data


def head(source: Source, name: str, count: int) -> bytes:
    """The first bytes, without white space before them."""
    with _readable(source, name) as stream:
        return stream.read(count).lstrip(b"\xef\xbb\xbf \t\r\n")


@contextmanager
def _readable(source: Source, name: str) -> Iterator[BinaryIO]:
    try:
        with _opened(source) as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TraceError(f"cannot read the trace: {reason}", where=name) from error


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """The uncompressed content. Closes only what it opened."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file, _plain(file) as stream:
            yield stream
    else:
        buffered = io.BufferedReader(cast(Any, source))
        try:
            with _plain(buffered) as stream:
                yield stream
        finally:
            buffered.detach()


@contextmanager
def _plain(buffered: io.BufferedReader) -> Iterator[BinaryIO]:
    if buffered.peek(2)[:2] != GZIP_MAGIC:
        yield buffered
        return
    with gzip.GzipFile(fileobj=buffered) as inflated:
        yield cast(BinaryIO, inflated)
