"""The network that solver, oracle and simulator share: links, and routes between instances.

Knows places and capacities, and asks its fabric (`net/fattree.py`, `net/graph.py`) for paths. Must
not know time, traffic, load or policy.

A transfer between two instances is one bundle of shard pairs. Each pair is hashed to one of its
equal paths by source, destination and transfer id, as a switch hashes connections: pairs of a
bundle may collide on one uplink while others idle, which an average over a tier cannot see.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import xxhash

from kvasir.core.errors import ConfigError
from kvasir.core.ids import WorkerId
from kvasir.core.messages import Location
from kvasir.core.specs import Deployment, TopologySpec
from kvasir.net.fabric import Fabric, Gpus, Lane, Link, LinkTable, Node, Path, pair_ends
from kvasir.net.fattree import FatTree
from kvasir.net.graph import Graph
from kvasir.net.place import place


class Way(msgspec.Struct, frozen=True, gc=False):
    """The part of a bundle that takes one path: `pairs` shard pairs, each over all `links`."""

    links: Path
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


class _Known(msgspec.Struct, frozen=True):
    """What is fixed between two instances. `choice`: some pair has more than one path."""

    lanes: list[Lane]
    route: Route  # pairs dealt out evenly
    choice: bool


class Topology:
    """Links and routes of one `TopologySpec`.

    `links` and `capacities` (bytes per second) run in parallel. They grow when a location is first
    routed; an index, once given, keeps its meaning.
    """

    def __init__(self, spec: TopologySpec) -> None:
        self.spec = spec
        table = LinkTable()
        self.links: list[Link] = table.links
        self.capacities: list[float] = table.capacities
        explicit = spec.preset == "explicit"
        self._fabric: Fabric = Graph(spec, table) if explicit else FatTree(spec, table)
        self._known: dict[tuple[Gpus, Gpus], _Known] = {}

    @property
    def nodes(self) -> Sequence[Node]:
        return self._fabric.nodes

    def tier(self, a: Location, b: Location) -> int:
        """0 same node or NVLink domain, 1 same rack, 2 same pod, 3 across pods: the least that
        holds all of both."""
        return self._fabric.tier(a.gpus, b.gpus)

    def route(self, src: Location, dst: Location, transfer_id: str | None = None) -> Route:
        """From one instance to another; links are crossed in order.

        Where paths are several, `transfer_id` says which of them each pair is hashed to. Without
        it, as nobody knows beforehand how a switch will hash, pairs are dealt out evenly.

        KV is split over all of an instance's accelerators, so there are as many shard pairs as the
        larger side has. Without rails an instance that spans racks uses the uplinks of its first
        accelerator. Raises ConfigError for an accelerator that the topology does not have.
        """
        known = self._known.get((src.gpus, dst.gpus))
        if known is None:
            known = self._known[src.gpus, dst.gpus] = self._learn(src.gpus, dst.gpus)
        if transfer_id is None or not known.choice:
            return known.route
        hashed = [_hash(a, b, transfer_id) for a, b in pair_ends(src.gpus, dst.gpus)]
        ways = _ways(known.lanes, hashed)
        return msgspec.structs.replace(known.route, links=_union(ways), ways=_if_several(ways))

    def _learn(self, src: Gpus, dst: Gpus) -> _Known:
        self._require(src)
        self._require(dst)
        lanes, tier = self._fabric.lanes(src, dst), self._fabric.tier(src, dst)
        pairs = max(len(src), len(dst))
        first = _hash(src[0], dst[0], "")
        ways = _ways(lanes, [first + pair for pair in range(pairs)])
        limits = self.spec.flow_tiers[tier]
        route = Route(
            links=_union(ways),
            multiplicity=pairs,
            flow_cap=limits.flow_bandwidth,
            latency_s=limits.latency_s + self._fabric.latency_s(src, dst),
            tier=tier,
            ways=_if_several(ways),
        )
        return _Known(lanes, route, any(len(lane.paths) > 1 for lane in lanes))

    def tier_capacity(self, tier: int) -> float:
        """Bytes per second over all links of a tier so far, both directions."""
        return sum(link.capacity for link in self.links if link.tier == tier)

    def nics(self, location: Location) -> list[int]:
        """The links over which an instance sends to and receives from other nodes."""
        self._require(location.gpus)
        return self._fabric.nics(location.gpus)

    def place(self, deployment: Deployment) -> dict[WorkerId, Location]:
        """Where every instance of every pool stands: see `net.place`."""
        return place(self.nodes, deployment)

    def _require(self, gpus: Gpus) -> None:
        if not gpus or min(gpus) < 0 or max(gpus) >= self.spec.gpus:
            raise ConfigError(
                f"a location names accelerators {list(gpus)}, the topology has {self.spec.gpus}",
                where="topology",
                next_step="make the topology larger, or correct the worker's location",
            )


def _ways(lanes: Sequence[Lane], chosen: Sequence[int]) -> dict[Path, int]:
    """Paths in use and their pairs: pair i takes path `chosen[i]` of its lane, counted around."""
    found: dict[Path, int] = {}
    for lane in lanes:
        for pair in lane.pairs:
            path = lane.paths[chosen[pair] % len(lane.paths)]
            found[path] = found.get(path, 0) + 1
    return found


def _union(ways: dict[Path, int]) -> Path:
    return tuple(dict.fromkeys(link for path in ways for link in path))


def _if_several(ways: dict[Path, int]) -> tuple[Way, ...]:
    return tuple(Way(path, pairs) for path, pairs in ways.items()) if len(ways) > 1 else ()


def _hash(src: int, dst: int, transfer_id: str) -> int:
    """The same in every process."""
    return xxhash.xxh3_64_intdigest(f"{src}>{dst} {transfer_id}".encode())
