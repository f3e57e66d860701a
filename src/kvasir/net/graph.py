"""A network of named nodes, switches and links: shortest paths, all equal ones of them.

Knows names, links and hops. Must not know time, traffic, load or policy.

Routing counts hops, as equal-cost multipath does with equal costs; nodes do not forward. A node's
links are shared by all instances on it. How far two nodes are apart says their tier: one switch
between them 1 (as in one rack), up to three 2 (leaf, spine, leaf), more 3.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Final, NamedTuple

from kvasir.core.specs import TopologySpec
from kvasir.net.fabric import (
    CORE,
    NODE,
    POD,
    RACK,
    Gpus,
    Lane,
    LinkTable,
    Node,
    Path,
    firsts,
    nvlink,
    pair_ends,
)

PATHS_MAX: Final = 64  # of equal paths in use between two nodes: what switches' groups hold


class _Hop(NamedTuple):
    """One direction of a link, to `to`."""

    to: str
    link: int


class Graph:
    """All links but NVLink are there from the start."""

    def __init__(self, spec: TopologySpec, table: LinkTable) -> None:
        self._spec = spec
        self._table = table
        self._hosts = {node.name for node in spec.nodes}
        self._hops: dict[str, list[_Hop]] = {
            name: [] for name in (*(n.name for n in spec.nodes), *spec.switches)
        }
        self._seconds: dict[int, float] = {}  # latency of links that have one
        self._add_links()
        self._firsts = firsts([node.gpus for node in spec.nodes])
        racks: dict[object, int] = {}
        self.nodes: list[Node] = []
        for i, (node, first) in enumerate(zip(spec.nodes, self._firsts, strict=True)):
            rack = racks.setdefault(self._beside(node.name), len(racks))
            self.nodes.append(Node(node.name, first, node.gpus, i, rack))
        self._distances: dict[str, dict[str, int]] = {}  # by target: hops from everywhere
        self._paths: dict[tuple[str, str], tuple[Path, ...]] = {}
        self._nvlink: dict[Gpus, int] = {}

    def _add_links(self) -> None:
        leaves = {
            end for link in self._spec.links if self._hosts & {*link.between}
            for end in link.between if end not in self._hosts
        }  # fmt: skip
        for link in self._spec.links:
            a, b = link.between
            tier = RACK if self._hosts & {a, b} else POD if leaves & {a, b} else CORE
            for i in range(link.count):
                for here, there in ((a, b), (b, a)):
                    name = f"{here}>{there}" + (f".{i}" if link.count > 1 else "")
                    at = self._table.add(name, link.bandwidth, tier)
                    self._hops[here].append(_Hop(there, at))
                    if link.latency_s:
                        self._seconds[at] = link.latency_s

    def _beside(self, name: str) -> object:
        """What nodes of one rack have in common: their switches. A node without any is alone."""
        return frozenset(h.to for h in self._hops[name] if h.to not in self._hosts) or name

    def tier(self, src: Gpus, dst: Gpus) -> int:
        """The largest between any two of their nodes."""
        nodes = dict.fromkeys(self._node(gpu) for gpu in (*src, *dst))
        hops = max(self._distance(a, b) for a in nodes for b in nodes)
        if not hops:
            return NODE
        return RACK if hops <= 2 else POD if hops <= 4 else CORE

    def latency_s(self, src: Gpus, dst: Gpus) -> float:
        """Of the slowest path of any pair."""
        paths = (path for lane in self.lanes(src, dst) for path in lane.paths)
        return max(sum(self._seconds.get(link, 0.0) for link in path) for path in paths)

    def lanes(self, src: Gpus, dst: Gpus) -> list[Lane]:
        """One for each two nodes that pairs run between."""
        pairs: dict[tuple[str, str], list[int]] = {}
        for i, (a, b) in enumerate(pair_ends(src, dst)):
            pairs.setdefault((self._node(a), self._node(b)), []).append(i)
        return [
            Lane(tuple(members), self._between(src, dst, *ends)) for ends, members in pairs.items()
        ]

    def _between(self, src: Gpus, dst: Gpus, a: str, b: str) -> tuple[Path, ...]:
        if a == b:
            return ((self._local(src), self._local(dst) + 1),)
        found = self._paths.get((a, b))
        if found is None:
            found = self._paths[a, b] = tuple(islice(self._shortest(a, b), PATHS_MAX))
        return found

    def _shortest(self, a: str, b: str) -> Iterator[Path]:
        """Every shortest path from `a` to `b`, in the order in which links were listed."""
        if a == b:
            yield ()
            return
        for hop in self._hops[a]:
            if (hop.to == b or hop.to not in self._hosts) and (
                self._distance(hop.to, b) == self._distance(a, b) - 1
            ):
                yield from ((hop.link, *rest) for rest in self._shortest(hop.to, b))

    def _distance(self, a: str, b: str) -> int:
        """Hops from `a` to `b`."""
        found = self._distances.get(b)
        if found is None:
            found = self._distances[b] = self._search(b)
        return found.get(a, len(self._hops))

    def _search(self, target: str) -> dict[str, int]:
        """Breadth first, over switches; links run both ways."""
        hops, queue = {target: 0}, deque([target])
        while queue:
            here = queue.popleft()
            if here in self._hosts and here != target:
                continue
            for hop in self._hops[here]:
                if hop.to not in hops:
                    hops[hop.to] = hops[here] + 1
                    queue.append(hop.to)
        return hops

    def nics(self, gpus: Gpus) -> list[int]:
        """All links of its nodes, both ways: other instances there share them."""
        nodes = dict.fromkeys(self._node(gpu) for gpu in gpus)
        out = {hop.link for name in nodes for hop in self._hops[name]}
        into = {hop.link for hops in self._hops.values() for hop in hops if hop.to in nodes}
        return sorted(out | into)

    def _node(self, gpu: int) -> str:
        return self._spec.nodes[bisect_right(self._firsts, gpu) - 1].name

    def _local(self, gpus: Gpus) -> int:
        found = self._nvlink.get(gpus)
        if found is None:
            bandwidth = self._spec.nvlink_bandwidth
            found = self._nvlink[gpus] = nvlink(self._table, gpus, bandwidth)
        return found
