"""Policies from outside: found by entry point, imported when named, and run like our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvasir.cli.files import load_deployment
from kvasir.cli.overrides import with_policy
from kvasir.core.errors import ConfigError
from kvasir.policy.route import ROUTES
from kvasir.runtime.policies import ensure, route_names
from kvasir.runtime.sweep import Case, sweep
from kvasir.runtime.verify import verify_dir
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.run import simulate

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = '''
from kvasir.policy.route import Choice

def last(view, memory):
    return Choice(view.candidates[-1].id, "the last"), memory

number = 3
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs packages whose entry points are given; afterwards our own policies are left."""
    own = dict(ROUTES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for processes started

    def install(package: str, **points: str) -> None:
        (tmp_path / f"{package}.py").write_text(SOURCE)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {value}" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[kvasir.policies]\n{lines}\n")

    yield install
    ROUTES.clear()
    ROUTES.update(own)
    sys.modules.pop("theirs", None)


def arrivals(count: int) -> Trace:
    return Trace("t", None, tuple(Arrival(0.1 * i, 64, 4) for i in range(count)))


def test_an_entry_point_is_a_policy(outside, tmp_path: Path) -> None:
    outside("theirs", last="theirs:last")
    assert "last" in route_names() and "last" not in ROUTES
    assert "theirs" not in sys.modules, "named by nobody yet"
    deployment = with_policy(load_deployment("local"), "last")
    found = simulate(deployment, arrivals(5), record=tmp_path / "recording")
    assert found.policy == "last" and found.summary.completed == 5
    del ROUTES["last"]
    assert verify_dir(tmp_path / "recording").ok, "a replay finds it by itself"


def test_a_deployment_names_it_too(outside, tmp_path: Path) -> None:
    outside("theirs", last="theirs:last")
    text = "\n".join((
        "models: [{name: m, shape: tiny}]",
        "pools: [{name: p, role: mixed, count: 2, kv_blocks: 100}]",
        "policy: {route: {name: session, fallback: last}}",
    ))
    (tmp_path / "kvasir.yaml").write_text(text)
    load_deployment(tmp_path / "kvasir.yaml")
    assert "last" in ROUTES


def test_processes_of_a_sweep_find_it(outside) -> None:
    outside("theirs", last="theirs:last")
    deployment = with_policy(load_deployment("local"), "last")
    small = deployment.workload.model_copy(update={"requests": 3, "trace": None})
    case = Case("last", deployment.model_copy(update={"workload": small}), 0)
    assert [r.summary.completed for r in sweep([case, case], jobs=2)] == [3, 3]


def test_unknown_names_get_the_nearest_of_all(outside) -> None:
    outside("theirs", last_come="theirs:last")
    for wrong, near in (("last_cone", "last_come"), ("netkv_jiont", "netkv_joint")):
        with pytest.raises(ConfigError) as error:
            with_policy(load_deployment("local"), wrong)
        assert f"nearest: {near}" in str(error.value)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ({"broken": "theirs:missing"}, "cannot be loaded: AttributeError"),
        ({"broken": "nowhere:last"}, "cannot be loaded: ModuleNotFoundError"),
        ({"broken": "theirs:number"}, "is a int, not a function"),
    ],
)
def test_what_cannot_be_used_says_why(outside, points: dict[str, str], said: str) -> None:
    outside("theirs", **points)
    with pytest.raises(ConfigError, match=said):
        ensure("broken")


def test_our_names_stay_ours_and_two_offers_are_none(outside) -> None:
    own = ROUTES["netkv"]
    outside("theirs", netkv="theirs:last", last="theirs:last")
    outside("others", last="others:last")
    ensure("netkv")
    assert ROUTES["netkv"] is own and route_names().count("netkv") == 1
    with pytest.raises(ConfigError, match=r"offered by .*others:last and theirs:last"):
        ensure("last")


def test_the_example_runs() -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLES / "05_custom_policy.py"], check=True, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    names = [line.split()[0] for line in run.stdout.splitlines()]
    assert names == ["round_robin", "warmest", "netkv"]
