"""A trace in two parts, to tune on one and report on the other. The same cut for the same input."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from typing import Final, NamedTuple

import msgspec

from kvasir.core.errors import TraceError
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.workload import Part, part_of

HASH_BYTES: Final = 8


class Parts(NamedTuple):
    first: Trace
    second: Trace


def cut_share(trace: Trace, share: float) -> Parts:
    """The first `share` of the requests by time, and the rest, which begins at its own time 0."""
    return Parts(part_of(trace, Part(0.0, share)), part_of(trace, Part(share, 1.0)))


def cut_time(trace: Trace, at_s: float) -> Parts:
    """What arrives before `at_s` seconds, and the rest. Raises TraceError when one is empty."""
    count = len(trace.arrivals)
    before = bisect_left(trace.arrivals, at_s, key=lambda a: a.at_s)
    if not 0 < before < count:
        raise TraceError(
            f"all {count} requests are on one side of {at_s:g} s",
            where=trace.name,
            next_step=f"a time between 0 and {trace.duration_s:.0f} s",
        )
    return cut_share(trace, before / count)


def dealt(trace: Trace, share: float, seed: int) -> Parts:
    """Whole sessions by hash, so that about `share` of them are in the first part; times stay.

    A request without a session is one of its own.
    """
    inside = [_draw(seed, i, a) < share for i, a in enumerate(trace.arrivals)]
    outside = [not kept for kept in inside]
    return Parts(_kept(trace, inside, "first", seed), _kept(trace, outside, "second", seed))


def _draw(seed: int, index: int, arrival: Arrival) -> float:
    """In [0, 1), the same for all requests of a session."""
    whose = f"request {index}" if arrival.session is None else f"session {arrival.session}"
    digest = hashlib.blake2b(f"{seed}:{whose}".encode(), digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "big") / 256**HASH_BYTES


def _kept(trace: Trace, keep: list[bool], which: str, seed: int) -> Trace:
    arrivals = tuple(a for a, kept in zip(trace.arrivals, keep, strict=True) if kept)
    note = f"{trace.name}: {which} part, dealt out by session (seed {seed})"
    return msgspec.structs.replace(trace, arrivals=arrivals, notes=(*trace.notes, note))
