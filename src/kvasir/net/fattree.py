"""A fat-tree of nodes, racks and pods: who is near whom, and which links are between.

Knows places and capacities. Must not know time, traffic, load or policy.

    core   ----+--------------------+----          tier 3: pod uplinks, up and down
             pod 0                pod 1
            /     \\              /     \\          tier 2: rack uplinks, up and down
        rack 0   rack 1      rack 2   rack 3
        n0  n1   n2  n3      n4  n5   n6  n7        tier 1: NICs, out and in
        GPUs 0..7, 8..15, ...                       tier 0: NVLink, out and in

Nodes of an NVLink domain are one tier 0. Data centres hold whole pods; a path between two of them
crosses one more link, from pod uplink to pod downlink. Without rails an instance's NICs are one
link of their summed rate for each direction, and so is its NVLink, so that all its transfers share
them.

With several uplinks a cross-pod path p of P takes pod uplink p mod pod_uplinks and rack uplink p
mod uplinks, the same on the way down (the plane of a Clos network).

Rails: NIC i of every node of a rack is on the rack's switch i, and the uplinks are those of each
switch. A pair arrives by the NIC of its target's rail. A source on another rail first hands the
bytes over NVLink to the neighbour on that rail (NCCL calls it PXN): NVLink is an order of magnitude
wider than a NIC and not shared with other nodes, while the way from rail to rail leads over the
oversubscribed spine.
"""

from __future__ import annotations

import itertools

import msgspec

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
    instance_name,
    nvlink,
    pair_ends,
)


class _Ports(msgspec.Struct, frozen=True, gc=False):
    """Link indices of one instance, the ways out. With rails the NICs are its node's."""

    nvlink_out: int
    nic_out: int | None


