"""Guessing in virtual time: what it is charged, what it brings, and that no token is lost."""

from __future__ import annotations

import pytest

from kvasir.core.effects import Row, Step
from kvasir.core.events import Speculated
from kvasir.core.specs import Deployment, ModelSpec
from kvasir.core.specs.speculate import SpeculateSpec
from kvasir.cost.step import Fitted
from kvasir.world.sim.executor import Executor
from tests.sims import FITTED, arrivals, cluster, watched

MODEL = Fitted(FITTED)


def guessing(acceptance: float | None, rows_max: int = 64, **more: object) -> Deployment:
    guess = None if acceptance is None else SpeculateSpec(acceptance=acceptance, rows_max=rows_max)
    d = cluster(**more)  # type: ignore[arg-type]
    models = (ModelSpec(name="m", shape="tiny", speculate=guess),)
    return d.model_copy(update={"models": models})


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_every_token_arrives_and_every_gap_is_counted(first_token: str) -> None:
    trace = arrivals(40, rate=8, output=120)
    tokens = sum(a.output_tokens for a in trace)
    paces = []
    for acceptance in (None, 0.0, 0.5, 0.8, 1.0):
        world = watched(guessing(acceptance, first_token=first_token), trace)
        outcomes = world.recorder.outcomes
        assert sum(o.output_tokens for o in outcomes) == tokens
        itl = world.recorder.itl.distribution((50.0,))
        assert itl.count == tokens - len(trace)
        told = world.events_of(Speculated)
        drafted, accepted = sum(e.drafted for e in told), sum(e.accepted for e in told)
        assert bool(drafted) == (acceptance is not None)
        assert accepted == {None: 0, 0.0: 0, 1.0: drafted}.get(acceptance, accepted)
        paces.append(itl.mean_s)
    plain, wrong, *right = paces
    assert plain < wrong < 1.1 * plain, "wrong guesses cost a little, and are given up"
    assert plain > right[0] > right[1] > right[2] and plain > 3 * right[2]


def test_no_guesses_above_rows_max() -> None:
    """All at once: nobody guesses before few are left."""
    trace = [a._replace(at_s=0.0) if hasattr(a, "_replace") else a for a in arrivals(30, rate=1e4)]
    few = watched(guessing(0.8, rows_max=1, count=1), trace).events_of(Speculated)
    many = watched(guessing(0.8, rows_max=64, count=1), trace).events_of(Speculated)
    assert len(few) < 5 < len(many)


# --- the executor ---------------------------------------------------------------------------------

OUTPUTS = {"a": 40, "b": 9, "p": 30}
ROW = Row("a", 1, 100, 1, sample=True, index=3, end_at=40, draft=4)


def begun(*rows: Row, steps: int = 8, acceptance: float = 0.6) -> Executor:
    executor = Executor(MODEL, OUTPUTS.__getitem__, acceptance=acceptance)
    executor.begin(0.0, Step(1, rows, steps))
    return executor


def test_each_iteration_is_charged_all_guesses() -> None:
    executor = begun(ROW, steps=1, acceptance=0.0)
    assert executor.finish().ended == MODEL.batch([(5, 100)])
    last = Row("a", 1, 136, 1, sample=True, index=39, end_at=40, draft=4)
    assert begun(last, steps=1).finish().ended == MODEL.batch([(1, 136)]), "none left to guess"


def test_it_ends_with_the_first_row_that_ends() -> None:
    short = Row("b", 1, 50, 1, sample=True, index=2, end_at=100, draft=4)
    outcome = begun(ROW, short, acceptance=1.0).finish()
    a, b = outcome.rows
    assert outcome.steps == 2, "five, then the last two of nine"
    assert (a.sampled, a.end, b.sampled, b.end) == (10, "", 7, "stop")
    assert (b.drafted, b.accepted) == (8, 6), "two of four right ones were beyond the end"


def test_beside_rows_that_stay_and_a_prompt() -> None:
    stays = Row("p", 1, 60, 1, sample=True, index=5, end_at=30, stays=True)
    outcome = begun(ROW, stays, steps=3, acceptance=1.0).finish()
    assert [row.sampled for row in outcome.rows] == [15, 3]
    assert {d.request_id: d.count for d in outcome.drawn} == {"a": 15, "p": 3}
    prompt = Row("p", 1, 0, 20)
    outcome = begun(ROW, prompt, steps=1, acceptance=1.0).finish()
    assert outcome.ended == MODEL.batch([(5, 100), (20, 0)])
    assert [row.sampled for row in outcome.rows] == [5, 0]


def test_a_cut_ends_it_after_the_running_iteration() -> None:
    """At any time: as if it had been asked for so many iterations only."""
    whole = begun(ROW)
    ends = [begun(ROW, steps=n).finish() for n in range(1, 9)]
    assert ends[-1].ended == whole.ends_at
    for n, end in enumerate(ends[:-1]):
        for at in (0.0 if n == 0 else ends[n - 1].ended, 0.999 * end.ended):
            executor = begun(ROW)
            assert executor.cut(at, 1) == end.ended
            assert executor.finish().rows == end.rows
    assert begun(ROW).cut(0.99 * whole.ends_at, 1) is None, "it ends by itself"


def test_a_death_loses_the_running_iteration_only() -> None:
    ends = [begun(ROW, steps=n).finish() for n in range(1, 9)]
    for n in (1, 4, 7):
        outcome = begun(ROW).crash(0.5 * (ends[n - 1].ended + ends[n].ended))
        assert outcome is not None and outcome.rows == ends[n - 1].rows
        assert sum(d.count for d in outcome.drawn) == ends[n - 1].rows[0].sampled


def test_the_first_token_is_told_when_it_is_drawn() -> None:
    row = Row("a", 1, 100, 1, sample=True, index=0, end_at=40, draft=4)
    executor = begun(row, acceptance=1.0)
    assert executor.joins
    (first,) = executor.first_drawn()
    assert (first.index, first.count) == (0, 5)
    assert executor.first_drawn() == ()
    (rest,) = executor.finish().drawn
    assert (rest.index, rest.count) == (5, 35)
