"""Traces as CSV: lengths and times, nothing about prefixes.

    Azure 2023, 2024   TIMESTAMP,ContextTokens,GeneratedTokens    (date-time, up to 9 decimals)
    BurstGPT           Timestamp,[Session ID,...]Request tokens,Response tokens,...   (seconds)

Columns are found by name, in any order and case. Knows the formats, not what arrivals are for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from typing import Final

from kvasir.traces.record import Arrival
from kvasir.traces.source import Line, Source, broken, lines, name_of

AZURE_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURST_COLUMNS: Final = ("Timestamp", "Request tokens", "Response tokens")
BURST_SESSION: Final = "Session ID"
DATE_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?"
)


def read_azure(source: Source, *, limit: int | None = None) -> Iterator[Arrival]:
    """Rows as they stand in a path or an open binary stream; `at_s` counts from the first row.

    Raises TraceError, with file and line, for a missing column, a row with other cells than the
    header, a time or a length that cannot be read, or a negative length.
    """
    name = name_of(source)
    return islice(rows(lines(source, name), name), limit)


def rows(found: Iterator[Line], name: str) -> Iterator[Arrival]:
    """Azure's or BurstGPT's, as the header says."""
    number, header = next(found, Line(1, b""))
    columns = [c.strip().lower() for c in header.decode("utf-8-sig", "replace").split(",")]
    burst = BURST_COLUMNS[1].lower() in columns
    wanted, clock = (BURST_COLUMNS, _seconds) if burst else (AZURE_COLUMNS, _nanoseconds)
    at, into, out = (_column(columns, c, name, number) for c in wanted)
    session = BURST_SESSION.lower()
    of = columns.index(session) if session in columns else None
    start: int | None = None
    for number, line in found:
        cells = line.decode("utf-8", "replace").split(",")
        if len(cells) != len(columns):
            raise broken(f"{len(cells)} cells; the header has {len(columns)}", name, number)
        try:
            now = clock(cells[at].strip())
            input_tokens, output_tokens = _length(cells[into]), _length(cells[out])
        except ValueError as error:
            raise broken(str(error), name, number) from None
        start = now if start is None else start
        whose = cells[of].strip() or None if of is not None else None
        yield Arrival((now - start) / 1e9, input_tokens, output_tokens, (), whose)


def _column(columns: list[str], wanted: str, name: str, number: int) -> int:
    if wanted.lower() in columns:
        return columns.index(wanted.lower())
    found = ", ".join(c[:40] for c in columns[:8])
    raise broken(f"no column {wanted} (found: {found})", name, number)


def _length(cell: str) -> int:
    try:
        value = int(cell)
    except ValueError:
        raise ValueError(f"{cell.strip()[:40]!r} is not a number of tokens") from None
    if value < 0:
        raise ValueError(f"a length of {value} tokens is negative")
    return value


def _seconds(cell: str) -> int:
    """Nanoseconds of a number of seconds."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{cell[:40]!r} is not a number of seconds")
    return round(value * 1e9)


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
