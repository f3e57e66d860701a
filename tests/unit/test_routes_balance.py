"""Turns and load: round robin, least loaded, load weighed with cache."""

import pytest

from kvasir.core.specs import RouteSpec
from kvasir.policy.route import ROUTES, RouteMemory
from tests.route_views import FakeView, choose, workers


def test_round_robin_has_a_counter_for_each_stage() -> None:
    pool, memory, turns = workers(a={}, b={}, c={}), RouteMemory(), []
    for stage in ("prefill", "prefill", "decode", "prefill", "decode", "prefill"):
        choice, memory = ROUTES["round_robin"](FakeView(pool, stage=stage), memory)
        turns.append(choice.worker)
    assert turns == ["a", "b", "a", "c", "b", "a"]


LOADS = [
    ("prefill", {"prefill_s": 2.0}, {"prefill_s": 1.0, "blocks_reserved": 90}, "b"),
    ("decode", {"blocks_reserved": 20}, {"blocks_reserved": 10, "prefill_s": 9.0}, "b"),
    ("decode", {"blocks_reserved": 20, "blocks_total": 400}, {"blocks_reserved": 10}, "a"),
    ("prefill", {}, {}, "a"),
]


@pytest.mark.parametrize(("stage", "a", "b", "chosen"), LOADS)
def test_least_loaded(stage: str, a: dict, b: dict, chosen: str) -> None:
    assert choose("least_loaded", FakeView(workers(a=a, b=b), stage=stage)).worker == chosen


@pytest.mark.parametrize(
    ("cache_weight", "load_weight", "chosen"), [(1, 1, "b"), (1, 3, "a"), (0, 1, "a"), (1, 0, "b")]
)
def test_cache_load_weighs(cache_weight: float, load_weight: float, chosen: str) -> None:
    """b holds 9 of 10 blocks and has the longest queue; a half of it and nothing cached."""
    spec = RouteSpec(cache_weight=cache_weight, load_weight=load_weight)
    pool = workers(a={"prefill_s": 1.0}, b={"prefill_s": 2.0})
    assert choose("cache_load", FakeView(pool, hits={"b": 9}, spec=spec)).worker == chosen
