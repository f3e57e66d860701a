"""`kvasir simulate`: one deployment, one workload, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from kvasir.core.specs import Deployment
    from kvasir.traces.record import Trace
    from kvasir.world.sim.run import Result

app = App(name="simulate")
Positive = Annotated[int | None, Parameter(validator=Number(gte=1))]
JsonTo = Annotated[str | None, Parameter(allow_leading_hyphen=True)]


@app.default
def simulate(
    deployment: str | None = None,
    /,
    *,
    trace: str | None = None,
    policy: str | None = None,
    seed: int | None = None,
    json: JsonTo = None,
    record: Path | None = None,
    html: Path | None = None,
    timeline: Path | None = None,
    limit: Positive = None,
) -> None:
    """Run a deployment on a workload in virtual time and print what users would see.

    Parameters
    ----------
    deployment
        A file, or the name of a bundled deployment (default: ./kvasir.yaml, else mooncake-64).
    trace
        A bundled trace or a file, instead of the deployment's own workload.
    policy
        Name of the route policy, instead of the deployment's own.
    seed
        Of everything random, instead of the deployment's own.
    json
        File for the result, or - for stdout.
    record
        Folder for a recording that `kvasir verify` re-runs.
    html
        File for a report: one page that needs nothing else.
    timeline
        File for a timeline as Chrome trace JSON, for Perfetto.
    limit
        Only the first requests of the workload.
    """
    from msgspec.structs import replace

    from kvasir.cli.output import progress, say, unique, write, write_json
    from kvasir.cli.overrides import with_policy
    from kvasir.measure.tables import table

    spec = with_policy(load(deployment), policy)
    seed = spec.seed if seed is None else seed
    arrivals = workload_of(spec, trace, limit, seed)
    say(headline(spec, arrivals, spec.policy.route.name, seed), json)

    from kvasir.runtime.timeline import Timeline
    from kvasir.world.sim.run import simulate as run

    drawn = Timeline() if timeline is not None else None
    with progress(spec.name) as report:
        result = run(
            spec,
            arrivals,
            seed=seed,
            record=record,
            listen=drawn.listen if drawn is not None else None,
            detail=html is not None,
            progress=report,
        )
    notes = unique((*arrivals.notes, *result.summary.notes, *result.notes))
    say(table(replace(result.summary, notes=notes)), json)
    write_json(json, result.to_json())
    if html is not None:
        write(html, _report(headline(spec, arrivals, result.policy, seed), result, notes))
    if timeline is not None and drawn is not None:
        write(timeline, drawn.json())


def _report(title: str, result: Result, notes: Sequence[str]) -> bytes:
    from kvasir.measure.html import page

    return page(title, result.summary, result.outcomes, notes, result.detail).encode()


def load(deployment: str | None) -> Deployment:
    """The deployment that a simulation means."""
    from kvasir.cli.files import chosen, load_deployment

    return load_deployment(chosen(deployment, "mooncake-64"))


def workload_of(spec: Deployment, trace: str | None, limit: int | None, seed: int) -> Trace:
    """Arrivals by flags, else by the deployment. Raises TraceError."""
    from kvasir.traces.workload import workload

    flags = {"trace": trace, "limit": limit}
    given = {k: v for k, v in flags.items() if v is not None}
    return workload(with_workload(spec, given).workload, spec.block_size, seed)


def with_workload(spec: Deployment, given: Mapping[str, object]) -> Deployment:
    """The deployment with these fields of its workload replaced."""
    return spec.model_copy(update={"workload": spec.workload.model_copy(update=given)})


def headline(spec: Deployment, trace: Trace, policies: str, seed: int) -> str:
    """What is about to run, in one line."""
    pools = " + ".join(f"{p.count} {p.role}" for p in spec.pools)
    requests = f"{trace.name}, {len(trace.arrivals)} requests"
    return f"{spec.name} ({pools}), {requests}, {policies}, seed {seed}"
