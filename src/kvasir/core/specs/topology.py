"""The network as a user describes it: a fat-tree, with or without rails, or named nodes and links.

Tiers (NetKV, arXiv 2606.03910): 0 same node, 1 same rack, 2 same pod, 3 across pods.
`paper` caps each flow by its tier and shares links; `fabric` has no caps, only NICs and links;
`explicit` has the nodes, switches and links that are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations_with_replacement, product
from typing import Final, Literal

from pydantic import Field, model_validator

from kvasir.core.errors import nearest
from kvasir.core.specs.base import Spec, wrong

TIERS: Final = ("node", "rack", "pod", "core")


class TierSpec(Spec):
    """What one flow of a tier can get at best: bytes per second (None: no cap) and seconds."""

    flow_bandwidth: float | None = Field(default=None, gt=0)
    latency_s: float = Field(default=10e-6, ge=0)


class NodeSpec(Spec):
    """A server of an explicit topology. Accelerators are numbered over all nodes in order."""

    name: str = Field(min_length=1)
    gpus: int = Field(gt=0, le=1024)


class LinkSpec(Spec):
    """`count` equal links between two nodes or switches; each way has all of `bandwidth`."""

    between: tuple[str, str]
    bandwidth: float = Field(gt=0)
    latency_s: float = Field(default=0.0, ge=0)
    count: int = Field(default=1, ge=1, le=1024)


class TelemetrySpec(Spec):
    """How switch counters reach the conductor: a log of readings, late, lossy and not exact.

    Every `period_s` the counters are read, and the reading arrives `delay_s` later, unless it is
    lost (probability `loss`). Each tier's utilisation is off by `bias` and by up to `error` either
    way (NetKV's eps). A reading older than `ttl_s` is stale: nothing is decided by it.

    `counters`, by link and direction (`leaf0>spine`): files with the bytes that went there so far,
    as Linux keeps them (/sys/class/net/PORT/statistics/tx_bytes). `serve` reads them each
    `period_s`; what is late, lost and off is simulated only.
    """

    period_s: float = Field(default=1.0, gt=0)
    delay_s: float = Field(default=0.0, ge=0)
    loss: float = Field(default=0.0, ge=0, le=1)
    error: float = Field(default=0.0, ge=0, le=1)
    bias: float = Field(default=0.0, ge=-1, le=1)
    ttl_s: float = Field(default=5.0, gt=0)
    counters: dict[str, str] = Field(default_factory=dict)


def _paper_tiers() -> tuple[TierSpec, ...]:
    return tuple(TierSpec(flow_bandwidth=b) for b in (450e9, 12.5e9, 6.25e9, 3.125e9))


class TopologySpec(Spec):
    """A fat-tree. Link capacity = sum of the members' NICs / oversubscription of that level.

    `rack_oversubscription` is at the rack's uplink, `pod_oversubscription` end to end at the pod's.
    That capacity is in `uplinks` equal links, by default one trunk, and in `pod_uplinks` of a pod
    (None: as many). A shard pair takes one path of them all the way, by a hash: a k-ary fat-tree
    has k/2 uplinks of a rack and (k/2)^2 of a pod.
    With `rails` a node has that many NICs of `nic_bandwidth`, NIC i of each node of a rack is on
    the rack's switch i, and each such switch has the uplinks; without, each accelerator has a NIC.
    `nvlink_nodes` nodes of a rack share NVLink and are one tier 0 (NVL72: 18 nodes of 4). Pods
    stand in `datacenters`, equally many in each; between any two of them there is one link of
    `wan_bandwidth` each way, which adds `wan_latency_s` and is counted with tier 3.
    With preset `paper` and no `tiers`, NetKV's caps apply. `telemetry` None: no switch counters.

    With preset `explicit`, `nodes`, `switches` and `links` say all of that, and only
    `nvlink_bandwidth` of an accelerator, `tiers` and `telemetry` count beside them.
    """

    preset: Literal["paper", "fabric", "explicit"] = "paper"
    gpus_per_node: int = Field(default=8, gt=0)
    nodes_per_rack: int = Field(default=2, gt=0)
    racks_per_pod: int = Field(default=2, gt=0)
    pods: int = Field(default=2, gt=0)
    nvlink_nodes: int = Field(default=1, gt=0)
    datacenters: int = Field(default=1, gt=0, le=256)
    nic_bandwidth: float = Field(default=12.5e9, gt=0)
    nvlink_bandwidth: float = Field(default=450e9, gt=0)
    rails: int | None = Field(default=None, gt=0)
    rack_oversubscription: float = Field(default=2.0, ge=1)
    pod_oversubscription: float = Field(default=4.0, ge=1)
    uplinks: int = Field(default=1, ge=1, le=1024)
    pod_uplinks: int | None = Field(default=None, ge=1, le=1024)
    wan_bandwidth: float = Field(default=12.5e9, gt=0)
    wan_latency_s: float = Field(default=0.0, ge=0)
    nodes: tuple[NodeSpec, ...] = ()
    switches: tuple[str, ...] = ()
    links: tuple[LinkSpec, ...] = ()
    tiers: tuple[TierSpec, ...] | None = Field(default=None, min_length=4, max_length=4)
    telemetry: TelemetrySpec | None = TelemetrySpec()

    @model_validator(mode="after")
    def _whole(self) -> TopologySpec:
        if self.preset == "explicit":
            self._explicit()
        else:
            self._fat_tree()
        return self

    def _fat_tree(self) -> None:
        for part in ("nodes", "switches", "links"):
            if getattr(self, part):
                raise wrong(f"{part} belong to preset explicit, this is {self.preset}", part)
        for part, whole in (
            ("nvlink_nodes", "nodes_per_rack"), ("datacenters", "pods"), ("rails", "gpus_per_node"),
        ):  # fmt: skip
            small, large = getattr(self, part), getattr(self, whole)
            if small is not None and large % small:
                raise wrong(f"{part} {small} does not divide {whole} {large}", part)

    def _explicit(self) -> None:
        for name in _FAT_TREE_ONLY:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise wrong(f"{name} describes a fat-tree, this is preset explicit", name)
        if not self.nodes:
            raise wrong("preset explicit lists its nodes; there are none", "nodes")
        names: dict[str, None] = {}
        listed = [(n.name, ("nodes", i)) for i, n in enumerate(self.nodes)]
        listed += [(name, ("switches", i)) for i, name in enumerate(self.switches)]
        for name, path in listed:
            if name in names:
                raise wrong(f"{name!r} is there twice", *path)
            names[name] = None
        for i, link in enumerate(self.links):
            for end in link.between:
                if end not in names:
                    what = f"no node or switch {end!r}"
                    raise wrong(what, "links", i, "between", near=nearest(end, names))
            if link.between[0] == link.between[1]:
                raise wrong(f"a link from {link.between[0]!r} to itself", "links", i, "between")
        for a, b in _apart(self.nodes, self.switches, self.links):
            raise wrong(f"no path between {a!r} and {b!r} (only switches forward)", "links")

    @property
    def flow_tiers(self) -> tuple[TierSpec, ...]:
        """The four tiers in force, by preset unless given."""
        if self.tiers is not None:
            return self.tiers
        return _paper_tiers() if self.preset == "paper" else (TierSpec(),) * len(TIERS)

    @property
    def gpus(self) -> int:
        if self.preset == "explicit":
            return sum(n.gpus for n in self.nodes)
        return self.pods * self.racks_per_pod * self.nodes_per_rack * self.gpus_per_node

    @property
    def nics_per_node(self) -> int:
        return self.rails or self.gpus_per_node


_FAT_TREE_ONLY: Final = (
    "gpus_per_node", "nodes_per_rack", "racks_per_pod", "pods", "nvlink_nodes", "datacenters",
    "nic_bandwidth", "rails", "rack_oversubscription", "pod_oversubscription", "uplinks",
    "pod_uplinks", "wan_bandwidth", "wan_latency_s",
)  # fmt: skip


def _apart(
    nodes: Iterable[NodeSpec], switches: Iterable[str], links: Iterable[LinkSpec]
) -> Iterator[tuple[str, str]]:
    """Pairs of nodes without a path. A node does not forward, so two are joined by a link of their
    own or by a connected set of switches that both are on."""
    root = {name: name for name in switches}

    def island(name: str) -> str:
        while root[name] != name:
            root[name] = name = root[root[name]]
        return name

    ends = [link.between for link in links]
    for a, b in ends:
        if a in root and b in root:
            root[island(a)] = island(b)
    on: dict[str, set[str]] = {n.name: set() for n in nodes}
    direct = set[tuple[str, str]]()
    for one, other in ends:
        for a, b in ((one, other), (other, one)):
            if a in on and b in on:
                direct.add((a, b))
            elif a in on:
                on[a].add(island(b))
    alike: dict[frozenset[str], list[str]] = {}
    for name, islands in on.items():
        alike.setdefault(frozenset(islands), []).append(name)
    for here, there in combinations_with_replacement(alike, 2):
        if not here & there:
            pairs = product(alike[here], alike[there])
            yield from ((a, b) for a, b in pairs if a != b and (a, b) not in direct)
