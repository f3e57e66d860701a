"""The command line: starts fast, loads late, and every mistake is at most five lines."""

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvasir.cli import main
from kvasir.cli.app import VERBS
from kvasir.cli.files import bundled, load_deployment
from kvasir.cli.models import with_folders
from kvasir.core.errors import LINES_MAX
from kvasir.core.specs import Deployment, ModelShape
from kvasir.core.specs.parse import parse_deployment
from kvasir.measure.itl import ItlRuns
from kvasir.measure.results import canonical, read_summary, result
from kvasir.measure.summary import RequestOutcome, summarise

TINY = Path(__file__).parents[2] / "src" / "kvasir" / "models" / "tiny"
DEMO = TINY.with_name("demo")
HELP_CPU_S_MAX = 0.8  # goal 0.4 s on an idle machine; twice that, as a busy one is slower
HEAVY = ("pydantic", "numpy", "starlette", "torch", "uvicorn", "zmq", "tokenizers", "asyncio")


MAIN = "import sys; from kvasir.cli import main; sys.exit(main())"


def python(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No ./kvasir.yaml and no KVASIR_* of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("KVASIR_")]:
        monkeypatch.delenv(name)
    return tmp_path


# --- help --------------------------------------------------------------------------------------


def test_help_is_fast_and_names_every_verb() -> None:
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python("-c", MAIN, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert statistics.median(seconds) < HELP_CPU_S_MAX


def test_help_imports_nothing_heavy() -> None:
    done = python("-X", "importtime", "-c", MAIN, "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "kvasir.cli.app" in imported
    assert not {name.partition(".")[0] for name in imported} & set(HEAVY)
    ours = {name for name in imported if name.startswith("kvasir.")}
    assert ours == {"kvasir.cli", "kvasir.cli.app", "kvasir.core", "kvasir.core.errors"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"Usage: kvasir {verb}" in capsys.readouterr().out


# --- mistakes ----------------------------------------------------------------------------------

# command line: what stderr says
WRONG = {
    "srve": "nearest: serve",
    "--prot 3": "kvasir has no command '--prot'",
    "config shw": "nearest: show",
    "serve --prt 3": "nearest: --port",
    "serve --port x": "--port",
    "serve --engine tensorflow": '"torch", "fake"',
    "serve a b": "does not take 'b'",
    "serve nothere": "no model folder 'nothere'",
    "serve nothere.yaml": "no deployment is called 'nothere.yaml'",
    "serve locale": "nearest: local",
    "serve .": "no config.json in the model folder",
    "serve mooncake-64": "has no path",
    "serve --policy netkw": "nearest: netkv",
    "serve --prefill 0": "only decode workers",
    "serve --prefill 0 --decode 0": "no worker is left",
    "serve --prefill -1": "--prefill -1",
    "simulate nothere": "no deployment is called 'nothere'",
    "simulate mooncake-46": "nearest: mooncake-64",
    "simulate .": "a folder is not a deployment",
    "simulate --limit 0": "--limit",
    "simulate --policy nope": "--policy: no 'nope'",
    "simulate --trace mooncake-conversatoin": "nearest: mooncake-conversation",
    "compare --policies netkv,netkw": "nearest: netkv",
    "verify": "requires an argument",
    "verify nothere": "no recording is there",
    "trace stats azure-2032-conv": "nearest: azure-2023-conv",
    "config validate": "no deployment is called 'kvasir.yaml'",
    "bench --nope": "has no flag --nope",
    "bench stray": "does not take 'stray'",
    "bench --base-url http://127.0.0.1:9": "no server answers",
    "bench --base-url nowhere": "is not a base URL",
    "bench --goodput tttf:200": "nearest: ttft",
    "bench --goodput ttft:fast": "not a positive number",
    "bench --metric-percentiles 101": "over 100",
    "bench --percentile-metrics ttft,tpto": "nearest: tpot",
    "bench --num-prompts 0": "--num-prompts",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_said_in_five_lines(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert WRONG[line] in err
    assert len(err.splitlines()) <= LINES_MAX
    assert "Traceback" not in err


def test_a_file_with_a_mistake_names_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("kvasir.yaml").write_text("models: [{name: tiny}]\npools:\n  - nmae: p\n")
    assert main(["simulate"]) == 2
    err = capsys.readouterr().err
    assert "kvasir.yaml:3" in err and "nearest: name" in err
    assert len(err.splitlines()) <= LINES_MAX


def test_a_defect_is_one_line_and_a_way_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("kvasir.cli.files.load_deployment", broken)
    assert main(["config", "show"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("internal error: RuntimeError: two lines\n")
    assert "KVASIR_DEBUG=1" in err and len(err.splitlines()) <= LINES_MAX
    monkeypatch.setenv("KVASIR_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["config", "show"])


def test_ctrl_c_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvasir.cli.files.load_deployment", interrupted)
    assert main(["config", "show"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["config schema", "config validate local"])
def test_a_closed_pipe_is_silent(line: str) -> None:
    command = [sys.executable, "-c", MAIN, *line.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


# --- config ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "mooncake-64"])
def test_bundled_deployments_are_valid_and_show_reads_back(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in bundled()
    assert main(["config", "validate", name]) == 0
    assert "valid" in capsys.readouterr().out
    assert main(["config", "show", name]) == 0
    assert parse_deployment(capsys.readouterr().out, "shown") == load_deployment(name)


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(Deployment.model_fields)


def test_validate_takes_the_file_of_this_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("kvasir.yaml").write_text(bundled()["mooncake-64"])
    assert main(["config", "validate"]) == 0
    assert "kvasir.yaml: valid" in capsys.readouterr().out


def test_mooncake_64_is_the_published_cluster() -> None:
    deployment = load_deployment("mooncake-64")
    assert deployment.topology.gpus == sum(p.count * p.gpus for p in deployment.pools) == 64
    assert [(p.role, p.count, p.racks) for p in deployment.pools] == [
        ("prefill", 8, (0, 2)),
        ("decode", 8, (1, 3)),
    ]


def test_local_has_the_shape_and_folder_of_the_model_in_the_package() -> None:
    local = load_deployment("local")
    config = json.loads((DEMO / "config.json").read_text())
    assert local.models[0].shape == ModelShape.from_hf(config)
    assert local.models[0].path == "demo"
    assert with_folders(local).models[0].path == str(DEMO)


# --- serve -------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What `kvasir serve` would have run."""
    runs: list[SimpleNamespace] = []
    module = ModuleType("kvasir.gateway.platform")
    module.run = lambda deployment, **more: runs.append(  # type: ignore[attr-defined]
        SimpleNamespace(deployment=deployment, **more)
    )
    monkeypatch.setitem(sys.modules, "kvasir.gateway.platform", module)
    return runs


def roles(deployment: Deployment) -> dict[str, int]:
    return {p.role: p.count for p in deployment.pools}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"prefill": 1, "decode": 2}),
        ("--prefill 2", {"prefill": 2, "decode": 2}),
        ("--prefill 2 --decode 3", {"prefill": 2, "decode": 3}),
        ("--mixed 3", {"mixed": 3}),
        ("--mixed 1 --decode 2", {"decode": 2, "mixed": 1}),
        ("--mixed 0", {"prefill": 1, "decode": 2}),
    ],
)
def test_numbers_of_workers(
    flags: str, expected: dict[str, int], served: list[SimpleNamespace]
) -> None:
    assert main(["serve", *flags.split()]) == 0
    assert roles(served[0].deployment) == expected


def test_a_model_folder_becomes_a_deployment(served: list[SimpleNamespace]) -> None:
    line = f"serve {TINY} --engine fake --transport tcp --first-token decode --port 0 --record r"
    assert main(line.split()) == 0
    (run,) = served
    (model,) = run.deployment.models
    assert (model.name, model.path, model.max_context) == ("tiny", str(TINY), 4096)
    assert model.shape.architecture == "qwen3"
    assert (run.host, run.port, run.record) == ("127.0.0.1", 0, Path("r"))
    assert run.deployment.transport.kind == "tcp"
    assert (run.deployment.engine, run.deployment.first_token) == ("fake", "decode")


def test_a_long_context_is_cut_to_what_the_blocks_hold(
    tmp_path: Path, served: list[SimpleNamespace]
) -> None:
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert main(["serve", str(tmp_path)]) == 0
    assert served[0].deployment.models[0].max_context == 512 * 16


def test_a_folder_without_tokenizer_names_the_nearest_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    (tmp_path / "tokenizer.jsn").touch()
    assert main(["serve", str(tmp_path)]) == 2
    assert "nearest: tokenizer.jsn" in capsys.readouterr().err


def test_flag_beats_environment_beats_file(
    monkeypatch: pytest.MonkeyPatch, served: list[SimpleNamespace]
) -> None:
    def first_token(*flags: str) -> str:
        assert main(["serve", "x.yaml", *flags]) == 0
        return str(served[-1].deployment.first_token)

    Path("x.yaml").write_text(bundled()["local"])
    assert first_token() == "prefill"
    monkeypatch.setenv("KVASIR_FIRST_TOKEN", "decode")
    assert first_token() == "decode"
    assert first_token("--first-token", "prefill") == "prefill"


# --- simulate and compare ----------------------------------------------------------------------


class FakeResult:
    """As many good requests as there were arrivals."""

    def __init__(self, arrivals: int) -> None:
        done = RequestOutcome(ok=True, prompt_tokens=8, output_tokens=2, ttft_s=1.0, e2e_s=2.0)
        self.summary = summarise([done] * arrivals, ItlRuns(), 10.0)
        self.notes = ("a note of the run",)

    def to_json(self) -> bytes:
        return canonical(result(self.summary))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    runs: list[SimpleNamespace] = []

    def simulate(deployment: Deployment, trace: Any, **more: Any) -> FakeResult:
        more["progress"](0.5)
        runs.append(SimpleNamespace(deployment=deployment, trace=trace, **more))
        return FakeResult(len(trace.arrivals))

    module = ModuleType("kvasir.world.sim.run")
    module.simulate = simulate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvasir.world.sim.run", module)
    return runs


def test_simulate_prints_the_table_and_all_notes(
    simulated: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    line = "simulate --limit 30 --policy round_robin --seed 7"
    assert main(line.split()) == 0
    (run,) = simulated
    assert run.deployment.policy.route.name == "round_robin"
    assert (run.seed, run.record, len(run.trace.arrivals)) == (7, None, 30)
    out = capsys.readouterr()
    assert "Successful requests:                     30" in out.out
    assert "a note of the run" in out.out
    assert all(note.split()[0] in out.out for note in run.trace.notes)
    assert "50%" in out.err


def test_the_real_simulator_serves_the_bundled_deployments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("local", "mooncake-64"):
        assert main(["simulate", name, "--limit", "5"]) == 0
        assert "Successful requests:                     5" in capsys.readouterr().out


def test_json_to_stdout_is_nothing_but_json(
    simulated: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--limit", "5", "--json", "-"]) == 0
    assert read_summary(capsys.readouterr().out.encode()).completed == 5


def test_json_file_has_no_time_in_it_but_beside_it(simulated: list[SimpleNamespace]) -> None:
    assert main(["simulate", "--limit", "5", "--json", "out/a.json"]) == 0
    first = Path("out/a.json").read_bytes()
    assert main(["simulate", "--limit", "5", "--json", "out/b.json"]) == 0
    assert Path("out/b.json").read_bytes() == first
    assert {"command", "version", "written"} <= set(json.loads(Path("out/a.meta.json").read_text()))


def test_compare_runs_each_policy_on_the_same_arrivals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "compare local --policies round_robin,netkv,netkv --limit 6 --seeds 2 --jobs 1"
    assert main([*line.split(), "--json", "c.json"]) == 0
    shown = capsys.readouterr().out
    assert "round_robin" in shown and "(x" in shown
    assert "95 % intervals" in shown and "mean of 2 seeds" in shown
    runs = json.loads(Path("c.json").read_text())
    assert set(runs) == {"round_robin", "netkv"}
    for policy, results in runs.items():
        assert [r["seed"] for r in results] == [0, 1]
        assert {r["policy"] for r in results} == {policy}
        assert {r["completed"] for r in results} == {6}


def test_compare_in_many_processes_gives_the_same_results() -> None:
    line = "compare local --policies round_robin,netkv --limit 6 --seeds 2"
    assert main([*line.split(), "--jobs", "1", "--json", "one.json"]) == 0
    assert main([*line.split(), "--jobs", "2", "--json", "two.json"]) == 0
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()


def test_unwritable_json_is_said(
    simulated: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    assert main(["simulate", "local", "--limit", "2", "--json", "file/a.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


# --- bench -------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """Two tokens for whoever asks a model that exists."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._send(200, b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != "m":
            return self._send(404, b"no such model")
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": 2}
        last = {"choices": [{"text": "b", "finish_reason": "length"}]}
        events = [{"choices": [{"text": "a"}]}, last, {"choices": [], "usage": usage}]
        body = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
        return self._send(200, body.encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as found:
        thread = Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_bench_takes_vllms_flags_and_prints_its_table(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"""bench --base-url {server} --model m --dataset-name random --random-input-len 7
        --random-output-len 2 --num-prompts 6 --request-rate 1000 --burstiness 1.0
        --max-concurrency 3 --goodput ttft:2000 tpot:300 --percentile-metrics ttft,e2el
        --metric-percentiles 50,99 --save-result --result-dir out --seed 1 --ignore-eos"""
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert "Successful requests:                     6" in out
    assert "Total input tokens:                      42" in out
    assert "P50 TTFT (ms):" in out and "P99 E2EL (ms):" in out and "Request goodput" in out
    assert "Mean TPOT" not in out and "Inter-token" not in out
    (saved,) = Path("out").glob("kvasir-1000qps-m-*[0-9].json")
    assert read_summary(saved.read_bytes()).completed == 6


def test_bench_asks_the_server_for_its_model(server: str) -> None:
    line = f"bench --base-url {server} --num-prompts 2 --json one.json --goodput ttft:2000"
    assert main(line.split()) == 0
    assert read_summary(Path("one.json").read_bytes()).completed == 2


def test_bench_without_a_success_exits_1(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"bench --base-url {server} --model x --num-prompts 2".split()) == 1
    assert "HTTP 404" in capsys.readouterr().out


# --- verify and trace --------------------------------------------------------------------------


@pytest.mark.parametrize("ok", [True, False])
def test_verify_exits_by_its_verdict(
    ok: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("kvasir.runtime.verify")
    verdict = SimpleNamespace(ok=ok, lines=("conductor: 12 decisions",))
    module.verify_dir = lambda path: verdict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvasir.runtime.verify", module)
    Path("r").mkdir()
    assert main(["verify", "r"]) == (0 if ok else 1)
    assert "conductor: 12 decisions" in capsys.readouterr().out


def test_trace_stats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "stats", "mooncake-conversation", "--limit", "500"]) == 0
    out = capsys.readouterr().out
    assert "500 requests" in out and "endless" in out
