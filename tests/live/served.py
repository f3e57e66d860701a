"""A real `kvasir serve` for tests: its processes, its lines, its metrics, and streams as clients.

Every wait is for a condition; `pytest-timeout` and WAIT_S bound it.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from kvasir.core.errors import LINES_MAX
from kvasir.engine.fake import fake_tokens

HOST = "127.0.0.1"
WAIT_S = 60.0
VOCAB, EOS = 259, (258,)  # of the model that comes with the package
KVASIR = (sys.executable, "-m", "kvasir")
COUNTS = (
    "kvasir_kv_blocks_held", "kvasir_leases", "kvasir_quarantined", "kvasir_reservations",
    "kvasir_requests_queued", "kvasir_requests_running",
)  # fmt: skip
Config = dict[str, Any]


def deployment(**changes: Any) -> Config:
    """One prefill and two decode workers of made-up tokens; steps as slow as `cost` says.

    `changes` replace top-level keys; those that are mappings are merged. `prefill` and `decode`
    change their pool.
    """
    pool = {"hardware": "cpu", "batch_tokens_max": 2048, "kv_blocks": 512}
    cost = {"overhead_s": 0.008, "per_token_s": 50e-6}
    config: Config = {
        "name": "test",
        "models": [{"name": "tiny", "path": "tiny"}],
        "topology": {"preset": "fabric", "gpus_per_node": 64, "telemetry": None},
        "engine": "fake",
        "limits": {"beat_s": 0.1, "grace_s": 3.0, "dead_after_s": 10.0},
        "policy": {
            "route": {"output_reserve_tokens": 64}, "batch": {"chunk_tokens": 256},
        },
    }  # fmt: skip
    pools = [
        {"name": name, "role": name, "count": count, "cost": cost, **pool, **changes.pop(name, {})}
        for name, count in (("prefill", 1), ("decode", 2))
    ]
    return _merged(config, {"pools": pools, **changes})


def _merged(base: Config, over: Config) -> Config:
    def both(key: str) -> Any:
        old, new = base.get(key), over[key]
        return _merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else new

    return base | {key: both(key) for key in over}


def written(folder: Path, config: Config) -> Path:
    path = folder / "kvasir.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def eventually(condition: Callable[[], Any], what: str = "", every_s: float = 0.02) -> Any:
    """The condition's first true value; fails after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < end, f"still not: {what or condition}"
        time.sleep(every_s)
    return found


def environment(**changes: str) -> dict[str, str]:
    """This process's, without anybody's KVASIR_* and proxies, and without kernels that somebody
    built here: tests name the one that they mean."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("KVASIR_")}
    own = {k: v for k, v in own.items() if not k.lower().endswith("_proxy")}
    return own | {"KVASIR_CACHE": os.environ["KVASIR_CACHE"]} | changes


def kvasir(
    *args: str | Path, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """One command, run to its end."""
    return subprocess.run(
        [*KVASIR, *map(str, args)], capture_output=True, text=True, check=False, timeout=WAIT_S,
        env=environment(**env), cwd=cwd, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def short(stderr: str) -> bool:
    """What a user may be shown for one fault."""
    return 0 < len(stderr.splitlines()) <= LINES_MAX and "Traceback" not in stderr


class Server:
    """One `kvasir serve` and what it started. Ends with the `with` block."""

    def __init__(self, *args: str | Path, **env: str) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="kv-"))  # short: sockets' names are in there
        self.lines: list[str] = []
        self.port = 0
        self._stderr = (self.scratch / "stderr").open("w+b")
        (self.scratch / "tmp").mkdir()
        self.process = subprocess.Popen(
            [*KVASIR, "serve", *map(str, args), "--port", "0"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
            env=environment(TMPDIR=str(self.scratch / "tmp"), PYTHONUNBUFFERED="1", **env),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.http = httpx.Client(base_url="http://nowhere", timeout=WAIT_S, trust_env=False)

    def __enter__(self) -> "Server":
        try:
            self.ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def ready(self) -> None:
        """Until the line that invites to try it."""
        eventually(lambda: self.said("ready in") or self.process.poll() is not None, "ready")
        assert self.said("ready in"), self.stderr
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.lines[0])
        assert found, self.lines
        self.port = int(found[1])
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False)

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def stderr(self) -> str:
        return (self.scratch / "stderr").read_text()

    @property
    def run_dirs(self) -> list[Path]:
        return sorted((self.scratch / "tmp").glob("kvasir-*"))

    # --- processes --------------------------------------------------------------------------------

    def workers(self) -> dict[str, int]:
        """Worker (its name and incarnation) to process id, as the process table has it."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                after = stat.read_text().rpartition(")")[2].split()
                command = (stat.parent / "cmdline").read_bytes().decode()
                name = re.search(r"([^/\0]+)\.start\.json", command)
                if after[0] != "Z" and int(after[1]) == self.process.pid and name:
                    found[name[1]] = int(stat.parent.name)
        return found

    def kill(self, *workers: str) -> None:
        """SIGKILL to the living processes of those workers, all in one go."""
        alive = self.workers()
        for worker in workers:
            (pid,) = (pid for name, pid in alive.items() if name.startswith(f"{worker}."))
            os.kill(pid, signal.SIGKILL)

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """End it, gently and then not, with all that it started."""
        workers = self.workers()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        if self.process.poll() is None:
            workers |= self.workers()
            self.process.kill()
            self.process.wait()
            for pid in workers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._stderr.close()
        self.http.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # --- what it shows ----------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """`name{labels}` to value."""
        text = self.http.get("/metrics").raise_for_status().text
        rows = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in rows}

    def total(self, name: str) -> float:
        """Sum of a metric over its labels."""
        found = [v for k, v in self.metrics().items() if k.partition("{")[0] == name]
        assert found, f"no {name}"
        return sum(found)

    def gauge(self, name: str, worker: str) -> float:
        return self.metrics().get(f'{name}{{worker="{worker}"}}', 0.0)

    def held(self) -> dict[str, float]:
        """Counts that are not zero: blocks, leases, quarantine, reservations, requests.

        What is not known (yet) is not zero.
        """
        metrics = self.metrics()
        unknown = dict.fromkeys(set(COUNTS) - {k.partition("{")[0] for k in metrics}, math.nan)
        return unknown | {k: v for k, v in metrics.items() if k.partition("{")[0] in COUNTS and v}

    def healthy(self) -> bool:
        return self.http.get("/health").status_code == 200

    def at_rest(self) -> None:
        """Until every worker is there and nothing is held anywhere."""
        held: dict[str, float] = {}

        def nothing() -> bool:
            nonlocal held
            held = self.held()
            return not held and self.healthy()

        try:
            eventually(nothing)
        except AssertionError:
            raise AssertionError(f"still held: {held}, {self.http.get('/health').text}") from None


