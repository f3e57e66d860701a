"""One simulation of `bench/netkv.py`: which policy decides, what arrives, and the figures of a run.

Knows the two clusters of `bench/netkv.yaml`. Must not know tables or what is to be shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import xxhash
import yaml

from kvasir.cli.overrides import changed
from kvasir.core.specs import Deployment
from kvasir.core.specs.faults import CrossTraffic, FaultSpec
from kvasir.core.specs.parse import parse_deployment
from kvasir.measure.summary import Summary, summarise
from kvasir.net.maxmin import flows_of
from kvasir.net.oracle import Arm, Estimate
from kvasir.net.topology import Route
from kvasir.policy.route import ROUTES, Choice, RouteMemory, RouteView
from kvasir.policy.route import Route as Policy
from kvasir.policy.route.view import Transfer
from kvasir.traces.record import Trace
from kvasir.traces.workload import Part, part_of, scaled, workload
from kvasir.world.sim.clients import reaching, seen
from kvasir.world.sim.faults import Faults, resolve
from kvasir.world.sim.world import SimWorld

FILE = Path(__file__).parent / "netkv.yaml"
TIER_COUNT = 4


class Setting(NamedTuple):
    """What is simulated. `slice`: which part of the trace, and the seed. `changes` to the
    deployment, by dotted path; `background`: the share of each uplink that others' traffic takes;
    `grown`: times as many pods, instances and requests a second."""

    cluster: Literal["paper", "honest"]
    arm: str
    slice: int
    rate: float
    requests: int
    profile: str = "rag"
    changes: tuple[tuple[str, Any], ...] = ()
    background: float = 0.0
    grown: int = 1


class Figures(msgspec.Struct, frozen=True):
    """Of one run. Seconds; `tiers` are shares of the requests whose KV went over each tier."""

    ttft_s: float
    ttft_p99_s: float
    tpot_s: float
    transfer_s: float
    second_token_s: float
    prefill_wait_s: float
    attained: float
    goodput: float
    failed: int
    tiers: tuple[float, ...]


class Flow(NamedTuple):
    """A transfer as it began in a run."""

    at_s: float
    route: Route
    bytes: int


@cache
def study_file() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
    return found


@cache
def cluster(name: str) -> Deployment:
    """A section of the file. Raises ConfigError when it is not a deployment."""
    text = yaml.safe_dump(study_file()[name], sort_keys=False)
    return parse_deployment(text, f"{FILE.name}, {name}")


# --- policies -------------------------------------------------------------------------------------


def in_two(
    prefill: str, decode: str, *, shown: Callable[[RouteView], Any] = lambda view: view
) -> Policy:
    """One policy chooses the prefill worker, another the decode worker, of what `shown` shows."""

    def route(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
        if view.stage == "prefill":
            return ROUTES[prefill](view, memory)
        return ROUTES[decode](shown(view), memory)

    return route


class Misplaced:
    """A view in which each decode worker seems to stand where another one does."""

    def __init__(self, view: RouteView, where: dict[str, str]) -> None:
        self._view, self._where = view, where

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def transfer(
        self, target: str, source: str = "", blocks: int | None = None, arm: Arm | None = None
    ) -> Transfer:
        if blocks is None:
            whole = -(-self._view.input_tokens // self._view.block_size)
            blocks = max(whole - self._view.hits.get(target, 0), 0)
        return self._view.transfer(self._where[target], source, blocks, arm)


def shuffled(view: RouteView) -> Misplaced:
    """For each source another order of the decode workers, the same all along the run."""
    names = sorted(w.id for w in view.candidates)
    key = f"{view.seed} {view.source}"
    order = sorted(names, key=lambda n: xxhash.xxh3_64_intdigest(f"{key} {n}".encode()))
    return Misplaced(view, dict(zip(names, order, strict=True)))


def alike(view: RouteView) -> Misplaced:
    """Every decode worker seems to stand where the last one does: bytes count, places do not."""
    names = [w.id for w in view.candidates]
    return Misplaced(view, dict.fromkeys(names, max(names)))


DECODERS = (
    "round_robin", "cache_load", "least_loaded", "netkv_static", "netkv_self", "netkv",
    "netkv_path", "exact_maxmin",
)  # fmt: skip
for _prefill in ("random", "netkv"):
    for _decode in DECODERS:
        ROUTES[f"{_prefill}+{_decode}"] = in_two(_prefill, _decode)
    ROUTES[f"{_prefill}+shuffled"] = in_two(_prefill, "netkv_static", shown=shuffled)
    ROUTES[f"{_prefill}+alike"] = in_two(_prefill, "netkv_static", shown=alike)

# By the name in our tables: the policy, and the weights it is asked with ("tuned": what tuning
# found). In A it chooses the decode worker alone, as the paper studies that choice, and prefill is
# drawn by a hash of the request, the same in all arms: in turn, it would fall into step with round
# robin's decode workers. In B policies are whole, unless they are said to choose decode only; then
# prefill is where NetKV has it.
ARMS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "paper": {
        "round robin": ("random+round_robin", {}),
        "cache only": ("random+cache_load", {"load_weight": 0.0}),
        "load only": ("random+least_loaded", {}),
        "cache_load": ("random+cache_load", {"load_weight": "tuned"}),
        "netkv_static": ("random+netkv_static", {}),
        "netkv_self": ("random+netkv_self", {}),
        "netkv": ("random+netkv", {}),
        "netkv_path": ("random+netkv_path", {}),
        "netkv_joint": ("netkv_joint", {"fetch_prefix": False}),
        "exact_maxmin": ("random+exact_maxmin", {}),
        "clairvoyant": ("random+exact_maxmin", {}),
        "tiers shuffled": ("random+shuffled", {}),
        "tiers alike": ("random+alike", {}),
    },
    "honest": {
        "round robin, decode only": ("netkv+round_robin", {}),
        "cache_load": ("cache_load", {"load_weight": "tuned"}),
        "cache_load, decode only": ("netkv+cache_load", {"load_weight": "tuned"}),
        "load only, decode only": ("netkv+least_loaded", {}),
        "netkv_static": ("netkv_static", {}),
        "netkv_self": ("netkv_self", {}),
        "netkv": ("netkv", {}),
        "netkv_path": ("netkv_path", {}),
        "netkv_joint": ("netkv_joint", {"fetch_prefix": False}),
        "netkv_joint, fetching": ("netkv_joint", {}),
        "exact_maxmin": ("exact_maxmin", {}),
        "clairvoyant": ("exact_maxmin", {}),
    },
}


# --- one run --------------------------------------------------------------------------------------


def run(setting: Setting, load_weight: float) -> Figures:
    """A pure function of the two; `load_weight` is what tuning found."""
    world, _ = simulated(setting, load_weight)
    deployment = world.deployment
    recorder = world.recorder
    outcomes = seen(recorder.outcomes, deployment.host)
    summary = summarise(
        outcomes, recorder.itl, world.now, deployment.slo,
        first_token=deployment.first_token,
    )  # fmt: skip
    return _figures(summary, _tiers(world))


def simulated(setting: Setting, load_weight: float) -> tuple[SimWorld, list[Flow]]:
    """A world that has come to its end, and the transfers that it saw."""
    d = deployment_of(setting, load_weight)
    faults = resolve(d)
    world = SimWorld(
        d, reaching(arrivals(setting, d).arrivals, d.host),
        faults=Faults(faults, setting.slice) if faults is not None else None,
    )  # fmt: skip
    if setting.arm == "clairvoyant":
        _open_eyes(world)
    flows = _overheard(world)
    world.run()
    return world, flows


def deployment_of(setting: Setting, load_weight: float) -> Deployment:
    policy, weights = ARMS[setting.cluster][setting.arm]
    changes: dict[str, Any] = {"policy.route.name": policy, "seed": setting.slice}
    for key, value in weights.items():
        changes[f"policy.route.{key}"] = load_weight if value == "tuned" else value
    deployment = changed(cluster(setting.cluster), changes | dict(setting.changes), setting.arm)
    if setting.grown > 1:
        deployment = _grown(deployment, setting.grown)
    if setting.background:
        traffic = background(deployment, setting.background)
        deployment = changed(deployment, {"faults": FaultSpec(traffic=traffic)}, "background")
    return deployment


def _grown(d: Deployment, times: int) -> Deployment:
    pools = [
        pool.model_copy(
            update={
                "count": pool.count * times,
                "racks": tuple(range(i, d.topology.pods * times * d.topology.racks_per_pod,
                                     d.topology.racks_per_pod)),
            }
        )
        for i, pool in enumerate(d.pools)
    ]  # fmt: skip
    return changed(d, {"topology.pods": d.topology.pods * times, "pools": tuple(pools)}, "grown")


def background(d: Deployment, share: float) -> tuple[CrossTraffic, ...]:
    """Constant flows from each pod's prefill rack into the next pod's decode rack, so wide that the
    narrowest uplinks on the way of a hand-over are taken to `share`. Each has a NIC of its own."""
    t = d.topology
    rack = t.nodes_per_rack * t.gpus_per_node
    pod_gpus = t.racks_per_pod * rack
    nics = min(pod_gpus / t.pod_oversubscription, rack / t.rack_oversubscription)
    uplink = nics * t.nic_bandwidth
    found = []
    for pod in range(t.pods):
        first = pod * pod_gpus
        target = ((pod + 1) % t.pods) * pod_gpus + rack
        for i in range(rack):
            found.append(
                CrossTraffic(
                    sources=(first + i,), target=target + i, bandwidth=share * uplink / rack
                )
            )
    return tuple(found)


def arrivals(setting: Setting, d: Deployment) -> Trace:
    """The slice's first requests of the profile at the rate; generated ones where the workload
    names no trace."""
    rate, wanted = setting.rate * setting.grown, setting.requests * setting.grown
    if d.workload.trace is None:
        spec = d.workload.model_copy(update={"rate": rate, "requests": wanted})
        return workload(spec, d.block_size, setting.slice)
    trace = workload(d.workload, d.block_size, setting.slice)
    more, most = study_file()["study"]["profiles"][setting.profile]
    kept = tuple(a for a in trace.arrivals if more < a.input_tokens <= most)
    slices = study_file()["study"]["slices"]
    at = setting.slice % slices
    trace = part_of(
        msgspec.structs.replace(trace, arrivals=kept), Part(at / slices, (at + 1) / slices)
    )
    trace = msgspec.structs.replace(trace, arrivals=trace.arrivals[:wanted])
    return scaled(trace, len(trace.arrivals) / trace.duration_s / rate)


def _open_eyes(world: SimWorld) -> None:
    """The oracle answers what the network would give at this very instant, whoever is on it."""
    network, places = world.network, world.locations

    def truth(src: str, dst: str, nbytes: int, now: float, arm: Arm) -> Estimate:
        route = network.route(places[src], places[dst])
        seconds = route.latency_s
        if nbytes:
            flows = flows_of(route)
            rates = network._shares.rates_if(flows)
            slowest = min(r / f.multiplicity for r, f in zip(rates, flows, strict=True))
            seconds += nbytes / max(slowest * route.multiplicity, 1.0)
        return Estimate(seconds, seconds, seconds, "truth")

    world.conductor.oracle.estimate = truth  # type: ignore[method-assign]


def _overheard(world: SimWorld) -> list[Flow]:
    flows: list[Flow] = []
    start = world.network.start

    def heard(now: float, route: Route, nbytes: int, done: Callable[[], None]) -> int:
        flows.append(Flow(now, route, nbytes))
        return start(now, route, nbytes, done)

    world.network.start = heard  # type: ignore[method-assign]
    return flows


def _tiers(world: SimWorld) -> tuple[float, ...]:
    topology, places = world.network.topology, world.locations
    pairs = Counter(
        (o.prefill_worker, o.decode_worker)
        for o in world.recorder.outcomes
        if o.ok and o.path == "disaggregated"
    )
    found = [0] * TIER_COUNT
    for (src, dst), times in pairs.items():
        found[topology.tier(places[src], places[dst])] += times
    return tuple(n / max(sum(found), 1) for n in found)


def _figures(s: Summary, tiers: Sequence[float]) -> Figures:
    split, slo = s.split, s.slo
    assert split is not None and slo is not None
    return Figures(
        ttft_s=s.ttft.mean_s,
        ttft_p99_s=dict(s.ttft.percentiles)[99.0],
        tpot_s=s.tpot.mean_s,
        transfer_s=split.transfer_s,
        second_token_s=split.second_token_delay_s or 0.0,
        prefill_wait_s=split.queue_s,
        attained=slo.attainment,
        goodput=s.goodput or 0.0,
        failed=s.failed,
        tiers=tuple(tiers),
    )
