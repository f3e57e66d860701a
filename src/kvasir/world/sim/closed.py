"""Closed-loop runs of the simulated world: outcomes in the order in which requests were sent."""

from __future__ import annotations

from collections.abc import Mapping

from kvasir.core.specs import Deployment
from kvasir.cost.step import StepModel
from kvasir.measure.summary import RequestOutcome
from kvasir.traces.closed import ClosedLoop, ClosedSpec
from kvasir.world.sim.world import SimWorld


def simulate_closed(
    deployment: Deployment,
    spec: ClosedSpec,
    *,
    seed: int = 0,
    models: Mapping[str, StepModel] | None = None,
) -> list[RequestOutcome]:
    """Serve `spec` on `deployment` in virtual time. `models`: step times by pool, else the pools'
    own. Raises ConfigError when instances do not fit."""
    loop = ClosedLoop(spec, seed)
    world = SimWorld(deployment, loop.first(), again=loop.again, models=models)
    world.run()
    return sorted(world.recorder.outcomes, key=lambda o: (o.start_s or 0.0, o.request_id))
