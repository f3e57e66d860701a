"""The transfers of simulated runs once more, as packets and in SimGrid's TCP-like model.

Knows flows: when each begins, its links and bytes. Must not know the scheduler: what it decided is
replayed as it was, so a transfer that takes longer here changes nothing that comes after it.

The packet model is store-and-forward: a shard pair's bytes are cells; a link is a queue, first come
first served; a pair has a window of cells on the way and sends no faster than its cap. No loss.
SimGrid's default model (LV08) has TCP's slow start, its bandwidth factor 0.97 and RTT unfairness.
"""

from __future__ import annotations

import heapq
import json
import subprocess
import textwrap
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from bench.netkv_runs import Flow, Setting, simulated
from kvasir.net.topology import Topology
from kvasir.world.sim.network import SimNetwork

CELL_BYTES = 8 << 20
WINDOW_CELLS = 8
POLICIES = ("round robin", "cache_load", "netkv", "netkv_path")

LV08 = """
import json, sys
from simgrid import Actor, Engine, LinkInRoute, Mailbox, NetZone, this_actor

job = json.load(sys.stdin)
engine = Engine(["referee", "--log=root.thres:critical"])
zone = NetZone.create_full_zone("net")
links = {}
for name, capacity in job["links"]:
    links[name] = zone.create_link(name, [capacity]).set_latency(1e-6)
    links[name].seal()
ends = {}

def send(at, name, nbytes):
    this_actor.sleep_until(at)
    Mailbox.by_name(name).put("kv", nbytes)

def receive(name):
    Mailbox.by_name(name).get()
    ends[name] = Engine.clock

hosts = []
for name, at, nbytes, path in job["flows"]:
    pair = [zone.create_host(name + end, 1e9) for end in ("-from", "-to")]
    for host in pair:
        host.seal()
    here, there = (host.netpoint for host in pair)
    crossed = [LinkInRoute(links[link]) for link in path]
    zone.add_route(here, there, None, None, crossed, False)
    hosts.append((name, at, nbytes, pair))
zone.seal()
for name, at, nbytes, (here, there) in hosts:
    Actor.create(name + "-send", here, send, at, name, nbytes)
    Actor.create(name + "-receive", there, receive, name)
engine.run()
print("ENDS " + json.dumps(ends))
"""


def crosscheck(setting: Setting, load_weight: float) -> dict[str, dict[str, Any]]:
    """By policy: mean seconds of a transfer in each model, of the very flows that it caused, and
    how far single transfers move from max-min (mean of relative differences)."""
    found: dict[str, dict[str, Any]] = {}
    for arm in POLICIES:
        world, flows = simulated(setting._replace(arm=arm), load_weight)
        topology = world.network.topology
        fluid = max_min(topology, flows)
        models = {"max-min": fluid, "packets": packets(topology, flows)}
        told = lv08(topology, flows)
        if told is not None:
            models["SimGrid LV08"] = told
        found[arm] = {"transfers": len(flows)}
        for name, seconds in models.items():
            moved = fmean(abs(s - f) / f for s, f in zip(seconds, fluid, strict=True))
            found[arm][name] = [round(fmean(seconds), 6), round(moved, 4)]
    return found


def max_min(topology: Topology, flows: Sequence[Flow]) -> list[float]:
    """Seconds of each transfer in the simulator's own network."""
    heap: list[tuple[float, int, Callable[[], None]]] = []
    ends = [0.0] * len(flows)
    serial, now = 0, 0.0

    def schedule(at: float, action: Callable[[], None]) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(heap, (at, serial, action))

    network = SimNetwork(topology, schedule)
    for i, flow in enumerate(flows):

        def begin(i: int = i, flow: Flow = flow) -> None:
            network.start(now, flow.route, flow.bytes, lambda: ends.__setitem__(i, now))

        schedule(flow.at_s, begin)
    while heap:
        now, _, action = heapq.heappop(heap)
        action()
    return [end - flow.at_s for end, flow in zip(ends, flows, strict=True)]


def packets(topology: Topology, flows: Sequence[Flow]) -> list[float]:
    """Seconds of each transfer, cell by cell. A pair puts its next cell on the way when one has
    arrived (the window), and not before its cap allows."""
    free_at = [0.0] * len(topology.capacities)  # of each link's queue
    ends = [0.0] * len(flows)
    heap: list[tuple[float, int, int, int, int]] = []  # when, serial, transfer, pair's way, hop
    serial = 0
    ways = [[w for w in f.route.parts() for _ in range(w.pairs)] for f in flows]
    share = [f.bytes / f.route.multiplicity for f in flows]
    left = [[max(1, round(s / CELL_BYTES))] * len(w) for s, w in zip(share, ways, strict=True)]
    cell = [s / parts[0] for s, parts in zip(share, left, strict=True)]
    next_at = [[f.at_s] * len(w) for f, w in zip(flows, ways, strict=True)]

    def inject(now: float, i: int, pair: int) -> None:
        nonlocal serial
        if not left[i][pair]:
            return
        left[i][pair] -= 1
        at = max(now, next_at[i][pair])
        cap = flows[i].route.flow_cap
        next_at[i][pair] = at + (cell[i] / cap if cap else 0.0)
        serial += 1
        heapq.heappush(heap, (at, serial, i, pair, 0))

    for i, flow in enumerate(flows):
        for pair in range(len(ways[i])):
            for _ in range(WINDOW_CELLS):
                inject(flow.at_s, i, pair)
    while heap:
        now, _, i, pair, hop = heapq.heappop(heap)
        path = ways[i][pair].links
        if hop == len(path):
            ends[i] = max(ends[i], now)
            inject(now, i, pair)
            continue
        link = path[hop]
        over = max(now, free_at[link]) + cell[i] / topology.capacities[link]
        free_at[link] = over
        serial += 1
        heapq.heappush(heap, (over, serial, i, pair, hop + 1))
    return [end - flow.at_s for end, flow in zip(ends, flows, strict=True)]


def lv08(topology: Topology, flows: Sequence[Flow]) -> list[float] | None:
    """Seconds of each transfer in SimGrid's default model; None where no Python has SimGrid. Its
    pairs go as one flow through a link of their caps' sum."""
    python = next((p for p in ("/usr/bin/python3", "python3") if _has_simgrid(p)), None)
    if python is None:
        return None
    links = [[f"l{i}", c] for i, c in enumerate(topology.capacities)]
    rows = []
    for i, flow in enumerate(flows):
        path = [f"l{link}" for link in flow.route.links]
        if flow.route.flow_cap is not None:
            links.append([f"cap{i}", flow.route.flow_cap * flow.route.multiplicity])
            path.append(f"cap{i}")
        rows.append([f"f{i}", flow.at_s, flow.bytes, path])
    done = subprocess.run(
        [python, "-c", textwrap.dedent(LV08)], input=json.dumps({"links": links, "flows": rows}),
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("ENDS "))
    ends = json.loads(line.removeprefix("ENDS "))
    return [ends[f"f{i}"] - flow.at_s for i, flow in enumerate(flows)]


def _has_simgrid(python: str) -> bool:
    try:
        tried = subprocess.run(
            [python, "-c", "import simgrid"], capture_output=True, timeout=60, check=False
        )
    except OSError:
        return False
    return tried.returncode == 0
