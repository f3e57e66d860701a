"""A pool's cost by a published profile, or by pairs of one's own: what is asked, and slips."""

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.specs import Deployment, ModelSpec, PoolSpec
from kvasir.core.specs.deployment import FittedCost, MeasuredCost, ProfileCost
from kvasir.core.specs.parse import parse_deployment, resolved
from kvasir.cost.pools import step_model
from kvasir.cost.profile import Interpolated, TwoPhases

OWN = {"prefill": [[128, 0.05], [1024, 0.13]], "decode": [[1, 0.03], [8, 0.05]]}


def deployment(cost: object, model: str = "bloom-176b", hardware: str = "h100") -> Deployment:
    pool = PoolSpec(name="p", role="mixed", count=1, tp=8, hardware=hardware, cost=cost)  # type: ignore[arg-type]
    return Deployment(models=(ModelSpec(name=model),), pools=(pool,))


def text(cost: str) -> str:
    return (
        "models: [{name: bloom-176b}]\n"
        f"pools: [{{name: p, role: mixed, count: 1, tp: 8, cost: {cost}}}]\n"
    )


@pytest.mark.parametrize(
    ("cost", "kind"),
    [
        ("splitwise", ProfileCost), ({"source": "distserve"}, ProfileCost), (OWN, ProfileCost),
        ("measured", MeasuredCost), ({"gemm": "fp8"}, MeasuredCost), ({}, FittedCost),
        ({"overhead_s": 0.01}, FittedCost), ({"kind": "measured"}, MeasuredCost),
    ],
)  # fmt: skip
def test_which_cost_is_meant(cost: object, kind: type) -> None:
    """By name, by keys; and a deployment that was written out is read as the same."""
    d = deployment(cost)
    assert type(d.pools[0].cost) is kind
    assert Deployment.model_validate(d.model_dump(mode="json")) == d
    assert parse_deployment(resolved(d), "x.yaml") == d


def test_the_pools_model_hardware_and_tp_choose_the_profile() -> None:
    d = deployment("splitwise")
    model = step_model(d, d.pools[0])
    assert isinstance(model, Interpolated)
    assert model.batch([(2048, 0)]) == pytest.approx(0.251964)
    d = deployment("distserve", "opt-66b", "a100")
    assert isinstance(step_model(d, d.pools[0]), TwoPhases)


@pytest.mark.parametrize("model", ["llama-3-8b", "opt-66b"])
def test_a_profile_that_nobody_published_names_the_nearest(model: str) -> None:
    d = deployment("distserve", model)
    with pytest.raises(ConfigError, match=f"no profile of {model} on h100, tp 8") as error:
        step_model(d, d.pools[0])
    assert error.value.where == "pools.p.cost"
    assert "opt-66b on a100, tp 8" in error.value.nearest


def test_pairs_are_straight_between_and_go_on_beyond() -> None:
    d = deployment(OWN)
    model = step_model(d, d.pools[0])
    assert model.batch([(576, 0)]) == pytest.approx(0.09)
    assert model.batch([(100, 0), (1820, 0)]) == pytest.approx(0.13 + 0.08)
    assert model.batch([(2, 0)]) == pytest.approx(0.05 - 0.08 * 126 / 896)
    assert model.batch([(1, 7)] * 15) == pytest.approx(0.07)
    assert model.iteration_seconds(15, 10**6) == model.batch([(1, 7)] * 15)


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        ("mesured", "by name there are measured, splitwise and distserve"),
        ("{source: splitwse}", "cost.source is 'splitwse', not one of splitwise, distserve"),
        ("{prefil: 3, decode: 4}", "nearest: prefill"),
        ("{gem: fp8, ep: 2}", "nearest: gemm"),
        ("{kind: profile}", "either `source`, or both"),
        ("{source: splitwise, decode: [[1, 0.1], [2, 0.1]]}", "either `source`, or both"),
        ("{prefill: [[1, 0.1]], decode: [[1, 0.1], [2, 0.1]]}", "two pairs or more"),
        ("{prefill: [[2, 0.1], [2, 0.2]], decode: [[1, 0.1], [2, 0.1]]}", "by growing count"),
        ("{prefill: [[2, 0.1], [3, 0.3]], decode: [[1, 0.1], [2, 0.1]]}", "take no time"),
        ("{prefill: [[1, 0.3], [3, 0.1]], decode: [[1, 0.1], [2, 0.1]]}", "take no time"),
    ],
)
def test_slips_are_told_in_the_words_of_one_cost(cost: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_deployment(text(cost), "x.yaml")
    assert words in str(error.value)
    assert "and 2 more" not in str(error.value)
