"""llm-d's scorers and their weights."""

import pytest

from kvasir.core.specs import RouteSpec
from tests.route_views import FakeView, choose, workers

WAITING = {"prefilling": 65}  # 64 wait: 0.5 * (1 - 64/128) = 0.25
TABLE = {  # stage, a, b, blocks of 10 that a holds, chosen
    "prefix": ("prefill", {}, {}, 1, "a"),
    "prefix against kv in use": ("prefill", {"blocks_reserved": 21}, {}, 2, "b"),
    "kv in use": ("decode", {"blocks_reserved": 21}, {"blocks_reserved": 20}, 0, "b"),
    "waiting": ("prefill", WAITING, {}, 2, "b"),
    "waiting is worth a quarter here": ("prefill", WAITING, {}, 3, "a"),
    "the first prefill does not wait": ("prefill", {"prefilling": 1}, {}, 0, "a"),
    "waiting to decode is what is over the batch": ("decode", {"decoding": 9}, {"decoding": 8}, 0,
                                                    "b"),
    "a worker is not worse than full": ("prefill", {"prefilling": 900},
                                        {"blocks_reserved": 49}, 0, "b"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_llm_d(case: str) -> None:
    stage, a, b, hits, chosen = TABLE[case]
    view = FakeView(workers(a=a, b=b), stage=stage, hits={"a": hits})
    assert choose("llm_d", view).worker == chosen


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [((1, 1, 1), "a"), ((0.1, 1, 1), "b"), ((0.1, 0, 1), "c"), ((0, 1, 0), "b")],
)
def test_weights(weights: tuple[float, float, float], chosen: str) -> None:
    """a holds the prompt, b has the emptiest memory, c the shortest queue."""
    cache, kv, load = weights
    spec = RouteSpec(cache_weight=cache, kv_weight=kv, load_weight=load)
    pool = workers(
        a={"blocks_reserved": 60} | WAITING, b={"prefilling": 33}, c={"blocks_reserved": 50}
    )
    assert choose("llm_d", FakeView(pool, hits={"a": 10}, spec=spec)).worker == chosen
