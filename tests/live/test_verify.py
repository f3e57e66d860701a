"""Recordings of both worlds, re-run in fresh processes: the same decisions, or the first other one.

The hash seed is another one each time: a decision that hangs on the order of a set would differ.
"""

import asyncio
import base64
import binascii
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from kvasir.core.specs.parse import parse_deployment
from kvasir.policy import batch
from kvasir.traces.workload import workload
from kvasir.world.sim.run import simulate
from tests.live.served import (
    WAIT_S,
    Config,
    Server,
    asked,
    contained,
    deployment,
    expected_tokens,
    kvasir,
    prompt_of,
    short,
    written,
)

pytestmark = pytest.mark.timeout(90)

CONCURRENT = 50
OUTPUT_TOKENS = 32
SEEDS = ("1", "7")  # these order the workers' names differently, as sets and by hash
TEXT = "The quartz xylophone of request %d sings about its owner's secrets"


class Recording(NamedTuple):
    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Fifty requests at a time, live; decode batches overflow, so that their queues count."""
    folder = tmp_path_factory.mktemp("recording")
    config = deployment(decode={"batch_max": 8})
    with Server(
        written(folder, config), "--record", folder / "record", PYTHONHASHSEED=SEEDS[0]
    ) as server:
        ids = asyncio.run(ask_all(server))
        server.at_rest()
        assert server.interrupt() == 0
    return Recording(folder / "record", *ids)


async def ask_all(server: Server) -> tuple[list[list[int]], list[list[int]]]:
    """Half as token ids that share prefixes, half as text. Prompt and answer of each, as ids."""
    shared = prompt_of(64)
    bodies: list[Config] = []
    for i in range(CONCURRENT):
        body = asked(shared + prompt_of(10 + i, i), OUTPUT_TOKENS) | {"stream": False}
        bodies.append(body if i % 2 else body | {"prompt": TEXT % i})
    limits = httpx.Limits(max_connections=CONCURRENT)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=WAIT_S, trust_env=False, limits=limits
    ) as client:
        calls = [client.post("/v1/completions", json=body) for body in bodies]
        answers = [r.raise_for_status().json() for r in await asyncio.gather(*calls)]
    choices = [a["choices"][0] for a in answers]
    return [c["prompt_token_ids"] for c in choices], [c["token_ids"] for c in choices]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def patched(folder: Path, code: str) -> dict[str, str]:
    """Environment in which every Python process runs `code` before anything else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path}


# --- a live recording -----------------------------------------------------------------------------


def test_the_recording_is_of_fifty_at_a_time_and_they_were_answered_rightly(
    recording: Recording,
) -> None:
    open_now = open_max = 0
    for entry in lines_of(recording.folder / "gateway-0.jsonl")[1:]:
        open_now += (entry["event"]["type"] == "Arrive") - (entry["event"]["type"] == "Done")
        open_max = max(open_max, open_now)
    assert open_max == CONCURRENT
    for prompt, answer in zip(recording.prompts, recording.answers, strict=True):
        assert answer == expected_tokens(prompt, OUTPUT_TOKENS)


def test_verify_reproduces_every_decision_of_every_node(recording: Recording) -> None:
    done = kvasir("verify", recording.folder, PYTHONHASHSEED=SEEDS[1])
    assert (done.returncode, done.stderr) == (0, "")
    kinds = {"conductor": "conductor", "gateway-0": "gateway"}
    workers = ("prefill-0", "decode-0", "decode-1")
    expected = []
    for name in sorted((*kinds, *workers)):
        inputs = len(lines_of(recording.folder / f"{name}.jsonl")) - 1
        expected.append(f"{name} ({kinds.get(name, 'worker')}): {inputs} inputs, same decisions")
        assert inputs > CONCURRENT
    assert done.stdout.splitlines() == expected


