"""The network as a user describes it: a fat-tree of nodes, racks and pods, with per-tier limits.

Tiers (NetKV, arXiv 2606.03910): 0 same node, 1 same rack, 2 same pod, 3 across pods.
`paper` caps each flow by its tier and shares links; `fabric` has no caps, only NICs and links.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, model_validator

from kvasir.core.specs.base import Spec

TIERS: Final = ("node", "rack", "pod", "core")


class TierSpec(Spec):
    """What one flow of a tier can get at best: bytes per second (None: no cap) and seconds."""

    flow_bandwidth: float | None = Field(default=None, gt=0)
    latency_s: float = Field(default=10e-6, ge=0)


def _paper_tiers() -> tuple[TierSpec, ...]:
    return tuple(TierSpec(flow_bandwidth=b) for b in (450e9, 12.5e9, 6.25e9, 3.125e9))


class TopologySpec(Spec):
    """A fat-tree. Link capacity = sum of the members' NICs / oversubscription of that level.

    `rack_oversubscription` is at the rack's uplink, `pod_oversubscription` end to end at the pod's.
    That capacity is in `uplinks` equal links, by default one trunk, and in `pod_uplinks` of a pod
    (None: as many). A shard pair takes one path of them all the way, by a hash: a k-ary fat-tree
    has k/2 uplinks of a rack and (k/2)^2 of a pod.
    `nvlink_nodes` nodes of a rack share NVLink and are one tier 0 (NVL72: 18 nodes of 4). Pods
    stand in `datacenters`, equally many in each; between any two of them there is one link of
    `wan_bandwidth` each way, which adds `wan_latency_s` and is counted with tier 3.
    With preset `paper` and no `tiers`, NetKV's caps apply. `telemetry_s` is how often switch
    counters reach the conductor; None means that there are none.
    """

    preset: Literal["paper", "fabric"] = "paper"
    gpus_per_node: int = Field(default=8, gt=0)
    nodes_per_rack: int = Field(default=2, gt=0)
    racks_per_pod: int = Field(default=2, gt=0)
    pods: int = Field(default=2, gt=0)
    nvlink_nodes: int = Field(default=1, gt=0)
    datacenters: int = Field(default=1, gt=0, le=256)
    nic_bandwidth: float = Field(default=12.5e9, gt=0)
    nvlink_bandwidth: float = Field(default=450e9, gt=0)
    rack_oversubscription: float = Field(default=2.0, ge=1)
    pod_oversubscription: float = Field(default=4.0, ge=1)
    uplinks: int = Field(default=1, ge=1, le=1024)
    pod_uplinks: int | None = Field(default=None, ge=1, le=1024)
    wan_bandwidth: float = Field(default=12.5e9, gt=0)
    wan_latency_s: float = Field(default=0.0, ge=0)
    tiers: tuple[TierSpec, ...] | None = Field(default=None, min_length=4, max_length=4)
    telemetry_s: float | None = Field(default=1.0, gt=0)
    telemetry_ttl_s: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _whole_parts(self) -> TopologySpec:
        if self.nodes_per_rack % self.nvlink_nodes:
            raise ValueError(
                f"nvlink_nodes {self.nvlink_nodes} does not divide nodes_per_rack "
                f"{self.nodes_per_rack}"
            )
        if self.pods % self.datacenters:
            raise ValueError(f"datacenters {self.datacenters} does not divide pods {self.pods}")
        return self

    @property
    def flow_tiers(self) -> tuple[TierSpec, ...]:
        """The four tiers in force, by preset unless given."""
        if self.tiers is not None:
            return self.tiers
        return _paper_tiers() if self.preset == "paper" else (TierSpec(),) * len(TIERS)

    @property
    def gpus(self) -> int:
        return self.pods * self.racks_per_pod * self.nodes_per_rack * self.gpus_per_node
