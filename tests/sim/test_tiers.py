"""Tiers in whole simulated clusters: hits against a count by hand, times, faults, determinism."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvasir.core.events import (
    Preempted,
    Prefilled,
    Recomputed,
    TierBack,
    TierHit,
    TierOff,
    TierPassed,
)
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


class SharedLru:
    """A store that all share, as it sees itself: what was put or read last stays. A worker puts
    what it does not know to be there."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.blocks, self.known = capacity, OrderedDict[int, None](), set[int]()

    def ask(self, blocks: Sequence[int]) -> list[int]:
        count = next((i for i, b in enumerate(blocks) if b not in self.blocks), len(blocks))
        self.known |= set(blocks[:count])
        self.known -= set(blocks[count:])
        return list(blocks[:count])

    def use(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)


def counted_with_store(
    rows: Sequence[Arrival], size: int, device: int, host: int, cluster: int
) -> Counter[str]:
    """As `counted`; the store is asked for all from the first block on that no other has."""
    device_lru, host_lru, store = Lru(device - 1), Lru(host), SharedLru(cluster)
    found: Counter[str] = Counter()
    for row in rows:
        blocks = row.hash_ids[: row.input_tokens // size]
        at = 0
        while at < len(blocks) and blocks[at] in device_lru.blocks:
            at += 1
        found["device"] += at
        below = at
        while below < len(blocks) and blocks[below] in host_lru.blocks:
            below += 1
        there, read = set(store.ask(blocks[below:])), list[int]()
        for block in blocks[at:]:
            if block not in host_lru.blocks and block not in there:
                break
            found["host" if block in host_lru.blocks else "cluster"] += 1
            read += [] if block in host_lru.blocks else [block]
        store.use(read)
        new = [block for block in blocks if block not in store.known]
        store.use(new)
        store.known |= set(new)
        for cache in (device_lru, host_lru):
            cache.use(blocks)
    return found


@pytest.mark.parametrize("sizes", [(300, 1000, 4000), (300, 1000, 100_000)], ids=str)
def test_hits_by_tier_with_a_shared_store(sizes: tuple[int, int, int]) -> None:
    """The trace again, whose third tier is the store of the cluster."""
    trace = load("mooncake-conversation")
    size = trace.block_size or 0
    rows = [a for a in trace.arrivals[:600] if a.input_tokens % size]
    spaced = [Arrival(i * APART_S, a.input_tokens, 1, a.hash_ids) for i, a in enumerate(rows)]
    device, host, store = sizes
    deployment = tiered(
        {"kv_blocks": device}, host={"blocks": host, "bytes_per_s": FAST},
        cluster={"blocks": store, "bytes_per_s": FAST}, load="always",
    ).model_copy(update={"block_size": size})  # fmt: skip
    result = simulate(deployment, Trace("spaced", size, tuple(spaced)))
    expected = counted_with_store(rows, size, device, host, store)
    assert min(expected.values()) > 0
    for tier in ("host", "cluster"):
        assert result.counts[f"TierHit: {tier}, tokens"] == expected[tier] * size
    hits = sum(outcome.cached_tokens for outcome in result.outcomes)
    assert hits == sum(expected.values()) * size


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
    world.tiers._all["mixed-0"]["host"].drive.bytes_per_s = 1e6
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
    tiers = TiersSpec.model_validate(BOTH | {"cluster": CLUSTER | {"blocks": 100}})
    deployment = cluster(
        "prefill", "decode", "mixed", count=1, pool={"kv_blocks": 60, "tiers": tiers},
        route={"output_reserve_tokens": 0},
    )  # fmt: skip
    spec = FaultSpec(loss=0.01, delay_s_max=0.01, deaths=3, down_s=0.5, cancel=0.1, until_s=3.0)
    world = Watched(deployment, arrivals(60, seed=seed), faults=Faults(spec, seed))
    world._after_event = lambda w: w.check_touched()
    rng = random.Random(seed)
    for worker in ("mixed-0", "prefill-0"):
        at, tier = rng.random() * 2, rng.choice(["host", "disk", "cluster"])
        act = rng.choice([world.tiers.damage, lambda w, t: world.tiers.lose(w, t, "x")])
        world.schedule(at, lambda w=worker, t=tier, a=act: a(w, t) if w in world.hosts else None)
    world.run()
    assert not world.requests.lives
    world.rest(60.0)
    for node in world.workers():
        node.check()
        assert not node.tiers.reading and not node.tiers.asking
        assert node.pool.held == 0 and node.pool.idle_pins == 0


# --- a tier that all share ------------------------------------------------------------------------


CLUSTER = {"blocks": 5000, "bytes_per_s": 1e9}


def shared_by_two(first: Sequence[Arrival], **cluster_tier: Any) -> Watched:
    """Two workers behind round robin, so that the same prompt twice meets both."""
    tiers = TiersSpec.model_validate({"cluster": CLUSTER | cluster_tier})
    pool = SMALL | {"tiers": tiers}
    return Watched(cluster("mixed", pool=pool, route={"name": "round_robin"}), first)


def test_what_one_worker_stored_another_loads() -> None:
    rows = [Arrival(0.0, 400, 2, tuple(range(25))), Arrival(5.0, 400, 2, tuple(range(25)))]
    world = shared_by_two(rows)
    world.run()
    world.check()
    assert [e.worker for e in world.events_of(Prefilled)] == ["mixed-0", "mixed-1"]
    (hit,) = world.events_of(TierHit)
    assert (hit.worker, hit.tier, hit.tokens) == ("mixed-1", "cluster", 384)


def test_all_restart_and_find_it_again() -> None:
    rows = [Arrival(0.0, 400, 2, tuple(range(25))), Arrival(20.0, 400, 2, tuple(range(25)))]
    outages = [{"worker": f"mixed-{i}", "at_s": 8, "for_s": 2} for i in range(2)]
    faults = FaultSpec.model_validate({"outages": outages})
    deployment = cluster("mixed", pool=SMALL | {"tiers": TiersSpec.model_validate(
        {"cluster": CLUSTER, "host": {"blocks": 100}})})  # fmt: skip
    world = watched(deployment, rows, faults=Faults(faults, 0))
    assert [(e.tier, e.tokens) for e in world.events_of(TierHit)] == [("cluster", 384)]


@pytest.mark.parametrize("bytes_per_s", [1e5, 1e6, 1e7, 1e8, 1e10])
@pytest.mark.parametrize("latency_s", [1e-4, 1e-2])
def test_asking_never_costs_much(bytes_per_s: float, latency_s: float) -> None:
    cluster_tier = {"blocks": 5000, "bytes_per_s": bytes_per_s, "latency_s": latency_s}
    none, auto = ttft(tiered(SMALL)), ttft(tiered(SMALL, cluster=cluster_tier))
    assert auto < 1.03 * none
    if bytes_per_s >= 1e8 and latency_s < 1e-3:  # computing takes about 14 ms
        assert auto < 0.85 * none


def test_a_store_that_holds_nothing_is_asked_less() -> None:
    """Prompts that nobody had before: asking is in vain, and costs next to nothing."""
    rows = [Arrival(i / 4, 400, 2, tuple(range(i * 100, i * 100 + 25))) for i in range(100)]
    world = shared_by_two(rows, latency_s=1e-3)
    asked: list[int] = []
    ask = world.tiers.ask
    world.tiers.ask = lambda *args: asked.append(ask(*args))  # type: ignore[method-assign,func-returns-value]
    world.run()
    assert 0 < len(asked) < 20 and len(world.recorder.outcomes) == 100


def test_a_shared_store_that_fails_is_left_alone_and_tried_again() -> None:
    world, at = shared_by_two(turns()), dict[type, list[float]]()
    told = world.recorder.event

    def listen(now: float, event: Any) -> None:
        at.setdefault(type(event), []).append(now)
        told(now, event)

    world.recorder.event = listen  # type: ignore[method-assign]
    world.schedule(8.0, lambda: world.tiers.lose("mixed-0", "cluster", "connection refused"))
    world.schedule(18.0, lambda: world.tiers.mend("mixed-0", "cluster"))
    world.run()
    world.check()
    assert len(at[TierOff]) == len(at[TierBack]) == 2
    assert at[TierOff][0] == 8.0 and 18.0 < at[TierBack][0] < 26.0
    assert any(t < 8.0 for t in at[TierHit]) and any(t > 18.0 for t in at[TierHit])
    assert not any(8.0 < t < 18.0 for t in at[TierHit])
    assert len(world.recorder.outcomes) == 120


def test_what_a_store_evicted_or_lost_is_computed() -> None:
    small = shared_by_two(turns(), blocks=60)
    small.run()
    small.check()
    emptied = shared_by_two(turns())
    emptied.schedule(15.0, lambda: emptied.tiers.damage("mixed-0", "cluster"))
    emptied.run()
    emptied.check()
    for world in (small, emptied):
        assert len(world.recorder.outcomes) == 120


# --- tenants --------------------------------------------------------------------------------------


def flood() -> list[Arrival]:
    """`hot` comes back to one prefix every two seconds; `flood` asks something new all the time."""
    rows = [Arrival(2.0 * i, 400, 2, tuple(range(25)), tenant="hot") for i in range(15)]
    rows += [
        Arrival(0.5 + i / 10, 400, 2, tuple(range(1000 * i, 1000 * i + 25)), tenant="flood")
        for i in range(1, 290)
    ]
    return sorted(rows, key=lambda row: row.at_s)


def hot_cached(evict: str, kv_blocks: int, tiers: TiersSpec | None) -> list[int]:
    """Cached tokens of each of the hot tenant's prompts."""
    pool = {"kv_blocks": kv_blocks, "tiers": tiers}
    deployment = cluster("mixed", count=1, pool=pool)
    policy = deployment.policy.model_copy(update={"evict": evict})
    rows = flood()
    world = watched(deployment.model_copy(update={"policy": policy}), rows)
    hot = {f"r{i}" for i, row in enumerate(rows) if row.tenant == "hot"}
    return [e.cached_tokens for e in world.events_of(Prefilled) if e.request_id in hot]


def test_a_flood_takes_the_device_unless_shares_are_fair() -> None:
    assert set(hot_cached("lru", 150, None)) == {0}
    assert set(hot_cached("fair", 150, None)[1:]) == {384}


def test_a_flood_takes_a_tier_unless_shares_are_fair() -> None:
    """A device so small that each prompt needs nearly all of it, and a tier that the flood fills
    twice between two visits."""
    tiers = TiersSpec.model_validate({"host": {"blocks": 250, "bytes_per_s": 1e10}})
    assert max(hot_cached("fair", 28, None)) < 100, "the device alone is no help"
    assert max(hot_cached("lru", 28, tiers)) < 100
    assert set(hot_cached("fair", 28, tiers)[1:]) == {384}


def test_the_same_bytes_twice_and_a_recording_that_verifies(tmp_path: Path) -> None:
    tiers = TiersSpec.model_validate(BOTH | {"cluster": CLUSTER})
    pool = {"kv_blocks": 60, "tiers": tiers}
    deployment = cluster("prefill", "decode", count=2, pool=pool)
    trace = Trace("t", 16, tuple(arrivals(80)))
    first = simulate(deployment, trace, record=tmp_path)
    assert first.counts["TierStored"] > 0 and first.counts["TierHit: cluster, tokens"] > 0
    assert simulate(deployment, trace).to_json() == first.to_json()
    assert all(not node.difference for node in verify_dir(tmp_path).nodes)
