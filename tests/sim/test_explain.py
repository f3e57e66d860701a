"""A recording explained and drawn: candidates of a decision, and a timeline for Perfetto."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from kvasir.cli.files import load_deployment
from kvasir.core.errors import ConfigError
from kvasir.runtime.explain import explain, lines
from kvasir.runtime.timeline import timeline
from kvasir.traces.workload import workload
from kvasir.world.sim.run import simulate


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    deployment = load_deployment("mooncake-64")
    spec = deployment.workload.model_copy(update={"limit": 60})
    simulate(deployment, workload(spec, deployment.block_size, 0), record=folder)
    return folder


def placed(folder: Path, request_id: str) -> list[str]:
    """Workers that the journal of the gateway names for a request, in order."""
    found = []
    for line in (folder / "gateway-0.jsonl").read_text().splitlines()[1:]:
        event = json.loads(line)["event"]
        if event["type"] == "Placed" and event["request_id"] == request_id:
            found.append(event.get("decode") or event["prefill"])
    return found


def test_explain_shows_all_candidates_and_the_one_that_was_taken(recording: Path) -> None:
    decisions = explain(recording, "r37")
    assert [d.stage for d in decisions] == ["prefill", "decode"]
    assert all(len(d.candidates) == 8 for d in decisions)
    taken = [c.worker for d in decisions for c in d.candidates if c.chosen]
    assert taken == placed(recording, "r37")
    shown = "\n".join(lines(decisions))
    assert shown.count("->") == 2 and "transfer" in shown


def test_the_winner_has_the_least_cost(recording: Path) -> None:
    decode = explain(recording, "r37")[1]
    costs = {c.worker: float(c.why.split()[1]) for c in decode.candidates}
    winner = next(c.worker for c in decode.candidates if c.chosen)
    assert costs[winner] == min(costs.values())


def test_an_unknown_request_names_a_near_one(recording: Path) -> None:
    with pytest.raises(ConfigError) as error:
        explain(recording, "r3x")
    assert "nearest: r3" in str(error.value) and len(str(error.value).splitlines()) <= 5


def test_timeline(recording: Path) -> None:
    marks = json.loads(timeline(recording))["traceEvents"]
    times = [m["ts"] for m in marks]
    assert times == sorted(times)
    assert all(isinstance(m["pid"], int) and isinstance(m["tid"], int) for m in marks)
    names = {m["args"]["name"] for m in marks if m["name"] == "process_name"}
    assert names == {f"{role}-{i}" for role in ("prefill", "decode") for i in range(8)}
    arrows = Counter(m["ph"] for m in marks if m["ph"] in "sf")
    assert arrows["s"] == arrows["f"] == 60
    assert all(m["dur"] >= 0 for m in marks if m["ph"] == "X")
