"""A store that all workers share, live: the very same tokens, whatever the store does.

The default suite talks to a small Redis that misbehaves on demand; `real` tests start Redis and
Mooncake Store themselves, and kill and freeze them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvasir.core.events import TierBack, TierHit, TierOff, TierPassed, TierStored  # noqa: E402
from kvasir.engine.fake import fake_tokens  # noqa: E402
from tests.live.cluster import Cluster, Layout, cluster, deployment_of, run  # noqa: E402
from tests.live.test_tokens import (  # noqa: E402
    Golden,
    crowd,
    folder,
    golden,
    goldens,
    prompt_of,
    wrong_blocks,
)
from tests.stores import FakeRedis, RealStore, missing, real_store  # noqa: E402

__all__ = ["folder", "golden", "goldens"]  # fixtures

N = 12
PROMPT = prompt_of(100)  # six full blocks
LEND = 64 << 20


@pytest.fixture
def server() -> Iterator[FakeRedis]:
    server = FakeRedis()
    yield server
    server.stop()


def shared(url: str, **more: Any) -> Layout:
    """All that is there is loaded."""
    tier = {"url": url, "blocks": 1000, "timeout_s": 0.5} | more
    return {"cluster": tier, "load": "always", "wait_s": 30.0}


def two_workers(folder: Path, url: str, **more: Any) -> Any:
    """Behind round robin: the same prompt twice meets both."""
    return deployment_of(folder, mixed=2, kv_blocks=14, route={"name": "round_robin"},
                         tiers=shared(url, **more))  # fmt: skip


async def ready(c: Cluster) -> None:
    """All workers have the store."""
    nodes = [c.node(name) for name in c.workers]
    await c.until(lambda: all("cluster" in node.tiers.states for node in nodes))


def loaded(c: Cluster) -> int:
    return sum(e.tokens for e in c.events(TierHit) if e.tier == "cluster")


async def asked(c: Cluster, golden: Golden, prompt: list[int]) -> int:
    """Its tokens are right. Returns how many of its own were cached."""
    answer = await c.ask(prompt, N)
    assert answer.tokens == golden.text(prompt, N)
    await c.at_rest()
    return int(answer.report.prefill.cached_tokens)


def test_what_one_worker_stored_another_loads(golden: Golden, server: FakeRedis) -> None:
    async def main() -> None:
        async with cluster(two_workers(golden.folder, server.url)) as c:
            await ready(c)
            assert await asked(c, golden, PROMPT) == 0
            assert await asked(c, golden, [*PROMPT, 5, 6]) == 96 == loaded(c)
            first, second = {e.worker for e in c.events(TierStored)}, c.events(TierHit)[0].worker
            assert second in {"mixed-0", "mixed-1"} and first
            assert not c.events(TierPassed) and not c.events(TierOff)

    run(main())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_everything_restarts_and_finds_it_again(
    golden: Golden, server: FakeRedis, transport: str
) -> None:
    async def once(cached: int) -> None:
        deployment = deployment_of(golden.folder, transport=transport, tiers=shared(server.url))
        async with cluster(deployment) as c:
            await ready(c)
            assert await asked(c, golden, PROMPT) == cached == loaded(c)

    run(once(0))
    run(once(96))


def test_another_model_does_not_find_it(goldens: dict[str, Golden], server: FakeRedis) -> None:
    async def once(golden: Golden) -> None:
        async with cluster(two_workers(golden.folder, server.url)) as c:
            await ready(c)
            assert await asked(c, golden, PROMPT) == 0

    run(once(goldens["qwen3"]))
    assert server.values
    run(once(goldens["llama"]))


FAULTS = {  # what the store does: what is said of it, or why it was passed over
    "hangs": "did not answer|Timeout", "resets": "redis", "full": "maxmemory", "raves": "redis",
    "lies": "damaged", "swaps": "damaged", "cuts": "damaged", "forgets": "damaged",
}  # fmt: skip


@pytest.mark.parametrize("mode", FAULTS)
def test_a_store_that_misbehaves_costs_time_only(
    golden: Golden, server: FakeRedis, mode: str
) -> None:
    async def main() -> None:
        async with cluster(two_workers(golden.folder, server.url)) as c:
            await ready(c)
            await asked(c, golden, PROMPT)
            server.mode = mode
            for prompt in ([*PROMPT, 1], prompt_of(100, 9), [*PROMPT, 2]):
                await asked(c, golden, prompt)
            said = FAULTS[mode]
            if said == "damaged":
                assert loaded(c) == 0 and not c.events(TierOff)
                assert {e.why for e in c.events(TierPassed)} == {"damaged"}
                return
            await c.until(lambda: c.events(TierOff))
            reasons = [e.reason for e in c.events(TierOff)]
            assert all(any(word in r for word in said.split("|")) for r in reasons), reasons
            off, rendered = c.events(TierOff), c.platform.metrics.render().decode()
            assert f'kvasir_tier_failures_total{{tier="cluster"}} {len(off)}.0' in rendered
            server.mode = "ok"
            await c.until(lambda: len(c.events(TierBack)) == len(c.events(TierOff)))
            await ready(c)
            before = loaded(c)
            for last in range(4):
                await asked(c, golden, [*prompt_of(100, 77), last])
            assert loaded(c) > before

    run(main())


def test_nobody_there_at_the_start(golden: Golden, server: FakeRedis) -> None:
    """It is an alarm, not an error; when the store comes up it is used."""

    async def main() -> None:
        server.mode = "resets"
        async with cluster(two_workers(golden.folder, server.url)) as c:
            await c.until(lambda: len(c.events(TierOff)) == 2)
            assert await asked(c, golden, PROMPT) == 0
            server.mode = "ok"
            await ready(c)

    run(main())


async def crowd_seed(seed: int, folder: Path, server: FakeRedis) -> int:
    """A crowd in too little memory, beside a store that does one thing after another."""
    rng = random.Random(seed)
    tiers = shared(server.url, timeout_s=0.2) | {"load": rng.choice(["always", "auto"])}
    tiers |= rng.choice([{}, {"host": {"blocks": 6}}])
    deployment = deployment_of(
        folder, engine="fake", first_token=rng.choice(["prefill", "decode"]),
        kv_blocks=rng.choice([10, 16]), prefill_blocks=24, steps_max=rng.choice([1, 4, 256]),
        route={"output_reserve_tokens": 0}, tiers=tiers,
        **rng.choice([{"mixed": 2}, {"decode": 2}]),
    )  # fmt: skip
    async with cluster(deployment) as c:
        await ready(c)
        questions = crowd(rng)

        async def one(prompt: list[int], n: int) -> None:
            answer = await c.ask(prompt, n)
            assert answer.tokens == fake_tokens(prompt, n)
            if rng.random() < 0.1:
                server.mode = rng.choice([*FAULTS, *["ok"] * 8])

        await asyncio.gather(*(one(prompt, n) for prompt, n in questions))
        server.mode = "ok"
        await c.at_rest()
        texts = [prompt + fake_tokens(prompt, n) for prompt, n in questions]
        assert wrong_blocks(c, texts) == []
        return loaded(c)


@pytest.mark.parametrize("seeds", [range(0, 4), range(4, 8)], ids=str)
def test_a_crowd_shares_and_nothing_wrong_is_loaded(
    folder: Path, server: FakeRedis, seeds: range
) -> None:
    total = 0
    for seed in seeds:
        server.mode = "ok"
        total += run(crowd_seed(seed, folder, server))
    assert total > 0


# --- real stores ----------------------------------------------------------------------------------


@contextlib.contextmanager
def real(kind: str, folder: Path, *more: str) -> Iterator[RealStore]:
    if reason := missing(kind):
        pytest.skip(reason)
    with real_store(kind, folder, *more) as store:
        yield store


KINDS = pytest.mark.parametrize("kind", ["redis", "mooncake"])


@pytest.mark.real
@KINDS
def test_real_what_one_worker_stored_another_loads(
    golden: Golden, tmp_path: Path, kind: str
) -> None:
    async def main(url: str) -> None:
        deployment = two_workers(golden.folder, url, lend_bytes=LEND, timeout_s=5.0)
        async with cluster(deployment) as c:
            await ready(c)
            assert await asked(c, golden, PROMPT) == 0
            assert await asked(c, golden, [*PROMPT, 5, 6]) == 96 == loaded(c)
            assert not c.events(TierOff)

    with real(kind, tmp_path) as store:
        run(main(store.url))


@pytest.mark.real
@KINDS
def test_real_everything_restarts_and_finds_it_again(
    golden: Golden, tmp_path: Path, kind: str
) -> None:
    """Mooncake's blocks are kept by a client beside the workers, which lend nothing."""

    async def once(url: str, cached: int) -> None:
        async with cluster(two_workers(golden.folder, url, timeout_s=5.0)) as c:
            await ready(c)
            assert await asked(c, golden, PROMPT) == cached == loaded(c)
            assert not c.events(TierOff)

    with real(kind, tmp_path) as store, contextlib.ExitStack() as stack:
        if kind == "mooncake":
            from kvasir.store.mooncake import MooncakeStore

            stack.callback(MooncakeStore(store.url, LEND, 1 << 16, 5.0).close)
        run(once(store.url, 0))
        run(once(store.url, 96))


