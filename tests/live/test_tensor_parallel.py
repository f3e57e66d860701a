"""Workers of several ranks, live: prefill and decode of different degree exchange blocks as they
are, and a rank that dies takes its worker along, not the request.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvasir.core.events import Shipped  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from tests.live.cluster import Cluster, cluster, deployment_of, run  # noqa: E402
from tests.live.served import (  # noqa: E402
    Server,
    Stream,
    deployment,
    eventually,
    kvasir,
    short,
    written,
)
from tests.live.test_tokens import Golden, ask_all, prompt_of  # noqa: E402

N = 24
PROMPTS = [prompt_of(length) for length in (15, 33, 100)]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """8 query heads on 4 KV heads: two ranks or four."""
    return Golden(make_tiny(tmp_path_factory.mktemp("wide"), heads=8, kv_heads=4))


# --- blocks between degrees -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [(2, 1, "shm"), (1, 2, "tcp"), (4, 2, "shm"), (2, 2, "tcp")],
)
def test_prefill_and_decode_of_different_degree(
    golden: Golden, prefill: int, decode: int, transport: str
) -> None:
    async def main() -> None:
        d = deployment_of(golden.folder, prefill_tp=prefill, tp=decode, transport=transport)
        async with cluster(d) as c:
            for prompt, answer in zip(PROMPTS, await ask_all(c, PROMPTS, N), strict=True):
                assert answer.tokens == golden.text(prompt, N)
            assert {e.transport for e in c.events(Shipped)} == {transport}
            await c.at_rest()
            assert common_blocks(c) == sum(len(prompt) // 16 for prompt in PROMPTS)

    run(main())


def common_blocks(c: Cluster) -> int:
    """Blocks that both workers have under one key: their bytes are the same, in every plane."""
    pools = [c.node(worker).pool for worker in c.workers]
    planes = [c.threads.runners[worker].planes() for worker in c.workers]
    keys = set.intersection(*(set(pool.all_keys()) for pool in pools))
    for key in keys:
        (ours,), (theirs,) = (pool.match([key]) for pool in pools)
        for layer, other in zip(*planes, strict=True):
            for plane, copy in zip(layer, other, strict=True):
                assert plane[ours].any() and (plane[ours] == copy[theirs]).all()
    return len(keys)


# --- deaths ---------------------------------------------------------------------------------------


def served(golden: Golden, **of_decode: Any) -> dict[str, Any]:
    """One prefill and one decode worker of the torch engine."""
    pool = {"count": 1, "cost": None}
    return deployment(
        engine="torch", prefill=pool, decode={**pool, **of_decode},
        models=[{"name": "tiny", "path": str(golden.folder)}],
    )  # fmt: skip


def ranks_of(pid: int) -> list[int]:
    """What a worker's process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.timeout(120)
def test_a_rank_killed_in_mid_answer(golden: Golden, tmp_path: Path) -> None:
    """Its worker ends, the answer goes on elsewhere, another worker with other ranks comes."""
    prompt, count = prompt_of(40), 300
    with Server(written(tmp_path, served(golden, tp=2))) as server:
        workers = server.workers()
        ranks = {worker: ranks_of(pid) for worker, pid in workers.items()}
        assert sorted(ranks) == ["decode-0.1", "prefill-0.1"]
        assert {worker: len(pids) for worker, pids in ranks.items()} == {
            "decode-0.1": 1, "prefill-0.1": 0,
        }  # fmt: skip
        stream = Stream(server, prompt, count, temperature=0)
        eventually(lambda: len(stream.tokens) >= 10, "ten tokens")
        assert stream.running
        os.kill(ranks["decode-0.1"][0], signal.SIGKILL)

        answer = stream.answer()
        assert list(answer.tokens) == golden.text(prompt, count)
        assert answer.attempts > 1
        eventually(lambda: "decode-0.2" in server.workers(), "the next decode worker")
        server.at_rest()
        pids = [pid for worker in server.workers().values() for pid in ranks_of(worker)]
        assert len(pids) == 1 and pids != ranks["decode-0.1"]
        (said,) = server.stderr.splitlines()
        assert said.startswith("decode-0: Unavailable: rank 1 of 2 (process ")
        assert len(server.run_dirs) == 1  # the server's own: ranks leave no files
        assert server.interrupt() in (0, 130)
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert server.run_dirs == []


@pytest.mark.timeout(120)
def test_what_no_rank_can_be_is_said_at_the_start(golden: Golden, tmp_path: Path) -> None:
    done = kvasir("serve", written(tmp_path, served(golden, tp=3)), "--port", "0")
    assert done.returncode != 0 and short(done.stderr), done.stderr
    assert "tp 3 does not divide 4 KV heads" in done.stderr
