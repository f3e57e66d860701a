"""Fits against synthetic timings of known constants, with disturbances that real ones have."""

import random

import numpy as np
import pytest

from kvasir.core.specs.deployment import FittedCost
from kvasir.cost.step import Fitted, Row
from kvasir.measure.engine_probe import Extent, checks, grid
from kvasir.measure.fit import Fit, Sample, choose, errors, fit, ladder, non_negative

EXTENT = Extent(tokens=512, batch=16, context=1024)
LINE = FittedCost(
    overhead_s=0.012, per_token_s=6e-4, per_attention_s=4e-7, per_context_s=2e-6, per_row_s=3e-4,
    per_prompt_context_s=5e-6,
)  # fmt: skip
BENT = FittedCost(
    overhead_s=0, per_token_s=0, per_context_s=3e-6, per_row_s=2e-4,
    curve=((1, 0.010), (8, 0.020), (21, 0.021), (512, 0.4)),
)  # fmt: skip


def samples(cost: FittedCost, shapes: list[tuple[Row, ...]] | None = None) -> list[Sample]:
    model = Fitted(cost)
    return [Sample(rows, model.batch(rows)) for rows in shapes or grid(EXTENT)]


def held_out(cost: FittedCost) -> list[Sample]:
    return samples(cost, checks(EXTENT, seed=3))


def test_a_line_is_found_again() -> None:
    found = fit(samples(LINE)).cost.model_dump(exclude={"curve"})
    assert found == pytest.approx(LINE.model_dump(exclude={"curve"}), rel=1e-3)


def test_a_line_is_taken_where_it_holds_though_a_curve_would_too() -> None:
    choice = choose(samples(LINE), held_out(LINE))
    assert not choice.curved and choice.best.cost.curve == ()
    assert choice.errors.worst < 0.002
    assert choice.curve_errors.worst < 0.01


def test_a_curve_is_taken_where_the_line_does_not_hold() -> None:
    choice = choose(samples(BENT), held_out(BENT))
    assert choice.line_errors.p90 > 0.1
    assert choice.curved
    assert choice.errors.median < 0.01
    bent = Fitted(choice.best.cost)
    for batch in (1, 3, 8, 13):
        assert bent.decode_line(batch) == pytest.approx(Fitted(BENT).decode_line(batch), rel=0.03)


def test_disturbed_steps_do_not_bend_the_rest() -> None:
    """One step in eight took three times as long, the others are off by 2 % either way."""
    rng = random.Random(5)
    noisy = [
        s._replace(seconds=s.seconds * (3 if rng.random() < 1 / 8 else rng.uniform(0.98, 1.02)))
        for s in samples(LINE)
    ]
    assert errors(fit(noisy), held_out(LINE)).worst < 0.05


def test_what_a_request_takes_is_told_from_what_a_step_takes() -> None:
    """Prompts one at a time, seen by a client; decode gaps, which hold no request."""
    model = Fitted(LINE)
    prompts = [((n, 0),) for n in ladder(8, 512)]
    gaps = [((1, c),) * b for b in (1, 4, 16) for c in (30, 400, 900)]
    seen = [Sample(rows, model.batch(rows) + 0.007, request=True) for rows in prompts]
    found = fit([*seen, *samples(LINE, [*gaps])])
    assert found.request_s == pytest.approx(0.007, rel=0.02)
    assert errors(found, seen).worst < 0.002


def test_a_constant_that_would_be_negative_is_zero() -> None:
    """Steps that get cheaper with context, as noise can make them."""
    falling = [s._replace(seconds=0.02 - 1e-6 * s.rows[0][1])
               for s in samples(LINE, [((1, c),) for c in range(0, 900, 100)])]  # fmt: skip
    cost = fit(falling).cost
    assert cost.per_context_s == 0
    assert min(cost.model_dump(exclude={"curve"}).values()) >= 0


def test_a_curve_never_falls() -> None:
    """Seconds that drop at 34 tokens come out flat there, as one value in between."""
    times = {2: 0.02, 5: 0.021, 13: 0.03, 34: 0.025, 89: 0.05}
    cost = fit([Sample(((n, 0),), s) for n, s in times.items()], list(times)).cost
    seconds = [s for _, s in cost.curve]
    assert seconds == sorted(seconds)
    assert Fitted(cost).batch(((89, 0),)) == pytest.approx(0.05, rel=0.05)


def test_errors_are_those_of_the_prediction() -> None:
    model = Fit(FittedCost(overhead_s=1.0, per_token_s=0.0), 0.5)
    off = errors(model, [Sample(((4, 0),), 1.0), Sample(((4, 0),), 2.0, request=True)])
    assert off == pytest.approx((0.125, 0.225, 0.25))


def test_the_ladder_has_both_ends_and_odd_steps() -> None:
    assert ladder(1, 1) == [1]
    assert ladder(2, 50) == [2, 3, 5, 8, 13, 21, 34, 50]
    assert ladder(8, 512)[0] == 8 and ladder(8, 512)[-1] == 512


@pytest.mark.parametrize("seed", range(20))
def test_non_negative_least_squares_end_where_no_step_helps(seed: int) -> None:
    """Karush, Kuhn, Tucker: no used column has a slope, no unused one an upward one. Columns depend
    on each other, nearly and exactly, as tokens and their ranges do."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(0, 1, (60, 12))
    a[:, 6] = a[:, 0] + a[:, 1]
    a[:, 7] = a[:, 2] * (1 + 1e-9 * rng.uniform(size=60))
    a[:, 8:] *= rng.uniform(1e-3, 1e3, 4)
    b = a @ np.maximum(rng.normal(size=12), 0) + rng.normal(size=60)
    x = non_negative(a, b)
    slope = a.T @ (b - a @ x) / np.linalg.norm(a, axis=0)
    assert x.min() >= 0
    assert np.abs(slope[x > 0]).max() < 1e-6
    assert slope[x == 0].max(initial=0.0) < 1e-6


def test_non_negative_least_squares_by_hand() -> None:
    """The first has the solution (2, -1): with x >= 0 the second is 0, the first the projection."""
    a = np.array([[1.0, 1.0], [0.0, 1.0]])
    assert non_negative(a, np.array([1.0, -1.0])) == pytest.approx([1.0, 0.0])
    assert non_negative(a, np.array([3.0, 1.0])) == pytest.approx([2.0, 1.0])
    assert non_negative(a, np.array([-1.0, -1.0])) == pytest.approx([0.0, 0.0])