@pytest.mark.real
@KINDS
@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_real_a_store_that_dies_or_hangs_in_mid_run(
    golden: Golden, tmp_path: Path, kind: str, fault: str
) -> None:
    async def main(store: RealStore) -> None:
        deployment = two_workers(golden.folder, store.url, lend_bytes=LEND, timeout_s=2.0)
        async with cluster(deployment) as c:
            await ready(c)
            for last in range(3):
                await asked(c, golden, [*PROMPT, last])
            assert loaded(c) > 0
            begin, end = faults(store)[fault]
            begin()
            for last in range(3, 6):
                await asked(c, golden, [*PROMPT, last])
                await asked(c, golden, prompt_of(100, last))
            await c.until(lambda: len(c.events(TierOff)) == 2)
            await asyncio.to_thread(end)
            await c.until(lambda: len(c.events(TierBack)) == 2)
            before, seed = loaded(c), 77
            while loaded(c) == before:  # a master may give out dead clients' memory for a while
                assert seed < 77 + 200
                seed += 1
                for last in range(4):
                    await asked(c, golden, [*prompt_of(100, seed), last])

    with real(kind, tmp_path) as store:
        run(main(store))


def faults(store: RealStore) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    return {"killed": (store.kill, store.start), "frozen": (store.freeze, store.thaw)}


@pytest.mark.real
def test_real_redis_that_is_full(golden: Golden, tmp_path: Path) -> None:
    async def main(url: str) -> None:
        async with cluster(two_workers(golden.folder, url)) as c:
            await ready(c)
            for seed in range(40):
                await asked(c, golden, prompt_of(100, seed))
                if c.events(TierOff):
                    break
            assert all("maxmemory" in e.reason for e in c.events(TierOff)) and c.events(TierOff)
            assert await asked(c, golden, PROMPT) >= 0

    with real("redis", tmp_path, "--maxmemory", "1500kb") as store:
        run(main(store.url))


@pytest.mark.real
def test_real_redis_that_evicts(golden: Golden, tmp_path: Path) -> None:
    """It forgets as it likes; what is left is used, the rest computed, nothing is an alarm."""

    async def main(url: str) -> None:
        async with cluster(two_workers(golden.folder, url)) as c:
            await ready(c)
            for _ in range(2):
                for seed in range(16):
                    await asked(c, golden, prompt_of(100, seed))
            assert not c.events(TierOff)

    with real("redis", tmp_path, "--maxmemory", "1500kb", "--maxmemory-policy",
              "allkeys-lru") as store:  # fmt: skip
        run(main(store.url))
