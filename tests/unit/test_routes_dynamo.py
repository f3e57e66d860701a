"""Dynamo's cost in blocks, no credit for overlap at decode, softmax at a temperature."""

import math

import pytest

from kvasir.core.specs import RouteSpec
from tests.route_views import FakeView, choose, counts, workers

TABLE = {  # stage, a, b, blocks that a holds, chosen
    "a hit saves its blocks": ("prefill", {"blocks_reserved": 5}, {}, 6, "a"),
    "but not more": ("prefill", {"blocks_reserved": 7}, {}, 6, "b"),
    "active prefill counts": ("prefill", {"prefill_tokens": 700}, {}, 6, "b"),
    "decode by load alone": ("decode", {"blocks_reserved": 5}, {}, 9, "b"),
    "cost is never below its load": ("prefill", {"blocks_reserved": 1}, {"prefill_tokens": 1}, 99,
                                     "a"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_dynamo(case: str) -> None:
    stage, a, b, hits, chosen = TABLE[case]
    view = FakeView(workers(a=a, b=b), stage=stage, hits={"a": hits})
    assert choose("dynamo", view).worker == chosen


@pytest.mark.parametrize(("overlap", "scale", "chosen"), [(0.5, 1, "b"), (0.5, 3, "a")])
def test_weights(overlap: float, scale: float, chosen: str) -> None:
    spec = RouteSpec(cache_weight=overlap, load_weight=scale)
    view = FakeView(workers(a={"blocks_reserved": 5}, b={}), hits={"a": 6}, spec=spec)
    assert choose("dynamo", view).worker == chosen


def test_equals_are_drawn() -> None:
    pool = workers(a={}, b={}, c={"blocks_reserved": 1})
    found = counts("dynamo", [FakeView(pool, request_id=f"r{i}") for i in range(1000)])
    assert set(found) == {"a", "b"} and 400 < found["a"] < 600


def test_temperature_is_a_softmax_of_normalised_costs() -> None:
    """Costs 0 and 8 blocks more: weights 1 and exp(-1 / T)."""
    pool, spec = workers(a={}, b={"blocks_reserved": 8}), RouteSpec(temperature=0.5)
    views = [FakeView(pool, request_id=f"r{i}", spec=spec) for i in range(4000)]
    share = counts("dynamo", views)["b"] / 4000
    expected = math.exp(-2) / (1 + math.exp(-2))
    assert share == pytest.approx(expected, abs=0.02)
