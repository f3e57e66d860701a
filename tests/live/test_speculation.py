"""A cluster that guesses tokens ahead: the same answers, the same decisions when it is re-run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.served import (
    WAIT_S,
    Server,
    asked,
    deployment,
    expected_tokens,
    kvasir,
    prompt_of,
    written,
)

pytestmark = pytest.mark.timeout(120)

CLIENTS = 6
OUTPUT_TOKENS = 60
GUESS = {"tokens": 5, "rows_max": 3, "acceptance": 0.8}


def counter(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    (line,) = [one for one in text.splitlines() if one.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


async def ask(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, trust_env=False) as client:
        bodies = [asked(prompt, OUTPUT_TOKENS) | {"stream": False} for prompt in prompts]
        calls = [client.post("/v1/completions", json=body) for body in bodies]
        answers = [r.raise_for_status().json() for r in await asyncio.gather(*calls)]
    return [answer["choices"][0]["token_ids"] for answer in answers]


def rows_of(path: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in path.read_bytes().splitlines()[1:]]
    steps = [e["event"] for e in entries if e["event"]["type"] == "StepDone"]
    return [row for step in steps for row in step["rows"]]


def test_answers_counters_and_a_recording_that_replays(tmp_path: Path) -> None:
    """Some decode alone, some in a batch too large to guess in; each answer is the model's own."""
    config = deployment(decode={"count": 1})
    config["models"] = [{"name": "tiny", "path": "tiny", "speculate": GUESS}]
    with Server(written(tmp_path, config), "--record", tmp_path / "record") as server:
        prompts = [prompt_of(30 + i, i) for i in range(CLIENTS)]
        answers = asyncio.run(ask(server, prompts[:1]))
        answers += asyncio.run(ask(server, prompts[1:]))
        server.at_rest()
        drafted = counter(server, "kvasir_draft_tokens_total")
        accepted = counter(server, "kvasir_draft_tokens_accepted_total")
        assert server.interrupt() == 0
    assert answers == [expected_tokens(prompt, OUTPUT_TOKENS) for prompt in prompts]
    rows = rows_of(tmp_path / "record" / "decode-0.jsonl")
    assert drafted == sum(row["drafted"] for row in rows)
    assert accepted == sum(row["accepted"] for row in rows)
    assert 0 < accepted < drafted
    assert any(row["sampled"] > 1 for row in rows)
    assert not any(row["drafted"] for row in rows_of(tmp_path / "record" / "prefill-0.jsonl"))
    done = kvasir("verify", tmp_path / "record")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
