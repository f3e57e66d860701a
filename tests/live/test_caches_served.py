"""Kept prefixes in a real `kvasir serve`: the worker that keeps one is killed, and it is remade."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.live.served import Server, deployment, eventually, kvasir, prompt_of, written

pytestmark = pytest.mark.timeout(90)

KEY = {"authorization": "Bearer the-key-of-ann"}
DIGEST = hashlib.sha256(b"the-key-of-ann").hexdigest()


def test_a_cache_survives_its_worker_and_the_recording_verifies(tmp_path: Path) -> None:
    config = deployment(tenants=[{"name": "ann", "keys_sha256": [DIGEST]}])
    with Server(written(tmp_path, config), "--record", tmp_path / "record") as server:
        http, prompt = server.http, prompt_of(200, 1)

        def state() -> Any:
            return http.get(f"/v1/caches/{made['id']}", headers=KEY).json()["status"]

        def use(own: int) -> Any:
            body = {"model": "tiny", "prompt": [*prompt, own], "max_tokens": 3}
            answer = http.post("/v1/completions", json=body, headers=KEY).raise_for_status()
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        body = {"model": "tiny", "prompt": prompt, "ttl": 60}
        assert http.post("/v1/caches", json=body).status_code == 401
        made = http.post("/v1/caches", json=body, headers=KEY).raise_for_status().json()
        assert (made["tokens"], use(1)) == (192, 192)
        eventually(lambda: server.gauge("kvasir_pinned_blocks", "prefill-0") == 12)
        server.kill("prefill-0")
        eventually(lambda: state() == "lost")
        eventually(server.healthy)
        assert use(2) == 192, "billed as cached, though it was computed again"
        assert state() == "ready"
        computed = server.total("kvasir_prefill_tokens_total")
        assert use(3) == 192
        assert server.total("kvasir_prefill_tokens_total") - computed == 201 - 192
        http.delete(f"/v1/caches/{made['id']}", headers=KEY).raise_for_status()
        eventually(lambda: server.total("kvasir_pinned_blocks") == 0)
        server.at_rest()
        server.interrupt()
    verified = kvasir("verify", tmp_path / "record")
    assert verified.returncode == 0, verified.stdout + verified.stderr
