"""What a deployment's `workload` means: a trace when it names one, else generated arrivals.

The one place that applies `limit`, `time_scale`, parts and the spreading of coarse clocks.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from kvasir.core.specs import WorkloadSpec
from kvasir.traces.formats import load, spread
from kvasir.traces.generators import generate
from kvasir.traces.record import Trace


class Part(NamedTuple):
    """From `start` to `stop`, shares of a trace's requests in order of arrival."""

    start: float = 0.0
    stop: float = 1.0


def workload(spec: WorkloadSpec, block_size: int, seed: int) -> Trace:
    """Arrivals of `spec`. Times are multiplied by `time_scale`; the trace keeps its own block size.

    Raises TraceError as `load` does.
    """
    if spec.trace is None:
        count = min(spec.requests, spec.limit or spec.requests)
        trace = generate(spec.model_copy(update={"requests": count}), block_size, seed)
    else:
        trace = spread(load(spec.trace, spec.limit), seed)
    return scaled(trace, spec.time_scale)


def scaled(trace: Trace, time_scale: float) -> Trace:
    """The same arrivals `time_scale` times as far apart: 0.5 is twice the load."""
    if time_scale == 1.0:
        return trace
    arrivals = tuple(msgspec.structs.replace(a, at_s=a.at_s * time_scale) for a in trace.arrivals)
    note = f"{trace.name}: times multiplied by {time_scale:g}"
    return msgspec.structs.replace(trace, arrivals=arrivals, notes=(*trace.notes, note))


def part_of(trace: Trace, part: Part) -> Trace:
    """Only these arrivals, from time 0 on; caches begin empty. Parts that share an end share no
    request."""
    if part == Part():
        return trace
    count = len(trace.arrivals)
    first, last = round(part.start * count), round(part.stop * count)
    chosen = trace.arrivals[first:last]
    begin_s = chosen[0].at_s if first and chosen else 0.0
    arrivals = tuple(msgspec.structs.replace(a, at_s=a.at_s - begin_s) for a in chosen)
    note = f"{trace.name}: requests {first + 1} to {last} of {count}, from empty caches"
    return msgspec.structs.replace(trace, arrivals=arrivals, notes=(*trace.notes, note))
