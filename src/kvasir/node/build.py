"""Nodes from a deployment: one configuration for a live process, the simulator and a replay."""

from __future__ import annotations

from kvasir.core.ids import Incarnation, NodeId, WorkerId
from kvasir.core.messages import Capacity, Location
from kvasir.core.specs import Deployment
from kvasir.cost.pools import capacity_of
from kvasir.node.config import WorkerConfig
from kvasir.node.request import Requests


def worker_config(
    deployment: Deployment,
    worker: WorkerId,
    incarnation: Incarnation,
    location: Location,
    *,
    fingerprint: str = "",
    capacity: Capacity | None = None,
) -> WorkerConfig:
    """`capacity` replaces the computed one when an engine has measured its own."""
    pool = deployment.pool_of(worker)
    limits, batch = deployment.limits, deployment.policy.batch
    return WorkerConfig(
        worker=worker,
        incarnation=incarnation,
        roles=(pool.role,),
        model=deployment.model_of(pool).name,
        fingerprint=fingerprint,
        capacity=capacity or capacity_of(deployment, pool),
        location=location,
        pool=pool.name,
        kv_events=pool.kv_events,
        batch=batch.name,
        evict=deployment.policy.evict,
        chunk_tokens=batch.chunk_tokens,
        steps_max=batch.steps_max,
        waiting_max=pool.waiting_max,
        transfer=deployment.transport.mode,
        serial_tokens=deployment.transport.serial_tokens,
        beat_s=limits.beat_s,
        prompt_wait_s=limits.prompt_wait_s,
        kv_wait_s=limits.kv_wait_s,
        lease_s=limits.lease_s,
    )




def build_requests(deployment: Deployment, gateway: NodeId, incarnation: Incarnation) -> Requests:
    limits = deployment.limits
    return Requests(
        gateway, incarnation, beat_s=limits.beat_s, grace_s=limits.grace_s,
        attempts_max=limits.attempts_max, deaths_max=limits.deaths_max,
    )  # fmt: skip
