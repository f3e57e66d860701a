"""NetKV (arXiv 2606.03910) reproduced in simulation, and beaten where it is blind.

    python -m bench.netkv [--tables main,heat] [--jobs 2] [--quick] [--json FILE]
    python -m bench.netkv --docs      # tables and charts of docs/netkv.md from the results file

Everything that is simulated stands in bench/netkv.yaml. Results go to bench/results/netkv.json: by
table, row and policy one value a replicate. docs/netkv.md says what they mean.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.netkv_doc import write_docs
from bench.netkv_packets import crosscheck
from bench.netkv_runs import ARMS, Figures, Setting, run, study_file

RESULTS = Path(__file__).parent / "results" / "netkv.json"
QUICK_REQUESTS = 40
BASE = "cache_load"
ABLATION = (BASE, "netkv_static", "netkv_self", "netkv")
PAIR = (BASE, "netkv")
HONEST = (
    BASE, "cache_load, decode only", "netkv_static", "netkv", "netkv_path", "netkv_joint",
    "exact_maxmin", "clairvoyant",
)  # fmt: skip
READERS = ("netkv_path", "netkv_joint")
DIGITS = 6


class Cell(NamedTuple):
    """One figure of a table: its runs, one a replicate."""

    table: str
    row: str
    arm: str
    settings: tuple[Setting, ...]


class Study(NamedTuple):
    """The study section, perhaps cut down. `replicates`: slices of the trace, and seeds."""

    spec: dict[str, Any]
    replicates: tuple[int, ...]
    requests: int

    def paper(self, arm: str, **more: Any) -> tuple[Setting, ...]:
        return self._each("paper", arm, {"rate": self.spec["rate"]} | more)

    def honest(self, arm: str, **more: Any) -> tuple[Setting, ...]:
        return self._each("honest", arm, {"rate": self.spec["honest_rate"]} | more)

    def _each(self, cluster: Any, arm: str, more: dict[str, Any]) -> tuple[Setting, ...]:
        requests = min(more.pop("requests", self.requests), self.requests)
        return tuple(Setting(cluster, arm, n, requests=requests, **more) for n in self.replicates)


# --- A: the paper's tables ------------------------------------------------------------------------


def main_table(study: Study) -> Iterator[Cell]:
    for row, rate in study.spec["rates"].items():
        for arm in ARMS["paper"]:
            yield Cell("main", row, arm, study.paper(arm, rate=rate))


def ablation(study: Study) -> Iterator[Cell]:
    for profile in study.spec["profiles"]:
        for arm in (*ABLATION, "netkv_path"):
            yield Cell("ablation", profile, arm, study.paper(arm, profile=profile))


def contexts(study: Study) -> Iterator[Cell]:
    for tokens in study.spec["contexts"]:
        changes = _generated(study, {"kind": "fixed", "mean": tokens, "max": tokens}, share=0.5)
        for arm in ("round robin", *PAIR, "netkv_path"):
            more = study.paper(arm, changes=changes, requests=study.spec["small"])
            yield Cell("contexts", f"{tokens // 1024}K", arm, more)


def sharing(study: Study) -> Iterator[Cell]:
    shared = study.spec["shared"]
    lengths = {"mean": shared["mean"], "sigma": shared["sigma"], "min": 512, "max": 120_000}
    for share in study.spec["sharing"]:
        changes = _generated(study, lengths, share=share)
        for arm in PAIR:
            more = study.paper(arm, changes=changes, requests=study.spec["small"])
            yield Cell("sharing", f"{share:g}", arm, more)


def _generated(
    study: Study, lengths: dict[str, Any], *, share: float
) -> tuple[tuple[str, Any], ...]:
    """Prompts of these lengths, of which a `share` starts with one of some common prefixes."""
    shared = study.spec["shared"]
    return (
        ("workload.trace", None),
        ("workload.input", lengths),
        ("workload.output", {"mean": 343, "sigma": 0.8, "min": 4, "max": 2000}),
        ("workload.prefix_share", share),
        ("workload.prefix_groups", shared["groups"]),
        ("workload.prefix_tokens", shared["tokens"]),
    )


def heat(study: Study) -> Iterator[Cell]:
    for profile in study.spec["profiles"]:
        for ratio in study.spec["oversubscriptions"]:
            for share in study.spec["backgrounds"]:
                for arm in PAIR:
                    more = study.paper(
                        arm, profile=profile, background=share, changes=oversubscribed(ratio),
                        requests=study.requests // 2,
                    )  # fmt: skip
                    yield Cell("heat", f"{profile} {ratio}:1 {share:g}", arm, more)


def oversubscribed(ratio: int) -> tuple[tuple[str, Any], ...]:
    """Pods at `ratio`, racks at half of it; caps per flow follow, so that 4:1 is the file's."""
    rack = max(1.0, ratio / 2)
    caps = [450e9, 12.5e9, 12.5e9 / rack, 12.5e9 / ratio]
    return (
        ("topology.rack_oversubscription", rack),
        ("topology.pod_oversubscription", float(ratio)),
        ("topology.tiers", [{"flow_bandwidth": cap} for cap in caps]),
    )


