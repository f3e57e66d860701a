"""What loading layer by layer under a request's own prefill could bring, at most.

    python -m bench.tier_overlap [--simulated] [--live] [--limit N]

Blocks come whole, before the request runs: load, then prefill of the rest. If each layer's KV came
while the layers before it compute, the two of n layers would take max(load, prefill) and one
layer's share of the other, so at most min(load, prefill) (1 - 1/n) would be saved, of requests that
load. `--simulated`: of the Mooncake conversation trace on one H100 (Llama 3.1 8B, 32 layers), as
share of mean TTFT. `--live`: one worker, a model of random weights on this machine's CPU (8 layers,
hidden 512), host tier; prompts of 1,024 cached and 16 to 512 new tokens, medians of 5; the last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from bench.tiers import deployment
from kvasir.core.events import AnyEvent, Prefilled, TierHit
from kvasir.traces.formats import load
from kvasir.traces.record import Arrival
from kvasir.world.sim.world import SimWorld

RATES = (1e9, 5e9, 20e9, 50e9)
LAYERS = 32
SHAPE: dict[str, Any] = {
    "hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 64,
    "intermediate": 1408, "context_max": 4096,
}  # fmt: skip
CACHED, NEW, REPEATS = 1024, (16, 128, 512), 5


def saved_s(load_s: float, prefill_s: float, layers: int) -> float:
    return min(load_s, prefill_s) * (1 - 1 / layers)


def simulated(rows: list[Arrival], block_size: int) -> dict[str, Any]:
    print(f"\nAt most saved, {len(rows)} requests on one H100")
    print("  host tier, GB/s   load     mean TTFT   saved   share")
    found: dict[str, Any] = {}
    for rate in RATES:
        tiers = {"host": {"blocks": 50_000, "bytes_per_s": rate}}
        spec = deployment(tiers).model_copy(update={"block_size": block_size})
        world = SimWorld(spec, rows)
        loads, prefills = Counter[str](), Counter[str]()
        told = world.recorder.event

        def listen(
            now: float, event: AnyEvent, loads: Any = loads, prefills: Any = prefills,
            told: Any = told,
        ) -> None:  # fmt: skip
            if isinstance(event, TierHit):
                loads[event.request_id] += event.seconds
            elif isinstance(event, Prefilled):
                prefills[event.request_id] += event.prefill_s
            told(now, event)

        world.recorder.event = listen  # type: ignore[method-assign]
        world.run()
        outcomes = world.recorder.outcomes
        mean = sum(o.ttft_s or 0.0 for o in outcomes) / len(outcomes)
        most = sum(saved_s(s, prefills[r], LAYERS) for r, s in loads.items()) / len(outcomes)
        found[f"{rate:g}"] = {"loads": len(loads), "ttft_s": mean, "saved_s": most}
        print(f"  {rate / 1e9:15.0f} {len(loads):6} {mean:11.3f} s {most:7.4f} {most / mean:7.1%}")
    return found


async def live() -> dict[str, Any]:
    from kvasir.engine.tiny import make_tiny
    from tests.live.cluster import cluster, deployment_of

    rng, found = random.Random(0), dict[str, Any]()
    print(f"\nLive, {CACHED} tokens from a host tier, medians of {REPEATS}")
    print("  new tokens   load ms   prefill ms   at most saved of both")
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(folder, "llama", **SHAPE)
        tiers = {"host": {"blocks": 4096}, "load": "always", "wait_s": 60.0}
        blocks = (CACHED + max(NEW)) // 16 + 8
        spec = deployment_of(Path(folder), mixed=1, kv_blocks=blocks, tiers=tiers)
        async with cluster(spec) as c:
            prefix = [rng.randrange(256) for _ in range(CACHED)]
            await c.ask(prefix, 1)
            await c.at_rest()
            for new in NEW:
                pairs = []
                for _ in range(REPEATS):
                    await c.ask([rng.randrange(256) for _ in range(blocks * 16 - 32)], 1)
                    await c.at_rest()
                    before = len(c.events(TierHit))
                    answer = await c.ask(prefix + [rng.randrange(256) for _ in range(new)], 1)
                    await c.until(lambda n=before: len(c.events(TierHit)) > n)  # type: ignore[misc]
                    load_s = sum(e.seconds for e in c.events(TierHit)[before:])
                    assert answer.report.prefill.cached_tokens == CACHED and load_s > 0
                    pairs.append((load_s, answer.report.prefill.prefill_s))
                load_s, prefill_s = (median(column) for column in zip(*pairs, strict=True))
                share = saved_s(load_s, prefill_s, SHAPE["layers"]) / (load_s + prefill_s)
                found[str(new)] = {"load_s": load_s, "prefill_s": prefill_s, "share": share}
                print(f"  {new:10} {load_s * 1e3:9.1f} {prefill_s * 1e3:12.1f} {share:14.1%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--limit", type=int)
    asked = parser.parse_args()
    both = not (asked.simulated or asked.live)
    found: dict[str, Any] = {}
    if asked.simulated or both:
        trace = load("mooncake-conversation")
        rows = list(trace.arrivals[::6][: asked.limit])
        found["simulated"] = simulated(rows, trace.block_size or 0)
    if asked.live or both:
        found["live"] = uvloop.run(live())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
