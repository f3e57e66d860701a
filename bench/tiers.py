"""Tiers: hits by tier and rule on a trace, time against no tier, and copies in bytes a second.

    python -m bench.tiers [--hits] [--store-hits] [--times] [--shared] [--copies] [--stores]
        [--limit N]

Without a flag, all. `--hits`: the Mooncake conversation trace, one request at a time: blocks
found on the device, in host memory and on disk, simulated and counted by three plain LRU caches;
then the hits of one tier alone under each rule of eviction. `--store-hits`: the same with a store
of the cluster in the place of the disk. `--times`: mean TTFT of the trace on
one H100 (Llama 3.1 8B) whose host tier is fast or slow, against none; `always` is what happens
without a prediction. `--shared`: mean TTFT of every second request on four of them that share a
store of the cluster, by its bandwidth and by a route that sees caches and one that does not.
`--copies`: a thread's loads and stores of 2 MiB blocks, checksums in them, in
turns with a plain copy of the same bytes; wall times of one process. `--stores`: the same with a
store of the cluster that runs beside it, Redis and Mooncake where they are installed, and what
asking for 64 keys takes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kvasir.core.effects import NOWHERE, Restore, Shelf, Store
from kvasir.core.keys import trace_key
from kvasir.core.specs import (
    Deployment,
    ModelSpec,
    PolicySpec,
    PoolSpec,
    RouteSpec,
    TopologySpec,
)
from kvasir.core.specs.deployment import FittedCost
from kvasir.core.specs.tiers import ClusterTier, TiersSpec
from kvasir.kv.tiers import TierCache, Use
from kvasir.policy.evict import RANKS
from kvasir.runtime.runners import client_of
from kvasir.store.cluster import ClusterShelves
from kvasir.store.disk import DiskShelves
from kvasir.store.memory import HostShelves
from kvasir.traces.formats import load
from kvasir.traces.record import Arrival, Trace
from kvasir.world.live.tiers import LiveTiers
from kvasir.world.sim.run import simulate
from tests.sim.test_tiers import counted_with_store
from tests.stores import missing, real_store

SIZES = (1_000, 10_000, 50_000)  # blocks of 512 tokens: device, host, disk
CAPACITIES = (1_000, 5_000, 10_000, 50_000)
RATES = (0.05e9, 0.2e9, 1e9, 5e9, 50e9)
SHARED = (0.5e9, 2e9, 10e9, 40e9)
APART_S = 5.0
BLOCK_BYTES, BLOCKS, ROUNDS = 2 << 20, 64, 7
CHUNK = 2  # blocks of one call


def deployment(tiers: dict[str, Any] | None, **pool: Any) -> Deployment:
    spec = TiersSpec(**tiers) if tiers is not None else None
    return Deployment(
        models=(ModelSpec(name="m", shape="llama-3.1-8b"),),
        pools=(PoolSpec(name="mixed", role="mixed", count=1, tiers=spec, **pool),),
        topology=TopologySpec(preset="fabric"),
        block_size=512,
    )


# --- hits -----------------------------------------------------------------------------------------


def counted(rows: Sequence[Arrival], size: int) -> Counter[str]:
    """Leading blocks by the fastest of three plain LRU caches; the device runs one block more than
    it keeps."""
    caches = {"device": (SIZES[0] - 1, OrderedDict[int, None]()),
              "host": (SIZES[1], OrderedDict[int, None]()),
              "disk": (SIZES[2], OrderedDict[int, None]())}  # fmt: skip
    found: Counter[str] = Counter()
    for row in rows:
        blocks, below = row.hash_ids[: row.input_tokens // size], False
        for block in blocks:
            names = [name for name, (_, cache) in caches.items() if block in cache]
            names = [name for name in names if name != "device" or not below]
            if not names:
                break
            below = names[0] != "device"
            found[names[0]] += 1
        for capacity, cache in caches.values():
            for block in reversed(blocks):
                cache[block] = None
                cache.move_to_end(block)
            while len(cache) > capacity:
                cache.popitem(last=False)
    return found


def by_tier(trace: Trace) -> dict[str, Any]:
    size = trace.block_size or 0
    rows = [a for a in trace.arrivals if a.input_tokens % size]
    spaced = [Arrival(i * APART_S, a.input_tokens, 1, a.hash_ids) for i, a in enumerate(rows)]
    tiers = {name: {"blocks": blocks, "bytes_per_s": 1e15}
             for name, blocks in zip(("host", "disk"), SIZES[1:], strict=True)}  # fmt: skip
    d = deployment(tiers | {"load": "always"}, kv_blocks=SIZES[0], cost=FittedCost())
    result = simulate(d, Trace("spaced", size, tuple(spaced)))
    loaded = {t: result.counts.get(f"TierHit: {t}, tokens", 0) // size for t in ("host", "disk")}
    hits = sum(outcome.cached_tokens for outcome in result.outcomes) // size
    simulated = {"device": hits - sum(loaded.values()), **loaded}
    expected = dict(counted(rows, size))
    print(f"\nHits by tier, {len(rows)} requests, sizes {SIZES} blocks")
    for tier in ("device", "host", "disk"):
        print(f"  {tier:6} {simulated[tier]:8} simulated {expected.get(tier, 0):8} counted")
    return {"simulated": simulated, "counted": expected}


def by_store(trace: Trace) -> dict[str, Any]:
    size = trace.block_size or 0
    rows = [a for a in trace.arrivals if a.input_tokens % size]
    spaced = [Arrival(i * APART_S, a.input_tokens, 1, a.hash_ids) for i, a in enumerate(rows)]
    tiers = {name: {"blocks": blocks, "bytes_per_s": 1e15}
             for name, blocks in zip(("host", "cluster"), SIZES[1:], strict=True)}  # fmt: skip
    d = deployment(tiers | {"load": "always"}, kv_blocks=SIZES[0], cost=FittedCost())
    result = simulate(d, Trace("spaced", size, tuple(spaced)))
    names = ("host", "cluster")
    loaded = {t: result.counts.get(f"TierHit: {t}, tokens", 0) // size for t in names}
    hits = sum(outcome.cached_tokens for outcome in result.outcomes) // size
    simulated = {"device": hits - sum(loaded.values()), **loaded}
    expected = dict(counted_with_store(rows, size, *SIZES))
    print(f"\nHits by tier with a store of the cluster, {len(rows)} requests, sizes {SIZES} blocks")
    for tier in ("device", *names):
        print(f"  {tier:7} {simulated[tier]:8} simulated {expected.get(tier, 0):8} counted")
    return {"simulated": simulated, "counted": expected}


def by_rule(trace: Trace) -> dict[str, Any]:
    """Share of all blocks that one tier alone finds, by rule and capacity."""
    size = trace.block_size or 0
    total = sum(a.input_tokens // size for a in trace.arrivals)
    print(f"\nHits of one tier alone, of {total} full blocks")
    print("  rule   " + "".join(f"{capacity:>9}" for capacity in CAPACITIES))
    shares: dict[str, list[float]] = {}
    for name, rank in RANKS.items():
        shares[name] = [_hits(trace, TierCache(c, rank)) / total for c in CAPACITIES]
        print(f"  {name:7}" + "".join(f"{share:9.1%}" for share in shares[name]))
    return shares


def _hits(trace: Trace, cache: TierCache) -> int:
    """As a worker does it: what is there is used again, what is not is stored."""
    size, hits = trace.block_size or 0, 0
    for tick, row in enumerate(trace.arrivals, start=1):
        keys = [trace_key(i) for i in row.hash_ids[: row.input_tokens // size]]
        seconds = 1.0 + len(keys) * size / 30_000  # linear and quadratic part of a 70B prefill
        missing, leading = list[tuple[bytes, Use]](), True
        for depth, key in enumerate(keys):
            there = cache.touch(key, tick, seconds, again=True)
            leading = leading and there
            hits += leading
            if not there:
                missing.append((key, Use(depth, tick, seconds, floor=cache.floor)))
        for key, use in missing:
            slot = cache.reserve(use)
            if slot is not None:
                cache.name(slot, key, use)
                cache.release([slot])
    return hits


# --- time -----------------------------------------------------------------------------------------


def times(trace: Trace) -> dict[str, Any]:
    """Mean TTFT; every sixth request, so that one H100 keeps up."""
    rows = trace.arrivals[::6]
    thinned = Trace("thinned", trace.block_size, tuple(rows))

    def ttft(tiers: dict[str, Any] | None) -> float:
        return float(simulate(deployment(tiers), thinned).summary.ttft.mean_s)

    none = ttft(None)
    print(f"\nMean TTFT, {len(rows)} requests on one H100, without a tier {none:.3f} s")
    print("  host tier, GB/s      auto   of none    always   of none")
    found: dict[str, Any] = {"none": none}
    for rate in RATES:
        host = {"host": {"blocks": 50_000, "bytes_per_s": rate}}
        auto, always = ttft(host), ttft(host | {"load": "always", "wait_s": 1e6})
        found[f"{rate:g}"] = {"auto": auto, "always": always}
        shares = f"{auto:9.3f} {auto / none:9.2f} {always:9.3f} {always / none:9.2f}"
        print(f"  {rate / 1e9:15.2f} {shares}")
    return found


def shared(trace: Trace) -> dict[str, Any]:
    thinned = Trace("thinned", trace.block_size, tuple(trace.arrivals[::2]))
    print(f"\nMean TTFT, s, {len(thinned.arrivals)} requests on four H100 (tokens from the store)")
    print("  route        no store" + "".join(f"  {rate / 1e9:8.1f} GB/s" for rate in SHARED))
    found: dict[str, Any] = {}
    for route in ("round_robin", "cache_load"):
        spec = PolicySpec(route=RouteSpec(name=route))
        line, row = f"  {route:12}", list[dict[str, float]]()
        for rate in (None, *SHARED):
            tiers = {"cluster": {"blocks": 200_000, "bytes_per_s": rate}} if rate else None
            d = deployment(tiers).model_copy(update={"policy": spec})
            pool = d.pools[0].model_copy(update={"count": 4})
            result = simulate(d.model_copy(update={"pools": (pool,)}), thinned)
            ttft = float(result.summary.ttft.mean_s)
            loaded = result.counts.get("TierHit: cluster, tokens", 0)
            row.append({"ttft_s": ttft, "loaded_tokens": loaded})
            line += f"{ttft:9.3f}" + (f" ({loaded / 1e6:.1f} M)" if rate else "")
        print(line)
        found[route] = row
    return found


# --- copies ---------------------------------------------------------------------------------------


class Answers:
    """What tiers tell, one by one."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def wait(self, count: int) -> Any:
        while len(self.all) < count:
            time.sleep(0.0005)
        return self.all[count - 1]


