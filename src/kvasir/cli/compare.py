"""`kvasir compare`: several policies, the very same arrivals, one column each."""

from __future__ import annotations

from cyclopts import App

from kvasir.cli.simulate import JsonTo, Positive

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
    from json import loads

    from msgspec.structs import replace

    from kvasir.cli.output import progress, say, unique, write_json
    from kvasir.cli.overrides import with_policy
    from kvasir.cli.simulate import headline, load, with_workload, workload_of
    from kvasir.measure.results import canonical
    from kvasir.measure.tables import compare_table
    from kvasir.policy.route import ROUTES

    spec = load(deployment)
    names = unique(n.strip() for n in policies.split(",")) if policies else tuple(ROUTES)
    specs = {name: with_policy(spec, name) for name in names}
    seed = spec.seed if seed is None else seed
    arrivals = workload_of(spec, trace, limit, seed)
    say(headline(spec, arrivals, ", ".join(names), seed), json)

    from kvasir.measure.intervals_table import intervals_table
    from kvasir.runtime.sweep import Case, sweep

    flags = {"trace": trace, "limit": limit}
    given = {k: v for k, v in flags.items() if v is not None}
    used = [seed + i for i in range(seeds or 1)]
    cases = [
        Case(name, with_workload(one, given), number)
        for name, one in specs.items()
        for number in used
    ]
    with progress(f"{spec.name}, {len(cases)} runs") as report:
        runs = sweep(cases, jobs=jobs, progress=report)
    by_name = {
        name: [r for r, c in zip(runs, cases, strict=True) if c.label == name] for name in names
    }
    results = {name: found[0] for name, found in by_name.items()}
    columns = []
    for name, result in results.items():
        notes = unique((*result.summary.notes, *result.notes))
        own = tuple(n for n in notes if n not in arrivals.notes)
        columns.append((name, replace(result.summary, notes=own)))
    say("\n".join([compare_table(columns), *(f"* {note}" for note in arrivals.notes)]), json)
    say(intervals_table({n: [r.summary for r in rs] for n, rs in by_name.items()}), json)
    content = {n: [loads(r.to_json()) for r in rs] for n, rs in by_name.items()}
    write_json(json, canonical(content))
