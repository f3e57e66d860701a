"""Simulations that published figures are held against: constant service, and a network without
latency or oversubscription."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvasir.core.specs import (
    Deployment,
    LimitsSpec,
    ModelSpec,
    PolicySpec,
    PoolSpec,
    RouteSpec,
    TierSpec,
    TopologySpec,
)
from kvasir.core.specs.deployment import ProfileCost
from kvasir.measure.summary import RequestOutcome
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.run import simulate

PROFILES = Path(__file__).parent / "data" / "profiles"
BLOCK = 16


def constant(seconds: float) -> ProfileCost:
    """Any step takes `seconds`: deterministic service."""
    return ProfileCost(prefill=((1, seconds), (2, seconds)), decode=((1, seconds), (2, seconds)))


def pool(role: str, cost: ProfileCost, count: int = 1, **more: Any) -> PoolSpec:
    """Workers that serve one request at a time, unless told otherwise."""
    fields = {"batch_max": 1, "kv_blocks": 10**6, "cost": cost} | more
    return PoolSpec(name=role, role=role, count=count, **fields)


def run(
    pools: Sequence[PoolSpec], arrivals: Sequence[Arrival], *, route: str = "round_robin",
    shape: str = "tiny", nic: float = 12.5e9, **fields: Any,
) -> list[RequestOutcome]:  # fmt: skip
    """Outcomes in order of arrival; all have succeeded. Nothing waits too long for a limit."""
    deployment = Deployment(
        models=(ModelSpec(name="m", shape=shape, max_context=8192),),
        topology=TopologySpec(
            preset="fabric", nic_bandwidth=nic, rack_oversubscription=1, pod_oversubscription=1,
            tiers=(TierSpec(latency_s=0),) * 4,
        ),
        pools=tuple(pools),
        policy=PolicySpec(route=RouteSpec(name=route, decode_choice="prefill_end")),
        limits=LimitsSpec(queue_wait_s=1e4, kv_wait_s=1e4, lease_s=1e4),
        **fields,
    )  # fmt: skip
    result = simulate(deployment, Trace("published", BLOCK, tuple(arrivals)))
    assert all(o.ok for o in result.outcomes)
    return sorted(result.outcomes, key=lambda o: int(o.request_id[1:]))


def arrival(at_s: float, tokens: int, output: int, serial: int) -> Arrival:
    """A prompt that shares nothing with another."""
    blocks = -(-tokens // BLOCK)
    return Arrival(at_s, tokens, output, tuple(range(serial * 10**4, serial * 10**4 + blocks)))