class FatTree:
    """Links appear when an instance is first routed, uplinks and rails at once."""

    def __init__(self, spec: TopologySpec, table: LinkTable) -> None:
        self._spec = spec
        self._table = table
        self._domain_gpus = spec.gpus_per_node * spec.nvlink_nodes
        self._rack_gpus = spec.gpus_per_node * spec.nodes_per_rack
        self._pod_gpus = self._rack_gpus * spec.racks_per_pod
        self._ports_of: dict[Gpus, _Ports] = {}
        self.nodes = [
            Node(f"node-{n}", n * spec.gpus_per_node, spec.gpus_per_node, n // spec.nvlink_nodes,
                 n // spec.nodes_per_rack)
            for n in range(spec.gpus // spec.gpus_per_node)
        ]  # fmt: skip
        self._wan: dict[tuple[int, int], int] = {}
        for a, b in itertools.permutations(range(spec.datacenters), 2):
            self._wan[a, b] = table.add(f"wan-{a}-{b}", spec.wan_bandwidth, CORE)
        self._rack_up = self._rack_uplinks()
        pod_nics = spec.racks_per_pod * spec.nodes_per_rack * spec.nics_per_node
        pod = pod_nics * spec.nic_bandwidth / spec.pod_oversubscription
        pod_uplinks = spec.pod_uplinks or spec.uplinks
        self._pod_up = [
            table.trunk(f"pod-{p}", pod, pod_uplinks, CORE) for p in range(spec.pods)
        ]
        self._nic: dict[tuple[int, int], int] = {}
        for node, rail in itertools.product(range(len(self.nodes)), range(spec.rails or 0)):
            name = f"node-{node}-nic-{rail}"
            self._nic[node, rail] = table.pair(name, "out", "in", spec.nic_bandwidth, RACK)

    def _rack_uplinks(self) -> dict[tuple[int, int], list[int]]:
        """By rack and rail; without rails all is on rail 0."""
        spec = self._spec
        racks = range(spec.pods * spec.racks_per_pod)
        nics = spec.nodes_per_rack * spec.nics_per_node
        capacity = nics * spec.nic_bandwidth / spec.rack_oversubscription
        if spec.rails is None:
            return {
                (r, 0): self._table.trunk(f"rack-{r}", capacity, spec.uplinks, POD) for r in racks
            }
        capacity /= spec.rails
        return {
            (r, rail): self._table.trunk(f"rack-{r}-rail-{rail}", capacity, spec.uplinks, POD)
            for r, rail in itertools.product(racks, range(spec.rails))
        }

    def tier(self, src: Gpus, dst: Gpus) -> int:
        """The least tier that holds all of both."""
        low = min(*src, *dst)
        high = max(*src, *dst)
        for tier, size in enumerate((self._domain_gpus, self._rack_gpus, self._pod_gpus)):
            if low // size == high // size:
                return tier
        return CORE

    def latency_s(self, src: Gpus, dst: Gpus) -> float:
        return self._spec.wan_latency_s if self._far(src[0], dst[0]) else 0.0

    def lanes(self, src: Gpus, dst: Gpus) -> list[Lane]:
        """One for all pairs without rails, from the first accelerator's rack; else one for each."""
        tier = self.tier(src, dst)
        ends = pair_ends(src, dst)
        if tier == NODE:
            paths: tuple[Path, ...] = (self._local(src, dst),)
        elif self._spec.rails is None:
            out, into = self._ports(src).nic_out, self._ports(dst).nic_out
            assert out is not None and into is not None
            paths = self._between(src[0], dst[0], tier, (out,), into + 1, 0)
        else:
            return [
                Lane((i,), self._by_rail(src, dst, a, b)) for i, (a, b) in enumerate(ends)
            ]
        return [Lane(tuple(range(len(ends))), paths)]

    def _local(self, src: Gpus, dst: Gpus) -> Path:
        return (self._ports(src).nvlink_out, self._ports(dst).nvlink_out + 1)

    def _by_rail(self, src: Gpus, dst: Gpus, a: int, b: int) -> tuple[Path, ...]:
        """The paths of a pair from accelerator `a` to `b`, by the rail of `b`."""
        tier = self.tier((a,), (b,))
        if tier == NODE:
            return (self._local(src, dst),)
        rail = self._rail(b)
        out: Path = (self._nic[a // self._spec.gpus_per_node, rail],)
        if self._rail(a) != rail:
            out = (self._ports(src).nvlink_out, *out)
        into = self._nic[b // self._spec.gpus_per_node, rail] + 1
        return self._between(a, b, tier, out, into, rail)

    def _rail(self, gpu: int) -> int:
        """Neighbours share a NIC where a node has fewer of them than accelerators."""
        per = self._spec.gpus_per_node
        return gpu % per * self._spec.nics_per_node // per

    def _between(
        self, a: int, b: int, tier: int, out: Path, into: int, rail: int
    ) -> tuple[Path, ...]:
        """Equal paths between the NICs of accelerators `a` and `b` of two nodes."""
        if tier == RACK:
            return ((*out, into),)
        up = self._rack_up[a // self._rack_gpus, rail]
        down = self._rack_up[b // self._rack_gpus, rail]
        if tier == POD:
            return tuple((*out, u, d + 1, into) for u, d in zip(up, down, strict=True))
        over, under = self._pod_up[a // self._pod_gpus], self._pod_up[b // self._pod_gpus]
        far = self._far(a, b)
        wan = () if far is None else (self._wan[far],)
        return tuple(
            (
                *out, up[p % len(up)], over[p % len(over)], *wan,
                under[p % len(under)] + 1, down[p % len(down)] + 1, into,
            )
            for p in range(max(len(up), len(over)))
        )  # fmt: skip

    def _far(self, a: int, b: int) -> tuple[int, int] | None:
        """The two data centres between which a path runs; None inside one."""
        per = self._pod_gpus * (self._spec.pods // self._spec.datacenters)
        return (a // per, b // per) if a // per != b // per else None

    def nics(self, gpus: Gpus) -> list[int]:
        """With rails a node's NICs are shared by all instances on the rails that this one uses."""
        if self._spec.rails is None:
            out = self._ports(gpus).nic_out
            assert out is not None
            return [out, out + 1]
        used = dict.fromkeys((g // self._spec.gpus_per_node, self._rail(g)) for g in gpus)
        return [self._nic[key] + way for key in used for way in (0, 1)]

    def _ports(self, gpus: Gpus) -> _Ports:
        found = self._ports_of.get(gpus)
        if found is None:
            found = self._ports_of[gpus] = self._make_ports(gpus)
        return found

    def _make_ports(self, gpus: Gpus) -> _Ports:
        nic = None
        if self._spec.rails is None:
            capacity = len(gpus) * self._spec.nic_bandwidth
            nic = self._table.pair(instance_name(gpus), "nic-out", "nic-in", capacity, RACK)
        return _Ports(nvlink(self._table, gpus, self._spec.nvlink_bandwidth), nic)
