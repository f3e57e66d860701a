"""Worker processes with tiers: what a kill leaves on disk is used again, and recordings verify."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.live.served import (
    WAIT_S,
    Server,
    asked,
    deployment,
    eventually,
    expected_tokens,
    kvasir,
    prompt_of,
    written,
)
from tests.stores import FakeRedis

pytestmark = pytest.mark.timeout(90)

OUTPUT = 24
PROMPTS = [prompt_of(150, seed) for seed in range(12)]


async def ask_all(server: Server, prompts: list[list[int]]) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, trust_env=False) as client:
        bodies = [asked(prompt, OUTPUT) | {"stream": False} for prompt in prompts]
        calls = [client.post("/v1/completions", json=body) for body in bodies]
        answers = [r.raise_for_status().json() for r in await asyncio.gather(*calls)]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == expected_tokens(prompt, OUTPUT)


async def killed(server: Server) -> None:
    """SIGKILL to the prefill worker while it computes and copies."""
    before = copied(server)
    others = asyncio.create_task(ask_all(server, [prompt_of(150, seed) for seed in range(50, 62)]))
    await asyncio.to_thread(eventually, lambda: copied(server) > before, "it copies")
    server.kill("prefill-0")
    await others


def copied(server: Server) -> float:
    return server.metrics()['kvasir_tier_bytes_total{tier="disk",way="to"}']


def test_killed_restarted_found_again_and_verified(tmp_path: Path) -> None:
    """The prefill worker is killed while it copies; its next life takes blocks from its disk. The
    decode workers preempt, in memory for half of what they are asked."""
    disk = {"disk": {"bytes": "64 MiB", "path": str(tmp_path / "kv")}, "load": "always"}
    host = {"host": {"blocks": 500}, "load": "always", "wait_s": 10.0}
    config = deployment(
        prefill={"kv_blocks": 64, "tiers": disk | {"wait_s": 10.0}},
        decode={"kv_blocks": 40, "tiers": host},
        policy={"route": {"output_reserve_tokens": 0}, "batch": {"steps_max": 4}},
    )
    with Server(written(tmp_path, config), "--record", tmp_path / "record") as server:
        asyncio.run(ask_all(server, PROMPTS))
        server.at_rest()
        asyncio.run(killed(server))
        eventually(lambda: "prefill-0.2" in server.workers(), "its next life")
        server.at_rest()
        asyncio.run(ask_all(server, PROMPTS))
        server.at_rest()
        metrics = server.metrics()
        assert metrics['kvasir_tier_loaded_tokens_total{tier="disk"}'] > 0
        assert metrics['kvasir_tier_bytes_total{tier="host",way="from"}'] > 0
        assert metrics["kvasir_preemptions_total"] > 0
        assert server.interrupt() == 0
    done = kvasir("verify", tmp_path / "record")
    assert (done.returncode, done.stderr) == (0, "")
    assert "prefill-0.2 (worker)" in done.stdout


def test_a_store_outlives_the_whole_server(tmp_path: Path) -> None:
    """Another server, gateway and workers alike, takes from the store what the first one put there;
    what both recorded, asking included, verifies."""
    store = FakeRedis()
    try:
        tiers = {"cluster": {"url": store.url, "blocks": 5000}, "load": "always", "wait_s": 10.0}
        config = deployment(prefill={"kv_blocks": 64, "tiers": tiers})
        for life in ("first", "second"):
            folder = tmp_path / life
            folder.mkdir()
            with Server(written(folder, config), "--record", folder / "record") as server:
                asyncio.run(ask_all(server, PROMPTS))
                server.at_rest()
                loaded = server.metrics().get('kvasir_tier_loaded_tokens_total{tier="cluster"}', 0)
                assert (loaded > 0) == (life == "second")
                assert server.interrupt() == 0
            done = kvasir("verify", folder / "record")
            assert (done.returncode, done.stderr) == (0, "")
    finally:
        store.stop()


def test_a_store_without_an_address_is_an_error_before_anything_is_served(tmp_path: Path) -> None:
    config = deployment(prefill={"tiers": {"cluster": {"bytes": "1 MiB"}}})
    done = kvasir("serve", written(tmp_path, config), "--port", "0")
    assert done.returncode != 0
    assert "a cluster tier needs the address of a store" in done.stderr
    assert "pools.prefill.tiers.cluster.url" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 5


def test_a_disk_without_a_folder_is_an_error_before_anything_is_served(tmp_path: Path) -> None:
    config = deployment(prefill={"tiers": {"disk": {"bytes": "1 MiB"}}})
    done = kvasir("serve", written(tmp_path, config), "--port", "0")
    assert done.returncode != 0
    assert "a disk tier needs a folder" in done.stderr
    assert "pools.prefill.tiers.disk.path" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 5
