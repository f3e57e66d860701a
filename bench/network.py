"""Speed of the simulated network: flows that start and end per CPU second.

    python bench/network.py [--gpus 64,1024,10000] [--presets paper,fabric] [--near 0.9,0]
                            [--seconds 3] [--seed 0]

As many flows as there are instances (TP 4) are in flight: each that ends starts another, of 0.1 to
4 GB, between two random instances: of one pod with probability `near`, else of any. `whole` solves
all flows at every change, `region` only what the change reaches (`net/maxmin.py`). Starts and ends
are counted. One thread; both arms see the same flows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import platform
import random
import time
from collections.abc import Callable
from typing import Any

from kvasir.core.messages import Location
from kvasir.core.specs import TopologySpec
from kvasir.net.maxmin import FlowSet, solve
from kvasir.net.topology import Topology
from kvasir.world.sim.network import SimNetwork

TP = 4
# nodes of 8 per rack, racks per pod, pods
SHAPES = {64: (2, 2, 2), 1024: (4, 8, 4), 10_000: (5, 25, 10)}


class WholeSet(FlowSet[int]):
    """Solves everything at every change."""

    def settle(self) -> dict[int, float]:
        rates = solve(self._capacities, self._flows.values())
        self._rates = dict(zip(self._flows, rates, strict=True))
        return self._rates

    def remove(self, name: int) -> None:
        del self._flows[name]


class Load:
    """A heap, a network, and flows that follow one another."""

    def __init__(self, gpus: int, preset: str, near: float, seed: int, whole: bool) -> None:
        nodes, racks, pods = SHAPES[gpus]
        spec = TopologySpec.model_validate(
            {"preset": preset, "nodes_per_rack": nodes, "racks_per_pod": racks, "pods": pods}
        )
        assert spec.gpus == gpus
        topology = Topology(spec)
        self.network = SimNetwork(topology, self._schedule)
        if whole:
            self.network._shares = WholeSet(topology.capacities)
        self.places = [Location(tuple(range(g, g + TP))) for g in range(0, gpus, TP)]
        per_pod = len(self.places) // pods
        self._pods = [self.places[i * per_pod : (i + 1) * per_pod] for i in range(pods)]
        self._near = near
        self.changes = 0
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._random = random.Random(seed)

    def _schedule(self, at: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (at, self._serial, action))

    def start(self) -> None:
        """One more flow between two instances."""
        self.changes += 1
        near = self._random.random() < self._near
        src, dst = self._random.sample(self._random.choice(self._pods) if near else self.places, 2)
        nbytes = self._random.randint(10**8, 4 * 10**9)
        self.network.start(self.now, self.network.route(src, dst), nbytes, self._over)

    def _over(self) -> None:
        self.changes += 1
        self.start()

    def turn(self) -> None:
        self.now, _, action = heapq.heappop(self._heap)
        action()


def measure(
    gpus: int, preset: str, near: float, seed: int, seconds: float, whole: bool
) -> dict[str, Any]:
    """Fill the network, then run for `seconds` of CPU."""
    load = Load(gpus, preset, near, seed, whole)
    flows = len(load.places)
    for _ in range(flows):
        load.start()
    load.turn()  # the first solve, of all of them at once
    load.changes = 0
    began = time.process_time()
    while (used := time.process_time() - began) < seconds:
        load.turn()
    return {
        "gpus": gpus, "preset": preset, "near": near, "arm": "whole" if whole else "region",
        "flows": flows, "changes": load.changes, "changes_per_cpu_s": round(load.changes / used, 1),
        "virtual_s": load.now,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", default="64,1024,10000")
    parser.add_argument("--presets", default="paper,fabric")
    parser.add_argument("--near", default="0.9,0")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}, one thread")
    row = "{:>7} {:<8}{:>6}{:>7}{:>12}{:>12}{:>8}"
    print(row.format("GPUs", "preset", "near", "flows", "whole /s", "region /s", "ratio"))
    runs = []
    cases = itertools.product(
        map(int, flags.gpus.split(",")), flags.presets.split(","), map(float, flags.near.split(","))
    )
    for gpus, preset, near in cases:
        pair = [
            measure(gpus, preset, near, flags.seed, flags.seconds, whole) for whole in (True, False)
        ]
        runs += pair
        whole, region = (run["changes_per_cpu_s"] for run in pair)
        ratio = f"{region / whole:.1f}" if whole else ""
        flows = pair[0]["flows"]
        print(row.format(gpus, preset, near, flows, whole, region, ratio), flush=True)
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()
