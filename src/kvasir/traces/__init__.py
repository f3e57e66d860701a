"""Layer 3: what arrives. Reads and generates request traces; knows lengths and block ids, no text.

Nothing here knows a worker or a clock: `at_s` counts from the start of the trace.
"""

from kvasir.traces.formats import BUNDLED, load, read_azure, read_mooncake, spread
from kvasir.traces.generators import generate
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.statistics import HitRow, hit_table
from kvasir.traces.workload import workload

__all__ = [
    "BUNDLED", "Arrival", "HitRow", "Trace", "generate", "hit_table", "load", "read_azure",
    "read_mooncake", "spread", "workload",
]  # fmt: skip
