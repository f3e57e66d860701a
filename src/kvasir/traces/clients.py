"""What load generators write about the requests that they sent, as arrivals to send again.

    vllm bench serve --save-result --save-detailed   one JSON object of parallel lists
    AIPerf profile_export.jsonl                      one JSON object a request

Neither keeps what prompts shared. Knows the two formats, nothing of the servers behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvasir.core.errors import TraceError
from kvasir.traces.mooncake import Count, decoded
from kvasir.traces.record import Arrival
from kvasir.traces.source import Line, broken


class VllmResult(msgspec.Struct):
    """A failed request has an output length of 0. `start_times` are seconds on any clock."""

    input_lens: list[Count]
    output_lens: list[Count]
    start_times: list[float]


def vllm_result(data: bytes, name: str) -> Iterator[Arrival]:
    """Arrivals of one result file. Raises TraceError for one without detail."""
    try:
        found = msgspec.json.decode(data, type=VllmResult)
    except msgspec.ValidationError as error:
        raise TraceError(
            f"not a detailed result of `vllm bench serve`: {error}",
            where=name,
            next_step="vllm bench serve --save-result --save-detailed (input_lens, start_times)",
        ) from None
    except msgspec.DecodeError as error:
        raise broken(f"not JSON: {error}", name) from None
    lengths = {len(found.input_lens), len(found.output_lens), len(found.start_times)}
    if len(lengths) != 1:
        raise broken("input_lens, output_lens and start_times differ in length", name)
    origin = min(found.start_times, default=0.0)
    columns = zip(found.start_times, found.input_lens, found.output_lens, strict=True)
    return (Arrival(at - origin, into, out) for at, into, out in columns)


class _Value(msgspec.Struct):
    value: Annotated[float, Meta(ge=0)]


class _Metrics(msgspec.Struct):
    input_sequence_length: _Value | None = None
    output_sequence_length: _Value | None = None


class _Metadata(msgspec.Struct):
    request_start_ns: int
    x_correlation_id: str | None = None


class AiperfRow(msgspec.Struct):
    metadata: _Metadata
    metrics: _Metrics
    error: Any = None


def aiperf(rows: Iterable[Line], name: str) -> Iterator[Arrival]:
    """Requests in the order of the file; a failed one has no output, and turns share a session."""
    decode = msgspec.json.Decoder(AiperfRow).decode
    start: int | None = None
    for number, data in rows:
        row = decoded(decode, data, name, number)
        into, out = row.metrics.input_sequence_length, row.metrics.output_sequence_length
        if row.error is None and (into is None or out is None):
            what = "no input_sequence_length and output_sequence_length, though no error"
            raise broken(what, name, number)
        start = row.metadata.request_start_ns if start is None else start
        yield Arrival(
            (row.metadata.request_start_ns - start) / 1e9,
            round(into.value) if into is not None else 0,
            round(out.value) if out is not None and row.error is None else 0,
            (),
            row.metadata.x_correlation_id,
        )
