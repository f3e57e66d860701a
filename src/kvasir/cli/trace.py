"""`kvasir trace`: what a trace holds, and what a prefix cache could do for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from cyclopts import App

from kvasir.cli.simulate import Positive

if TYPE_CHECKING:
    from kvasir.traces.record import Trace

app = App(name="trace")
CAPACITIES: Final = (1_000, 10_000, 100_000, None)
PERCENTILES: Final = (50, 95, 99, 100)


@app.command
def stats(name: str, /, *, limit: Positive = None) -> None:
    """Print a trace's rates, lengths and attainable prefix hits.

    Parameters
    ----------
    name
        A bundled trace (mooncake-conversation, azure-2023-conv), or a file.
    limit
        Only the first requests.
    """
    from kvasir.traces.formats import load

    trace = load(name, limit)
    for line in (*_rates(trace), *_lengths(trace), *_hits(trace)):
        print(line)
    for note in trace.notes:
        print(f"* {note}")


def _rates(trace: Trace) -> Iterator[str]:
    count, seconds = len(trace.arrivals), trace.duration_s or 1.0
    into, out = trace.input_tokens / seconds, trace.output_tokens / seconds
    yield f"{trace.name}: {count} requests in {seconds:.1f} s, {count / seconds:.2f} per s"
    yield f"tokens per s: {into:.0f} in, {out:.0f} out"


def _lengths(trace: Trace) -> Iterator[str]:
    heads = "".join(f"{f'p{p}' if p < 100 else 'max':>10}" for p in PERCENTILES)
    yield f"{'tokens':<10}{'mean':>10}{heads}"
    yield _length_row("input", [a.input_tokens for a in trace.arrivals])
    yield _length_row("output", [a.output_tokens for a in trace.arrivals])


def _length_row(label: str, values: Sequence[int]) -> str:
    from kvasir.measure.distribution import interpolated

    ordered = sorted(values) or [0]
    at = [interpolated(ordered.__getitem__, len(ordered), p) for p in PERCENTILES]
    cells = (sum(ordered) / len(ordered), *at)
    return f"{label:<10}" + "".join(f"{cell:>10.0f}" for cell in cells)


def _hits(trace: Trace) -> Iterator[str]:
    from kvasir.traces.statistics import hit_table

    if trace.block_size is None:
        return
    yield f"prefix hits of one LRU cache, in blocks of {trace.block_size} tokens:"
    yield f"{'cache':<10}{'blocks':>10}{'tokens':>10}"
    for row in hit_table(trace, CAPACITIES):
        label = "endless" if row.capacity_blocks is None else f"{row.capacity_blocks}"
        yield f"{label:<10}{row.block_ratio:>10.2%}{row.token_ratio:>10.2%}"
