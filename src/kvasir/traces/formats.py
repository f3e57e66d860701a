"""Published trace formats into arrivals. Knows file formats and nothing of what arrivals are for.

    Mooncake JSONL   {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}
    Azure CSV        TIMESTAMP,ContextTokens,GeneratedTokens  (date-time with up to 9 decimals)

Both may be gzipped; format and compression are told by content, never by the file's name.
"""

from __future__ import annotations

import gzip
import io
import re
import statistics
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from importlib.resources import files
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from random import Random
from typing import Annotated, Any, BinaryIO, Final, cast

import msgspec
from msgspec import Meta

from kvasir.core.errors import TraceError, nearest
from kvasir.traces.record import Arrival, Trace

MOONCAKE_BLOCK: Final = 512
LINE_BYTES_MAX: Final = 16 * 1024 * 1024
GRID_S_MIN: Final = 1.0
GZIP_MAGIC: Final = b"\x1f\x8b"

BUNDLED: Final = {
    "mooncake-conversation": "mooncake_conversation.jsonl.gz",
    "azure-2023-conv": "azure_2023_conv.csv.gz",
}

Source = str | Path | BinaryIO
Line = tuple[int, bytes]  # its number in the file, from 1, and its bytes
Count = Annotated[int, Meta(ge=0)]


class MooncakeRow(msgspec.Struct, gc=False):
    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Count
    output_length: Count
    hash_ids: tuple[Count, ...] | None = None


# --- whole traces ---------------------------------------------------------------------------------


def load(name_or_path: str | Path, limit: int | None = None) -> Trace:
    """A bundled trace by name, or a file: its first `limit` rows, in order of time.

    Raises TraceError for an unknown name, an unreadable file or a broken row.
    """
    name, path = _find(str(name_or_path))
    lines = _lines(path, name)
    first = next(lines, None)
    if first is None:
        raise TraceError("the trace is empty", where=name)
    whole = chain([first], lines)
    mooncake = first[1].startswith(b"{")
    rows = _mooncake(whole, name, MOONCAKE_BLOCK) if mooncake else _azure(whole, name)
    arrivals = list(islice(rows, limit))
    served = sorted(
        (a for a in arrivals if a.input_tokens and a.output_tokens), key=lambda a: a.at_s
    )
    keyed = any(a.hash_ids for a in served)
    return Trace(
        name=name,
        block_size=MOONCAKE_BLOCK if keyed else None,
        arrivals=tuple(_from_zero(served)),
        notes=_notes(name, len(arrivals) - len(served), keyed),
    )


def spread(trace: Trace, seed: int = 0) -> Trace:
    """Arrivals of a coarse clock (1 s or more), each group spread uniformly over its step.

    The order of rows is kept, a group stays before the next one, the same seed gives the same
    times, and a note says so. A trace with a fine clock is returned as it is.
    """
    times = sorted({a.at_s for a in trace.arrivals})
    gaps = [b - a for a, b in pairwise(times)]
    step = statistics.median(gaps) if gaps else 0.0
    if step < GRID_S_MIN or len(times) == len(trace.arrivals):
        return trace
    widths = dict(zip(times, [*(min(step, gap) for gap in gaps), step], strict=True))
    random = Random(seed)
    arrivals: list[Arrival] = []
    for at_s, group in groupby(trace.arrivals, key=lambda a: a.at_s):
        members = list(group)
        shares = sorted(random.random() for _ in members)
        arrivals += [
            msgspec.structs.replace(member, at_s=at_s + share * widths[at_s])
            for member, share in zip(members, shares, strict=True)
        ]
    note = (
        f"{trace.name}: the clock of this trace steps by {step:g} s; the arrivals of each step "
        f"are spread uniformly over it (seed {seed})"
    )
    return msgspec.structs.replace(trace, arrivals=tuple(arrivals), notes=(*trace.notes, note))


def _find(name: str) -> tuple[str, Path]:
    """What to call the trace, and what to open. A folder never shows in the name."""
    if name in BUNDLED:
        return name, Path(str(files("kvasir.traces") / "data" / BUNDLED[name]))
    path = Path(name)
    if path.is_file():
        return path.name, path
    raise TraceError(
        f"no trace is called {name!r}, and no file is there",
        nearest=nearest(name, BUNDLED),
        next_step=f"a bundled trace ({', '.join(BUNDLED)}), or a JSONL or CSV file",
    )


def _from_zero(arrivals: list[Arrival]) -> Iterable[Arrival]:
    """Rows from before the first one (an unsorted CSV) move the whole trace."""
    earliest = arrivals[0].at_s if arrivals else 0.0
    if earliest >= 0:
        return arrivals
    return (msgspec.structs.replace(a, at_s=a.at_s - earliest) for a in arrivals)


