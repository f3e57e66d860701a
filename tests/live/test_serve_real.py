"""`kvasir serve` as a user meets it: the real engine, OpenAI's client, the printed line, Ctrl-C."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.live.served import (
    WAIT_S,
    Server,
    deployment,
    environment,
    eventually,
    kvasir,
    written,
)

pytestmark = pytest.mark.timeout(120)

USER = [{"role": "user", "content": "Tell me of the well of Mimir."}]
TOKENS = 12


def test_serve_the_model_that_comes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without a kvasir.yaml
    with Server("--decode", "1") as server:
        assert set(server.workers()) == {"prefill-0.1", "decode-0.1"}
        assert len(server.run_dirs) == 1

        texts = [streamed(server) for _ in range(2)]
        assert texts[0] == texts[1]
        assert server.total("kvasir_kv_transfer_bytes_total") > 0
        assert_the_printed_line_works(server)
        assert_ctrl_c_ends_it(server)


def assert_ctrl_c_ends_it(server: Server) -> None:
    """Cleanly: no process, no run directory, no complaint."""
    pids = server.workers().values()
    assert pids
    assert server.interrupt() in (0, 130)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert server.run_dirs == []
    assert server.stderr == ""


def streamed(server: Server) -> str:
    """Greedy text of one chat answer, streamed; it went from one worker to another."""
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="demo", messages=USER, max_tokens=TOKENS, stream=True, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert raw.headers["x-kvasir-path"] == "disaggregated"
        chunks = list(raw.parse())
    assert chunks[-1].choices[0].finish_reason == "length"
    assert sum(1 for chunk in chunks if chunk.choices and chunk.choices[0].delta.content) > 1
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def assert_the_printed_line_works(server: Server) -> None:
    """What stands under "Try:" can be pasted as it is."""
    (line,) = (line for line in server.lines if line.startswith("curl "))
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    done = subprocess.run(
        [*shlex.split(line), "--silent", "--show-error", "--fail", "--noproxy", "*"],
        capture_output=True, text=True, check=False, timeout=WAIT_S, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["kvasir"]["path"] == "disaggregated"
    assert answer["kvasir"]["bytes"] > 0
    assert answer["kvasir"]["workers"]["prefill"] == "prefill-0"


def test_ctrl_c_while_workers_start_leaves_nothing_behind(tmp_path: Path) -> None:
    server = Server(written(tmp_path, deployment()))
    try:
        eventually(lambda: server.workers() or server.process.poll() is not None, "workers")
        assert_ctrl_c_ends_it(server)
    finally:
        server.close()


def test_bench_prints_the_table_of_vllm(tmp_path: Path) -> None:
    with Server(written(tmp_path, deployment())) as server:
        done = kvasir(
            "bench", "--base-url", server.url, "--num-prompts", "20", "--random-input-len", "64",
            "--random-output-len", "16", "--ignore-eos", "--json", tmp_path / "result.json",
            cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "Serving Benchmark Result" in lines[0]
    assert set(lines[0].replace(" Serving Benchmark Result ", "")) == {"="}
    shown = {label.strip(): value.strip() for label, _, value in
             (line.rpartition(":") for line in lines)}  # fmt: skip
    assert shown["Successful requests"] == "20"
    assert shown["Total input tokens"] == str(20 * 64)
    assert shown["Total generated tokens"] == str(20 * 16)
    for label in ("Request throughput (req/s)", "Mean TTFT (ms)", "P99 TPOT (ms)", "P99 ITL (ms)"):
        assert float(shown[label]) > 0
    assert json.loads((tmp_path / "result.json").read_bytes())["completed"] == 20


def test_the_script_is_the_module() -> None:
    """`kvasir` and `python -m kvasir` are one command."""
    said = subprocess.run(
        [Path(sys.executable).parent / "kvasir", "--version"],
        capture_output=True, text=True, check=True, timeout=WAIT_S, env=environment(),
    )  # fmt: skip
    assert said.stdout == kvasir("--version").stdout != ""