def copies() -> dict[str, Any]:
    planes = [[np.random.default_rng(0).integers(0, 256, (2 * BLOCKS, BLOCK_BYTES // 8), np.uint8)]
              for _ in range(8)]  # fmt: skip
    keys = tuple(trace_key(i) for i in range(BLOCKS))
    slots, total = tuple(range(BLOCKS)), BLOCKS * BLOCK_BYTES
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        answers = Answers()
        tiers = LiveTiers(planes, {
            "host": lambda: HostShelves(BLOCKS, BLOCK_BYTES),
            "disk": lambda: DiskShelves(Path(folder) / "kv", BLOCKS, BLOCK_BYTES, "bench"),
        }, answers.all.append, answers.all.append)  # type: ignore[arg-type]  # fmt: skip
        count = 2
        answers.wait(count)
        for turn in range(ROUNDS):
            began = time.perf_counter()
            for (plane,) in planes:
                plane[BLOCKS:] = plane[:BLOCKS]
            found.setdefault("copy", []).append(total / (time.perf_counter() - began))
            for tier in ("host", "disk"):
                tiers.store(Store(turn, tier, keys, slots, slots))  # type: ignore[arg-type]
                stored = answers.wait(count := count + 1)
                assert stored.count == BLOCKS
                found.setdefault(f"{tier} store", []).append(total / stored.seconds)
                into = tuple(range(BLOCKS, 2 * BLOCKS))
                shelf = Shelf(tier, slots)  # type: ignore[arg-type]
                tiers.restore(Restore("r", turn, keys, into, (shelf,), time.monotonic() + 60))
                loaded = answers.wait(count := count + 1)
                assert loaded.count == BLOCKS and (plane[BLOCKS:] == plane[:BLOCKS]).all()
                found.setdefault(f"{tier} load", []).append(total / loaded.moved[0].seconds)
        tiers.close()
    base = median(found["copy"])
    print(f"\nCopies of {BLOCKS} blocks of 2 MiB in 8 planes, GB/s: median of {ROUNDS} (range)")
    for name, rates in found.items():
        low, mid, high = min(rates) / 1e9, median(rates) / 1e9, max(rates) / 1e9
        share = f"{median(rates) / base:.0%} of a copy"
        print(f"  {name:10} {mid:6.2f} ({low:.2f} to {high:.2f}), {share}")
    return {name: median(rates) for name, rates in found.items()}


def stores() -> dict[str, Any]:
    """One client of each store, as a worker has it: chunks of 2 MiB blocks, labels in them."""
    rng, found = np.random.default_rng(0), dict[str, Any]()
    rows = rng.integers(0, 256, (BLOCKS, BLOCK_BYTES), np.uint8)
    slots, total = [NOWHERE] * CHUNK, rows.nbytes
    for kind in ("redis", "mooncake"):
        if reason := missing(kind):
            print(f"\n{kind}: {reason}")
            continue
        rates: dict[str, list[float]] = {"store": [], "load": [], "ask": []}
        with tempfile.TemporaryDirectory() as folder, real_store(kind, Path(folder)) as store:
            lend = 2 * ROUNDS * total
            tier = ClusterTier(url=store.url, blocks=1, lend_bytes=lend, timeout_s=20.0)
            shelves = opened(tier)
            for turn in range(ROUNDS):
                keys = [trace_key(turn * BLOCKS + i) for i in range(BLOCKS)]
                marks = [time.perf_counter()]
                for at in range(0, BLOCKS, CHUNK):
                    shelves.write(slots, keys[at : at + CHUNK], rows[at : at + CHUNK])
                marks.append(time.perf_counter())
                assert shelves.held(keys) == BLOCKS
                marks.append(time.perf_counter())
                into = np.empty((CHUNK, BLOCK_BYTES), np.uint8)
                for at in range(0, BLOCKS, CHUNK):
                    assert shelves.read(slots, keys[at : at + CHUNK], into) == CHUNK
                marks.append(time.perf_counter())
                assert (into == rows[-CHUNK:]).all()
                stored, asked, loaded = np.diff(marks)
                rates["store"].append(total / stored)
                rates["load"].append(total / loaded)
                rates["ask"].append(asked)
            shelves.close()
        found[kind] = {name: median(values) for name, values in rates.items()}
        print(f"\n{kind}, {BLOCKS} blocks of 2 MiB: median of {ROUNDS} (range)")
        for name, scale, unit in (("store", 1e9, "GB/s"), ("load", 1e9, "GB/s"),
                                  ("ask", 1e-3, "ms")):  # fmt: skip
            low, mid, high = (f(rates[name]) / scale for f in (min, median, max))
            print(f"  {name:6} {mid:6.2f} {unit} ({low:.2f} to {high:.2f})")
    return found


def opened(tier: ClusterTier) -> ClusterShelves:
    connect = client_of(tier, BLOCK_BYTES, where="bench")
    return ClusterShelves(connect, BLOCK_BYTES, "bench", tier.timeout_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for flag in ("hits", "store-hits", "times", "shared", "copies", "stores"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--limit", type=int)
    asked = parser.parse_args()
    every = not any(value for name, value in vars(asked).items() if name != "limit")
    whole = load("mooncake-conversation")
    trace = Trace(whole.name, whole.block_size, whole.arrivals[: asked.limit])
    found: dict[str, Any] = {}
    if asked.hits or every:
        found["by_tier"], found["by_rule"] = by_tier(trace), by_rule(trace)
    if asked.store_hits or every:
        found["by_store"] = by_store(trace)
    if asked.times or every:
        found["ttft_s"] = times(trace)
    if asked.shared or every:
        found["shared"] = shared(trace)
    if asked.copies or every:
        found["bytes_per_s"] = copies()
    if asked.stores or every:
        found["stores"] = stores()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
