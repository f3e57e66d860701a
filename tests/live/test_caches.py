"""Kept prefixes, live: the whole platform with made-up tokens, asked as a client asks."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvasir.core.caches import Retain
from kvasir.core.messages import WorkerGone
from kvasir.core.specs import Deployment
from kvasir.core.specs.tenants import CachesSpec, TenantSpec
from kvasir.core.specs.tiers import HostTier
from kvasir.engine.fake import FakeRunner, fake_tokens
from kvasir.gateway.app import make_app
from kvasir.gateway.port import Keeping
from kvasir.gateway.tokenize import TextModel
from tests.live.cluster import LIMIT_S, Cluster, cluster, deployment_of, run

MODELS = Path(__file__).parents[2] / "src" / "kvasir" / "models"
BOOK = [(11 * i) % 250 for i in range(160)]  # ten blocks


def spec(**more: Any) -> Deployment:
    changes = {name: more.pop(name) for name in ("tenants", "caches") if name in more}
    d = deployment_of(MODELS / "tiny", engine="fake", **more)
    return Deployment.model_validate({**d.model_dump(), **changes})


class Api:
    """A client of `/v1`, without a socket."""

    def __init__(self, c: Cluster) -> None:
        d = c.platform.deployment
        c.desk._texts["tiny"] = TextModel.load(MODELS / "tiny")
        self.app = make_app(
            c.desk, c.platform.metrics, d.limits, tenants=d.tenants, caches=d.caches
        )

    async def __call__(self, method: str, path: str, **body: Any) -> httpx.Response:
        key = body.pop("key", None)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here/v1") as http:
            return await http.request(
                method, path, json=body or None, headers=headers, timeout=LIMIT_S
            )

    async def make(self, prompt: list[int], **body: Any) -> dict[str, Any]:
        found = await self("POST", "/caches", model="tiny", prompt=prompt, **body)
        assert found.status_code == 200, found.text
        made: dict[str, Any] = found.json()
        return made

    async def ask(self, prompt: list[int], **body: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True, **body}  # fmt: skip
        found = await self("POST", "/completions", **body)
        assert found.status_code == 200, found.text
        answer: dict[str, Any] = found.json()
        return answer


def cached(answer: dict[str, Any]) -> int:
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def pinned(c: Cluster) -> int:
    return sum(c.node(worker).pins.blocks_count for worker in c.workers)


def test_a_cache_from_its_making_to_its_end() -> None:
    async def main() -> None:
        async with cluster(spec(kv_blocks=64, decode=1)) as c:
            api = Api(c)
            made = await api.make(BOOK, ttl=60, name="book")
            assert (made["status"], made["tokens"], pinned(c)) == ("ready", 160, 10)
            for i in range(6):  # together more than the worker holds
                await api.ask([(7 * i + 3 * j) % 250 for j in range(16 * 20 + i)])
            used = await api.ask([*BOOK, 1, 2, 3])
            assert cached(used) == 160
            assert used["choices"][0]["token_ids"] == fake_tokens([*BOOK, 1, 2, 3], 4)
            named = await api.ask([1, 2, 3], cache=made["id"])
            assert named["choices"][0]["token_ids"] == used["choices"][0]["token_ids"]
            assert (cached(named), named["usage"]["prompt_tokens"]) == (160, 163)
            metrics = c.platform.metrics.render().decode()
            assert 'kvasir_caches_total{state="ready"} 1.0' in metrics
            gone = await api("DELETE", f"/caches/{made['id']}")
            assert gone.status_code == 200
            await c.until(lambda: not pinned(c))
            await c.at_rest()

    run(main())


def test_a_cache_ends_by_itself() -> None:
    async def main() -> None:
        async with cluster(spec()) as c:
            api = Api(c)
            made = await api.make(BOOK, ttl=0.5)
            await c.until(lambda: not pinned(c))
            assert (await api("GET", "/caches")).json()["data"] == []
            assert (await api("GET", f"/caches/{made['id']}")).status_code == 404
            await c.at_rest()

    run(main())


def test_limits_are_429_and_a_line() -> None:
    async def main() -> None:
        async with cluster(spec(caches={"tenant_blocks_max": 15})) as c:
            api = Api(c)
            made = await api.make(BOOK)
            other = [(x + 1) % 250 for x in BOOK]
            refused = await api("POST", "/caches", model="tiny", prompt=other)
            assert refused.status_code == 429
            assert "10 of at most 15 are kept" in refused.json()["error"]["message"]
            await api("DELETE", f"/caches/{made['id']}")
            assert (await api.make(other))["status"] == "ready"

    run(main())


def test_markers_in_a_chat_are_kept_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = partial(FakeRunner, vocab=259)  # a template has special tokens
    monkeypatch.setattr("tests.live.cluster.FakeRunner", whole)

    async def main() -> None:
        async with cluster(spec()) as c:
            api = Api(c)
            story = "The gods built Asgard. " * 12
            part = {"type": "text", "text": story, "cache_control": {"type": "ephemeral"}}

            async def chat(question: str) -> dict[str, Any]:
                found = await api(
                    "POST", "/chat/completions", model="tiny", max_tokens=3, temperature=0,
                    messages=[{"role": "system", "content": [part]},
                              {"role": "user", "content": question}],
                )  # fmt: skip
                assert found.status_code == 200, found.text
                usage: dict[str, Any] = found.json()["usage"]
                return usage

            first, second = await chat("Who?"), await chat("When?")
            written = first["cache_creation_input_tokens"]
            assert written > 160 and first["cache_read_input_tokens"] == 0
            assert first["cache_creation"]["ephemeral_5m_input_tokens"] == written
            assert second["cache_read_input_tokens"] == written == pinned(c) * 16
            assert second["cache_creation_input_tokens"] == 0

    run(main())


def test_a_dead_workers_cache_is_made_again() -> None:
    """Its blocks are gone; the next prompt that begins with it has it kept where it runs."""
    async def main() -> None:
        async with cluster(spec(prefill=2)) as c:
            api = Api(c)
            made = await api.make(BOOK)
            (keeper,) = [w for w in c.workers if c.node(w).pins.held]
            c.feed_conductor(WorkerGone(keeper, 1, "as a test says"))
            lost = await api("GET", f"/caches/{made['id']}")
            assert lost.json()["status"] == "lost"
            await api.ask([*BOOK, 5])
            assert (await api("GET", f"/caches/{made['id']}")).json()["status"] == "ready"

    run(main())


# --- tenants --------------------------------------------------------------------------------------

KEYS = {"ann": "a1", "bob": "b1", "cat": "c1"}


def tenants(**groups: str) -> list[TenantSpec]:
    return [
        TenantSpec(name=name, keys_sha256=(hashlib.sha256(key.encode()).hexdigest(),),
                   cache_group=groups.get(name))
        for name, key in KEYS.items()
    ]  # fmt: skip


def test_tenants_share_hits_in_a_group_only() -> None:
    async def main() -> None:
        async with cluster(spec(tenants=tenants(ann="x", bob="x"))) as c:
            api = Api(c)
            prompt = [*BOOK, 9]
            hits = [cached(await api.ask(prompt, key=KEYS[name])) for name in ("ann", "bob", "cat")]
            assert hits == [0, 160, 0]
            assert cached(await api.ask(prompt, key=KEYS["cat"])) == 160

    run(main())


# --- no leak --------------------------------------------------------------------------------------


def test_hundreds_of_mixed_requests_leave_nothing() -> None:
    """Caches, markers, plain prompts and hang-ups at random times, over tiers and TCP."""
    total = 400

    async def main() -> None:
        rng = random.Random(5)
        d = spec(
            prefill=2, decode=2, kv_blocks=128, transport="tcp", route={"name": "mooncake"},
            caches=CachesSpec(pool_share_max=0.3).model_dump(),
            tiers={"host": HostTier(blocks=64).model_dump()},
        )  # fmt: skip
        ends: Counter[str] = Counter()
        async with cluster(d) as c:
            made: list[str] = []

            async def one(i: int) -> None:
                group, own = rng.randint(0, 3), rng.randint(1, 200)
                prompt = [(group * 13 + j) % 250 for j in range(rng.randint(0, 300))]
                prompt += [(i * 31 + j * j) % 250 for j in range(own)]
                keeps: tuple[Keeping, ...] = ()
                kind, output = rng.random(), rng.randint(1, 40)
                if kind < 0.15 and len(prompt) >= 16:
                    made.append(f"cache-{i}")
                    keeps, output = (Keeping(len(prompt), 0.3, made[-1], must=True),), 1
                elif kind < 0.4:
                    keeps = (Keeping(rng.randint(1, len(prompt)), rng.choice([0.1, 1.0])),)
                _, pieces = c.submit(prompt, output, keeps=keeps)
                patience = rng.expovariate(50) if rng.random() < 0.4 else LIMIT_S
                ends[await drain(pieces, patience)] += 1
                if made and rng.random() < 0.2:
                    c.desk.retain("default", rng.choice(made), rng.choice([0.0, 0.5]))

            left = set(range(total))
            running: set[asyncio.Task[None]] = set()
            while left or running:
                while left and len(running) < 16:
                    running.add(asyncio.create_task(one(left.pop())))
                over, running = await asyncio.wait(
                    running, return_when=asyncio.FIRST_COMPLETED
                )
                for task in over:
                    task.result()
            await c.until(lambda: not c.conductor.caches.entries)
            await c.until(lambda: not pinned(c))
            await c.at_rest()
            assert sum(ends.values()) == total and ends["length"] and ends["left"], ends

    run(main())


async def drain(pieces: Any, patience: float) -> str:
    """How it ended; a client leaves when its patience is over."""
    end = ""
    try:
        async with asyncio.timeout(patience):
            async for piece in pieces:
                end = getattr(piece, "reason", "") or end
    except TimeoutError:
        end = "left"
    finally:
        await pieces.aclose()
    return end if end in ("length", "stop", "left") else "refused"


def test_a_retain_for_nobodys_cache_is_answered() -> None:
    async def main() -> None:
        async with cluster(spec()) as c:
            c.desk.host.feed(Retain(c.desk.id, "default", "cache-x", 5.0))
            assert not c.platform.requests._retained

    run(main())
