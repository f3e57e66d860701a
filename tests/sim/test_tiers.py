"""Tiers in whole simulated clusters: hits against a count by hand, times, faults, determinism."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvasir.core.events import Preempted, Prefilled, Recomputed, TierHit, TierOff, TierPassed
from kvasir.core.specs.deployment import FittedCost
from kvasir.core.specs.faults import FaultSpec
from kvasir.core.specs.tiers import TiersSpec
from kvasir.runtime.verify import verify_dir
from kvasir.traces.formats import load
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.faults import Faults
from kvasir.world.sim.run import simulate
from tests.sims import Watched, arrivals, cluster, watched

FAST = 1e15  # bytes a second
APART_S = 5.0


def tiered(pool: dict[str, Any] | None = None, **tiers: Any) -> Any:
    """One mixed worker with these tiers."""
    spec = TiersSpec(**tiers) if tiers else None
    return cluster("mixed", count=1, pool={"tiers": spec} | (pool or {}))


# --- hits, counted twice --------------------------------------------------------------------------


class Lru:
    """A plain cache of prompts: the last `capacity` blocks used, heads later than tails."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.blocks = capacity, OrderedDict[int, None]()

    def use(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)


def counted(rows: Sequence[Arrival], size: int, device: int, host: int, disk: int) -> Counter[str]:
    """Leading blocks by the fastest cache that has them, of prompts served one after the other. A
    block of the device holds the end of the prompt that runs, so one less keeps others."""
    caches = {"device": Lru(device - 1), "host": Lru(host), "disk": Lru(disk)}
    found: Counter[str] = Counter()
    for row in rows:
        blocks, below = row.hash_ids[: row.input_tokens // size], False
        for block in blocks:
            names = [n for n, cache in caches.items() if block in cache.blocks]
            names = [n for n in names if not (below and n == "device")]
            if not names:
                break
            below = names[0] != "device"
            found[names[0]] += 1
        for cache in caches.values():
            cache.use(blocks)
    return found


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(700, (300, 1000, 4000)), (900, (300, 2000, 100_000))],
    ids=str,
)
def test_hits_by_tier_on_the_mooncake_trace(limit: int, sizes: tuple[int, int, int]) -> None:
    """The conversation trace, one request at a time, against three plain LRU caches."""
    trace = load("mooncake-conversation")
    size = trace.block_size or 0
    rows = [a for a in trace.arrivals[:limit] if a.input_tokens % size]
    spaced = [Arrival(i * APART_S, a.input_tokens, 1, a.hash_ids) for i, a in enumerate(rows)]
    device, host, disk = sizes
    deployment = tiered(
        {"kv_blocks": device}, host={"blocks": host, "bytes_per_s": FAST},
        disk={"blocks": disk, "bytes_per_s": FAST}, load="always",
    ).model_copy(update={"block_size": size})  # fmt: skip
    result = simulate(deployment, Trace("spaced", size, tuple(spaced)))
    expected = counted(rows, size, device, host, disk)
    counts = result.counts
    assert min(expected.values()) > 0
    assert counts["TierHit: host, tokens"] == expected["host"] * size
    assert counts["TierHit: disk, tokens"] == expected["disk"] * size
    hits = sum(outcome.cached_tokens for outcome in result.outcomes)
    assert hits == sum(expected.values()) * size


# --- what it is worth -----------------------------------------------------------------------------


