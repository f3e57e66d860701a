"""NetKV: its sum, its three ways to combine, and the oracle arm that each name asks."""

from dataclasses import replace

import pytest

from kvasir.core.specs import RouteSpec
from tests.route_views import FakeView, choose, workers


def decode(far: float, near: float, **fields) -> FakeView:
    pool = fields.pop("pool", workers(far={}, near={}))
    transfers = {("p", "far"): far, ("p", "near"): near}
    return FakeView(pool, stage="decode", source="p", transfers=transfers, **fields)


def test_prefill_is_where_it_is_over_first() -> None:
    """Queue 0.3 s and 0.2 s left against 1 s."""
    pool = workers(a={"prefill_s": 0.3}, b={})
    assert choose("netkv", FakeView(pool, hits={"a": 8})).worker == "a"
    assert choose("netkv", FakeView(pool, hits={"a": 2})).worker == "b"


def test_decode_is_the_least_sum() -> None:
    assert choose("netkv", decode(0.2, 0.1)).worker == "near"
    busy = workers(far={}, near={"decoding": 7, "context_tokens": 200_000})  # 207 ms more a step
    assert choose("netkv", decode(0.2, 0.1, pool=busy)).worker == "far"
    assert choose("netkv", decode(0.4, 0.1, pool=busy)).worker == "near"


def test_a_full_batch_waits_for_a_departure() -> None:
    """The 3rd departure of 8, 256 tokens each of 10 ms: 0.96 s."""
    full = workers(far={}, near={"decoding": 10, "iteration_s": 0.01})
    assert choose("netkv", decode(0.9, 0.0, pool=full)).worker == "far"
    assert choose("netkv", decode(1.1, 0.0, pool=full)).worker == "near"


@pytest.mark.parametrize(
    ("cost", "ahead_s", "chosen"),
    [("serial", 0.0, "far"), ("overlap", 0.0, "near"), ("streamed", 0.0, "near"),
     ("streamed", 0.5, "far"), ("serial", 0.5, "far")],
)  # fmt: skip
def test_costs_combine(cost: str, ahead_s: float, chosen: str) -> None:
    """near: 0.3 s of transfer beside 0.32 s of queue; far: 0.4 s and none. With 0.5 s of prefill
    ahead both transfers are hidden."""
    pool = workers(far={}, near={"decoding": 8, "iteration_s": 0.01})
    view = decode(0.4, 0.3, pool=pool, spec=RouteSpec(cost=cost), prefill_ahead_s=ahead_s)
    assert choose("netkv", view).worker == chosen


def test_of_two_transfers_that_prefill_hides_the_shorter_counts_less() -> None:
    """Both fit into 1 s of prefill, but for their last layer: 6.25 and 1.6 ms."""
    hidden = decode(0.4, 0.1, spec=RouteSpec(cost="streamed"), prefill_ahead_s=1.0)
    assert choose("netkv", hidden).worker == "near"
    busier = workers(far={}, near={"context_tokens": 4000})  # 4 ms more a step
    assert choose("netkv", replace(hidden, candidates=busier)).worker == "near"
    busy = workers(far={}, near={"context_tokens": 5000})
    assert choose("netkv", replace(hidden, candidates=busy)).worker == "far"


ARMS = {
    "netkv_static": "static", "netkv_self": "self", "netkv": None, "netkv_path": "path",
    "exact_maxmin": "exact_maxmin", "netkv_joint": "path",
}  # fmt: skip


@pytest.mark.parametrize("name", ARMS)
def test_each_name_asks_its_arm(name: str) -> None:
    view = decode(0.2, 0.1)
    choice = choose(name, view)
    assert choice.worker == "near" and choice.estimate_s == 0.1
    assert view.arms == [ARMS[name]] * 2


@pytest.mark.parametrize("name", ARMS)
def test_order_of_candidates_does_not_matter(name: str) -> None:
    pool = workers(c={}, a={}, b={"blocks_reserved": 1})
    for order in (pool, pool[::-1]):
        assert choose(name, FakeView(order, stage="decode", source="p")).worker == "a"
