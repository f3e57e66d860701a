"""What a deployment's `workload` means: a trace when it names one, else generated arrivals.

The one place that applies `limit`, `time_scale` and the spreading of coarse clocks.
"""

from __future__ import annotations

import msgspec

from kvasir.core.specs import WorkloadSpec
from kvasir.traces.formats import load, spread
from kvasir.traces.generators import generate
from kvasir.traces.record import Trace


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