def staleness(study: Study) -> Iterator[Cell]:
    for period in study.spec["periods_s"]:
        more = study.paper("netkv", background=0.4, changes=_telemetry(period))
        yield Cell("staleness", f"{period:g} s", "netkv", more)
    yield Cell("staleness", "any", BASE, study.paper(BASE, background=0.4))


def _telemetry(period: float, error: float = 0.1) -> tuple[tuple[str, Any], ...]:
    """Readings each `period`, used until the next one is due."""
    told = {"period_s": period, "delay_s": 0.2, "error": error, "ttl_s": period + 1.0}
    return (("topology.telemetry", told),)


def scale(study: Study) -> Iterator[Cell]:
    for gpus in study.spec["scales"]:
        for arm in PAIR:
            more = study.paper(arm, grown=gpus // 64, requests=study.spec["small"])
            yield Cell("scale", f"{gpus}", arm, more[:3])


# --- B: honest ------------------------------------------------------------------------------------


def swing(study: Study) -> Iterator[Cell]:
    for rate in study.spec["honest_rates"]:
        every = rate == study.spec["honest_rate"]
        some = (BASE, "netkv", "netkv_path", "netkv_joint", "clairvoyant")
        for arm in ARMS["honest"] if every else some:
            yield Cell("swing", f"{rate:g}/s", arm, study.honest(arm, rate=rate))


def calm(study: Study) -> Iterator[Cell]:
    for arm in HONEST:
        yield Cell("calm", "no faults", arm, study.honest(arm, changes=(("faults", None),)))


def second_token(study: Study) -> Iterator[Cell]:
    for arm in HONEST:
        more = study.honest(arm, changes=(("first_token", "prefill"),))
        yield Cell("second", "first_token: prefill", arm, more)


def streamed(study: Study) -> Iterator[Cell]:
    changes = (
        ("transport.mode", "streamed"), ("policy.route.cost", "streamed"),
        ("policy.route.decode_choice", "arrival"),
    )  # fmt: skip
    for arm in HONEST:
        yield Cell("streamed", "streamed", arm, study.honest(arm, changes=changes))


def honest_staleness(study: Study) -> Iterator[Cell]:
    for period in study.spec["periods_s"]:
        for arm in READERS:
            more = study.honest(arm, changes=_telemetry(period))
            yield Cell("readings", f"{period:g} s", arm, more)
    for error in study.spec["errors"]:
        for arm in READERS:
            more = study.honest(arm, changes=_telemetry(1.0, error))
            yield Cell("readings", f"error {error:g}", arm, more)


def replayed(study: Study) -> Iterator[tuple[int, Setting]]:
    """Runs whose transfers are sent once more in other models: as the paper's, and narrower."""
    rate = max(study.spec["rates"].values())
    for ratio in study.spec["oversubscriptions"][-2:]:
        yield ratio, study.paper(BASE, rate=rate, changes=oversubscribed(ratio))[0]


TABLES = {
    "main": main_table, "ablation": ablation, "contexts": contexts, "heat": heat,
    "staleness": staleness, "sharing": sharing, "scale": scale, "swing": swing, "calm": calm,
    "second": second_token, "streamed": streamed, "readings": honest_staleness,
}  # fmt: skip


# --- running --------------------------------------------------------------------------------------


def tuned(study: Study, jobs: int) -> dict[str, dict[str, float]]:
    """Mean TTFT of cache_load on the first slice, by cluster and load weight."""
    first = study._replace(replicates=(0,))
    weights = [float(w) for w in study.spec["load_weights"]]
    wanted = [(*first.paper(BASE), w) for w in weights]
    wanted += [(*first.honest(BASE), w) for w in weights]
    found: dict[str, dict[str, float]] = {"paper": {}, "honest": {}}
    for (setting, weight), figures in zip(wanted, each(wanted, jobs), strict=True):
        found[setting.cluster][f"{weight:g}"] = round(figures.ttft_s, DIGITS)
    return found


def best(ttft_s: dict[str, float]) -> float:
    return float(min(ttft_s, key=lambda weight: (ttft_s[weight], float(weight))))


def each(wanted: Sequence[tuple[Setting, float]], jobs: int) -> list[Figures]:
    """Figures in the order of `wanted`; equal runs are made once."""
    distinct = list(dict.fromkeys(map(_named, wanted)))
    by_name = dict(zip(map(_named, wanted), wanted, strict=True))
    todo = [by_name[name] for name in distinct]
    if jobs == 1:
        found = [run(*one) for one in todo]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            found = list(pool.map(run, *zip(*todo, strict=True), chunksize=1))
    by = dict(zip(distinct, found, strict=True))
    return [by[_named(one)] for one in wanted]


def _named(one: tuple[Setting, float]) -> str:
    return repr(one)


def measured(
    cells: Iterable[Cell], weights: dict[str, float], jobs: int
) -> dict[str, dict[str, dict[str, dict[str, list[Any]]]]]:
    """By table, row, arm and figure: one value a replicate."""
    every = list(cells)
    wanted = [(s, weights[s.cluster]) for cell in every for s in cell.settings]
    results = iter(each(wanted, jobs))
    found: dict[str, Any] = {}
    for cell in every:
        runs = [next(results) for _ in cell.settings]
        row = found.setdefault(cell.table, {}).setdefault(cell.row, {})
        row[cell.arm] = {name: [_short(getattr(r, name)) for r in runs] for name in _NAMES}
    return found


_NAMES = Figures.__struct_fields__


def _short(value: Any) -> Any:
    if isinstance(value, tuple):
        return [round(v, 4) for v in value]
    return round(value, DIGITS)


def cut_down(study: Study) -> Study:
    """A few requests of two replicates and the ends of each sweep: that it runs, not what it
    says."""
    ends = {
        key: [value[0], value[-1]]
        for key, value in study.spec.items()
        if isinstance(value, list) and len(value) > 2
    }
    ends["scales"] = [64, 128]
    rates = dict(list(study.spec["rates"].items())[:1])
    spec = study.spec | ends | {"rates": rates, "small": QUICK_REQUESTS}
    return Study(spec, study.replicates[:2], QUICK_REQUESTS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", help=f"of {', '.join(TABLES)}, packets (default: all)")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a few requests: that it runs")
    parser.add_argument("--json", type=Path, default=RESULTS, help="results, added to those there")
    parser.add_argument("--docs", action="store_true", help="only docs/netkv.md, of the results")
    flags = parser.parse_args(argv)
    if not flags.docs:
        _run(flags)
    if flags.docs or flags.json == RESULTS:
        write_docs(json.loads(RESULTS.read_text("utf-8")))


def _run(flags: argparse.Namespace) -> None:
    spec = study_file()["study"]
    study = Study(spec, tuple(range(1, spec["slices"])), spec["requests"])
    if flags.quick:
        study = cut_down(study)
    names = flags.tables.split(",") if flags.tables else [*TABLES, "packets"]
    began = time.perf_counter()
    tuning = tuned(study, flags.jobs)
    weights = {name: best(ttft_s) for name, ttft_s in tuning.items()}
    found: dict[str, Any] = {"tuning": tuning, "load_weight": weights}
    if flags.json.exists():
        found = json.loads(flags.json.read_text("utf-8")) | found
    for name in names:
        if name == "packets":
            found[name] = {f"{r}:1": crosscheck(s, weights["paper"]) for r, s in replayed(study)}
        else:
            found |= measured(TABLES[name](study), weights, flags.jobs)
        print(f"{name}: {time.perf_counter() - began:.0f} s, {cpu_s():.0f} CPU s", file=sys.stderr)
        flags.json.parent.mkdir(exist_ok=True)
        flags.json.write_text(dumped(found), "utf-8")


def cpu_s() -> float:
    """Of this process and of those that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def dumped(found: dict[str, Any]) -> str:
    """One line a policy: small, and readable in a diff."""
    lines = []
    for table, rows in found.items():
        if table in TABLES:
            inner = [
                f'  "{row}": {{\n'
                + ",\n".join(f'   "{a}": {json.dumps(f)}' for a, f in arms.items())
                + "\n  }"
                for row, arms in rows.items()
            ]
            lines.append(f' "{table}": {{\n' + ",\n".join(inner) + "\n }")
        else:
            lines.append(f' "{table}": {json.dumps(rows)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
