"""`kvasir measure engine` as users run it: on a folder, on a server, on a recording."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.live.served import Server, deployment, kvasir, short, written

SMALL = ("--tokens-max", "32", "--batch-max", "2", "--context-max", "64", "--rounds", "1")
OVERHEAD_S, PER_TOKEN_S = 0.008, 2e-4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server whose steps take what its fake engine is told, and the folder of its recording."""
    folder = tmp_path_factory.mktemp("measured")
    cost = {"cost": {"overhead_s": OVERHEAD_S, "per_token_s": PER_TOKEN_S}}
    path = written(folder, deployment(prefill=cost, decode=cost | {"count": 1}))
    with Server(path, "--record", folder / "recording") as server:
        yield server, folder / "recording"


def measured(folder: Path, *args: str | Path) -> dict[str, Any]:
    done = kvasir("measure", "engine", *args, "--yaml", folder / "cost.yaml")
    assert done.returncode == 0, done.stderr
    assert "held-out error median" in done.stdout
    found: dict[str, Any] = yaml.safe_load((folder / "cost.yaml").read_text())
    return found


def simulates(folder: Path, found: dict[str, Any]) -> None:
    """The file's parts, put where they belong, make a deployment that is valid and runs."""
    config = deployment(prefill={"cost": found["cost"]}, decode={"cost": found["cost"]})
    path = written(folder, config | {"host": found.get("host", {})})
    for verb in (("config", "validate", path), ("simulate", path, "--limit", "10")):
        done = kvasir(*verb)
        assert done.returncode == 0, done.stderr
    assert "Failed requests:                         0" in done.stdout


def test_a_folders_cost_is_accepted_by_validate_and_simulate(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = measured(tmp_path, "tiny", *SMALL)
    assert found["cost"]["overhead_s"] > 0 or found["cost"]["curve"]
    simulates(tmp_path, found)


def test_a_servers_cost_is_what_its_engine_was_told(
    recorded: tuple[Server, Path], tmp_path: Path
) -> None:
    """From outside, through HTTP and sleeps that end late: near, not equal."""
    server, _ = recorded
    limits = ("--tokens-max", "400", "--batch-max", "4", "--context-max", "500", "--rounds", "2")
    found = measured(tmp_path, "--base-url", f"http://127.0.0.1:{server.port}", *limits)
    cost = found["cost"]
    simulates(tmp_path, found)
    from kvasir.core.specs.deployment import FittedCost
    from kvasir.cost.step import Fitted

    fitted = Fitted(FittedCost(**cost))
    told = Fitted(FittedCost(overhead_s=OVERHEAD_S, per_token_s=PER_TOKEN_S))
    for rows in (((400, 0),), ((150, 0),), ((1, 100),) * 3):
        assert 0.9 * told.batch(rows) < fitted.batch(rows) < 1.5 * told.batch(rows), rows
    assert found.get("host", {}).get("request_s", 0) < 0.05


def test_a_recordings_cost_is_what_was_served(
    recorded: tuple[Server, Path], tmp_path: Path
) -> None:
    """While the server still runs."""
    server, recording = recorded
    load = ("--num-prompts", "40", "--random-input-len", "64", "--random-output-len", "16")
    url = f"http://127.0.0.1:{server.port}"
    done = kvasir("bench", "--base-url", url, "--request-rate", "20", *load, "--ignore-eos")
    assert done.returncode == 0, done.stderr
    found = measured(tmp_path, "--recording", recording)
    simulates(tmp_path, found)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("tiny", "--recording", "x"), "exclude each other"),
        (("nowhere",), "no model folder 'nowhere'"),
        (("--recording", "nowhere"), "no journals"),
        (("--base-url", "http://127.0.0.1:1"), "no server answers"),
        (("tiny", "--seconds", "0.001", *SMALL), "not enough to time everything once"),
    ],
)
def test_what_cannot_be_measured_is_said_in_words(
    args: tuple[str, ...], what: str, tmp_path: Path
) -> None:
    done = kvasir("measure", "engine", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert what in done.stderr and short(_without_progress(done.stderr))


def _without_progress(stderr: str) -> str:
    return "".join(line for line in stderr.splitlines(True) if not line.rstrip().endswith("%"))