def _notes(name: str, left_out: int, keyed: bool) -> tuple[str, ...]:
    notes = []
    if left_out:
        notes.append(f"{name}: {left_out} rows without input or output tokens are left out")
    if not keyed:
        notes.append(f"{name}: says nothing about prefixes, so no request hits a cache")
    return tuple(notes)


# --- rows -----------------------------------------------------------------------------------------


def read_mooncake(
    source: Source, *, block_size: int = MOONCAKE_BLOCK, limit: int | None = None
) -> Iterator[Arrival]:
    """Rows as they stand in a path or an open binary stream, which is left open.

    Raises TraceError, with file and line, for a row that is not JSON, lacks a field, has a negative
    length, or has another number of `hash_ids` than ceil(input_length / block_size).
    """
    name = _name(source)
    return islice(_mooncake(_lines(source, name), name, block_size), limit)


def read_azure(source: Source, *, limit: int | None = None) -> Iterator[Arrival]:
    """Rows as they stand in a path or an open binary stream; `at_s` counts from the first row.

    Raises TraceError, with file and line, for a missing column, a row with other cells than the
    header, a time or a length that cannot be read, or a negative length.
    """
    name = _name(source)
    return islice(_azure(_lines(source, name), name), limit)


def _mooncake(lines: Iterable[Line], name: str, block_size: int) -> Iterator[Arrival]:
    decode = msgspec.json.Decoder(MooncakeRow).decode
    for number, line in lines:
        try:
            row = decode(line)
        except msgspec.ValidationError as error:
            raise _broken(str(error), name, number) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _broken(f"not JSON: {error}", name, number) from None
        ids, blocks = row.hash_ids, -(-row.input_length // block_size)
        if ids is not None and len(ids) != blocks:
            wanted = f"input_length {row.input_length} makes {blocks} blocks of {block_size} tokens"
            raise _broken(f"{len(ids)} hash_ids, but {wanted}", name, number)
        yield Arrival(row.timestamp / 1e3, row.input_length, row.output_length, ids or ())


AZURE_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
DATE_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?"
)


def _azure(lines: Iterator[Line], name: str) -> Iterator[Arrival]:
    number, header = next(lines, (1, b""))
    columns = [c.strip().lower() for c in header.decode("utf-8-sig", "replace").split(",")]
    at, context, generated = (_column(columns, c, name, number) for c in AZURE_COLUMNS)
    start: int | None = None
    for number, line in lines:
        cells = line.decode("utf-8", "replace").split(",")
        if len(cells) != len(columns):
            raise _broken(f"{len(cells)} cells; the header has {len(columns)}", name, number)
        try:
            now = _nanoseconds(cells[at].strip())
            input_tokens, output_tokens = _length(cells[context]), _length(cells[generated])
        except ValueError as error:
            raise _broken(str(error), name, number) from None
        start = now if start is None else start
        yield Arrival((now - start) / 1e9, input_tokens, output_tokens)


def _column(columns: list[str], wanted: str, name: str, number: int) -> int:
    if wanted.lower() in columns:
        return columns.index(wanted.lower())
    found = ", ".join(c[:40] for c in columns[:8])
    raise _broken(f"no column {wanted} (found: {found})", name, number)


def _length(cell: str) -> int:
    try:
        value = int(cell)
    except ValueError:
        raise ValueError(f"{cell.strip()[:40]!r} is not a number of tokens") from None
    if value < 0:
        raise ValueError(f"a length of {value} tokens is negative")
    return value


def _nanoseconds(cell: str) -> int:
    """Integers: a float of this size would round off the last published decimal."""
    found = DATE_TIME.fullmatch(cell)
    if found is None:
        raise ValueError(f"{cell[:40]!r} is not a time like 2023-11-16 18:15:46.6805900")
    head, decimals, zone = found.groups()
    return _epoch_seconds(head, zone or "Z") * 10**9 + int((decimals or "").ljust(9, "0"))


@lru_cache(maxsize=64)
def _epoch_seconds(head: str, zone: str) -> int:
    return int(datetime.fromisoformat(head + zone).astimezone(UTC).timestamp())


# --- bytes ----------------------------------------------------------------------------------------


def _name(source: Source) -> str:
    """A file's own name, without its folder."""
    path = source if isinstance(source, str | Path) else getattr(source, "name", "stream")
    return Path(str(path)).name


def _lines(source: Source, name: str) -> Iterator[Line]:
    """Every line that is not blank. Raises TraceError for what cannot be read."""
    try:
        with _opened(source) as stream:
            number = 0
            while line := stream.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(line) > LINE_BYTES_MAX:
                    raise _broken(f"a line of more than {LINE_BYTES_MAX} bytes", name, number)
                if stripped := line.strip():
                    yield number, stripped
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


def _broken(what: str, name: str, number: int) -> TraceError:
    return TraceError(what, where=f"{name}:{number}")
