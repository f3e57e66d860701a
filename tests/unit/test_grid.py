"""Grids of policy parameters, tuning on one slice and reporting on another, sweeps and where they
run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvasir.cli import main
from kvasir.cli.files import load_deployment
from kvasir.cli.grid import CELLS_MAX, axes, cells
from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.specs import Deployment
from kvasir.measure.tune import best
from kvasir.runtime.sweep import Case, sweep
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.workload import Part, part_of


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- cells ----------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes_and_changes_nothing_else() -> None:
    spec = load_deployment("local")
    grid = axes(["route.cache_weight=0.5,2", "batch.name=lpm,dfs", "route.hash_blocks=3"])
    found = cells({"a": spec, "b": spec}, grid)
    assert list(found)[:3] == [
        "a cache_weight=0.5 name=lpm hash_blocks=3",
        "a cache_weight=0.5 name=dfs hash_blocks=3",
        "a cache_weight=2 name=lpm hash_blocks=3",
    ]
    assert len(found) == 8
    one = found["b cache_weight=2 name=dfs hash_blocks=3"].policy
    assert (one.route.cache_weight, one.batch.name, one.route.hash_blocks) == (2.0, "dfs", 3)
    back = {"cache_weight": spec.policy.route.cache_weight,
            "hash_blocks": spec.policy.route.hash_blocks}  # fmt: skip
    assert one.route.model_copy(update=back) == spec.policy.route
    assert cells({"a": spec}, ()) == {"a": spec}


WRONG = {
    "route.cache_wieght=1": "nearest: route.cache_weight",
    "cache_weight=1": "nearest: route.cache_weight",
    "route=netkv": "no policy parameter is called so",
    "route.cache_weight=": "no values",
    "route.cache_weight": "no values",
    "route.cache_weight=-1": "greater than or equal to 0",
    "route.cache_weight=fast": "valid number",
    "route.name=netkw": "nearest: netkv",
    "route.fallback=netkw": "nearest: netkv",
    "batch.name=lmp": "nearest: lpm",
    "admit=erly": "nearest: early",
    "evict=lur": "nearest: lru",
}


@pytest.mark.parametrize("grid", WRONG)
def test_a_wrong_grid_is_said_in_five_lines(grid: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "local", "--grid", grid]) == 2
    err = capsys.readouterr().err
    assert WRONG[grid] in err and "--grid" in err
    assert len(err.splitlines()) <= LINES_MAX and "Traceback" not in err


def test_a_grid_is_bounded_and_names_a_parameter_once() -> None:
    values = ",".join(map(str, range(1, 33)))
    grid = axes([f"route.cache_weight={values}", f"route.load_weight={values}"])
    with pytest.raises(ConfigError, match=f"1024 cells, at most {CELLS_MAX}"):
        cells({"a": load_deployment("local")}, grid)
    with pytest.raises(ConfigError, match="given twice"):
        axes(["admit=early", "admit=bounded"])


# --- parts and choosing ---------------------------------------------------------------------------


def test_parts_of_a_trace_share_no_request_and_begin_at_zero() -> None:
    trace = Trace("t", None, tuple(Arrival(1.0 + i, 10 + i, 2) for i in range(10)))
    first, rest = part_of(trace, Part(0, 0.3)), part_of(trace, Part(0.3, 1))
    lengths = [a.input_tokens for a in (*first.arrivals, *rest.arrivals)]
    assert lengths == list(range(10, 20)) and len(first.arrivals) == 3
    assert first.arrivals[0].at_s == 1.0, "the first part keeps its clock"
    assert [a.at_s for a in rest.arrivals] == [float(i) for i in range(7)]
    assert "requests 4 to 10 of 10" in rest.notes[-1]
    assert part_of(trace, Part()) is trace


def test_best_is_goodput_then_mean_ttft_then_the_first() -> None:
    def ran(goodput: float | None, ttft_s: float) -> SimpleNamespace:
        return SimpleNamespace(goodput=goodput, ttft=SimpleNamespace(mean_s=ttft_s))

    assert best({"a": [ran(1.0, 1.0)], "b": [ran(2.0, 9.0)]}) == "b"
    assert best({"a": [ran(1.0, 5.0), ran(3.0, 5.0)], "b": [ran(2.0, 4.0), ran(2.0, 4.0)]}) == "b"
    assert best({"a": [ran(None, 1.0)], "b": [ran(None, 1.0)]}) == "a"


# --- compare --------------------------------------------------------------------------------------


def test_a_grid_runs_every_cell_with_every_seed(capsys: pytest.CaptureFixture[str]) -> None:
    line = "compare local --limit 6 --seeds 2 --jobs 1 --json g.json"
    assert main([*line.split(), "--grid", "route.cache_weight=0,1", "--policies",
                 "cache_load,netkv"]) == 0  # fmt: skip
    runs = json.loads(Path("g.json").read_text())
    assert set(runs) == {f"{p} cache_weight={w}" for p in ("cache_load", "netkv") for w in (0, 1)}
    assert all([r["seed"] for r in found] == [0, 1] for found in runs.values())
    shown = capsys.readouterr().out
    assert "netkv cache_weight=1 " in shown, "no label is cut"


def test_one_seed_shows_figures_without_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    line = "compare local --limit 6 --seeds 1 --jobs 1 --grid admit=bounded"
    assert main(line.split()) == 0
    shown = capsys.readouterr().out
    assert "one seed: no intervals" in shown and "mean TTFT (ms)" in shown and "+-" not in shown


def test_tuning_chooses_on_one_slice_and_reports_on_the_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "compare local --policies cache_load --limit 20 --seeds 2 --jobs 1 --json t.json"
    grid = ["--grid", "route.cache_weight=0,1", "--grid", "route.load_weight=0,1"]
    assert main([*line.split(), *grid, "--tune-on", "0.3"]) == 0
    found = json.loads(Path("t.json").read_text())
    assert found["chosen"]["cache_load"] in found["tuned"] and len(found["tuned"]) == 4
    assert {r["completed"] for runs in found["tuned"].values() for r in runs} == {6}
    assert set(found["rest"]) == {"cache_load", "cache_load tuned"}
    assert {r["completed"] for runs in found["rest"].values() for r in runs} == {14}
    hashes = {key: {r["trace_hash"] for runs in found[key].values() for r in runs}
              for key in ("tuned", "rest")}  # fmt: skip
    assert not hashes["tuned"] & hashes["rest"]
    assert "chosen for cache_load" in capsys.readouterr().out


def test_tuning_on_another_trace_reports_on_the_whole_one() -> None:
    rows = [{"timestamp": i * 500, "input_length": 20, "output_length": 3} for i in range(4)]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "compare local --limit 5 --seeds 1 --jobs 1 --grid admit=bounded,early --json t.json"
    assert main([*line.split(), "--tune-on", "other.jsonl"]) == 0
    found = json.loads(Path("t.json").read_text())
    assert {r["completed"] for runs in found["tuned"].values() for r in runs} == {4}
    assert {r["completed"] for runs in found["rest"].values() for r in runs} == {5}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--tune-on 0.3", "add --grid"),
        ("--tune-on 1.5 --grid admit=early", "between 0 and 1"),
        ("--tune-on nowhere --grid admit=early --jobs 1", "no trace is called 'nowhere'"),
    ],
)
def test_tuning_mistakes(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "local", *line.split()]) == 2
    assert said in capsys.readouterr().err


# --- where a sweep runs ---------------------------------------------------------------------------


def small(requests: int = 4) -> Deployment:
    spec = load_deployment("local")
    workload = spec.workload.model_copy(update={"requests": requests, "trace": None})
    return spec.model_copy(update={"workload": workload})


def test_processes_give_the_results_of_this_one_in_order() -> None:
    cases = [Case("a", small(), seed, part) for seed in (0, 1) for part in (Part(), Part(0.5, 1))]
    here, there = sweep(cases, jobs=1), sweep(cases, jobs=2)
    assert [r.to_json() for r in here] == [r.to_json() for r in there]
    assert [r.summary.completed for r in here] == [4, 2, 4, 2]
    assert not here[0].outcomes


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    sweep([Case("a", small(), 0)] * 2, jobs=1, progress=told.append)
    assert told == [0.5, 1.0]


def test_without_ray_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    assert main(["compare", "local", "--limit", "2", "--ray", "127.0.0.1:1"]) == 2
    assert "pip install 'kvasir-llm[ray]'" in capsys.readouterr().err
