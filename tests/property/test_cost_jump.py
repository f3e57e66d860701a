"""A jump over k decode iterations equals stepping through them, whenever it is interrupted."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.specs import HARDWARE, ModelSpec
from kvasir.core.specs.deployment import FittedCost, MeasuredCost, ProfileCost
from kvasir.cost.catalog import shape_of
from kvasir.cost.measured import Measured
from kvasir.cost.profile import TwoPhases, profiled
from kvasir.cost.published import DISTSERVE
from kvasir.cost.step import Fitted, Roofline, StepModel
from kvasir.measure.calibration import load_tables

REL = 1e-9


def roofline(name: str, hardware: str, tp: int, pp: int = 1) -> Roofline:
    return Roofline(shape_of(ModelSpec(name=name)), HARDWARE[hardware], tp, pp)


def measured(name: str, hardware: str, tp: int, pp: int = 1, **cost: object) -> Measured:
    shape, spec = shape_of(ModelSpec(name=name)), MeasuredCost.model_validate(cost)
    return Measured(shape, HARDWARE[hardware], tp, pp, spec, load_tables(hardware))


ARMS: dict[str, StepModel] = {
    "dense": roofline("llama-3-70b", "h100", 4),
    "experts": roofline("mixtral-8x7b", "a100", 2),
    "latent": roofline("deepseek-v3", "h100", 16),
    "stages": roofline("opt-175b", "a100", 4, 3),
    "processor": roofline("tiny", "cpu", 1),
    "measured": measured("llama-3-70b", "h100", 4, gemm="fp8", kv="fp8"),
    "measured experts": measured("minimax-m2.5", "h200", 4, gemm="fp8_block", ep=4, dp=4),
    "measured windows": measured("gpt-oss-120b", "b200", 2, moe="w4a8_mxfp4_mxfp8"),
    "measured, host waits": measured("llama-3.1-8b", "a100", 1, asynchronous=False),
    "measured, no tables": measured("deepseek-v3", "a40", 8, 2),
    "profile": profiled(ProfileCost(source="splitwise"), "llama-2-70b", "h100", 8, ""),
    "profile of one's own": profiled(
        ProfileCost(prefill=((1, 1e-3), (64, 9e-3)), decode=((2, 5e-3), (3, 4e-3), (9, 2e-2))),
        "", "", 1, "",
    ),
    "two phases": TwoPhases(DISTSERVE["opt-13b", "a100", 1]._replace(large_from=12)),
    "fitted": Fitted(
        FittedCost(overhead_s=4e-3, per_token_s=1e-4, per_attention_s=1e-9, per_context_s=3e-8)
    ),
    "fitted curve": Fitted(
        FittedCost(
            overhead_s=0, per_token_s=0, per_context_s=3e-6, per_row_s=2e-4,
            curve=((2, 0.01), (8, 0.02), (21, 0.021)),
        )
    ),
    "fitted without context": Fitted(FittedCost()),
    "fitted steep": Fitted(FittedCost(overhead_s=1e-9, per_token_s=0.0, per_context_s=1e-3)),
}
arms = pytest.mark.parametrize("arm", ARMS)
contexts = st.lists(st.integers(1, 131_072), min_size=1, max_size=24)


@arms
@given(contexts, st.integers(1, 120), st.lists(st.floats(0, 1), max_size=5))
def test_a_jump_equals_stepping_under_interrupts(
    arm: str, contexts: list[int], k: int, interrupts: list[float]
) -> None:
    """Interrupts come at shares of the whole time; each ends the running jump after its current
    iteration, and another jump does what is left."""
    cost, rows = ARMS[arm], len(contexts)
    stepped = math.fsum(cost.batch([(1, c - 1 + j) for c in contexts]) for j in range(k))
    assert math.isclose(cost.elapsed(rows, sum(contexts), k), stepped, rel_tol=REL)
    now, done, context = 0.0, 0, sum(contexts)
    for share in sorted(interrupts):
        at = share * stepped
        if at < now:
            continue  # the iteration that was cut is still running
        here = min(cost.steps_within(rows, context, at - now) + 1, k - done)
        now += cost.elapsed(rows, context, here)
        done, context = done + here, context + here * rows
    now += cost.elapsed(rows, context, k - done)
    assert math.isclose(now, stepped, rel_tol=REL)


@arms
@given(contexts, st.floats(0, 1e4))
def test_the_inverse_is_exact(arm: str, contexts: list[int], seconds: float) -> None:
    cost, rows, context = ARMS[arm], len(contexts), sum(contexts)
    k = cost.steps_within(rows, context, seconds)
    assert cost.elapsed(rows, context, k) <= seconds < cost.elapsed(rows, context, k + 1)


@arms
@given(contexts, st.integers(1, 10**6))
def test_the_inverse_finds_the_very_iteration_that_ends_now(
    arm: str, contexts: list[int], k: int
) -> None:
    cost, rows, context = ARMS[arm], len(contexts), sum(contexts)
    end = cost.elapsed(rows, context, k)
    assert cost.steps_within(rows, context, end) == k
    assert cost.steps_within(rows, context, math.nextafter(end, 0.0)) == k - 1


@arms
@given(contexts)
def test_iterations_add_up(arm: str, contexts: list[int]) -> None:
    cost, rows, context = ARMS[arm], len(contexts), sum(contexts)
    singles = math.fsum(cost.iteration_seconds(rows, context, j) for j in range(50))
    assert math.isclose(singles, cost.elapsed(rows, context, 50), rel_tol=REL)
