"""Small simulated clusters: a deployment, arrivals, and a world that keeps what it saw."""

from __future__ import annotations

import random
from typing import Any, TypeVar

import msgspec

from kvasir.core.events import AnyEvent
from kvasir.core.messages import AnyMessage
from kvasir.core.specs import (
    Deployment,
    LimitsSpec,
    ModelSpec,
    PolicySpec,
    PoolSpec,
    RouteSpec,
    TopologySpec,
)
from kvasir.core.specs.deployment import BatchSpec, FittedCost
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.faults import Faults
from kvasir.world.sim.world import Host, SimWorld

M = TypeVar("M")
E = TypeVar("E")

BLOCK = 16
FITTED = FittedCost(overhead_s=2e-3, per_token_s=2e-5, per_context_s=1e-8)


def cluster(
    *roles: str, count: int = 2, shape: str = "tiny", cost: FittedCost | None = FITTED,
    route: dict[str, Any] | None = None, batch: dict[str, Any] | None = None,
    topology: dict[str, Any] | None = None, pool: dict[str, Any] | None = None, **fields: Any,
) -> Deployment:  # fmt: skip
    """`count` workers of each role (prefill and decode unless named), each on one accelerator."""
    pools = {"count": count, "kv_blocks": 2000, "cost": cost, "batch_max": 16} | (pool or {})
    return Deployment(
        name="small",
        models=(ModelSpec(name="m", shape=shape),),
        topology=TopologySpec(**({"preset": "fabric", "nic_bandwidth": 1e8} | (topology or {}))),
        pools=tuple(
            PoolSpec(name=role, role=role, **pools) for role in roles or ("prefill", "decode")
        ),
        policy=PolicySpec(
            route=RouteSpec(**({"name": "netkv"} | (route or {}))), batch=BatchSpec(**(batch or {}))
        ),
        limits=LimitsSpec(beat_s=0.5, dead_after_s=2.0, grace_s=1.0),
        block_size=BLOCK,
        **fields,
    )


def arrivals(count: int, seed: int = 1, rate: float = 40.0, output: int = 80) -> list[Arrival]:
    """Prompts of up to 400 tokens, some with a beginning that others have too."""
    rng, at, found = random.Random(seed), 0.0, []
    for i in range(count):
        at += rng.expovariate(rate)
        tokens, group = rng.randint(1, 400), rng.randint(0, 3)
        blocks = -(-tokens // BLOCK)
        shared = rng.randint(0, blocks)
        ids = [group * 1000 + j for j in range(shared)]
        ids += [10**6 + i * 1000 + j for j in range(blocks - shared)]
        found.append(Arrival(at, tokens, rng.randint(1, output), tuple(ids)))
    return found


def trace(count: int, **more: Any) -> Trace:
    return Trace("generated", BLOCK, tuple(arrivals(count, **more)))


class Seen(msgspec.Struct, frozen=True):
    at: float
    node: str
    message: Any


class Watched(SimWorld):
    """Keeps every message that a node handled and every event that one noted. Ends by itself."""

    def __init__(
        self, deployment: Deployment, arrivals: list[Arrival], *, faults: Faults | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        self.seen: list[Seen] = []
        super().__init__(deployment, arrivals, faults=faults, **more)
        self.noted: list[AnyEvent] = []
        told = self.recorder.event

        def listen(now: float, event: AnyEvent) -> None:
            self.noted.append(event)
            told(now, event)

        self.recorder.event = listen  # type: ignore[method-assign]

    def deliver(self, host: Host, event: AnyMessage) -> None:
        self.seen.append(Seen(self.now, host.id, event))
        super().deliver(host, event)

    def messages(self, kind: type[M]) -> list[M]:
        return [s.message for s in self.seen if isinstance(s.message, kind)]

    def events_of(self, kind: type[E]) -> list[E]:
        return [e for e in self.noted if isinstance(e, kind)]


def watched(deployment: Deployment, arrivals: list[Arrival], **more: Any) -> Watched:
    world = Watched(deployment, arrivals, **more)
    world.run()
    assert not world.requests.lives
    world.check()
    return world
