"""Worker processes that code KV: rates measured at start, answers that name the form, and a
recording that verifies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("zstandard")
pytest.importorskip("torch")

from kvasir.engine.tiny import make_tiny
from tests.live.served import (
    WAIT_S,
    Server,
    asked,
    deployment,
    kvasir,
    prompt_of,
    written,
)

pytestmark = pytest.mark.timeout(120)

TOKENS, COUNT = 400, 4


async def ask_all(server: Server) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, trust_env=False) as client:
        bodies = [asked(prompt_of(TOKENS, seed), 8) | {"stream": False} for seed in range(COUNT)]
        calls = [client.post("/v1/completions", json=body) for body in bodies]
        return [r.raise_for_status().json() for r in await asyncio.gather(*calls)]


def test_a_recorded_run_with_a_codec_verifies(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "tiny", layers=8, hidden=256, heads=8, kv_heads=8, head_dim=32,
                      intermediate=256)  # fmt: skip
    config = deployment(
        engine="torch", models=[{"name": "tiny", "path": str(model)}],
        transport={
            "kind": "tcp", "bytes_per_s_max": "2 MB/s", "codec": {"kind": "cachegen"},
        },
    )  # fmt: skip
    with Server(written(tmp_path, config), "--record", tmp_path / "record") as server:
        answers = asyncio.run(ask_all(server))
        server.at_rest()
        metrics = server.metrics()
        assert server.interrupt() == 0
    timings = [answer["kvasir"] for answer in answers]
    assert {t["transport"] for t in timings} == {"tcp"}
    forms = [t["codec"] for t in timings]
    assert all("cachegen-2" in form for form in forms), forms
    sent = sum(v for k, v in metrics.items() if k.startswith("kvasir_kv_wire_bytes_total"))
    assert 0 < sent < sum(t["bytes"] for t in timings) / 3
    done = kvasir("verify", tmp_path / "record")
    assert (done.returncode, done.stderr) == (0, "")
    assert "prefill-0 (worker)" in done.stdout
    header = json.loads((tmp_path / "record" / "prefill-0.jsonl").read_bytes().splitlines()[0])
    offers = header["config"]["codec"]["offers"]
    assert [offer["name"] for offer in offers] == ["lossless", "int8", "cachegen-1", "cachegen-2"]
    known = {0.493e9, 0.25e9, 0.4e9}
    assert all(offer["encode_bytes_s"] not in known for offer in offers), "not measured here"


def test_a_codec_needs_a_transport_that_sends_a_stream(tmp_path: Path) -> None:
    config = deployment(transport={"kind": "shm", "codec": {"kind": "lossless"}})
    done = kvasir("config", "validate", written(tmp_path, config))
    assert done.returncode != 0 and "a codec needs kind tcp or auto" in done.stderr
    assert "transport.kind" in done.stderr
