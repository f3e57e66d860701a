"""Every wrong input a user can give: at most five lines that say what, where, and the nearest name.

Through the real command and real HTTP, beside a server that goes on serving.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvasir as package
from kvasir.core.errors import LINES_MAX
from tests.live.served import Server, asked, deployment, good, kvasir, prompt_of, short, written

pytestmark = pytest.mark.timeout(60)

TINY = Path(package.__file__).parent / "models" / "tiny"
CONTEXT = 4096
ROW = {"timestamp": 0, "input_length": 40, "output_length": 4}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(written(tmp_path_factory.mktemp("good"), deployment())) as server:
        yield server
        assert server.process.poll() is None, server.stderr
        assert server.interrupt() == 0
        assert server.stderr == ""


@pytest.fixture(autouse=True)
def goes_on(server: Server) -> Iterator[None]:
    """After each of them the server answers a usual request."""
    yield
    good(server)


# --- files and flags ------------------------------------------------------------------------------


def line_of(path: Path, words: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if words in line)


def unknown_policy(folder: Path) -> tuple[list[str], list[str]]:
    path = written(folder, deployment(policy={"route": {"name": "netkw"}}))
    return ["serve", str(path)], [f"{path}:{line_of(path, 'netkw')}", "nearest: netkv"]


def unknown_key(folder: Path) -> tuple[list[str], list[str]]:
    config = deployment()
    config["polls"] = config.pop("pools")
    path = written(folder, config)
    return ["serve", str(path)], [f"{path}:{line_of(path, 'polls:')}", "nearest: pools"]


def malformed_yaml(folder: Path) -> tuple[list[str], list[str]]:
    path = written(folder, deployment())
    text = path.read_text().replace("engine: fake", "engine: [fake")
    path.write_text(text)
    return ["serve", str(path)], ["not valid YAML", f"{path}:"]


def broken_trace_row(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "trace.jsonl"
    rows = [json.dumps({**ROW, "timestamp": i}) for i in range(5)]
    rows[3] = rows[3].replace('"input_length": 40', '"input_length": "many"')
    path.write_text("\n".join(rows) + "\n")
    return ["simulate", "local", "--trace", str(path)], ["input_length", f"{path.name}:4"]


def cut_trace_row(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "trace.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)[:20]}\n{json.dumps(ROW)}\n")
    return ["trace", "stats", str(path)], ["not JSON", f"{path.name}:2"]


def missing_model_folder(folder: Path) -> tuple[list[str], list[str]]:
    return ["serve", str(folder / "nothing")], ["no model folder", "try:"]


def missing_weights(folder: Path) -> tuple[list[str], list[str]]:
    shutil.copytree(TINY, folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    return ["serve", str(folder / "model")], ["no model.safetensors", str(folder / "model")]


def missing_tokenizer(folder: Path) -> tuple[list[str], list[str]]:
    shutil.copytree(TINY, folder / "model")
    (folder / "model" / "tokenizer.json").unlink()
    return ["serve", str(folder / "model")], ["no tokenizer.json", "nearest: tokenizer_config.json"]


def broken_config(folder: Path) -> tuple[list[str], list[str]]:
    shutil.copytree(TINY, folder / "model")
    (folder / "model" / "config.json").write_text('{"hidden_size": ')
    return ["serve", str(folder / "model")], [str(folder / "model" / "config.json")]


WRONG_COMMANDS: list[Callable[[Path], tuple[list[str], list[str]]]] = [
    unknown_policy, unknown_key, malformed_yaml,
    broken_trace_row, cut_trace_row, missing_model_folder, missing_weights, missing_tokenizer,
    broken_config,
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG_COMMANDS, ids=lambda case: case.__name__)
def test_a_wrong_command_ends_with_a_few_lines(
    case: Callable[[Path], tuple[list[str], list[str]]], tmp_path: Path
) -> None:
    args, words = case(tmp_path)
    done = kvasir(*args, *(("--port", "0") if args[0] == "serve" else ()), cwd=tmp_path)
    assert done.returncode == 2
    assert short(done.stderr), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_workers_that_cannot_start_end_the_server(tmp_path: Path) -> None:
    """Found by three processes, said once, and not tried again and again."""
    tight = {"kv_blocks": None, "memory_fraction": 1e-9}
    path = written(tmp_path, deployment(prefill=tight, decode=tight))
    done = kvasir("serve", path, "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert short(done.stderr), done.stderr
    assert "memory_fraction" in done.stderr


@pytest.mark.long
def test_damaged_weights_end_the_server(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    args = ("serve", str(tmp_path / "model"), "--mixed", "1", "--port", "0")
    done = kvasir(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert short(done.stderr), done.stderr
    assert str(weights) in done.stderr


def test_a_port_in_use_is_said_and_nothing_is_left_behind(server: Server, tmp_path: Path) -> None:
    path = written(tmp_path, deployment())
    (tmp_path / "tmp").mkdir()
    taken = str(server.port)
    done = kvasir("serve", path, "--port", taken, cwd=tmp_path, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 2
    assert short(done.stderr), done.stderr
    assert "already in use" in done.stderr
    assert f"127.0.0.1:{taken}" in done.stderr
    assert "listening" not in done.stdout
    assert list((tmp_path / "tmp").iterdir()) == []


# --- requests -------------------------------------------------------------------------------------


def body(**changes: Any) -> bytes:
    return json.dumps(asked(prompt_of(20), 4) | {"stream": False} | changes).encode()


WRONG_REQUESTS: dict[str, tuple[bytes, int, list[str]]] = {
    "prompt over the context": (body(prompt=prompt_of(5000)), 400, ["4096", "5004"]),
    "output over the context": (body(max_tokens=5000), 400, ["4096", "5020"]),
    "unknown model": (body(model="tinny"), 404, ["tinny", "nearest: tiny"]),
    "bad JSON": (body()[:-1], 400, []),
    "not JSON": (b"\x00\xff" * 100, 400, []),
    "a list": (b"[]", 400, []),
    "wrong type": (body(max_tokens="many"), 400, ["max_tokens"]),
    "unknown token": (body(prompt=[1, 2, 259]), 400, ["259"]),
    "no prompt": (body(prompt=[]), 400, ["prompt"]),
    "10 MB": (body(user="x" * 10 * 1024 * 1024), 413, ["limit of 8.4 MB"]),
    "nested": (b"[" * 100_000, 400, []),
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_a_wrong_request_is_refused_in_a_few_lines(server: Server, name: str) -> None:
    content, status, words = WRONG_REQUESTS[name]
    answer = server.http.post("/v1/completions", content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert 0 < len(error["message"].splitlines()) <= LINES_MAX
    assert "Traceback" not in answer.text
    assert all(word in error["message"] for word in words), error


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/completion", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/no", 404),
])  # fmt: skip
def test_a_wrong_address_is_refused(server: Server, method: str, path: str, status: int) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == status
    assert len(answer.json()["error"]["message"].splitlines()) <= LINES_MAX
