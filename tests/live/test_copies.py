"""Copies of cached blocks between real processes' caches, and workers that leave: right bytes, no
token lost or doubled. The fake engine's KV says of each position which tokens it is of."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from kvasir.core.copies import Leave
from kvasir.core.events import BlocksCopied, CopiesUsed, Prefilled, WorkerLeft
from kvasir.core.specs import Deployment
from kvasir.core.specs.copies import CopiesSpec
from kvasir.engine.tiny import make_tiny
from kvasir.runtime.verify import verify_dir
from tests.live.cluster import SIZE, Cluster, cluster, collect, deployment_of, run, wrong_blocks
from tests.live.served import (
    Server,
    Stream,
    deployment,
    eventually,
    kvasir,
    prompt_of,
    short,
    written,
)

PROMPT = [(7 * j) % 200 for j in range(100)]


def copying(
    folder: Path, *, transport: str = "shm", engine: str = "fake", **copies: Any
) -> Deployment:
    make_tiny(folder)
    spec = deployment_of(
        folder, engine=engine, transport=transport, prefill=2, route={"name": "cache_load"}
    )
    slow = {"overhead_s": 0.002, "per_token_s": 1e-3}  # predicted: copying pays
    pools = tuple(
        type(pool).model_validate(pool.model_dump() | {"cost": slow}) for pool in spec.pools
    )
    policy = spec.policy.model_copy(update={"copies": CopiesSpec(**copies)})
    return spec.model_copy(update={"policy": policy, "pools": pools})


async def settled(c: Cluster) -> None:
    await c.at_rest()
    await c.until(lambda: not c.conductor.copies.orders)
    assert not any(c.node(w).replicas.coming for w in c.workers)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("engine", ["fake", "torch"])
def test_an_answer_is_where_the_next_turn_is_prefilled(
    tmp_path: Path, engine: str, transport: str
) -> None:
    if engine == "torch":
        pytest.importorskip("torch")

    async def main() -> None:
        spec = copying(tmp_path, transport=transport, engine=engine, next_turn=True)
        async with cluster(spec) as c:
            first = await c.ask(PROMPT, 60, session="one")
            await c.until(lambda: c.events(BlocksCopied), c.counts)
            await settled(c)
            (copied,) = c.events(BlocksCopied)
            assert (copied.source, copied.worker) == ("decode-0", first.prefill)
            assert copied.blocks == 159 // SIZE - 100 // SIZE, "full blocks that were computed"
            longer = [*PROMPT, *first.tokens, 5, 6, 7]
            second = await c.ask(longer, 12, session="one")
            await settled(c)
            assert [e.cached_tokens for e in c.events(Prefilled)] == [0, 159 // SIZE * SIZE]
            assert sum(e.used for e in c.events(CopiesUsed)) == copied.blocks
            if engine == "fake":
                assert wrong_blocks(c, [PROMPT + first.tokens, longer + second.tokens]) == []
            other = await c.ask(longer, 12)
            assert second.tokens == other.tokens

    run(main())


def test_a_worker_leaves_and_its_prefixes_stay(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(copying(tmp_path, leaving=True)) as c:
            first = await c.ask(PROMPT, 4)
            await settled(c)
            long = c.submit([*PROMPT, 1, 2], 40)
            c.feed_conductor(Leave(first.prefill, 20.0))
            c.feed_conductor(Leave(first.prefill, 20.0))
            answer = await collect(*long)
            assert len(answer.tokens) == 40 and answer.reason == "length"
            await c.until(lambda: c.events(WorkerLeft), lambda: c.conductor.leaving.going)
            assert c.events(WorkerLeft)[0].reason == "left"
            (copied,) = {e.purpose for e in c.events(BlocksCopied)}
            assert copied == "leaving"
            again = await c.ask([*PROMPT, 1, 3], 4)
            assert again.prefill != first.prefill
            assert c.events(Prefilled)[-1].cached_tokens == 96

    run(main())


@pytest.mark.timeout(90)
@pytest.mark.parametrize("how", ["signal", "verb"])
def test_a_worker_of_a_server_is_let_go_in_good_order(tmp_path: Path, how: str) -> None:
    """What it decodes is moved when its time is over, token by token the same."""
    config = deployment(
        prefill={"count": 1}, decode={"count": 2}, limits={"drain_s": 0.5},
        policy={"copies": {"leaving": True, "next_turn": True, "hot": True}},
    )  # fmt: skip
    with Server(written(tmp_path, config), "--record", tmp_path / "record") as server:
        streams = [Stream(server, prompt_of(40, seed), 200) for seed in range(6)]
        eventually(lambda: all(s.tokens for s in streams))
        alive = server.workers()
        (pid,) = (pid for name, pid in alive.items() if name.startswith("decode-0."))
        if how == "signal":
            os.kill(pid, signal.SIGTERM)
        else:
            said = kvasir("drain", "decode-0", "--within-s", "0.5", "--base-url", server.url)
            assert said.stdout == "decode-0 takes nothing new, and leaves within 0.5 s\n", said
        answers = [s.check() for s in streams]
        eventually(lambda: not any(n.startswith("decode-0.") for n in server.workers()))
        assert {a.attempts for a in answers} == {1, 2}, "some were on it, and moved"
        eventually(server.healthy, "who left on purpose is not missed")
        assert server.http.get("/health").json()["workers"]["decode-0"] == "left"
        Stream(server, prompt_of(20, 99), 4).check()
        server.at_rest()
    verdict = verify_dir(tmp_path / "record")
    assert verdict.ok, verdict.lines


def test_the_verb_says_what_is_wrong(tmp_path: Path) -> None:
    with Server(written(tmp_path, deployment(decode={"count": 1}))) as server:
        wrong = kvasir("drain", "decode-7", "--base-url", server.url)
        assert wrong.returncode and "no worker 'decode-7'" in wrong.stderr and short(wrong.stderr)
        late = kvasir("drain", "decode-0", "--within-s", "0", "--base-url", server.url)
        assert late.returncode and "within_s" in late.stderr and short(late.stderr)
        assert server.healthy()
    nobody = kvasir("drain", "decode-0", "--base-url", server.url)
    assert nobody.returncode and "no server answers" in nobody.stderr and short(nobody.stderr)
