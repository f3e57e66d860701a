"""Other tools' files as traces: what is read, what is refused, and what comes back unchanged."""

import gzip
import io
import json
from pathlib import Path

import pytest

from kvasir.cli import main
from kvasir.core.errors import LINES_MAX, TraceError
from kvasir.core.specs import WorkloadSpec
from kvasir.traces.formats import load
from kvasir.traces.generators import generate
from kvasir.traces.mooncake import reblocked, write_mooncake
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.slices import cut_share, cut_time, dealt

BURST = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,a,1.5,big,30,12,42,Conversation log\n"
    "7.25,b,2,small,9,0,9,API log\n"
    "11,a,2,big,80,20,100,Conversation log\n"
)
VLLM = {
    "date": "20260101-000000", "backend": "vllm", "input_lens": [7, 9, 11],
    "output_lens": [3, 0, 5], "start_times": [100.5, 101.0, 100.0], "errors": ["", "timeout", ""],
}  # fmt: skip
TALKS = (("Hälfte", "x"), ("alone",), ("ab", "cde", "more", "answers"))
SHAREGPT = [
    {"id": "x", "conversations": [{"from": "human", "value": turn} for turn in talk]}
    for talk in TALKS
]


def aiperf_row(start_ns: int, into: int, out: int, error: object = None) -> str:
    metrics: dict[str, object] = {"error_isl": {"value": into, "unit": "tokens"}}
    if error is None:
        metrics = {
            "input_sequence_length": {"value": into, "unit": "tokens"},
            "output_sequence_length": {"value": out, "unit": "tokens"},
            "time_to_first_token": {"value": 255.8, "unit": "ms"},
        }
    metadata = {"session_num": 0, "x_correlation_id": "s", "request_start_ns": start_ns}
    return json.dumps({"metadata": metadata, "metrics": metrics, "error": error})


def saved(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, "utf-8")
    return path


# --- reading ----------------------------------------------------------------------------------


def test_burstgpt(tmp_path: Path) -> None:
    trace = load(saved(tmp_path, "burst.csv", BURST))
    assert trace.arrivals == (
        Arrival(0.0, 30, 12, (), "a"), Arrival(6.0, 80, 20, (), "a"),
    )  # fmt: skip
    assert "1 rows without input or output" in trace.notes[0]


def test_burstgpt_without_sessions(tmp_path: Path) -> None:
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n3,m,4,5,9,API\n"
    assert load(saved(tmp_path, "b.csv", text)).arrivals == (Arrival(0.0, 4, 5),)


def test_a_detailed_result_of_vllm(tmp_path: Path) -> None:
    for text in (json.dumps(VLLM), json.dumps(VLLM, indent=1)):
        trace = load(saved(tmp_path, "v.json", text))
        assert trace.arrivals == (Arrival(0.0, 11, 5), Arrival(0.5, 7, 3))


def test_records_of_aiperf(tmp_path: Path) -> None:
    start = 1759813207532900363
    rows = [aiperf_row(start, 550, 9), aiperf_row(start + 1, 5, 0, {"code": 499}),
            aiperf_row(start + 250_000_000, 7, 2)]  # fmt: skip
    trace = load(saved(tmp_path, "p.jsonl", "\n".join(rows)))
    assert trace.arrivals == (Arrival(0.0, 550, 9, (), "s"), Arrival(0.25, 7, 2, (), "s"))


def test_sharegpt_has_the_lengths_of_a_tokenizer(tmp_path: Path) -> None:
    path = saved(tmp_path, "s.json", json.dumps(SHAREGPT))
    trace = load(path, tokens=lambda text: len(text.encode()), rate=2.0, seed=1)
    assert [(a.input_tokens, a.output_tokens) for a in trace.arrivals] == [(7, 1), (2, 3)]
    words = load(path, tokens=lambda _: 4, rate=2.0, seed=1)
    assert [a.at_s for a in words.arrivals] == [a.at_s for a in trace.arrivals]
    with pytest.raises(TraceError, match="--tokenizer bytes"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.csv", BURST + "12,a,1,big,ten,1,11,API log\n", "'ten' is not a number of tokens"),
        ("b.csv", BURST + "noon,a,1,big,1,1,2,API log\n", "'noon' is not a number of seconds"),
        ("b.csv", BURST + "nan,a,1,big,1,1,2,API log\n", "'nan' is not a number of seconds"),
        ("v.json", '{"date": "x", "duration": 1.0, "completed": 3}', "--save-detailed"),
        ("v.json", json.dumps(VLLM | {"output_lens": [1]}), "differ in length"),
        ("v.json", '{"date": ', "not JSON"),
        ("p.jsonl", aiperf_row(1, 2, 3) + '\n{"metadata": {}}', "p.jsonl:2"),
        ("p.jsonl", '{"metadata": {"request_start_ns": 1}, "metrics": {}}', "though no error"),
        ("s.json", '[{"conversations": "text"}]', "not a list of conversations"),
        ("s.json", "[{", "not JSON"),
        ("x.txt", "hello\nworld\n", "no column TIMESTAMP (found: hello)"),
    ],
)
def test_what_is_broken_is_said_in_five_lines(
    name: str, content: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError) as caught:
        load(saved(tmp_path, name, content), tokens=len)
    assert said in str(caught.value) and name in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= LINES_MAX


