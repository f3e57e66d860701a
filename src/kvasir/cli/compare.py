"""`kvasir compare`: several policies or settings, the very same arrivals, one column each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from cyclopts import App

from kvasir.cli.simulate import JsonTo, Positive

if TYPE_CHECKING:
    from kvasir.core.specs import Deployment
    from kvasir.measure.summary import Summary
    from kvasir.traces.workload import Part
    from kvasir.world.sim.run import Result

app = App(name="compare")
NAMES_CHARS_MAX: Final = 100  # of the headline's list of names


@app.default
def compare(
    deployment: str | None = None,
    /,
    *,
    policies: str | None = None,
    grid: list[str] | None = None,
    tune_on: str | None = None,
    trace: str | None = None,
    seed: int | None = None,
    json: JsonTo = None,
    limit: Positive = None,
    seeds: Positive = 3,
    jobs: Positive = None,
    ray: str | None = None,
) -> None:
    """Simulate several policies on the same arrivals; the first one is the base of the ratios.

    The table is of the first seed; below it stand means over all seeds with 95 % intervals, and the
    differences from the first policy, paired by seed.

    Parameters
    ----------
    deployment
        A file, or the name of a bundled deployment (default: ./kvasir.yaml, else mooncake-64).
    policies
        Names of route policies, separated by commas (default: all; with --grid or --tune-on the
        deployment's own).
    grid
        Values of a policy parameter: --grid route.cache_weight=0.5,1,2. Given several times, every
        combination runs with every policy.
    tune_on
        Choose each policy's best combination (most goodput) on this first share of the requests,
        as 0.3, or on this other trace; then compare the chosen ones on the rest.
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
    ray
        Run on the Ray cluster at this address (HOST:PORT) instead.
    """
    from kvasir.cli.grid import axes, cells
    from kvasir.cli.output import unique
    from kvasir.cli.overrides import with_policy
    from kvasir.cli.simulate import load, with_workload
    from kvasir.core.errors import ConfigError
    from kvasir.policy.route import ROUTES

    if tune_on is not None and not grid:
        raise ConfigError("--tune-on needs something to choose from", next_step="add --grid")
    spec = load(deployment)
    every = (spec.policy.route.name,) if grid else tuple(ROUTES)
    names = unique(n.strip() for n in policies.split(",")) if policies else every
    flags = {"trace": trace, "limit": limit}
    given = {k: v for k, v in flags.items() if v is not None}
    specs = {name: with_policy(with_workload(spec, given), name) for name in names}
    how = How(spec.seed if seed is None else seed, seeds or 1, jobs, ray, json)
    found = {name: cells({name: one}, axes(grid or ())) for name, one in specs.items()}
    if tune_on is None:
        _compare({label: one for own in found.values() for label, one in own.items()}, how)
    else:
        _tune(specs, found, tune_on, how)


class How(NamedTuple):
    """What all runs of one comparison share."""

    seed: int
    seeds: int
    jobs: int | None
    ray: str | None
    json: str | None


def _compare(specs: Mapping[str, Deployment], how: How) -> None:
    from kvasir.cli.output import write_json
    from kvasir.measure.results import canonical
    from kvasir.traces.workload import Part

    write_json(how.json, canonical(_content(_shown_runs(specs, how, Part()))))


def _tune(
    specs: Mapping[str, Deployment], found: Mapping[str, Mapping[str, Deployment]], on: str,
    how: How,
) -> None:  # fmt: skip
    """Each policy's best cell on one slice; on the rest, that cell beside the policy as it is."""
    from kvasir.cli.output import say, write_json
    from kvasir.cli.simulate import with_workload
    from kvasir.measure.intervals_table import intervals_table
    from kvasir.measure.results import canonical
    from kvasir.measure.tune import best

    first, rest = _slices(on)
    tuned = {label: one for own in found.values() for label, one in own.items()}
    if first is None:
        tuned = {n: with_workload(one, {"trace": on, "limit": None}) for n, one in tuned.items()}
    runs = _runs(tuned, how, first)
    say(f"tuned on {on}", how.json)
    say(intervals_table(_summaries(runs)), how.json)
    chosen = {name: best(_summaries({c: runs[c] for c in own})) for name, own in found.items()}
    columns: dict[str, Deployment] = {}
    for name, label in chosen.items():
        different = len({b"".join(r.to_json() for r in runs[c]) for c in found[name]})
        says = f"chosen for {name}: {label} ({len(found[name])} settings, {different} results)"
        say(says, how.json)
        columns |= {name: specs[name], f"{name} tuned": found[name][label]}
    say("", how.json)
    content = {"chosen": chosen, "tuned": _content(runs)}
    write_json(how.json, canonical(content | {"rest": _content(_shown_runs(columns, how, rest))}))


def _slices(on: str) -> tuple[Part | None, Part]:
    """What to tune on (None: another trace) and what is left to report on."""
    from kvasir.core.errors import ConfigError
    from kvasir.traces.workload import Part

    try:
        share = float(on)
    except ValueError:
        return None, Part()
    if not 0 < share < 1:
        raise ConfigError(f"--tune-on {on}: a share is between 0 and 1", next_step="--tune-on 0.3")
    return Part(0.0, share), Part(share, 1.0)


def _runs(
    specs: Mapping[str, Deployment], how: How, part: Part | None
) -> dict[str, list[Result]]:
    """Every deployment with every seed, by label."""
    from kvasir.cli.output import progress
    from kvasir.runtime.sweep import Case, sweep
    from kvasir.traces.workload import Part

    seeds = range(how.seed, how.seed + how.seeds)
    cases = [Case(name, one, s, part or Part()) for name, one in specs.items() for s in seeds]
    with progress(f"{next(iter(specs.values())).name}, {len(cases)} runs") as report:
        results = iter(sweep(cases, jobs=how.jobs, ray=how.ray, progress=report))
    return {name: [next(results) for _ in seeds] for name in specs}


def _shown_runs(
    specs: Mapping[str, Deployment], how: How, part: Part
) -> dict[str, list[Result]]:
    """Run everything and print the tables."""
    from msgspec.structs import replace

    from kvasir.cli.output import say, unique
    from kvasir.cli.simulate import headline
    from kvasir.measure.intervals_table import intervals_table
    from kvasir.measure.tables import COLUMN, compare_table
    from kvasir.traces.workload import part_of, workload

    spec = next(iter(specs.values()))
    arrivals = part_of(workload(spec.workload, spec.block_size, how.seed), part)
    labels = ", ".join(specs)
    shown = labels if len(labels) <= NAMES_CHARS_MAX else f"{len(specs)} settings"
    say(headline(spec, arrivals, shown, how.seed), how.json)
    runs = _runs(specs, how, part)
    columns = []
    for name, found in runs.items():
        notes = unique((*found[0].summary.notes, *found[0].notes))
        own = tuple(n for n in notes if n not in arrivals.notes)
        columns.append((name, replace(found[0].summary, notes=own)))
    if all(len(name) < COLUMN - 1 for name in runs):  # else a column's head would be cut
        say(compare_table(columns), how.json)
    say("\n".join(f"* {note}" for note in arrivals.notes), how.json)
    say(intervals_table(_summaries(runs)), how.json)
    return runs


def _summaries(runs: Mapping[str, list[Result]]) -> dict[str, list[Summary]]:
    return {name: [r.summary for r in found] for name, found in runs.items()}


def _content(runs: Mapping[str, list[Result]]) -> dict[str, object]:
    from json import loads

    return {name: [loads(r.to_json()) for r in found] for name, found in runs.items()}