EDITS = {
    "a route constant": (
        "import sys, kvasir.policy.route\n"
        "sys.modules['kvasir.policy.route.netkv'].OUTPUT_TOKENS_MEAN += 1\n",
        {"conductor"},
    ),
    "the length of decode runs": (
        "from kvasir.policy.batch import BATCHES\n"
        "old = BATCHES['token_budget']\n"
        "new = lambda view: old(view)._replace(steps=min(old(view).steps, 7))\n"
        "BATCHES['token_budget'] = new\n",
        {"decode-0", "decode-1"},
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_verify_reports_the_first_decision_that_an_edited_policy_changes(
    recording: Recording, edit: str, tmp_path: Path
) -> None:
    code, nodes = EDITS[edit]
    env = patched(tmp_path / "edit", code)
    done = kvasir("verify", recording.folder, PYTHONHASHSEED=SEEDS[1], **env)
    assert (done.returncode, done.stderr) == (1, "")
    said = done.stdout.splitlines()
    assert {line.split()[0] for line in contained(said, ", differs")} == nodes
    node = min(nodes)
    at = next(i for i, line in enumerate(said) if line.startswith(f"{node} ("))
    found = re.fullmatch(r"  first difference at input (\d+), (\w+), time .*", said[at + 1])
    assert found, said[at + 1]
    number, kind = int(found[1]), found[2]
    lines = (recording.folder / f"{node}.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(lines[number])["event"]["type"] == kind
    assert [line.split()[0] for line in said[at + 2 : at + 5]] == ["input:", "recorded:", "now:"]
    # It is the first one: cut off before it, the recording verifies.
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / f"{node}.jsonl").write_bytes(b"".join(lines[:number]))
    assert kvasir("verify", tmp_path / "before", **env).returncode == 0


def test_verify_sees_a_changed_input(recording: Recording, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(recording.folder, changed)
    path = changed / "decode-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"type":"StepDone"' in line)
    entry = json.loads(lines[at])
    entry["event"]["rows"][0]["end"] = "length"
    lines[at] = json.dumps(entry).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    done = kvasir("verify", changed)
    assert done.returncode == 1
    assert f"first difference at input {at}, StepDone" in done.stdout


@pytest.mark.parametrize("node", ["conductor", "decode-0"])
def test_a_recording_of_another_version_is_named(
    recording: Recording, node: str, tmp_path: Path
) -> None:
    header = lines_of(recording.folder / f"{node}.jsonl")[0]
    header |= {"version": "99.0", "config": header["config"] | {"limits": 1, "beat_s": "often"}}
    (tmp_path / f"{node}.jsonl").write_text(json.dumps(header) + "\n")
    done = kvasir("verify", tmp_path)
    assert done.returncode == 2
    assert short(done.stderr), done.stderr
    assert f"{node}, recorded by version 99.0" in done.stderr


def test_a_recording_holds_no_text_and_no_tokens(recording: Recording) -> None:
    """Not as lists of numbers, nor as bytes in any string."""
    runs = [ids[at : at + 4] for ids in (*recording.prompts, *recording.answers)
            for at in range(0, len(ids) - 4, 4)]  # fmt: skip
    packed = {array("I", run).tobytes() for run in runs}
    listed = {tuple(run) for run in runs}
    journals = sorted(recording.folder.iterdir())
    assert len(journals) == 5
    for path in journals:
        raw = path.read_bytes()
        assert b"xylophone" not in raw
        for line in raw.splitlines():
            for value in values(json.loads(line)):
                if isinstance(value, list):
                    assert not any(tuple(value[i : i + 4]) in listed for i in range(len(value)))
                elif isinstance(value, str):
                    for data in readings(value):
                        assert b"xylophone" not in data
                        assert not any(data[i : i + 16] in packed for i in range(len(data) - 15))


def values(value: Any) -> Iterator[Any]:
    """Every list of numbers and every string in a JSON value."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from values(inner)
    elif isinstance(value, list):
        if value and all(isinstance(one, int) for one in value):
            yield value
        for inner in value:
            yield from values(inner)
    elif isinstance(value, str):
        yield value


def readings(text: str) -> list[bytes]:
    """What a string can be read as: itself, base64, hexadecimal."""
    found = [text.encode()]
    for decode in (lambda: base64.b64decode(text, validate=True), lambda: bytes.fromhex(text)):
        try:
            found.append(decode())
        except (binascii.Error, ValueError):
            continue
    return found


# --- a policy that fails --------------------------------------------------------------------------


RAISES = (
    "from kvasir.policy.batch import BATCHES\n"
    "def broken(view): raise RuntimeError('this policy is broken')\n"
    "BATCHES['token_budget'] = broken\n"
)


def test_a_batch_policy_that_raises_fails_the_live_world(tmp_path: Path) -> None:
    path = written(tmp_path, deployment(limits={"attempts_max": 1}))
    with Server(path, **patched(tmp_path / "edit", RAISES)) as server:
        body = asked(prompt_of(20), 4)
        whole = server.http.post("/v1/completions", json=body | {"stream": False})
        assert whole.status_code == 503
        stream = server.http.post("/v1/completions", json=body)
        event = json.loads(stream.text.removeprefix("data: "))
        for error in (whole.json()["error"], event["error"]):
            assert error["type"] == "service_unavailable"
            assert "exited with status" in error["message"]
        assert short(server.stderr)
        assert "RuntimeError: this policy is broken" in server.stderr


def test_a_batch_policy_that_raises_fails_the_simulated_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = kvasir("simulate", "local", "--limit", "3", **patched(tmp_path / "edit", RAISES))
    assert done.returncode == 1
    faults = [line for line in done.stderr.splitlines() if not line.endswith("%")]
    assert short("\n".join(faults))
    assert "RuntimeError: this policy is broken" in done.stderr

    def broken(view: batch.BatchView) -> batch.Batch:
        raise RuntimeError("this policy is broken")

    monkeypatch.setitem(batch.BATCHES, "token_budget", broken)
    spec = parse_deployment(written(tmp_path, deployment()).read_text(), "kvasir.yaml")
    with pytest.raises(RuntimeError, match="this policy is broken"):
        simulate(spec, workload(spec.workload, spec.block_size, 0))


# --- simulations ----------------------------------------------------------------------------------


SCENARIOS = {
    "local": ("local",),
    "mooncake": ("mooncake-64", "--limit", "150"),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_simulate_twice_gives_the_same_bytes_and_its_recording_verifies(
    name: str, tmp_path: Path
) -> None:
    first, second, record = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "record"
    for path, more, hash_seed in (
        (first, (), SEEDS[0]),
        (second, ("--record", str(record)), SEEDS[1]),
    ):
        done = kvasir(
            "simulate", *SCENARIOS[name], "--json", path, *more, cwd=tmp_path,
            PYTHONHASHSEED=hash_seed,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_bytes())["completed"] > 100

    done = kvasir("verify", record, PYTHONHASHSEED=SEEDS[0])
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert len(said) == len(list(record.iterdir()))
    assert all(line.endswith("same decisions") for line in said)
