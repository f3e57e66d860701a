"""How much of the KV memory that running sequences hold is empty, against what reserving would be.

    python -m bench.waste [--requests 2000] [--steps-max 1 8 64]

One mixed worker under more load than it can serve, so that its memory is what limits it: lengths as
in vLLM's paper (SOSP 2023, arXiv 2309.06180, section 6.1: ShareGPT, mean 161 in, 338 out), context
2,048, blocks of 16. Sampled after every step: KV tokens that exist over slots that are held. Beside
it, of the same sequences: a whole context each (Orca max), the next power of two (Orca pow2), and
prompt and final output exactly (Orca oracle), as the paper's figure 2 has them, without the outer
fragmentation that those had too. `--steps-max`: decode iterations that one step may run, because
blocks for them are handed out ahead. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvasir.cli.files import load_deployment
from kvasir.core.specs import LengthSpec, WorkloadSpec
from kvasir.traces.generators import generate
from kvasir.world.sim.world import SimWorld

CONTEXT, BLOCKS = 2_048, 900  # 14,400 slots: about 30 sequences
GOAL = 0.96
NAMES = ("paged", "oracle", "pow2", "max")


class Sampler:
    """Sums of tokens and slots over the steps of one worker."""

    def __init__(self) -> None:
        self.samples = 0
        self.tokens = 0
        self.slots = dict.fromkeys(NAMES, 0)

    def __call__(self, world: SimWorld) -> None:
        worker: Any = world.touched
        if worker is None or not hasattr(worker, "pool") or not worker.steps.running:
            return
        worker.steps.cohort.settle_all()
        size = worker.config.capacity.block_size
        self.samples += 1
        for work in worker.steps.running:
            request = work.dispatch.request
            total = request.prompt_tokens + request.max_tokens
            self.tokens += work.computed
            self.slots["paged"] += len(work.blocks) * size
            self.slots["oracle"] += total
            self.slots["pow2"] += min(1 << (work.known - 1).bit_length(), CONTEXT)
            self.slots["max"] += CONTEXT

    def shares(self) -> dict[str, float]:
        return {name: self.tokens / slots for name, slots in self.slots.items()}


def run(requests: int, steps_max: int) -> dict[str, Any]:
    deployment = load_deployment("local")
    pool = deployment.pools[0].model_copy(
        update={"name": "mixed", "role": "mixed", "count": 1, "kv_blocks": BLOCKS,
                "batch_max": 256, "waiting_max": 100_000},
    )  # fmt: skip
    policy = deployment.policy
    batch = policy.batch.model_copy(update={"steps_max": steps_max})
    changed = {"pools": (pool,), "policy": policy.model_copy(update={"batch": batch})}
    deployment = deployment.model_copy(update=changed)
    spec = WorkloadSpec(
        rate=200.0, requests=requests,
        input=LengthSpec(mean=161, sigma=1.0, min=4, max=1_000),
        output=LengthSpec(mean=338, sigma=0.8, min=4, max=1_000),
    )  # fmt: skip
    trace = generate(spec, deployment.block_size, 0)
    sampler = Sampler()
    world = SimWorld(deployment, trace.arrivals, after_event=sampler)
    world.run()
    shares = sampler.shares()
    return {"steps_max": steps_max, "samples": sampler.samples, "shares": shares,
            "preemptions": world.recorder.counts.get("Preempted", 0)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--steps-max", type=int, nargs="+", default=[1, 8, 64])
    flags = parser.parse_args()
    found = [run(flags.requests, steps) for steps in flags.steps_max]
    print("share of held KV slots that hold a token")
    print("iterations a step up to" + "".join(f"{name:>10}" for name in NAMES) + "  preemptions")
    for one in found:
        row = "".join(f"{one['shares'][name]:>10.1%}" for name in NAMES)
        print(f"{one['steps_max']:>23}{row}{one['preemptions']:>13}")
    print(f"goal: paged at least {GOAL:.0%} (published: 96.3 %, 38.2, 26.8 and 20.4 %)")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
