"""How far the simulator is from measured servers: median and p90 absolute error of TTFT and TPOT.

    python -m bench.accuracy FILE [--all] [--others N] [--loo] [--aiconfigurator ANSWERS]

Each row is simulated as it was measured: a closed loop of users on the row's deployment, by the
same conductor and workers that serve live; vLLM's rows under `batch: vllm_v1`, whose error is shown
beside that of `token_budget`. Headline 1 are the rows whose system, backend, precision and
attention have measured tables. Headline 2 are all rows by what they lack: `--others` of the rest,
drawn evenly, or every one with `--all`. The constants around the tables (`Engine`, `FrontEnd`) were
chosen on this file, so `--loo` chooses them again without each (system, model) and prints the error
on what was left out. `--aiconfigurator` puts the answers that bench/ask_aiconfigurator.py wrote
beside ours. The last line is JSON.
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

from bench.silicon import Case, Group, read
from kvasir.core.errors import KvasirError
from kvasir.core.specs import PoolSpec
from kvasir.core.specs.deployment import MeasuredCost
from kvasir.cost.catalog import shape_of
from kvasir.cost.measured import Engine, Measured
from kvasir.measure.calibration import load_tables
from kvasir.traces.closed import ClosedSpec
from kvasir.world.sim.closed import simulate_closed

GOALS = {"ttft": 0.12, "tpot": 0.08}
REQUESTS_MIN, USERS_MAX = 160, 512
LOO_ROWS, LOO_USERS_MAX = 120, 64


class FrontEnd(NamedTuple):
    """From a client to the engine and back: one constant a cause.

    `request_s`: HTTP, processes and sockets on the way. Client and server take requests in one
    after another (`serial_s` and `token_s` each: making, sending, templates, tokenising), so users
    who start together wait for each other there. Both are single event loops that also pass on the
    tokens of all other streams, step by step, and a request and its first token wait for those:
    `stream_s` for each user.
    """

    request_s: float = 6e-3
    serial_s: float = 1.5e-3
    token_s: float = 6e-6
    stream_s: float = 0.5e-3

    def one_s(self, case: Case) -> float:
        """The serial part of one request."""
        mean = case.input_tokens * (1 + case.length_min_share) / 2
        return self.serial_s + self.token_s * mean

    def whole_s(self, case: Case) -> float:
        """All of it while the others' streams run."""
        return self.request_s + self.one_s(case) + self.stream_s * case.users


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
    serial_s, front_s = constants.front.one_s(case), constants.front.whole_s(case)
    requests = min(case.waves * case.users, max(2 * case.users, REQUESTS_MIN))
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
        share = 1 / case.waves
        return statistics.fmean(values) * share + statistics.fmean(later) * (1 - share)

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
    "request_s": (3e-3, 9e-3),
    "token_s": (3e-6, 9e-6),
    "stream_s": (0.3e-3, 0.7e-3),
    "kernel": (1.04, 1.12),
    "prefill_experts": (1.0, 1.5),
    "layer_s": (4e-6, 12e-6),
    "host_row_s": (25e-6, 50e-6),
}


def changed(name: str, value: float) -> Constants:
    base = Constants()
    if name in FrontEnd._fields:
        return base._replace(front=base.front._replace(**{name: value}))
    return base._replace(engine=Engine(**{**base.engine._asdict(), name: value}))


def left_out(cases: Sequence[Case], found: dict[str, Errors]) -> dict[str, Errors]:
    """Errors of each group under the constants that are best for all others."""
    effects: dict[str, dict[float, dict[str, Errors]]] = {}
    for name, values in STEPS.items():
        effects[name] = {v: errors(cases, changed(name, v)) for v in values}
    apart: dict[str, Errors] = {}
    for group in sorted({c.group for c in cases}):
        others = [c.id for c in cases if c.group != group and c.id in found]
        chosen = _best(others, found, effects)
        mine = [c.id for c in cases if c.group == group and c.id in found]
        apart |= {i: _moved(i, chosen, found, effects) for i in mine}
    return apart


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


def by_batching(cases: Sequence[Case], found: dict[str, Errors]) -> None:
    """vLLM's rows under its own batching and under `token_budget`: the model's own error."""
    heading(f"batching, {len(cases)} rows of vLLM")
    line("vllm_v1", [found[c.id] for c in cases])
    other = errors([c.batched("token_budget") for c in cases], Constants())
    line("token_budget", list(other.values()))


class Answered(NamedTuple):
    """One line that bench/ask_aiconfigurator.py wrote."""

    id: str
    ttft_s: float | None
    tpot_s: float | None
    error: str


