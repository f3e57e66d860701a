"""The search behind docs/when-to-disaggregate.md: who is compared, and how a run is judged."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bench.disaggregate import CELLS, FOUR, QUICK, best_of, family, joint, mixed, ratio, split
from bench.goodput import (
    ATTAINED,
    STEP,
    Cell,
    Contender,
    Tally,
    arrivals,
    at_rate,
    deployment,
    highest,
    models,
    run,
    served,
    shares,
)
from kvasir.measure.summary import good
from kvasir.net.topology import Topology

ROOT = Path(__file__).parents[2]
EVERY = [(cell, name) for cell in CELLS for name in cell.contenders]


@pytest.mark.parametrize("threshold", [0.004, 0.9, 1.0, 1.05, 37.0, 900.0])
def test_the_highest_rate_is_found_from_any_guess(threshold: float) -> None:
    asked: list[float] = []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return rate <= threshold

    found = highest(meets, 1.0)
    assert threshold / (1 + STEP) <= found <= threshold
    assert len(asked) < 20 and len(set(asked)) == len(asked)


def test_nothing_meets() -> None:
    assert highest(lambda rate: False, 1.0) == 0.0


@pytest.mark.parametrize(("cell", "name"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_every_contender_has_all_gpus_of_its_cell(cell: Cell, name: str) -> None:
    d = deployment(cell, cell.contenders[name])
    assert sum(pool.count * pool.gpus for pool in d.pools) == cell.gpus
    placed = Topology(d.topology).place(d)
    assert sorted(gpu for place in placed.values() for gpu in place.gpus) == list(range(cell.gpus))
    assert d.slo == cell.slo


def test_roles_stand_near_each_other_or_apart() -> None:
    assert [shares(n, 2, near=True) for n in (1, 2, 3, 4)] == [(1, 0), (1, 1), (2, 1), (2, 2)]
    assert [shares(n, 2, near=False) for n in (1, 2, 3, 4)] == [(1, 0), (2, 0), (2, 1), (2, 2)]
    cell = CELLS[1]
    for near, nodes in ((True, {"node-0", "node-1"}), (False, {"node-0"})):
        d = deployment(cell._replace(near=near), split(2))
        assert {n for p in d.pools if p.role == "prefill" for n in p.nodes or ()} == nodes


def test_rates_differ_in_nothing_but_time() -> None:
    cell = CELLS[0]
    slow, fast = at_rate(cell, 3, 2.0), at_rate(cell, 3, 8.0)
    assert len(slow) < len(fast) and fast[-1].at_s < cell.window_s
    for a, b in zip(slow, fast, strict=False):
        assert (a.input_tokens, a.output_tokens) == (b.input_tokens, b.output_tokens)
        assert a.at_s * 2.0 == pytest.approx(b.at_s * 8.0, rel=1e-12)
    assert at_rate(cell, 3, 2.0) == slow != at_rate(cell, 4, 2.0)
    assert len(fast) / (8.0 * cell.window_s) == pytest.approx(1.0, abs=0.2)
    with pytest.raises(ValueError, match="more than"):
        at_rate(cell, 3, 1e6)


def test_lengths_are_those_that_were_served() -> None:
    pairs = served("profiles/distserve_run.csv")
    assert len(pairs) == 300
    drawn = [(a.input_tokens, a.output_tokens) for a in arrivals("chat", 0)]
    assert set(drawn) == set(pairs)
    means = [statistics.fmean(column) for column in zip(*drawn, strict=True)]
    theirs = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    assert means == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize(
    ("good_", "missed", "met"),
    [(90, 0, True), (89, 10, None), (89, 11, False), (0, 10, None), (0, 11, False)],
)
def test_a_verdict_waits_until_it_is_certain(good_: int, missed: int, met: bool | None) -> None:
    assert Tally(good_, missed, 100).met is met


# (contender, requests per second and GPU): far below its limit, about there, above, far above
VERDICTS = [
    (who, rate)
    for who in (mixed(512), split(2), split(3), joint(1, 0.01))
    for rate in (0.5, 1.7, 2.6, 6.0)
]


@pytest.mark.parametrize(("who", "rate"), VERDICTS)
def test_an_early_verdict_is_the_whole_runs(who: Contender, rate: float) -> None:
    """And what an unfinished run counts as good or missed stays so."""
    cell = CELLS[1]._replace(window_s=5)
    early, _ = run(cell, who, 1, rate * cell.gpus)
    whole, judged = run(cell, who, 1, rate * cell.gpus, whole=True)
    assert len(judged) == whole.total == early.total == whole.good + whole.missed
    assert whole.good == sum(o.ok and good(o, cell.slo) for o in judged)
    assert early.met is whole.met is (whole.good >= ATTAINED * whole.total)
    assert early.good <= whole.good and early.missed <= whole.missed


def test_an_overloaded_run_is_given_up_early() -> None:
    """Before its requests end: what is overdue is known to be missed."""
    cell = CELLS[2]._replace(window_s=25)
    tally, judged = run(cell, split(3), 0, 1.0 * cell.gpus)
    assert tally.met is False
    assert tally.missed > 2 * len(judged)
    assert len(judged) < tally.total / 10


def test_vllm_of_2023_runs_prompts_by_themselves() -> None:
    cell = CELLS[1]
    who = cell.contenders["vLLM 2023"]
    (model,) = models(cell, who, deployment(cell, who)).values()
    prompt, decode = [(512, 0)], [(1, 300)] * 8
    assert model.batch(prompt + decode) == model.batch(prompt) + model.batch(decode)
    whole = mixed(8192)
    ours = models(cell, whole, deployment(cell, whole))["mixed"]
    assert ours.batch(prompt + decode) < 0.6 * model.batch(prompt + decode)
    assert model.iteration_seconds(8, 8 * 301) == model.batch(decode)


def test_the_best_of_each_family_and_paired_ratios() -> None:
    cell = CELLS[1]
    assert {family(who) for who in cell.contenders.values()} == {"", "mixed", "split", "choice"}
    goodput = {name: [1.0, 1.0, 1.0] for name in cell.contenders}
    goodput |= {"mixed 512": [2, 4, 6], "2P:2D": [1, 2, 6], "1P:3D stay": [3, 3, 3.0],
                "vLLM 2023": [9, 9, 9]}  # fmt: skip
    assert best_of(cell, goodput) == {"mixed": "mixed 512", "split": "2P:2D",
                                      "choice": "1P:3D stay"}  # fmt: skip
    found = ratio(goodput["2P:2D"], goodput["mixed 512"])
    assert found is not None and found.mean == pytest.approx(2 / 3)
    assert ratio([1.0], [0.0]) is None
    assert set(QUICK.contenders) <= set(FOUR)


def test_quick_prints_tables_and_one_json_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.disaggregate", "--quick", "--plots", tmp_path / "p"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *tables, last = done.stdout.splitlines()
    cell = json.loads(last)["cells"]["quick"]
    assert set(cell["goodput_per_gpu"]) == set(QUICK.contenders)
    # Two prefill workers share what four mixed ones do: fewer prompts start in time.
    whole, apart = (cell["goodput_per_gpu"][name] for name in ("mixed 2048", "2P:2D"))
    assert all(a < w for a, w in zip(apart, whole, strict=True))
    assert any("best split" in line for line in tables)
