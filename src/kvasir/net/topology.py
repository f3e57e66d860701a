"""A fat-tree: which accelerators are near, which links a transfer crosses, where instances go.

Knows places and capacities. Must not know time, traffic, load or policy.

    core   ----+--------------------+----          tier 3: pod uplinks, up and down
             pod 0                pod 1
            /     \\              /     \\          tier 2: rack uplinks, up and down
        rack 0   rack 1      rack 2   rack 3
        n0  n1   n2  n3      n4  n5   n6  n7        tier 1: NICs, out and in
        GPUs 0..7, 8..15, ...                       tier 0: NVLink, out and in

Nodes of an NVLink domain are one tier 0. Data centres hold whole pods; a path between two of them
crosses one more link, from pod uplink to pod downlink.

A transfer between two instances is one bundle of shard pairs. An instance's NICs are one link of
their summed rate for each direction, and so is its NVLink, so that all its transfers share them.

With several uplinks a cross-pod path p of P takes pod uplink p mod pod_uplinks and rack uplink p
mod uplinks, the same on the way down (the plane of a Clos network). Each shard pair is hashed to
one path by source, destination and transfer id, as a switch hashes connections: pairs of a bundle
may collide on one uplink while others idle, which an average over a tier cannot see.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import msgspec
import xxhash

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


class Way(msgspec.Struct, frozen=True, gc=False):
    """The part of a bundle that takes one path: `pairs` shard pairs, each over all `links`."""

    links: tuple[int, ...]
    pairs: int


class Route(msgspec.Struct, frozen=True, gc=False):
    """The way of a bundle of `multiplicity` shard pairs, each at most `flow_cap` bytes per second.

    `links` index `Topology.links`; each pair crosses all of them, unless `ways` says which pairs
    cross which: then `links` are those of any of them.
    """

    links: tuple[int, ...]
    multiplicity: int
    flow_cap: float | None
    latency_s: float
    tier: int
    ways: tuple[Way, ...] = ()

    def parts(self) -> tuple[Way, ...]:
        """The paths in use, with how many pairs take each."""
        return self.ways or (Way(self.links, self.multiplicity),)

    def pairs_by_link(self) -> list[tuple[int, int]]:
        """Each link and how many pairs cross it."""
        if not self.ways:
            return [(link, self.multiplicity) for link in self.links]
        count = dict.fromkeys(self.links, 0)
        for way in self.ways:
            for link in way.links:
                count[link] += way.pairs
        return list(count.items())


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
        self._domain_gpus = spec.gpus_per_node * spec.nvlink_nodes
        self._rack_gpus = spec.gpus_per_node * spec.nodes_per_rack
        self._pod_gpus = self._rack_gpus * spec.racks_per_pod
        self._racks = spec.pods * spec.racks_per_pod
        self._ports_of: dict[Gpus, _Ports] = {}
        self._routes: dict[tuple[Gpus, Gpus], Route] = {}
        self._paths: dict[tuple[Gpus, Gpus], list[tuple[int, ...]]] = {}
        rack = self._rack_gpus * spec.nic_bandwidth / spec.rack_oversubscription
        pod = self._pod_gpus * spec.nic_bandwidth / spec.pod_oversubscription
        self._wan: dict[tuple[int, int], int] = {}
        for a, b in itertools.permutations(range(spec.datacenters), 2):
            self._wan[a, b] = len(self.links)
            self._add(f"wan-{a}-{b}", spec.wan_bandwidth, CORE)
        pod_uplinks = spec.pod_uplinks or spec.uplinks
        self._rack_up = [
            self._uplinks(f"rack-{r}", rack, spec.uplinks, POD) for r in range(self._racks)
        ]
        self._pod_up = [self._uplinks(f"pod-{p}", pod, pod_uplinks, CORE) for p in range(spec.pods)]

    # --- distances and routes ---------------------------------------------------------------------

    def tier(self, a: Location, b: Location) -> int:
        """0 same node or NVLink domain, 1 same rack, 2 same pod, 3 across pods: the least that
        holds all of both."""
        low = min(*a.gpus, *b.gpus)
        high = max(*a.gpus, *b.gpus)
        for tier, size in enumerate((self._domain_gpus, self._rack_gpus, self._pod_gpus)):
            if low // size == high // size:
                return tier
        return CORE

    def route(self, src: Location, dst: Location, transfer_id: str | None = None) -> Route:
        """From one instance to another; links are crossed in order.

        Where paths are several, `transfer_id` says which of them each pair is hashed to. Without
        it, as nobody knows beforehand how a switch will hash, pairs are dealt out evenly.

        KV is split over all of an instance's accelerators, so there are as many shard pairs as the
        larger side has. An instance that spans racks uses the uplinks of its first accelerator.
        Raises ConfigError for an accelerator that the topology does not have.
        """
        key = (src.gpus, dst.gpus)
        found = self._routes.get(key)
        if found is None:
            paths = self._paths[key] = self._make_paths(src, dst)
            tier = self.tier(src, dst)
            first = _hash(src.gpus, dst.gpus, "") % len(paths)
            found = self._routes[key] = self._over(
                src, dst, tier, [first + pair for pair in range(_pairs(src, dst))]
            )
        if transfer_id is None or len(self._paths[key]) == 1:
            return found
        pairs = range(_pairs(src, dst))
        ends = [(src.gpus[i % len(src.gpus)], dst.gpus[i % len(dst.gpus)]) for i in pairs]
        hashed = [_hash((a,), (b,), transfer_id) for a, b in ends]
        return self._over(src, dst, found.tier, hashed)

    def _over(self, src: Location, dst: Location, tier: int, chosen: Sequence[int]) -> Route:
        """The route on which pair i takes path `chosen[i]`, counted around."""
        paths = self._paths[src.gpus, dst.gpus]
        pairs: dict[int, int] = {}
        for path in chosen:
            pairs[path % len(paths)] = pairs.get(path % len(paths), 0) + 1
        links = dict.fromkeys(link for path in pairs for link in paths[path])
        limits = self.spec.flow_tiers[tier]
        return Route(
            links=tuple(links),
            multiplicity=len(chosen),
            flow_cap=limits.flow_bandwidth,
            latency_s=limits.latency_s + (self.spec.wan_latency_s if self._far(src, dst) else 0),
            tier=tier,
            ways=tuple(Way(paths[p], n) for p, n in pairs.items()) if len(pairs) > 1 else (),
        )

    def _make_paths(self, src: Location, dst: Location) -> list[tuple[int, ...]]:
        """Equal paths, each of links in the order in which they are crossed."""
        a, b = self._ports(src.gpus), self._ports(dst.gpus)
        tier = self.tier(src, dst)
        if tier == NODE:
            return [(a.nvlink_out, b.nvlink_in)]
        if tier == RACK:
            return [(a.nic_out, b.nic_in)]
        up, down = self._rack_up[a.rack], self._rack_up[b.rack]
        if tier == POD:
            ways = zip(up, down, strict=True)
            return [(a.nic_out, out, into + 1, b.nic_in) for out, into in ways]
        over, under = self._pod_up[a.pod], self._pod_up[b.pod]
        far = self._far(src, dst)
        wan = () if far is None else (self._wan[far],)
        return [
            (
                a.nic_out, up[p % len(up)], over[p % len(over)], *wan,
                under[p % len(under)] + 1, down[p % len(down)] + 1, b.nic_in,
            )
            for p in range(max(len(up), len(over)))
        ]  # fmt: skip

    def _far(self, src: Location, dst: Location) -> tuple[int, int] | None:
        """The two data centres between which a path runs; None inside one."""
        per = self._pod_gpus * (self.spec.pods // self.spec.datacenters)
        ends = (src.gpus[0] // per, dst.gpus[0] // per)
        return ends if ends[0] != ends[1] else None

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

    def _uplinks(self, name: str, capacity: float, count: int, tier: int) -> list[int]:
        """The first directions of `count` equal links."""
        if count == 1:
            return [self._pair(name, "up", "down", capacity, tier)]
        return [
            self._pair(f"{name}.{i}", "up", "down", capacity / count, tier) for i in range(count)
        ]

    def _pair(self, name: str, one: str, other: str, capacity: float, tier: int) -> int:
        """Add both directions; the second has the next index."""
        first = len(self.links)
        for way in (one, other):
            self._add(f"{name}-{way}", capacity, tier)
        return first

    def _add(self, name: str, capacity: float, tier: int) -> None:
        self.links.append(Link(name, capacity, tier))
        self.capacities.append(capacity)

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
        """`need` empty nodes, of one NVLink domain, else of one rack, where that is possible; none
        if there are too few."""
        empty = [n for n in nodes if free[n] == self.spec.gpus_per_node]
        for together in (self.spec.nvlink_nodes, self.spec.nodes_per_rack):
            for start in range(len(empty) - need + 1):
                run = empty[start : start + need]
                if len({n // together for n in run}) == 1:
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


def _pairs(src: Location, dst: Location) -> int:
    return max(len(src.gpus), len(dst.gpus))


def _hash(src: Gpus, dst: Gpus, transfer_id: str) -> int:
    """The same in every process."""
    return xxhash.xxh3_64_intdigest(f"{src[0]}>{dst[0]} {transfer_id}".encode())


def _bound(pool: PoolSpec) -> tuple[int, int]:
    """Sort key: the pool with the least choice first."""
    return (sys.maxsize if pool.racks is None else len(pool.racks), -pool.gpus)