def beside(path: Path, cases: Sequence[Case], found: dict[str, Errors]) -> dict[str, Any]:
    """AIConfigurator's errors and ours on the rows that it answered."""
    lines = [Answered(**json.loads(text)) for text in path.read_text().splitlines()]
    theirs, unanswered = dict[str, Errors](), Counter[str]()
    truth = {c.id: c for c in cases if c.id in found}
    for answer in lines:
        case = truth.get(answer.id)
        if case is None:
            continue
        if not answer.ttft_s or not answer.tpot_s:
            unanswered[answer.error or "an answer of 0"] += 1
            continue
        theirs[case.id] = Errors(
            math.log(answer.ttft_s / case.truth_ttft_s),
            math.log(answer.tpot_s / case.truth_tpot_s),
        )
    heading(f"AIConfigurator: {len(theirs)} rows answered, {sum(unanswered.values())} not")
    for why, count in unanswered.most_common(5):
        print(f"not answered, {count} rows: {why}")
    groups: dict[str, list[str]] = {}
    for i in theirs:
        groups.setdefault(" ".join(truth[i].group), []).append(i)
    for name in sorted(groups):
        line(f"{name}: AIConfigurator", [theirs[i] for i in groups[name]])
        line(f"{name}: Kvasir", [found[i] for i in groups[name]])
    total = line("all: AIConfigurator", list(theirs.values()))
    ours = line("all: Kvasir", [found[i] for i in theirs])
    return {"theirs": total._asdict(), "ours": ours._asdict()}


def by_coverage(cases: Sequence[Case], found: dict[str, Errors], of: Counter[str]) -> None:
    heading(f"headline 2: {len(cases)} of {sum(of.values())} rows, by what lacks")
    for name in sorted(of):
        mine = [found[c.id] for c in cases if c.coverage == name and c.id in found]
        if mine:
            line(f"{name} ({of[name]})", mine)
    line("all", [found[c.id] for c in cases if c.id in found])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="CSV of measured servers")
    parser.add_argument("--all", action="store_true", help="every row that says enough")
    parser.add_argument("--others", type=int, default=150, help="rows outside headline 1")
    parser.add_argument("--headline", type=int, default=10**6, help="rows of headline 1 at most")
    parser.add_argument("--batching", type=int, default=60, help="rows to batch both ways")
    parser.add_argument("--loo", action="store_true", help="leave one (system, model) out")
    parser.add_argument("--aiconfigurator", type=Path, help="answers to put beside ours")
    return parser.parse_args()


def main() -> None:
    flags = parsed()
    began = time.process_time()
    cases, skipped = read(flags.file)
    headline = [c for c in cases if c.coverage == "headline"]
    rest = [c for c in cases if c.coverage != "headline"]
    print(f"{len(cases) + len(skipped)} rows: {len(headline)} headline 1, {len(rest)} others, "
          f"{len(skipped)} not simulated ({dict(Counter(s.why for s in skipped))})")  # fmt: skip
    headline = evenly(headline, flags.headline)
    small = [c for c in rest if flags.all or c.users <= USERS_MAX]
    others = small if flags.all else evenly(small, flags.others)
    measured_part(headline)
    found = errors([*headline, *others], Constants())
    done = [c for c in headline if c.id in found]
    heading("headline 1, by system, backend, model and mode")
    by_group(done, found)
    total = line("all", [found[c.id] for c in done])
    summary: dict[str, Any] = {"headline": total._asdict(), "goals": GOALS}
    by_coverage([*headline, *others], found, Counter(c.coverage for c in cases))
    if others:
        heading("... the others by system, backend, model and mode")
        by_group(others, found)
    by_batching(evenly([c for c in done if c.users <= LOO_USERS_MAX], flags.batching), found)
    if flags.loo:
        summary["loo"] = _loo_report(done, found)
    if flags.aiconfigurator is not None:
        summary["aiconfigurator"] = beside(flags.aiconfigurator, done, found)
    print(f"\ngoals: median TTFT <= {GOALS['ttft']:.0%}, median TPOT <= {GOALS['tpot']:.0%}; "
          f"{time.process_time() - began:.0f} CPU s")  # fmt: skip
    print(json.dumps(summary))


def _loo_report(headline: Sequence[Case], found: dict[str, Errors]) -> dict[str, Any]:
    tried = evenly([c for c in headline if c.users <= LOO_USERS_MAX], LOO_ROWS)
    apart = left_out(tried, found)
    heading(f"left out by (system, model), of {len(tried)} rows with <= {LOO_USERS_MAX} users")
    groups: dict[Group, list[Errors]] = {}
    for case in tried:
        groups.setdefault(case.group, []).append(apart[case.id])
    for group in sorted(groups):
        line(" ".join(group), groups[group])
    chosen_here = line("as chosen on all", [found[c.id] for c in tried])
    total = line("left out", list(apart.values()))
    return {"left_out": total._asdict(), "chosen_on_all": chosen_here._asdict()}


if __name__ == "__main__":
    main()
