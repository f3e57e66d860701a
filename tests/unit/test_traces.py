"""Trace files: what is read, what is refused and how the refusal reads, and the 3 s clock."""

import gzip
import io
import itertools
from pathlib import Path

import pytest

from kvasir.core.errors import TraceError
from kvasir.core.keys import trace_key
from kvasir.core.specs import WorkloadSpec
from kvasir.traces.formats import BUNDLED, load, read_azure, read_mooncake, spread
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.workload import workload

ROWS = (
    b'{"timestamp": 0, "input_length": 513, "output_length": 2, "hash_ids": [7, 8]}\n'
    b"\n"
    b'{"timestamp": 2500, "input_length": 512, "output_length": 1, "hash_ids": [7], "extra": "x"}\n'
)
CSV = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 18:15:46.6805900,374,44\r\n"
    b"2023-11-16 18:16:50.9951691,396,109"
)


def test_mooncake_rows() -> None:
    first, second = read_mooncake(io.BytesIO(ROWS))
    assert first == Arrival(0.0, 513, 2, (7, 8))
    assert second == Arrival(2.5, 512, 1, (7,))
    assert first.keys(512) == (trace_key(7),)  # the last block is partial: no key
    assert second.keys(512) == (trace_key(7),)


def test_azure_rows_keep_every_decimal() -> None:
    assert list(read_azure(io.BytesIO(CSV))) == [
        Arrival(0.0, 374, 44),
        Arrival(64.3145791, 396, 109),
    ]


def test_azure_with_zone_and_without_decimals() -> None:
    rows = b"\xef\xbb\xbftimestamp,contexttokens,generatedtokens\n2024-05-10 00:00:00,1,2\n"
    rows += b"2024-05-10 01:00:01.5+01:00,3,4\n"
    assert [a.at_s for a in read_azure(io.BytesIO(rows))] == [0.0, 1.5]


def test_a_stream_is_read_packed_or_not_and_stays_open() -> None:
    plain, packed = io.BytesIO(ROWS), io.BytesIO(gzip.compress(ROWS))
    assert list(read_mooncake(plain)) == list(read_mooncake(packed))
    assert not plain.closed and not packed.closed


def test_rows_are_read_as_they_are_asked_for() -> None:
    def endless() -> bytes:
        return next(lines)

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            data = endless()[: len(buffer)]
            buffer[: len(data)] = data
            return len(data)

    row = b'{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [3]}\n'
    lines = itertools.repeat(row)
    assert len(list(read_mooncake(Endless(), limit=5))) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"timestamp": 0, "input_length": 5, "hash_ids": [1]}', "`output_length`"),
        ('{"timestamp": 0, "input_length": -5, "output_length": 1, "hash_ids": []}', ">= 0"),
        ('{"timestamp": 0, "input_length": "5", "output_length": 1}', "Expected `int`"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1}', "$.timestamp"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [-1]}', ">= 0"),
        ("{timestamp: 0}", "not JSON"),
        ('{"timestamp": 0, "input_le', "not JSON"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
         "1 hash_ids, but input_length 513 makes 2 blocks of 512 tokens"),
        ('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}',
         "2 hash_ids"),
    ],
)  # fmt: skip
def test_a_broken_mooncake_row_says_where_and_what(row: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(ROWS + row.encode())
    with pytest.raises(TraceError) as caught:
        load(path)
    assert said in str(caught.value)
    assert "broken.jsonl:4" in str(caught.value)  # the blank line counts
    assert str(tmp_path) not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("2023-11-16 18:17:00,5", "2 cells; the header has 3"),
        ("2023-11-16 18:17:00,5,-1", "a length of -1 tokens is negative"),
        ("2023-11-16 18:17:00,five,1", "'five' is not a number of tokens"),
        ("yesterday,5,1", "'yesterday' is not a time like"),
        ("2023-13-16 18:17:00,5,1", "month must be in 1..12"),
    ],
)
def test_a_broken_azure_row_says_where_and_what(row: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.csv"
    path.write_bytes(CSV + b"\n" + row.encode())
    with pytest.raises(TraceError) as caught:
        load(path)
    assert said in str(caught.value)
    assert "broken.csv:4" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"time,in,out\n1,2,3\n", "no column TIMESTAMP"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl.gz", gzip.compress(ROWS)[:40], "cannot read"),
        ("a.jsonl.gz", gzip.compress(ROWS)[:-8] + b"\0" * 8, "cannot read"),
    ],
)
def test_a_file_that_is_no_trace(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError, match=said):
        load(path)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(TraceError, match="nearest: mooncake-conversation"):
        load("moncake-conversation")


