"""The network as a user describes it: a fat-tree of nodes, racks and pods, with per-tier limits.

Tiers (NetKV, arXiv 2606.03910): 0 same node, 1 same rack, 2 same pod, 3 across pods.
`paper` caps each flow by its tier and shares links; `fabric` has no caps, only NICs and links.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

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
    With preset `paper` and no `tiers`, NetKV's caps apply. `telemetry_s` is how often switch
    counters reach the conductor; None means that there are none.
    """

    preset: Literal["paper", "fabric"] = "paper"
    gpus_per_node: int = Field(default=8, gt=0)
    nodes_per_rack: int = Field(default=2, gt=0)
    racks_per_pod: int = Field(default=2, gt=0)
    pods: int = Field(default=2, gt=0)
    nic_bandwidth: float = Field(default=12.5e9, gt=0)
    nvlink_bandwidth: float = Field(default=450e9, gt=0)
    rack_oversubscription: float = Field(default=2.0, ge=1)
    pod_oversubscription: float = Field(default=4.0, ge=1)
    tiers: tuple[TierSpec, ...] | None = Field(default=None, min_length=4, max_length=4)
    telemetry_s: float | None = Field(default=1.0, gt=0)
    telemetry_ttl_s: float = Field(default=5.0, gt=0)

    @property
    def flow_tiers(self) -> tuple[TierSpec, ...]:
        """The four tiers in force, by preset unless given."""
        if self.tiers is not None:
            return self.tiers
        return _paper_tiers() if self.preset == "paper" else (TierSpec(),) * len(TIERS)

    @property
    def gpus(self) -> int:
        return self.pods * self.racks_per_pod * self.nodes_per_rack * self.gpus_per_node