def turns(count: int = 120, seed: int = 3) -> list[Arrival]:
    """Conversations that come back after others have filled the device."""
    rng, at, found = random.Random(seed), 0.0, list[Arrival]()
    for turn in range(count):
        at += rng.expovariate(4.0)
        who, length = turn % 30, 40 + 10 * (turn // 30)
        ids = tuple(who * 1000 + j for j in range(length))
        found.append(Arrival(at, 16 * length - 3, 8, ids))
    return found


def ttft(deployment: Any) -> float:
    return float(simulate(deployment, Trace("turns", 16, tuple(turns()))).summary.ttft.mean_s)


SMALL = {"kv_blocks": 150}


@pytest.mark.parametrize("bytes_per_s", [1e5, 1e6, 3e6, 1e7, 1e8, 1e10])
def test_never_slower_than_no_tier(bytes_per_s: float) -> None:
    """From far too slow to for nothing: at most what a few tries cost."""
    none = ttft(tiered(SMALL))
    auto = ttft(tiered(SMALL, host={"blocks": 5000, "bytes_per_s": bytes_per_s}))
    assert auto < 1.02 * none
    if bytes_per_s >= 1e8:
        assert auto < 0.8 * none


def test_always_loading_can_be_slower() -> None:
    """The losing case that `auto` is there for."""
    host = {"blocks": 5000, "bytes_per_s": 3e6}
    slow = ttft(tiered(SMALL, host=host, load="always", wait_s=1e3))
    assert slow > 1.2 * ttft(tiered(SMALL))
    assert ttft(tiered(SMALL, host=host)) < slow


@pytest.mark.parametrize("evict", ["lru", "lfu", "length", "cost"])
def test_every_rule_of_eviction_runs(evict: str) -> None:
    """Whose blocks stay is the rule's; that it holds on average is `bench/tiers.py`'s."""
    host = {"blocks": 400, "evict": evict, "bytes_per_s": 1e9}
    rng = random.Random(0)
    rows = [rng.choice(turns()[:30]) for _ in range(100)]
    rows = [Arrival(i / 4, a.input_tokens, 8, a.hash_ids) for i, a in enumerate(rows)]
    world = watched(tiered(SMALL, host=host), rows)
    assert world.events_of(TierHit)
    assert len(world.workers()[0].tiers.states["host"].cache.pool.all_keys()) > 350


def test_a_worker_that_is_slower_than_it_says_is_found_out() -> None:
    """The assumed rate is a hundred times the true one: loads are late, then passed over."""
    deployment = tiered(SMALL, host={"blocks": 5000, "bytes_per_s": 1e9}, wait_s=0.0)
    world = Watched(deployment, turns())
    world.tiers._all["mixed-0"]["host"].bytes_per_s = 1e6
    world.run()
    whys = Counter(e.why for e in world.events_of(TierPassed))
    assert whys["late"] and whys["sooner"] > whys["late"]


# --- preemption -----------------------------------------------------------------------------------


def test_preempted_both_ways() -> None:
    """In too little memory, with a tier: some of what was preempted is loaded, the rest made
    again; and without one all of it is made again."""
    pool = {"kv_blocks": 60, "batch_max": 16}
    route: dict[str, Any] = {"route": {"output_reserve_tokens": 0}}
    rows = arrivals(60, rate=200.0)
    tiers = TiersSpec(host={"blocks": 5000, "bytes_per_s": 1e9})
    route |= {"cost": FittedCost(overhead_s=2e-3, per_token_s=2e-4)}  # prompts are dear
    with_it = watched(cluster("mixed", count=1, pool=pool | {"tiers": tiers}, **route), rows)
    without = watched(cluster("mixed", count=1, pool=pool, **route), rows)

    def tokens(world: Watched, kind: Any) -> int:
        return sum(e.tokens for e in world.events_of(kind))

    assert sum(e.tokens for e in with_it.events_of(TierHit) if e.preempted) > 0
    assert 0 < tokens(with_it, Recomputed) < tokens(with_it, Preempted)
    assert tokens(without, Recomputed) == tokens(without, Preempted) > 0


# --- what goes wrong ------------------------------------------------------------------------------


DISK = {"disk": {"blocks": 5000, "bytes_per_s": 1e8}}
BOTH = {"disk": {"blocks": 200, "bytes_per_s": 1e8}, "host": {"blocks": 60, "bytes_per_s": 1e9}}


def test_a_tier_that_fails_midway() -> None:
    world = Watched(tiered(SMALL, **DISK), turns())
    world.schedule(10.0, lambda: world.tiers.lose("mixed-0", "disk", "No space left on device"))
    world.run()
    world.check()
    assert [e.reason for e in world.events_of(TierOff)] == ["No space left on device"]
    assert not world.requests.lives and len(world.recorder.outcomes) == 120
    assert world.conductor.index.blocks_of("mixed-0", "disk") == 0


def test_what_is_damaged_is_computed() -> None:
    world = Watched(tiered(SMALL, **DISK), turns())
    world.schedule(15.0, lambda: world.tiers.damage("mixed-0", "disk"))
    world.run()
    world.check()
    assert any(e.why == "damaged" for e in world.events_of(TierPassed))
    assert len(world.recorder.outcomes) == 120


def test_a_restart_finds_its_disk_again_and_not_its_memory() -> None:
    deployment = cluster("mixed", count=1, pool=SMALL | {"tiers": TiersSpec(**BOTH)})
    rows = [Arrival(0.0, 400, 2, tuple(range(25))), Arrival(20.0, 400, 2, tuple(range(25)))]
    faults = FaultSpec.model_validate({"outages": [{"worker": "mixed-0", "at_s": 8, "for_s": 2}]})
    world = watched(deployment, rows, faults=Faults(faults, 0))
    assert [(e.tier, e.tokens) for e in world.events_of(TierHit)] == [("disk", 384)]
    assert [e.cached_tokens for e in world.events_of(Prefilled)] == [0, 384]


@pytest.mark.parametrize("seed", range(6))
def test_invariants_under_faults(seed: int) -> None:
    """Deaths, lost messages, clients that leave, tiers that fail or lie: checked throughout."""
    deployment = cluster(
        "prefill", "decode", "mixed", count=1, pool={"kv_blocks": 60, "tiers": TiersSpec(**BOTH)},
        route={"output_reserve_tokens": 0},
    )  # fmt: skip
    spec = FaultSpec(loss=0.01, delay_s_max=0.01, deaths=3, down_s=0.5, cancel=0.1, until_s=3.0)
    world = Watched(deployment, arrivals(60, seed=seed), faults=Faults(spec, seed))
    world._after_event = lambda w: w.check_touched()
    rng = random.Random(seed)
    for worker in ("mixed-0", "prefill-0"):
        at, tier = rng.random() * 2, rng.choice(["host", "disk"])
        act = rng.choice([world.tiers.damage, lambda w, t: world.tiers.lose(w, t, "x")])
        world.schedule(at, lambda w=worker, t=tier, a=act: a(w, t) if w in world.hosts else None)
    world.run()
    assert not world.requests.lives
    world.rest(60.0)
    for node in world.workers():
        node.check()
        assert not node.tiers.reading and node.pool.held == 0 and node.pool.idle_pins == 0


def test_the_same_bytes_twice_and_a_recording_that_verifies(tmp_path: Path) -> None:
    pool = {"kv_blocks": 60, "tiers": TiersSpec(**BOTH)}
    deployment = cluster("prefill", "decode", count=2, pool=pool)
    trace = Trace("t", 16, tuple(arrivals(80)))
    first = simulate(deployment, trace, record=tmp_path)
    assert first.counts["TierStored"] > 0
    assert simulate(deployment, trace).to_json() == first.to_json()
    assert all(not node.difference for node in verify_dir(tmp_path).nodes)
