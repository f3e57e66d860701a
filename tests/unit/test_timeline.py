"""A timeline is what Perfetto opens: sorted, numeric, slices that nest, arrows with both ends."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kvasir.cli import main
from kvasir.runtime.timeline import Timeline, timeline
from kvasir.world.sim.run import simulate
from tests.sims import cluster, trace

PHASES = {"M", "X", "C", "i", "s", "f"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, int]:
    """The same run drawn while it ran, and from its recording; and its hand-overs."""
    folder = tmp_path_factory.mktemp("recording")
    live = Timeline()
    run = simulate(cluster(), trace(60), record=folder, listen=live.listen)
    return live.json(), timeline(folder), run.summary.paths["disaggregated"]


def events(data: bytes) -> list[dict[str, Any]]:
    found = json.loads(data)["traceEvents"]
    assert isinstance(found, list)
    return found


def test_every_event_is_well_formed_and_in_order(drawn: tuple[bytes, bytes, int]) -> None:
    for data in drawn[:2]:
        marks = events(data)
        assert {m["ph"] for m in marks} == PHASES
        for m in marks:
            assert type(m["pid"]) is int and type(m["tid"]) is int and m["name"]
            assert m["ts"] >= 0 and m.get("dur", 0) >= 0
        times = [m["ts"] for m in marks]
        assert times == sorted(times)


def test_a_process_a_worker_and_names_for_threads(drawn: tuple[bytes, bytes, int]) -> None:
    marks = events(drawn[0])
    names = [m["args"]["name"] for m in marks if m["name"] == "process_name"]
    assert sorted(names) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    threads = {(m["pid"], m["tid"]) for m in marks if m["name"] == "thread_name"}
    assert {(m["pid"], m["tid"]) for m in marks if m["ph"] == "X"} <= threads


def test_slices_of_one_thread_never_overlap(drawn: tuple[bytes, bytes, int]) -> None:
    ends: dict[tuple[int, int], float] = defaultdict(float)
    slices = [m for m in events(drawn[0]) if m["ph"] == "X"]
    for m in slices:
        thread = (m["pid"], m["tid"])
        assert m["ts"] >= ends[thread] - 2e-3, m
        ends[thread] = m["ts"] + m["dur"]
    assert sum(m["name"].startswith("receive") for m in slices) == drawn[2] > 30


def test_arrows_begin_and_end_inside_slices(drawn: tuple[bytes, bytes, int]) -> None:
    marks = events(drawn[0])
    by_id: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for m in marks:
        if m["ph"] in "sf":
            assert m["ph"] not in by_id[m["id"]]
            by_id[m["id"]][m["ph"]] = m
    slices = [m for m in marks if m["ph"] == "X"]
    moved = [m for m in slices if m["name"].startswith("receive") and m["args"]["bytes"]]
    assert len(by_id) == len(moved) > 30  # a prefix that was all there moves nothing
    for both in by_id.values():
        begin, end = both["s"], both["f"]
        assert begin["ts"] <= end["ts"] and begin["pid"] != end["pid"]
        assert (begin["cat"], begin["name"]) == (end["cat"], end["name"])
        assert around(slices, begin)["name"] == f"send {begin['args']['request']}"
        assert around(slices, end)["name"] == f"receive {begin['args']['request']}"


def around(slices: list[dict[str, Any]], mark: dict[str, Any]) -> dict[str, Any]:
    """The slice that an arrow's end belongs to."""
    (found,) = (
        s for s in slices
        if (s["pid"], s["tid"]) == (mark["pid"], mark["tid"])
        and s["ts"] <= mark["ts"] < s["ts"] + s["dur"]
    )  # fmt: skip
    return found


def test_a_recording_gives_the_same_timeline(drawn: tuple[bytes, bytes, int]) -> None:
    """But for the numbers of processes and arrows."""

    def plain(data: bytes) -> list[str]:
        marks = events(data)
        names = {m["pid"]: m["args"]["name"] for m in marks if m["name"] == "process_name"}
        return sorted(json.dumps(m | {"pid": names[m["pid"]], "id": 0}) for m in marks)

    assert plain(drawn[0]) == plain(drawn[1])


def test_simulate_writes_one_without_a_recording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "t.json"
    assert main(["simulate", "local", "--limit", "10", "--timeline", str(file)]) == 0
    assert sum(m["ph"] == "f" for m in events(file.read_bytes())) == 10
    assert "Successful requests" in capsys.readouterr().out