def test_load_sorts_and_leaves_out_what_cannot_be_served(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_bytes(CSV + b"\n2023-11-16 18:15:40.6805900,7,7\n2023-11-16 18:15:41,7,0\n")
    trace = load(path)
    assert [a.at_s for a in trace.arrivals] == [0.0, 6.0, 70.3145791]
    assert trace.name == "some.csv" and trace.block_size is None
    assert "1 rows without input or output" in trace.notes[0]
    assert "nothing about prefixes" in trace.notes[1]


def test_bundled_traces_are_the_published_ones() -> None:
    """Counts, means and spans of the descriptions that came with them."""
    mooncake, azure = (load(name) for name in BUNDLED)
    assert len(mooncake.arrivals) == 12_031 and len(azure.arrivals) == 19_366
    assert mooncake.block_size == 512 and azure.block_size is None
    assert round(mooncake.input_tokens / 12_031) == 12_035
    assert round(azure.input_tokens / 19_366) == 1_155
    assert round(mooncake.duration_s, 1) == 3_537.0 and round(azure.duration_s, 1) == 3_501.7
    assert sum(len(a.hash_ids) for a in mooncake.arrivals) == 288_500


def test_limit_is_the_first_rows() -> None:
    assert load("mooncake-conversation", 9).arrivals == load("mooncake-conversation").arrivals[:9]


# --- a coarse clock ---------------------------------------------------------------------------


def test_spread_keeps_rows_in_order_inside_their_step() -> None:
    trace = load("mooncake-conversation", 2_000)
    again = spread(trace)
    assert again == spread(trace) != spread(trace, seed=1)
    assert len(trace.notes) == 0
    assert "steps by 3 s" in again.notes[0] and "seed 0" in again.notes[0]
    times = [a.at_s for a in again.arrivals]
    assert times == sorted(times)
    groups = sorted({a.at_s for a in trace.arrivals})
    ends = dict(itertools.pairwise([*groups, groups[-1] + 3.0]))
    for before, after in zip(trace.arrivals, again.arrivals, strict=True):
        assert before.at_s <= after.at_s < ends[before.at_s]
        assert before.hash_ids == after.hash_ids
    assert len(set(times)) == len(times)


def test_spread_is_uniform_over_the_step() -> None:
    trace = load("mooncake-conversation")
    late = [b.at_s - a.at_s for a, b in zip(trace.arrivals, spread(trace).arrivals, strict=True)]
    assert sum(late) / len(late) == pytest.approx(1.5, abs=0.02)


def test_spread_never_leaves_a_short_step() -> None:
    rows = tuple(Arrival(t, 1, 1) for t in (0.0, 0.0, 0.0, 3.0, 6.0, 6.5, 6.5, 9.5))
    times = [a.at_s for a in spread(Trace("t", None, rows)).arrivals]
    assert 6.0 <= times[4] < 6.5 <= times[5] <= times[6] < 9.5


def test_spread_leaves_a_fine_clock_alone() -> None:
    trace = load("azure-2023-conv", 500)
    assert spread(trace) is trace


# --- what a deployment's workload means -------------------------------------------------------


def test_workload_of_a_trace_is_limited_spread_and_scaled() -> None:
    spec = WorkloadSpec(trace="mooncake-conversation", limit=40)
    plain = workload(spec, 16, 5)
    half = workload(spec.model_copy(update={"time_scale": 0.5}), 16, 5)
    assert plain == spread(load("mooncake-conversation", 40), 5)
    assert plain.block_size == 512
    assert [a.at_s for a in half.arrivals] == [a.at_s / 2 for a in plain.arrivals]
    assert "multiplied by 0.5" in half.notes[-1]


def test_workload_without_a_trace_is_generated() -> None:
    trace = workload(WorkloadSpec(requests=50, limit=7), 16, 3)
    assert trace.name == "generated" and len(trace.arrivals) == 7
    assert trace.arrivals == workload(WorkloadSpec(requests=50), 16, 3).arrivals[:7]
