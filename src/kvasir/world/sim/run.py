"""`simulate(deployment, trace, seed)`: a pure function from deployment and arrivals to figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kvasir import __version__
from kvasir.core.errors import ConfigError
from kvasir.core.specs import Deployment
from kvasir.measure.results import canonical, result
from kvasir.measure.summary import RequestOutcome, Summary, summarise
from kvasir.traces.record import Trace
from kvasir.world.journal import Journal
from kvasir.world.sim.faults import Faults, FaultSpec
from kvasir.world.sim.world import SimWorld

TIER_NAMES = ("node", "rack", "pod", "core")


class Result(msgspec.Struct, frozen=True):
    """A run's figures. No time, path or host of the machine that ran it."""

    summary: Summary
    policy: str
    seed: int
    events: int
    counts: dict[str, int]
    notes: tuple[str, ...]
    deployment: str
    trace: str
    trace_hash: str
    outcomes: tuple[RequestOutcome, ...] = ()

    def to_json(self) -> bytes:
        """Canonical: equal inputs give equal bytes. Single outcomes are left out."""
        own: dict[str, Any] = {
            "policy": self.policy,
            "seed": self.seed,
            "events": self.events,
            "counts": dict(sorted(self.counts.items())),
            "deployment": self.deployment,
            "trace": self.trace,
            "trace_hash": self.trace_hash,
            "notes": list(self.notes),
            "version": __version__,
        }
        return canonical(result(self.summary) | own)


def simulate(
    deployment: Deployment,
    trace: Trace,
    *,
    seed: int = 0,
    record: Path | None = None,
    faults: FaultSpec | None = None,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """Replay `trace` on `deployment` in virtual time.

    `record`: a folder for one journal per node. Raises ConfigError when the trace's block size is
    not the deployment's, or instances do not fit.
    """
    if trace.block_size not in (None, deployment.block_size):
        raise ConfigError(
            f"the trace's blocks have {trace.block_size} tokens, the deployment's "
            f"{deployment.block_size}",
            where=f"{deployment.name}, trace {trace.name}",
            next_step=f"set block_size: {trace.block_size}",
        )
    sinks: list[Any] = []

    def journal(name: str, kind: str, config: dict[str, Any]) -> Journal:
        assert record is not None
        sinks.append((record / f"{name}.jsonl").open("wb"))
        return Journal(sinks[-1], name, kind, config, seed)

    if record is not None:
        record.mkdir(parents=True, exist_ok=True)
    world = SimWorld(
        deployment,
        trace.arrivals,
        faults=Faults(faults, seed) if faults is not None else None,
        journals=journal if record is not None else None,
    )
    try:
        _run(world, trace, progress)
    finally:
        for sink in sinks:
            sink.close()
    return _result(world, deployment, trace, seed)


def _run(world: SimWorld, trace: Trace, progress: Callable[[float], None] | None) -> None:
    if progress is None:
        world.run()
        return
    parts = 100
    for part in range(1, parts):
        world.run(until=trace.duration_s * part / parts)
        progress(part / parts)
    world.run()
    progress(1.0)


def _result(world: SimWorld, deployment: Deployment, trace: Trace, seed: int) -> Result:
    recorder = world.recorder
    by_tier = zip(TIER_NAMES, world.network.bytes_by_tier, strict=True)
    summary = summarise(
        recorder.outcomes,
        recorder.itl,
        world.now,
        deployment.slo,
        gpus=sum(p.count * p.gpus for p in deployment.pools),
        first_token=deployment.first_token,
        bytes_by_tier=dict(by_tier),
        notes=trace.notes,
    )
    return Result(
        summary=summary,
        policy=deployment.policy.route.name,
        seed=seed,
        events=world.events,
        counts=recorder.counts,
        notes=trace.notes,
        deployment=deployment.name,
        trace=trace.name,
        trace_hash=trace.digest(),
        outcomes=tuple(recorder.outcomes),
    )
