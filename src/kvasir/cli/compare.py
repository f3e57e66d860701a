"""`kvasir compare`: several policies, the very same arrivals, one column each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cyclopts import App

from kvasir.cli.simulate import JsonTo, Positive

if TYPE_CHECKING:
    from kvasir.core.specs import Deployment

app = App(name="compare")


@app.default
def compare(
    deployment: str | None = None,
    /,
    *,
    policies: str | None = None,
    trace: str | None = None,
    seed: int | None = None,
    json: JsonTo = None,
    limit: Positive = None,
    seeds: Positive = 3,
    jobs: Positive = None,
) -> None:
    """Simulate several policies on the same arrivals; the first one is the base of the ratios.

    The table is of the first seed; below it stand means over all seeds with 95 % intervals, and the
    differences from the first policy, paired by seed.

    Parameters
    ----------
    deployment
        A file, or the name of a bundled deployment (default: ./kvasir.yaml, else mooncake-64).
    policies
        Names of route policies, separated by commas (default: all).
    trace
        A bundled trace or a file, instead of the deployment's own workload.
    seed
        Of everything random, instead of the deployment's own.
    json
        File for the results by policy, or - for stdout.
    limit
        Only the first requests of the workload.
    seeds
        How many seeds each policy is run with; one gives no intervals.
    jobs
        Processes to use (default: one a core).
    """
    from kvasir.cli.output import unique
    from kvasir.cli.overrides import with_policy
    from kvasir.cli.simulate import load, with_workload
    from kvasir.policy.route import ROUTES

    spec = load(deployment)
    names = unique(n.strip() for n in policies.split(",")) if policies else tuple(ROUTES)
    flags = {"trace": trace, "limit": limit}
    given = {k: v for k, v in flags.items() if v is not None}
    specs = {name: with_policy(with_workload(spec, given), name) for name in names}
    _compare(specs, spec.seed if seed is None else seed, seeds or 1, jobs, json)


def _compare(
    specs: dict[str, Deployment], seed: int, seeds: int, jobs: int | None, json: str | None
) -> None:
    """Run every policy with every seed, print the tables, write the results."""
    from json import loads

    from msgspec.structs import replace

    from kvasir.cli.output import progress, say, unique, write_json
    from kvasir.cli.simulate import headline
    from kvasir.measure.intervals_table import intervals_table
    from kvasir.measure.results import canonical
    from kvasir.measure.tables import compare_table
    from kvasir.runtime.sweep import Case, sweep
    from kvasir.traces.workload import workload

    spec = next(iter(specs.values()))
    arrivals = workload(spec.workload, spec.block_size, seed)
    say(headline(spec, arrivals, ", ".join(specs), seed), json)
    cases = [Case(name, one, seed + i) for name, one in specs.items() for i in range(seeds)]
    with progress(f"{spec.name}, {len(cases)} runs") as report:
        runs = sweep(cases, jobs=jobs, progress=report)
    by_name = {
        name: [r for r, c in zip(runs, cases, strict=True) if c.label == name] for name in specs
    }
    columns = []
    for name, found in by_name.items():
        notes = unique((*found[0].summary.notes, *found[0].notes))
        own = tuple(n for n in notes if n not in arrivals.notes)
        columns.append((name, replace(found[0].summary, notes=own)))
    say("\n".join([compare_table(columns), *(f"* {note}" for note in arrivals.notes)]), json)
    say(intervals_table({n: [r.summary for r in rs] for n, rs in by_name.items()}), json)
    content = {n: [loads(r.to_json()) for r in rs] for n, rs in by_name.items()}
    write_json(json, canonical(content))
