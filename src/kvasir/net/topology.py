"""A fat-tree: which accelerators are near, which links a transfer crosses, where instances go.

Knows places and capacities. Must not know time, traffic, load or policy.

    core   ----+--------------------+----          tier 3: pod uplinks, up and down
             pod 0                pod 1
            /     \\              /     \\          tier 2: rack uplinks, up and down
        rack 0   rack 1      rack 2   rack 3
        n0  n1   n2  n3      n4  n5   n6  n7        tier 1: NICs, out and in
        GPUs 0..7, 8..15, ...                       tier 0: NVLink, out and in

A transfer between two instances is one bundle of shard pairs. An instance's NICs are one link of
their summed rate for each direction, and so is its NVLink, so that all its transfers share them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from kvasir.core.errors import ConfigError
from kvasir.core.ids import WorkerId
from kvasir.core.messages import Location
from kvasir.core.specs import Deployment, PoolSpec, TopologySpec

NODE, RACK, POD, CORE = range(4)
Gpus = tuple[int, ...]


class Link(msgspec.Struct, frozen=True, gc=False):
    """One direction of a wire, or of several that act as one. `capacity` is bytes per second.

    `tier` says whose counters it belongs to: 0 NVLink, 1 NIC, 2 rack uplink, 3 pod uplink.
    """

    name: str
    capacity: float
    tier: int


class Route(msgspec.Struct, frozen=True, gc=False):
    """The way of a bundle of `multiplicity` shard pairs, each at most `flow_cap` bytes per second.

    `links` index `Topology.links`; each pair crosses all of them.
    """

    links: tuple[int, ...]
    multiplicity: int
    flow_cap: float | None
    latency_s: float
    tier: int


class _Ports(msgspec.Struct, frozen=True, gc=False):
    """Link indices of one instance, and the rack and pod whose uplinks it uses."""

    nic_out: int
    nic_in: int
    nvlink_out: int
    nvlink_in: int
    rack: int
    pod: int


class Topology:
    """Links and routes of one `TopologySpec`.

    `links` and `capacities` (bytes per second) run in parallel. They grow when a location is first
    routed; an index, once given, keeps its meaning.
    """

    def __init__(self, spec: TopologySpec) -> None:
        self.spec = spec
        self.links: list[Link] = []
        self.capacities: list[float] = []
        self._rack_gpus = spec.gpus_per_node * spec.nodes_per_rack
        self._pod_gpus = self._rack_gpus * spec.racks_per_pod
        self._racks = spec.pods * spec.racks_per_pod
        self._ports_of: dict[Gpus, _Ports] = {}
        self._routes: dict[tuple[Gpus, Gpus], Route] = {}
        rack = self._rack_gpus * spec.nic_bandwidth / spec.rack_oversubscription
        pod = self._pod_gpus * spec.nic_bandwidth / spec.pod_oversubscription
        self._rack_up = [
            self._pair(f"rack-{r}", "up", "down", rack, POD) for r in range(self._racks)
        ]
        self._pod_up = [self._pair(f"pod-{p}", "up", "down", pod, CORE) for p in range(spec.pods)]

    # --- distances and routes ---------------------------------------------------------------------

    def tier(self, a: Location, b: Location) -> int:
        """0 same node, 1 same rack, 2 same pod, 3 across pods: the least that holds all of both."""
        low = min(*a.gpus, *b.gpus)
        high = max(*a.gpus, *b.gpus)
        for tier, size in enumerate((self.spec.gpus_per_node, self._rack_gpus, self._pod_gpus)):
            if low // size == high // size:
                return tier
        return CORE

    def route(self, src: Location, dst: Location) -> Route:
        """From one instance to another; links are crossed in order.

        KV is split over all of an instance's accelerators, so there are as many shard pairs as the
        larger side has. An instance that spans racks uses the uplinks of its first accelerator.
        Raises ConfigError for an accelerator that the topology does not have.
        """
        key = (src.gpus, dst.gpus)
        found = self._routes.get(key)
        if found is None:
            found = self._routes[key] = self._make_route(src, dst)
        return found

    def _make_route(self, src: Location, dst: Location) -> Route:
        a, b = self._ports(src.gpus), self._ports(dst.gpus)
        tier = self.tier(src, dst)
        if tier == NODE:
            links: tuple[int, ...] = (a.nvlink_out, b.nvlink_in)
        elif tier == RACK:
            links = (a.nic_out, b.nic_in)
        else:
            pods = (self._pod_up[a.pod], self._pod_up[b.pod] + 1) if tier == CORE else ()
            down = self._rack_up[b.rack] + 1
            links = (a.nic_out, self._rack_up[a.rack], *pods, down, b.nic_in)
        limits = self.spec.flow_tiers[tier]
        return Route(
            links=links,
            multiplicity=max(len(src.gpus), len(dst.gpus)),
            flow_cap=limits.flow_bandwidth,
            latency_s=limits.latency_s,
            tier=tier,
        )

    def tier_capacity(self, tier: int) -> float:
        """Bytes per second over all links of a tier so far, both directions."""
        return sum(link.capacity for link in self.links if link.tier == tier)

    def _ports(self, gpus: Gpus) -> _Ports:
        found = self._ports_of.get(gpus)
        if found is None:
            found = self._ports_of[gpus] = self._make_ports(gpus)
        return found

    def _make_ports(self, gpus: Gpus) -> _Ports:
        if not gpus or min(gpus) < 0 or max(gpus) >= self.spec.gpus:
            raise ConfigError(
                f"a location names accelerators {list(gpus)}, the topology has {self.spec.gpus}",
                where="topology",
                next_step="make the topology larger, or correct the worker's location",
            )
        name = f"gpus-{gpus[0]}" if len(gpus) == 1 else f"gpus-{gpus[0]}..{gpus[-1]}"
        nic = self._pair(name, "nic-out", "nic-in", len(gpus) * self.spec.nic_bandwidth, RACK)
        nvlink = len(gpus) * self.spec.nvlink_bandwidth
        local = self._pair(name, "nvlink-out", "nvlink-in", nvlink, NODE)
        return _Ports(
            nic_out=nic, nic_in=nic + 1, nvlink_out=local, nvlink_in=local + 1,
            rack=gpus[0] // self._rack_gpus, pod=gpus[0] // self._pod_gpus,
        )  # fmt: skip

    def _pair(self, name: str, one: str, other: str, capacity: float, tier: int) -> int:
        """Add both directions; the second has the next index."""
        first = len(self.links)
        for way in (one, other):
            self.links.append(Link(f"{name}-{way}", capacity, tier))
            self.capacities.append(capacity)
        return first

    # --- placement --------------------------------------------------------------------------------

    def place(self, deployment: Deployment) -> dict[WorkerId, Location]:
        """Where every instance of every pool stands, in the order of `worker_ids()`.

        First fit; pools bound to the fewest racks go first, then those of large instances. An
        instance may share a node but no accelerator; it stays in one node, else in one rack, if it
        can. Raises ConfigError when a pool does not fit.
        """
        free = [self.spec.gpus_per_node] * (self._racks * self.spec.nodes_per_rack)
        placed: dict[WorkerId, Location] = {}
        for pool in sorted(deployment.pools, key=_bound):
            nodes = self._nodes_of(pool)
            room = sum(free[n] for n in nodes)
            for done, worker in enumerate(pool.worker_ids()):
                gpus = self._take(free, nodes, pool.gpus)
                if gpus is None:
                    raise self._full(pool, done, room)
                placed[worker] = Location(gpus)
        return {worker: placed[worker] for worker in deployment.worker_ids()}

    def _nodes_of(self, pool: PoolSpec) -> list[int]:
        """Nodes that a pool may use: those of its racks, in the order given."""
        racks = range(self._racks) if pool.racks is None else dict.fromkeys(pool.racks)
        for rack in racks:
            if not 0 <= rack < self._racks:
                raise ConfigError(
                    f"pool {pool.name!r} names rack {rack}, the topology has {self._racks}",
                    where=f"pools.{pool.name}.racks",
                    next_step=f"use racks 0 to {self._racks - 1}, counted over all pods",
                )
        per = self.spec.nodes_per_rack
        return [rack * per + i for rack in racks for i in range(per)]

    def _take(self, free: list[int], nodes: Sequence[int], count: int) -> Gpus | None:
        """The first `count` accelerators that are free together; None if there are none."""
        per = self.spec.gpus_per_node
        if count <= per:
            chosen = [n for n in nodes if free[n] >= count][:1]
        else:
            chosen = self._whole_nodes(free, nodes, -(-count // per))
        gpus: list[int] = []
        for node in chosen:
            taken = min(count - len(gpus), free[node])
            first = node * per + per - free[node]
            gpus.extend(range(first, first + taken))
            free[node] -= taken
        return tuple(gpus) or None

    def _whole_nodes(self, free: list[int], nodes: Sequence[int], need: int) -> list[int]:
        """`need` empty nodes, of one rack where that is possible; none if there are too few."""
        empty = [n for n in nodes if free[n] == self.spec.gpus_per_node]
        for start in range(len(empty) - need + 1):
            run = empty[start : start + need]
            if len({n // self.spec.nodes_per_rack for n in run}) == 1:
                return run
        return empty[:need] if len(empty) >= need else []

    def _full(self, pool: PoolSpec, done: int, room: int) -> ConfigError:
        where = "the topology" if pool.racks is None else f"racks {list(pool.racks)}"
        return ConfigError(
            f"pool {pool.name!r} wants {pool.count} x {pool.gpus} accelerators "
            f"({pool.count * pool.gpus}); {where} had {room} free, room for {done} x {pool.gpus}",
            where=f"pools.{pool.name}",
            next_step="lower count, tp or pp, or make the topology larger",
        )


def _bound(pool: PoolSpec) -> tuple[int, int]:
    """Sort key: the pool with the least choice first."""
    return (sys.maxsize if pool.racks is None else len(pool.racks), -pool.gpus)
