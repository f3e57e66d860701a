"""Mooncake's JSON lines, read and written: the one format that says what prompts share.

    {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...], "session_id": "..."}

`hash_ids` and `session_id` may be missing, `adapter` (a LoRA adapter's name; ours) may be there;
other fields are passed over. A file does not say how many tokens a block has, but its rows leave
little choice: `len(hash_ids)` is ceil(input_length / size).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Annotated, BinaryIO, Final, TypeVar

import msgspec
from msgspec import Meta

from kvasir.core.errors import TraceError
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.source import Line, Source, broken, lines, name_of

MOONCAKE_BLOCK: Final = 512
Count = Annotated[int, Meta(ge=0)]
T = TypeVar("T")


class MooncakeRow(msgspec.Struct, gc=False, omit_defaults=True):
    timestamp: Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0)]
    input_length: Count
    output_length: Count
    hash_ids: tuple[Count, ...] | None = None
    session_id: str | None = None
    adapter: str | None = None


class BlockSize:
    """What all rows so far allow: any size from `low` to `high` tokens."""

    def __init__(self, known: int | None = None) -> None:
        self.low, self.high = known or 1, known or sys.maxsize

    @property
    def likely(self) -> int:
        """Mooncake's own when it fits, else a power of two, else the smallest."""
        if self.low <= MOONCAKE_BLOCK <= self.high:
            return MOONCAKE_BLOCK
        power = 1 << (self.low - 1).bit_length()
        return power if power <= self.high else self.low

    def fits(self, tokens: int, blocks: int) -> bool:
        """Narrow down to sizes with ceil(tokens / size) == blocks; False when none is left."""
        if not blocks or not tokens:
            return blocks == tokens
        low = max(self.low, -(-tokens // blocks))
        high = min(self.high, -(-tokens // (blocks - 1)) - 1) if blocks > 1 else self.high
        if low > high:
            return False
        self.low, self.high = low, high
        return True


def read_mooncake(
    source: Source, *, block_size: int | None = None, limit: int | None = None
) -> Iterator[Arrival]:
    """Rows as they stand in a path or an open binary stream, which is left open.

    Raises TraceError, with file and line, for a row that is not JSON, lacks a field, has a negative
    length, or has another number of `hash_ids` than ceil(input_length / block_size); without
    `block_size`, than any size that the rows before allow.
    """
    name = name_of(source)
    return islice(mooncake(lines(source, name), name, BlockSize(block_size)), limit)


def mooncake(rows: Iterable[Line], name: str, size: BlockSize) -> Iterator[Arrival]:
    """Rows of `name`; `size` learns from them."""
    decode = msgspec.json.Decoder(MooncakeRow).decode
    for number, data in rows:
        row = decoded(decode, data, name, number)
        ids = row.hash_ids
        if ids is not None and not size.fits(row.input_length, len(ids)):
            blocks = -(-row.input_length // size.likely)
            wanted = f"makes {blocks} blocks of {size.likely} tokens"
            what = f"{len(ids)} hash_ids, but input_length {row.input_length} {wanted}"
            raise broken(what, name, number)
        yield Arrival(
            row.timestamp / 1e3, row.input_length, row.output_length, ids or (), row.session_id,
            row.adapter,
        )  # fmt: skip


def decoded(decode: Callable[[bytes], T], data: bytes, name: str, number: int) -> T:
    """Raises TraceError that says what was expected."""
    try:
        return decode(data)
    except msgspec.ValidationError as error:
        raise broken(str(error), name, number) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise broken(f"not JSON: {error}", name, number) from None


# --- writing --------------------------------------------------------------------------------------


def write_mooncake(trace: Trace, stream: BinaryIO) -> None:
    """One row a line. Times are kept to a nanosecond; whole milliseconds become integers."""
    encode = msgspec.json.Encoder().encode
    for a in trace.arrivals:
        row = MooncakeRow(
            _milliseconds(a.at_s), a.input_tokens, a.output_tokens, a.hash_ids or None, a.session,
            a.adapter,
        )  # fmt: skip
        stream.write(encode(row) + b"\n")


def _milliseconds(seconds: float) -> int | float:
    rounded = round(seconds * 1e3, 6)
    return int(rounded) if rounded.is_integer() else rounded


def reblocked(trace: Trace, block_size: int) -> Trace:
    """The same prompts in larger blocks. Raises TraceError unless it is a multiple of their size.

    An id stands for its block and all before it, so every m-th id is enough. The last, partial
    block keeps the id of the last small one, which no full block has.
    """
    if trace.block_size in (None, block_size):
        return trace
    times, rest = divmod(block_size, trace.block_size or 1)
    if rest:
        raise TraceError(
            f"blocks of {trace.block_size} tokens do not make blocks of {block_size}",
            where=trace.name,
            next_step=f"a multiple of {trace.block_size}",
        )
    arrivals = (
        msgspec.structs.replace(a, hash_ids=_every(a.hash_ids, times)) for a in trace.arrivals
    )
    return msgspec.structs.replace(trace, block_size=block_size, arrivals=tuple(arrivals))


def _every(ids: tuple[int, ...], times: int) -> tuple[int, ...]:
    return ids[times - 1 :: times] + (ids[-1:] if len(ids) % times else ())
