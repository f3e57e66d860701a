"""What a served cluster keeps in memory: the KV that was planned, to the page, and nothing that
grows with the requests served."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

pytest.importorskip("torch")

from kvasir.cli.files import load_deployment
from kvasir.core.specs import Deployment, PoolSpec
from kvasir.cost.pools import capacity_of
from tests.live.served import Server, deployment, written

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/smaps"),
]

BLOCKS = 256
PAGE = 4096
GROWTH_MAX = 6 * 2**20  # bytes a process over 2,000 requests; a block of each would be 16 MiB
CLIENTS = 8


class Resident(NamedTuple):
    """Bytes of a process: `kv` of its own cache, `own` of everything that is not a cache."""

    kv: int
    own: int


@pytest.mark.parametrize("requests", [300, pytest.param(4000, marks=pytest.mark.long)])
def test_memory_is_the_plan_and_does_not_grow(tmp_path: Path, requests: int) -> None:
    """The first half of the requests warms up: kernels for each size, dictionaries to their bounds,
    every block used. After 2,000, as many more take no memory but that of a few rare sizes."""
    shape = {"kv_blocks": BLOCKS, "cost": None, "batch_max": 16}
    config = deployment(
        engine="torch", transport={"kind": "shm"},
        prefill=shape, decode=shape | {"count": 1},
    )  # fmt: skip
    path = written(tmp_path, config)
    with Server(path) as server:
        pids = {"gateway": server.process.pid, **server.workers()}
        rng = random.Random(1)
        serve(server, rng, requests // 2)
        before = {name: resident(pid) for name, pid in pids.items()}
        serve(server, rng, requests - requests // 2)
        server.at_rest()
        after = {name: resident(pid) for name, pid in pids.items()}
        assert server.workers().items() <= pids.items(), "a worker was started again"
    planned = load_deployment(str(path))
    for pool in planned.pools:
        assert_as_planned(after[f"{pool.name}-0.1"].kv, planned_bytes(planned, pool))
    grown = {name: now.own - before[name].own for name, now in after.items()}
    print(f"{requests} requests; bytes grown in the second half: {grown}")
    if requests >= 4000:
        assert max(grown.values()) < GROWTH_MAX, grown


def planned_bytes(planned: Deployment, pool: PoolSpec) -> int:
    capacity = capacity_of(planned, pool)
    return capacity.kv_blocks * capacity.block_size * capacity.kv_token_bytes


def assert_as_planned(kv: int, plan: int) -> None:
    """Each plane begins on a page of its own."""
    planes = 64
    assert plan <= kv <= plan + planes * PAGE, (kv, plan)


def serve(server: Server, rng: random.Random, count: int) -> None:
    """Prompts of 20 to 200 tokens, some of them with a beginning that others have; one in ten is
    hung up on, one in four is streamed."""
    common = [rng.randrange(256) for _ in range(64)]

    def body(i: int) -> dict[str, object]:
        own = [rng.randrange(256) for _ in range(rng.randint(20, 136))]
        prompt = common + own if i % 3 == 0 else own
        return {
            "model": "tiny", "prompt": prompt, "max_tokens": rng.randint(1, 24), "temperature": 0,
            "stream": i % 4 == 0 or i % 10 == 0, "ignore_eos": True,
        }  # fmt: skip

    bodies = [body(i) for i in range(count)]
    with (
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        assert sum(pool.map(lambda i: asked(client, bodies[i], hang_up=i % 10 == 0), range(count)))


def asked(client: httpx.Client, body: dict[str, object], *, hang_up: bool) -> int:
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for _ in response.iter_bytes():
            if hang_up:
                break
    return 1


def resident(pid: int) -> Resident:
    """As the kernel counts it. The own cache is the mapped one that can be written."""
    kv = own = 0
    mine = cache = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            cache = "memfd:kvasir-kv" in line
            mine = cache and "w" in fields[1]
        elif fields[0] == "Rss:":
            kv += 1024 * int(fields[1]) * mine
            own += 1024 * int(fields[1]) * (not cache)
    return Resident(kv, own)
