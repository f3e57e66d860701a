"""Trace files into traces. Knows how formats are told apart, not the formats themselves.

    Mooncake JSONL, our own included            kvasir.traces.mooncake
    Azure 2023 and 2024 CSV, BurstGPT CSV       kvasir.traces.tables
    vllm bench serve JSON, AIPerf JSONL         kvasir.traces.clients
    ShareGPT JSON                               kvasir.traces.sharegpt

Any may be gzipped; format and compression are told by content, never by the file's name.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from random import Random
from typing import Final

import msgspec

from kvasir.core.errors import TraceError, nearest
from kvasir.traces.clients import aiperf, vllm_result
from kvasir.traces.mooncake import MOONCAKE_BLOCK, BlockSize, mooncake, read_mooncake
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.sharegpt import Tokens, sharegpt
from kvasir.traces.source import document, head, lines
from kvasir.traces.tables import read_azure, rows

__all__ = ["BUNDLED", "load", "named", "read_azure", "read_mooncake", "spread"]

GRID_S_MIN: Final = 1.0
HEAD_BYTES: Final = 4096
VLLM: Final = re.compile(rb'\{\s*"(date|backend|endpoint_type|label|model_id|duration)"')
AIPERF: Final = re.compile(rb'\{\s*"(metadata|metrics|error|trace_data)"')

BUNDLED: Final = {
    "mooncake-conversation": "mooncake_conversation.jsonl.gz",
    "azure-2023-conv": "azure_2023_conv.csv.gz",
}


def load(
    name_or_path: str | Path,
    limit: int | None = None,
    *,
    tokens: Tokens | None = None,
    rate: float = 4.0,
    seed: int = 0,
) -> Trace:
    """A bundled trace by name, or a file: its first `limit` rows, in order of time.

    `tokens`, `rate` and `seed` are for ShareGPT, which has neither lengths nor times. Raises
    TraceError for an unknown name, an unreadable file or a broken row.
    """
    name, path = _find(str(name_or_path))
    size = BlockSize(MOONCAKE_BLOCK if name in BUNDLED else None)
    start = head(path, name, HEAD_BYTES)
    if start.startswith(b"["):
        found = sharegpt(document(path, name), name, tokens, rate, seed)
    elif VLLM.match(start):
        found = vllm_result(document(path, name), name)
    else:
        found = _rows(path, name, start, size)
    return named(name, islice(found, limit), size)


def _rows(path: Path, name: str, start: bytes, size: BlockSize) -> Iterator[Arrival]:
    every = lines(path, name)
    first = next(every, None)
    if first is None:
        raise TraceError("the trace is empty", where=name)
    whole = chain([first], every)
    if AIPERF.match(start):
        return aiperf(whole, name)
    return mooncake(whole, name, size) if start.startswith(b"{") else rows(whole, name)


def named(name: str, rows: Iterable[Arrival], size: BlockSize) -> Trace:
    """A trace of these rows: sorted, from time 0, without those that cannot be served."""
    arrivals = list(rows)
    served = sorted(
        (a for a in arrivals if a.input_tokens and a.output_tokens), key=lambda a: a.at_s
    )
    keyed = any(a.hash_ids for a in served)
    return Trace(
        name=name,
        block_size=size.likely if keyed else None,
        arrivals=tuple(_from_zero(served)),
        notes=_notes(name, len(arrivals) - len(served), size if keyed else None),
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
    if path.is_dir():
        step = f"kvasir trace convert {path} OUT.jsonl (if it is a recording)"
        raise TraceError("a folder is not a trace", where=path.name, next_step=step)
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


def _notes(name: str, left_out: int, size: BlockSize | None) -> tuple[str, ...]:
    notes = []
    if left_out:
        notes.append(f"{name}: {left_out} rows without input or output tokens are left out")
    if size is not None and size.low != size.high:
        notes.append(
            f"{name}: blocks of {size.likely} tokens are assumed; its rows fit any size from "
            f"{size.low} tokens up"
        )
    if size is None:
        notes.append(f"{name}: says nothing about prefixes, so no request hits a cache")
    return tuple(notes)
