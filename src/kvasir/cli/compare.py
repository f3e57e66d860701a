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
) -> None:
    """Simulate several policies on the same arrivals; the first one is the base of the ratios.

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
    """
    from json import loads

    from msgspec.structs import replace

    from kvasir.cli.output import progress, say, unique, write_json
    from kvasir.cli.overrides import with_policy
    from kvasir.cli.simulate import headline, load, workload_of
    from kvasir.measure.results import canonical
    from kvasir.measure.tables import compare_table
    from kvasir.policy.route import ROUTES

    spec = load(deployment)
    names = unique(n.strip() for n in policies.split(",")) if policies else tuple(ROUTES)
    specs = {name: with_policy(spec, name) for name in names}
    seed = spec.seed if seed is None else seed
    arrivals = workload_of(spec, trace, limit, seed)
    say(headline(spec, arrivals, ", ".join(names), seed), json)

    from kvasir.world.sim.run import simulate as run

    results = {}
    for name, one in specs.items():
        with progress(f"{spec.name}, {name}") as report:
            results[name] = run(one, arrivals, seed=seed, progress=report)
    columns = []
    for name, result in results.items():
        notes = unique((*result.summary.notes, *result.notes))
        own = tuple(n for n in notes if n not in arrivals.notes)
        columns.append((name, replace(result.summary, notes=own)))
    say("\n".join([compare_table(columns), *(f"* {note}" for note in arrivals.notes)]), json)
    write_json(json, canonical({name: loads(r.to_json()) for name, r in results.items()}))
