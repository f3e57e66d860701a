"""How far the simulator is from measured servers: median and p90 absolute error of TTFT and TPOT.

    python -m bench.accuracy [FILE] [--all] [--others N] [--holdout]

Each row is simulated as it was measured: a closed loop of users on the row's deployment, by the
same conductor and workers that serve live. The headline rows are those whose system, backend,
precision and attention have measured tables; `--others` rows of the rest (drawn evenly) are shown
by what they lack; `--all` takes every one. The constants around the tables (`Engine`, `FrontEnd`)
were chosen on this file, so `--holdout` chooses them again without each (system, model) and prints
the error on what was left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.silicon import WAVES, Case, Group, read
from kvasir.core.errors import KvasirError
from kvasir.core.specs import PoolSpec
from kvasir.core.specs.deployment import MeasuredCost
from kvasir.cost.catalog import shape_of
from kvasir.cost.measured import Engine, Measured
from kvasir.measure.calibration import load_tables
from kvasir.traces.closed import ClosedSpec
from kvasir.world.sim.closed import simulate_closed

FILE = Path("../shared/data/calibration/silicon/silicon_sample.csv.gz")
GOALS = {"ttft": 0.12, "tpot": 0.08}
REQUESTS_MIN, USERS_MAX = 160, 512
HOLDOUT_USERS_MAX = 16


class FrontEnd(NamedTuple):
    """From a client to the engine and back.

    Client and server take requests in one after another (`serial_s` and `token_s` each: making,
    sending, templates, tokenising), so users who start together wait for each other there.
    """

    request_s: float = 11e-3
    serial_s: float = 1.5e-3
    token_s: float = 6e-6

    def one_s(self, case: Case) -> float:
        """The serial part of one request."""
        mean = case.input_tokens * (1 + case.length_min_share) / 2
        return self.serial_s + self.token_s * mean


class Constants(NamedTuple):
    engine: Engine = Engine()
    front: FrontEnd = FrontEnd()


class Times(NamedTuple):
    ttft_s: float
    tpot_s: float


class Errors(NamedTuple):
    """Logarithms of simulated over measured."""

    ttft: float
    tpot: float


def model_of(case: Case, pool: PoolSpec, engine: Engine) -> Measured:
    """Step times of one pool with these constants."""
    cost, d = pool.cost, case.deployment
    assert isinstance(cost, MeasuredCost)
    return Measured(
        shape_of(d.model_of(pool)), d.hardware_of(pool), pool.tp, pool.pp, cost,
        load_tables(cost.system), engine,
    )  # fmt: skip


def simulate(case: Case, constants: Constants) -> Times:
    """Means over the run. Of long runs only a part is simulated; the first wave, in which all
    users start together, keeps its share of the whole."""
    serial_s = constants.front.one_s(case)
    front_s = constants.front.request_s + serial_s
    requests = min(WAVES * case.users, max(2 * case.users, REQUESTS_MIN))
    spec = ClosedSpec(
        users=case.users, requests=requests, input_tokens=case.input_tokens,
        output_tokens=case.output_tokens, length_min_share=case.length_min_share,
        think_s=front_s, spread_s=serial_s,
    )  # fmt: skip
    models = {p.name: model_of(case, p, constants.engine) for p in case.deployment.pools}
    outcomes = simulate_closed(case.deployment, spec, models=models)
    first, rest = outcomes[: case.users], outcomes[case.users :]
    if any(not o.ok for o in outcomes):
        raise KvasirError(f"{case.id}: {Counter(o.error for o in outcomes if not o.ok)}")

    def mean(values: Sequence[float], later: Sequence[float]) -> float:
        return statistics.fmean(values) / WAVES + statistics.fmean(later) * (1 - 1 / WAVES)

    ttft = mean([o.ttft_s + (o.start_s or 0) for o in first], [o.ttft_s + front_s for o in rest])
    tpot = mean([o.tpot_s or 0 for o in first], [o.tpot_s or 0 for o in rest])
    return Times(ttft, tpot)


def errors(cases: Iterable[Case], constants: Constants) -> dict[str, Errors]:
    """By id. Equal loads are simulated once; one that cannot run is left out, and said so."""
    known: dict[tuple[object, ...], Times | None] = {}
    found = {}
    for case in cases:
        if case.load not in known:
            try:
                known[case.load] = simulate(case, constants)
            except KvasirError as error:
                known[case.load] = None
                print(f"not simulated: {case.id}: {str(error).splitlines()[0]}")
        times = known[case.load]
        if times is not None:
            found[case.id] = Errors(
                math.log(times.ttft_s / case.truth_ttft_s),
                math.log(times.tpot_s / case.truth_tpot_s),
            )
    return found


# --- figures --------------------------------------------------------------------------------------


def relative(log_error: float) -> float:
    return abs(math.expm1(log_error))


class Figures(NamedTuple):
    rows: int
    ttft_median: float
    ttft_p90: float
    ttft_bias: float
    tpot_median: float
    tpot_p90: float
    tpot_bias: float


def figures(found: Sequence[Errors]) -> Figures:
    def column(log_errors: list[float]) -> tuple[float, float, float]:
        sizes = sorted(map(relative, log_errors))
        p90 = sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]
        return statistics.median(sizes), p90, math.expm1(statistics.median(log_errors))

    return Figures(
        len(found), *column([e.ttft for e in found]), *column([e.tpot for e in found])
    )


LINE = "{:<58}{:>5}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}"


def heading(title: str) -> None:
    print(f"\n{title}")
    print(LINE.format("", "rows", "TTFT", "p90", "bias", "TPOT", "p90", "bias"))


def line(name: str, found: Sequence[Errors]) -> Figures:
    f = figures(found)
    shown = [f"{x:+.1%}" if i in (2, 5) else f"{x:.1%}" for i, x in enumerate(f[1:])]
    print(LINE.format(name[:57], f.rows, *shown))
    return f


def by_group(cases: Sequence[Case], found: dict[str, Errors]) -> None:
    names: dict[str, list[Errors]] = {}
    for case in cases:
        if case.id in found:
            name = f"{case.group.system} {case.backend} {case.group.model} {case.mode}"
            names.setdefault(name, []).append(found[case.id])
    for name in sorted(names):
        line(name, names[name])


# --- constants, without what they are tried on ----------------------------------------------------

# One change at a time; effects on the logarithm of a time are taken to add up.
STEPS: dict[str, tuple[float, ...]] = {
    "request_s": (5e-3, 16e-3),
    "token_s": (4e-6, 8e-6),
    "kernel": (1.0, 1.04),
    "prefill_experts": (1.2, 2.0),
    "layer_s": (4e-6, 12e-6),
    "host_row_s": (25e-6, 50e-6),
}


def changed(name: str, value: float) -> Constants:
    base = Constants()
    if name in FrontEnd._fields:
        return base._replace(front=base.front._replace(**{name: value}))
    return base._replace(engine=Engine(**{**base.engine._asdict(), name: value}))


def holdout(cases: Sequence[Case], found: dict[str, Errors]) -> dict[str, Errors]:
    """Errors of each group under the constants that are best for all others."""
    effects: dict[str, dict[float, dict[str, Errors]]] = {}
    for name, values in STEPS.items():
        effects[name] = {v: errors(cases, changed(name, v)) for v in values}
    left_out: dict[str, Errors] = {}
    for group in sorted({c.group for c in cases}):
        others = [c.id for c in cases if c.group != group and c.id in found]
        chosen = _best(others, found, effects)
        mine = [c.id for c in cases if c.group == group and c.id in found]
        left_out |= {i: _moved(i, chosen, found, effects) for i in mine}
    return left_out


Effects = dict[str, dict[float, dict[str, Errors]]]


def _moved(
    row: str, chosen: dict[str, float | None], found: dict[str, Errors], effects: Effects
) -> Errors:
    ttft, tpot = base = found[row]
    for name, value in chosen.items():
        if value is not None:
            ttft += effects[name][value][row].ttft - base.ttft
            tpot += effects[name][value][row].tpot - base.tpot
    return Errors(ttft, tpot)


def _best(rows: list[str], found: dict[str, Errors], effects: Effects) -> dict[str, float | None]:
    """Coordinate descent on the sum of the two median errors."""
    chosen: dict[str, float | None] = dict.fromkeys(effects)

    def cost() -> float:
        moved = [_moved(row, chosen, found, effects) for row in rows]
        f = figures(moved)
        return f.ttft_median + f.tpot_median

    best = cost()
    for _ in range(2):
        for name, values in effects.items():
            for value in (None, *values):
                before, chosen[name] = chosen[name], value
                now = cost()
                if now < best:
                    best = now
                else:
                    chosen[name] = before
    return chosen


# --- the run --------------------------------------------------------------------------------------


def evenly(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` of them, spread over the file's order."""
    if count >= len(cases):
        return list(cases)
    return [cases[i * len(cases) // count] for i in range(count)]


def measured_part(cases: Iterable[Case]) -> None:
    """Which operators of the headline's models are not measured as they are."""
    seen: Counter[str] = Counter()
    for case in cases:
        for pool in case.deployment.pools:
            parts = model_of(case, pool, Engine()).parts
            seen.update({part.source.name.lower() for part in parts})
    print("rows with an operator that is " + ", ".join(f"{k}: {v}" for k, v in seen.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    parser.add_argument("--all", action="store_true", help="every row that says enough")
    parser.add_argument("--others", type=int, default=150, help="rows outside the headline")
    parser.add_argument("--headline", type=int, default=10**6, help="headline rows at most")
    parser.add_argument("--holdout", action="store_true")
    flags = parser.parse_args()
    began = time.process_time()
    cases, skipped = read(flags.file)
    headline = [c for c in cases if c.coverage == "headline"]
    rest = [c for c in cases if c.coverage != "headline"]
    print(f"{len(cases) + len(skipped)} rows: {len(headline)} headline, {len(rest)} others, "
          f"{len(skipped)} not simulated ({dict(Counter(s.why for s in skipped))})")  # fmt: skip
    headline = evenly(headline, flags.headline)
    small = [c for c in rest if flags.all or c.users <= USERS_MAX]
    others = small if flags.all else evenly(small, flags.others)
    measured_part(headline)
    found = errors([*headline, *others], Constants())
    heading("headline, by system and model")
    by_group(headline, found)
    total = line("all", [found[c.id] for c in headline if c.id in found])
    summary: dict[str, Any] = {"headline": total._asdict(), "goals": GOALS}
    heading(f"others: {len(others)} of {len(rest)}")
    for name in sorted({c.coverage for c in others}):
        line(name, [found[c.id] for c in others if c.coverage == name and c.id in found])
    if others:
        by_group(others, found)
    if flags.holdout:
        summary["holdout"] = _holdout_report(headline, found)
    print(f"\ngoals: median TTFT <= {GOALS['ttft']:.0%}, median TPOT <= {GOALS['tpot']:.0%}; "
          f"{time.process_time() - began:.0f} CPU s")  # fmt: skip
    print(json.dumps(summary))


def _holdout_report(headline: Sequence[Case], found: dict[str, Errors]) -> dict[str, Any]:
    tried = [c for c in headline if c.users <= HOLDOUT_USERS_MAX and c.id in found]
    left_out = holdout(tried, found)
    heading(f"left out by (system, model), of {len(tried)} rows with <= {HOLDOUT_USERS_MAX} users")
    groups: dict[Group, list[Errors]] = {}
    for case in tried:
        groups.setdefault(case.group, []).append(left_out[case.id])
    for group in sorted(groups):
        line(" ".join(group), groups[group])
    chosen_here = line("as chosen on all", [found[c.id] for c in tried])
    total = line("left out", list(left_out.values()))
    return {"left_out": total._asdict(), "chosen_on_all": chosen_here._asdict()}


if __name__ == "__main__":
    main()