# --- block sizes ------------------------------------------------------------------------------


def rows(*pairs: tuple[int, int]) -> str:
    def row(tokens: int, blocks: int) -> str:
        ids = list(range(blocks))
        return json.dumps(
            {"timestamp": 0, "input_length": tokens, "output_length": 1, "hash_ids": ids}
        )

    return "\n".join(row(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("pairs", "size", "said"),
    [
        ([(1024, 2), (513, 2)], 512, 0),
        ([(160, 10), (1600, 100)], 16, 0),
        ([(161, 11), (160, 10)], 16, 0),
        ([(48, 1), (49, 2)], 48, 0),
        ([(100, 1)], 512, 1),  # any size from 100 on: Mooncake's own
        ([(10_000, 1)], 16_384, 1),
    ],
)
def test_rows_say_how_large_a_block_is(
    pairs: list[tuple[int, int]], size: int, said: int, tmp_path: Path
) -> None:
    trace = load(saved(tmp_path, "t.jsonl", rows(*pairs)))
    assert trace.block_size == size
    assert sum("are assumed" in note for note in trace.notes) == said


def test_larger_blocks_say_the_same_of_prefixes() -> None:
    spec = WorkloadSpec(requests=200, turns=4, prefix_share=0.5, prefix_tokens=256, think_s=1)
    fine = generate(spec, 16, 3)
    coarse = reblocked(fine, 64)
    assert coarse.block_size == 64
    full: set[int] = set()
    tails: set[int] = set()
    for a, b in zip(fine.arrivals, coarse.arrivals, strict=True):
        assert len(b.hash_ids) == -(-b.input_tokens // 64)
        whole = b.input_tokens // 64
        assert b.hash_ids[:whole] == a.hash_ids[3::4][:whole]
        full.update(b.hash_ids[:whole])
        tails.update(b.hash_ids[whole:])
    assert not full & tails  # a partial block is never taken for a full one
    with pytest.raises(TraceError, match="a multiple of 16"):
        reblocked(fine, 24)


# --- round trips ------------------------------------------------------------------------------


def written(trace: Trace) -> bytes:
    buffer = io.BytesIO()
    write_mooncake(trace, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["mooncake-conversation", "azure-2023-conv"])
def test_what_is_written_reads_back(name: str, tmp_path: Path) -> None:
    trace = load(name, 3_000)
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(written(trace)))
    again = load(path)
    assert again.block_size == trace.block_size
    for a, b in zip(again.arrivals, trace.arrivals, strict=True):
        assert a.at_s == pytest.approx(b.at_s, abs=1e-9)
        assert (a.input_tokens, a.output_tokens, a.hash_ids, a.session) == (
            b.input_tokens, b.output_tokens, b.hash_ids, b.session,
        )  # fmt: skip
    assert written(again) == written(trace)


def test_sessions_survive(tmp_path: Path) -> None:
    trace = generate(WorkloadSpec(requests=60, turns=3), 16, 0)
    path = tmp_path / "t.jsonl"
    path.write_bytes(written(trace))
    assert [a.session for a in load(path).arrivals] == [a.session for a in trace.arrivals]


# --- two parts --------------------------------------------------------------------------------

WHOLE = generate(WorkloadSpec(requests=300, turns=3), 16, 0)


def test_a_cut_by_share_or_time_keeps_every_request_once() -> None:
    by_share = cut_share(WHOLE, 0.8)
    assert [len(part.arrivals) for part in by_share] == [240, 60]
    at_s = WHOLE.arrivals[240].at_s
    assert cut_time(WHOLE, at_s) == by_share
    first, second = by_share
    assert first.arrivals == WHOLE.arrivals[:240]
    assert second.arrivals[0].at_s == 0.0
    lengths = [a.input_tokens for part in by_share for a in part.arrivals]
    assert lengths == [a.input_tokens for a in WHOLE.arrivals]
    with pytest.raises(TraceError, match="one side of"):
        cut_time(WHOLE, 1e6)


def test_dealing_keeps_sessions_whole() -> None:
    first, second = dealt(WHOLE, 0.7, seed=1)
    assert dealt(WHOLE, 0.7, seed=1) == (first, second)
    assert dealt(WHOLE, 0.7, seed=2) != (first, second)
    assert sorted((*first.arrivals, *second.arrivals), key=lambda a: a.at_s) == list(WHOLE.arrivals)
    names = [{a.session for a in part.arrivals} for part in (first, second)]
    assert not names[0] & names[1]
    assert 0.55 < len(names[0]) / len(names[0] | names[1]) < 0.85


# --- command line -----------------------------------------------------------------------------


def test_a_recording_becomes_a_trace_without_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key").write_bytes(b"k" * 32)
    line = "trace generate in.jsonl --requests 40 --turns 3 --think-s 1 --block-size 16"
    assert main([*line.split(), "--input-mean", "200"]) == 0
    assert main(["simulate", "local", "--trace", "in.jsonl", "--record", "rec"]) == 0
    for out in ("a.jsonl", "b.jsonl", "c.jsonl"):
        keyed = ["--key-file", "key"] if out != "c.jsonl" else []
        assert main(["trace", "convert", "rec", out, *keyed]) == 0
    assert "kkkk" not in capsys.readouterr().out
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    given, found, other = (load(p) for p in ("in.jsonl", "a.jsonl", "c.jsonl"))
    assert found.block_size == 16 and len(found.arrivals) > 35
    ids: dict[int, int] = {}
    for a, b in zip(given.arrivals, found.arrivals, strict=False):
        assert (a.input_tokens, a.output_tokens) == (b.input_tokens, b.output_tokens)
        for old, new in zip(a.hash_ids, b.hash_ids, strict=True):
            assert ids.setdefault(old, new) == new
    assert len(set(ids.values())) == len(ids)  # equal iff they were equal
    assert not {i for a in other.arrivals for i in a.hash_ids} & set(ids.values())
    assert main(["trace", "convert", "rec", "coarse.jsonl.gz", "--block-size", "64"]) == 0
    assert load("coarse.jsonl.gz").block_size == 64


def test_the_same_flags_give_the_same_file(tmp_path: Path) -> None:
    line = "--requests 50 --arrivals on_off --input zipf --input-mean 300 --turns 2"
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        assert main(["trace", "generate", str(tmp_path / name), *line.split()]) == 0
    first, second = ((tmp_path / f"{name}.jsonl.gz").read_bytes() for name in "ab")
    assert first == second and first[4:8] == bytes(4)  # gzip's own time is left empty


def test_sharegpt_with_the_tokenizer_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Path(__file__).parents[2] / "src" / "kvasir" / "models" / "tiny"
    path, out = saved(tmp_path, "s.json", json.dumps(SHAREGPT)), tmp_path / "o.jsonl"
    assert main(["trace", "convert", str(path), str(out), "--tokenizer", str(tiny)]) == 0
    assert len(load(out).arrivals) == 2
    assert main(["trace", "convert", str(path), str(out), "--tokenizer", str(tmp_path)]) == 2
    assert "no tokenizer can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trace convert . o.jsonl", "no journals here"),
        ("trace convert azure-2023-conv o.jsonl --limit 0", "--limit"),
        ("trace split azure-2023-conv a b --at-s 5 --share 0.5", "cuts by time alone"),
        ("trace split azure-2023-conv a b --share 1.5", "--share"),
        ("trace generate o.jsonl --arrivals poison", '"poisson"'),
        ("trace generate o.jsonl --input zipf --input-mean 2000 --input-max 3000", "no Zipf law"),
        ("simulate local --trace .", "a folder is not a trace"),
    ],
)
def test_mistakes(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) <= LINES_MAX


def test_a_short_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, key = str(tmp_path / "rec"), tmp_path / "key"
    key.write_bytes(b"short")
    assert main(["simulate", "local", "--limit", "2", "--record", record]) == 0
    assert main(["trace", "convert", record, "o.jsonl", "--key-file", str(key)]) == 2
    assert "can be guessed" in capsys.readouterr().err
