"""`simulate(deployment, trace, seed)`: a pure function from deployment and arrivals to figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from kvasir import __version__
from kvasir.core.errors import ConfigError
from kvasir.core.ids import BlockKey
from kvasir.core.specs import Deployment
from kvasir.measure.calibration import PoolCalibration, calibration_of, notes_of
from kvasir.measure.charts import Plots, charts
from kvasir.measure.detail import Detail, LinkUse, hottest, itl_counts
from kvasir.measure.frames import frame
from kvasir.measure.recovery import Recovery, recovery
from kvasir.measure.results import canonical, result
from kvasir.measure.summary import PrefixUse, RequestOutcome, Summary, summarise
from kvasir.traces.answers import answer_keys
from kvasir.traces.record import Trace
from kvasir.traces.statistics import shared_tokens
from kvasir.world.journal import Journal, Listener, Listeners
from kvasir.world.sim.clients import reaching, seen
from kvasir.world.sim.faults import Faults, resolve, windows
from kvasir.world.sim.heat import LinkHeat
from kvasir.world.sim.world import Journals, SimWorld

Listen = Callable[[str, str], Listener | None]  # a node's name and kind
TIER_NAMES = ("node", "rack", "pod", "core")


class Result(msgspec.Struct, frozen=True):
    """A run's figures. No time, path or host of the machine that ran it.

    `detail` is there when `simulate` was asked for it, `recovery` when there were faults.
    """

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
    calibration: tuple[PoolCalibration, ...] = ()
    detail: Detail | None = None
    recovery: Recovery | None = None

    def to_json(self) -> bytes:
        """Canonical: equal inputs give equal bytes. Single outcomes and detail are left out."""
        own: dict[str, Any] = {
            "policy": self.policy,
            "seed": self.seed,
            "events": self.events,
            "counts": dict(sorted(self.counts.items())),
            "deployment": self.deployment,
            "trace": self.trace,
            "trace_hash": self.trace_hash,
            "notes": list(self.notes),
            "calibration": msgspec.to_builtins(self.calibration),
            "version": __version__,
        }
        if self.recovery is not None:
            own["recovery"] = msgspec.to_builtins(self.recovery)
        return canonical(result(self.summary) | own)

    def to_pandas(self) -> Any:
        """One row a request, as `measure.frames.frame` says. Raises ConfigError without pandas."""
        return frame(self.outcomes, self.summary.slo)

    def plot(self, *names: str) -> Plots:
        """Charts as SVG: all, or those named (parts, ttft, slo, itl, links, cache).

        Raises ConfigError for one that this run does not have.
        """
        every = Plots(tuple(charts(self.summary, self.outcomes, self.detail)))
        return every.only(names) if names else every


def simulate(
    deployment: Deployment,
    trace: Trace,
    *,
    seed: int = 0,
    record: Path | None = None,
    listen: Listen | None = None,
    detail: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """Replay `trace` on `deployment` in virtual time, with the deployment's faults.

    `record`: a folder for one journal per node. `listen` is asked for each node who else wants to
    hear what it decides. `detail`: sample what reports draw. Raises ConfigError when the
    trace's block size is not the deployment's, instances do not fit, or a fault names what is
    not there.
    """
    if trace.block_size not in (None, deployment.block_size):
        raise ConfigError(
            f"the trace's blocks have {trace.block_size} tokens, the deployment's "
            f"{deployment.block_size}",
            where=f"{deployment.name}, trace {trace.name}",
            next_step=f"set block_size: {trace.block_size}",
        )
    faults = resolve(deployment)
    sinks: list[Any] = []

    def listeners(name: str, kind: str, config: dict[str, Any]) -> Listeners:
        heard = []
        if record is not None:
            sinks.append((record / f"{name}.jsonl").open("wb"))
            heard.append(Journal(sinks[-1], name, kind, config, seed))
        other = listen(name, kind) if listen is not None else None
        return Listeners([*heard, other] if other is not None else heard)

    if record is not None:
        record.mkdir(parents=True, exist_ok=True)
    world = SimWorld(
        deployment,
        reaching(trace.arrivals, deployment.host),
        faults=Faults(faults, seed) if faults is not None else None,
        seed=seed,
        journals=cast(Journals, listeners) if record or listen else None,
        answers=_answers(deployment, trace),
    )
    if detail:
        world.network.heat = LinkHeat()
    try:
        _run(world, trace, progress)
    finally:
        for sink in sinks:
            sink.close()
    return _result(world, deployment, trace, seed)


def _answers(deployment: Deployment, trace: Trace) -> tuple[tuple[BlockKey, ...], ...] | None:
    if not deployment.workload.name_answers:
        return None
    return answer_keys(trace.arrivals, deployment.block_size)


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
    outcomes = seen(recorder.outcomes, deployment.host)
    by_tier = zip(TIER_NAMES, world.network.bytes_by_tier, strict=True)
    summary = summarise(
        outcomes,
        recorder.itl,
        world.now,
        deployment.slo,
        gpus=sum(p.count * p.gpus for p in deployment.pools),
        first_token=deployment.first_token,
        bytes_by_tier=dict(by_tier),
        prefix=PrefixUse(
            recorder.prefix_queries, recorder.prefix_hits, recorder.prefix_attainable,
            shared_tokens(trace),
        ),
        notes=trace.notes,
    )
    cost = _recovery(world, deployment)
    calibration = calibration_of(deployment, summary)
    return Result(
        summary=summary,
        policy=deployment.policy.route.name,
        seed=seed,
        events=world.events,
        counts=recorder.counts,
        notes=(*trace.notes, *(cost.lines() if cost else ()), *notes_of(calibration)),
        deployment=deployment.name,
        trace=trace.name,
        trace_hash=trace.digest(),
        outcomes=tuple(outcomes),
        calibration=calibration,
        detail=_detail(world, world.network.heat) if world.network.heat is not None else None,
        recovery=cost,
    )


def _recovery(world: SimWorld, deployment: Deployment) -> Recovery | None:
    if deployment.faults is None:
        return None
    recorder = world.recorder
    again = recorder.counts.get("Recomputed.tokens", 0)
    when = windows(deployment.faults)
    return recovery(recorder.outcomes, when, world.now, again, deployment.slo)


def _detail(world: SimWorld, heat: LinkHeat) -> Detail:
    world.network.utilisation(world.now)  # brings every flow's bytes up to now
    windows = int(world.now / heat.width_s) + 1
    links = world.network.topology.links
    used = [
        LinkUse(links[i].name, TIER_NAMES[links[i].tier], links[i].capacity, tuple(row[:windows]))
        for i, row in heat.moved.items()
    ]
    return Detail(heat.width_s, hottest(used), itl_counts(world.recorder.itl))
