"""Our completion times against SimGrid's flow model, an independent max-min solver.

SimGrid runs under whichever Python can import it (Debian: python3-simgrid), in a process of its
own. Pure max-min is model CM02 without TCP's window, cross traffic and RTT weights; its default
model would move single flows by tens of per cent, so every comparison names the model.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import subprocess
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvasir.core.messages import Location
from kvasir.core.specs import TopologySpec
from kvasir.net.topology import Topology
from kvasir.world.sim.network import SimNetwork

FLOWS = 200
ERROR_MAX = 1e-6

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

REFEREE = """
import json, sys
from simgrid import Actor, Engine, Host, LinkInRoute, Mailbox, NetZone, this_actor

job = json.load(sys.stdin)
engine = Engine([
    "referee", "--log=root.thres:critical", "--cfg=network/model:CM02",
    "--cfg=network/TCP-gamma:0", "--cfg=network/crosstraffic:0", "--cfg=network/weight-S:0",
])
zone = NetZone.create_full_zone("net")
links = {}
for name, capacity in job["links"]:
    links[name] = zone.create_link(name, [capacity])
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


@cache
def python_with_simgrid() -> str:
    """The first Python on the path that imports simgrid; "" if there is none."""
    names = ("python3", "python3.11", "python3.12", "python3.13")
    for folder in os.get_exec_path():
        for name in names:
            found = Path(folder) / name
            if found.is_file() and os.access(found, os.X_OK):
                tried = subprocess.run(
                    [str(found), "-c", "import simgrid"],
                    check=False,
                    capture_output=True,
                    timeout=60,
                )
                if tried.returncode == 0:
                    return str(found)
    return ""


def ours(topology: Topology, rows: list[tuple[str, float, int, Any]]) -> dict[str, float]:
    """When each flow ends in our network."""
    heap: list[tuple[float, int, Callable[[], None]]] = []
    ends: dict[str, float] = {}
    serial, now = 0, 0.0

    def schedule(at: float, action: Callable[[], None]) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(heap, (at, serial, action))

    network = SimNetwork(topology, schedule)
    for name, at, nbytes, route in rows:

        def begin(name: str = name, nbytes: int = nbytes, route: Any = route) -> None:
            network.start(now, route, nbytes, lambda: ends.__setitem__(name, now))

        schedule(at, begin)
    while heap:
        now, _, action = heapq.heappop(heap)
        action()
    return ends


def referee(topology: Topology, rows: list[tuple[str, float, int, Any]]) -> dict[str, float]:
    """When each flow ends in SimGrid."""
    used = sorted({link for _, _, _, route in rows for link in route.links})
    job = {
        "links": [[f"l{link}", topology.capacities[link]] for link in used],
        "flows": [
            [name, at, nbytes, [f"l{link}" for link in route.links]]
            for name, at, nbytes, route in rows
        ],
    }
    done = subprocess.run(
        [python_with_simgrid(), "-c", textwrap.dedent(REFEREE)],
        input=json.dumps(job), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ENDS "))
    found: dict[str, float] = json.loads(line.removeprefix("ENDS "))
    return found


LEAF_SPINE: dict[str, Any] = {
    "preset": "explicit",
    "nodes": [{"name": f"n{i}", "gpus": 8} for i in range(8)],
    "switches": [*(f"leaf{i}" for i in range(4)), *(f"spine{i}" for i in range(3))],
    "links": [
        *({"between": [f"n{i}", f"leaf{i // 2}"], "bandwidth": 100e9} for i in range(8)),
        *({"between": [f"leaf{a}", f"spine{b}"], "bandwidth": (b + 1) * 15e9}
          for a in range(4) for b in range(3)),
    ],
}  # fmt: skip
FABRICS: dict[str, dict[str, Any]] = {
    "uplinks": {"preset": "fabric", "uplinks": 2},
    "rails": {"preset": "fabric", "rails": 4, "uplinks": 2},
    "explicit": LEAF_SPINE,
}


@pytest.mark.parametrize("fabric", FABRICS)
@pytest.mark.parametrize("rate", [None, 60.0], ids=["at once", "60 a second"])
@pytest.mark.parametrize("seed", range(5))
def test_completion_times_agree(seed: int, rate: float | None, fabric: str) -> None:
    """200 flows of one accelerator pair each, on 64 accelerators: a fat-tree with two uplinks at
    each level, the same with rails, and leaves under uneven spines."""
    if not python_with_simgrid():
        pytest.skip("no Python on the path imports simgrid (Debian: apt install python3-simgrid)")
    rng = random.Random(seed)
    topology = Topology(TopologySpec.model_validate(FABRICS[fabric]))
    rows = []
    at = 0.0
    for i in range(FLOWS):
        at += rng.expovariate(rate) if rate else 0.0
        a, b = rng.sample(range(64), 2)
        route = topology.route(Location((a,)), Location((b,)), f"f{i}")
        rows.append((f"f{i}", at, rng.randint(5 * 10**7, 4 * 10**9), route))
    mine, theirs = ours(topology, rows), referee(topology, rows)
    assert mine.keys() == theirs.keys() == {row[0] for row in rows}
    errors = [abs(mine[n] - theirs[n]) / (theirs[n] - start) for n, start, _, _ in rows]
    print(f"{max(mine.values()):.6f} {max(theirs.values()):.6f} {max(errors):.1e}")
    assert max(errors) < ERROR_MAX