# --- clients --------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """One finished stream."""

    tokens: tuple[int, ...]
    finish: str
    path: str
    attempts: int
    workers: Mapping[str, str]


class Stream:
    """One streaming completion in a thread of its own; `tokens` grows while it runs."""

    def __init__(
        self, server: Server, prompt: Sequence[int], max_tokens: int, model: str = "tiny",
        adapter: str = "", **values: Any,
    ) -> None:  # fmt: skip
        """`adapter`: the digest of what `model` stands for. `values`: more of the body."""
        self._values = values
        self.prompt, self.max_tokens = list(prompt), max_tokens
        self.model, self.adapter = model, adapter
        self.tokens: list[int] = []
        self._url = f"{server.url}/v1/completions"
        self._future: Future[Answer] = Future()
        threading.Thread(target=self._main, daemon=True).start()

    def _main(self) -> None:
        try:
            self._future.set_result(self._run())
        except BaseException as error:
            self._future.set_exception(error)

    def _run(self) -> Answer:
        body = asked(self.prompt, self.max_tokens) | {"model": self.model} | self._values
        finish, timing = "", {}
        with httpx.stream(
            "POST", self._url, json=body, timeout=WAIT_S, trust_env=False
        ) as response:
            if response.status_code != 200:
                raise AssertionError(response.read().decode())
            path = response.headers["x-kvasir-path"]
            done = False
            for line in filter(None, response.iter_lines()):
                assert not done, f"after the end: {line}"
                if line == "data: [DONE]":
                    done = True
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    self.tokens += choice.get("token_ids") or ()
                    finish = choice["finish_reason"] or finish
                timing = event.get("kvasir", timing)
            assert done, "the stream broke off"
        return Answer(tuple(self.tokens), finish, path, timing["attempts"], timing["workers"])

    @property
    def running(self) -> bool:
        return not self._future.done()

    def answer(self) -> Answer:
        return self._future.result(WAIT_S)

    def check(self) -> Answer:
        """The answer, which must be the very tokens that the fake engine foretells."""
        answer = self.answer()
        expected = expected_tokens(self.prompt, self.max_tokens, self.adapter)
        assert list(answer.tokens) == expected, first_difference(answer.tokens, expected)
        assert answer.finish == "length"
        return answer


def asked(prompt: Sequence[int], max_tokens: int) -> Config:
    return {
        "model": "tiny", "prompt": list(prompt), "max_tokens": max_tokens, "stream": True,
        "ignore_eos": True, "return_token_ids": True, "kvasir": {"timing": True},
    }  # fmt: skip


def expected_tokens(prompt: Sequence[int], count: int, adapter: str = "") -> list[int]:
    return fake_tokens(prompt, count, vocab=VOCAB, eos_token_ids=EOS, adapter=adapter)


def first_difference(got: Sequence[int], expected: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    return f"{len(got)} tokens of {len(expected)}, first difference at {at}"


def prompt_of(count: int, seed: int = 0) -> list[int]:
    """Token ids that no other seed's prompt begins with."""
    return [(7 * i + 31 * seed + 13 * (i * i % 11) + seed * i) % 250 for i in range(count)]


class Raw:
    """A client that can hang up: a bare socket."""

    def __init__(self, server: Server, prompt: Sequence[int], max_tokens: int) -> None:
        body = json.dumps(asked(prompt, max_tokens)).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {HOST}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.sock = socket.create_connection((HOST, server.port), timeout=WAIT_S)
        self.sock.sendall(head.encode() + body)
        self.data = b""

    def read_events(self, count: int) -> None:
        """Until so many events came."""
        while self.data.count(b"\n\n") < count:
            new = self.sock.recv(65536)
            assert new, self.data
            self.data += new

    def hang_up(self) -> None:
        self.sock.close()


def good(server: Server, seed: int = 99) -> None:
    """The server answers a usual request, rightly."""
    Stream(server, prompt_of(20, seed), 4).check()


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """All at once, each in a thread."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result(WAIT_S) for f in [pool.submit(call) for call in calls]]


def contained(lines: Iterator[str] | Sequence[str], words: str) -> list[str]:
    return [line for line in lines if words in line]
