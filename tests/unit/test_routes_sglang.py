"""SGLang's cache-aware rule: imbalance, then match threshold, then load."""

import pytest

from kvasir.core.specs import RouteSpec
from tests.route_views import FakeView, choose, workers

TABLE = {  # requests at warm and cold, blocks of 10 that warm holds, chosen
    "a match": (10, 0, 4, "warm"),
    "too short a match": (10, 0, 3, "cold"),
    "65 apart is unbalanced": (65, 0, 9, "cold"),
    "64 apart is not": (64, 0, 9, "warm"),
    "65 apart on 135 is within 1.5 times": (200, 135, 9, "warm"),
    "no match": (0, 3, 0, "warm"),
}


@pytest.mark.parametrize("case", TABLE)
def test_sglang(case: str) -> None:
    warm, cold, hit, chosen = TABLE[case]
    pool = workers(warm={"requests": warm}, cold={"requests": cold})
    assert choose("sglang", FakeView(pool, hits={"warm": hit})).worker == chosen


def test_thresholds_are_parameters() -> None:
    pool = workers(warm={"requests": 3}, cold={})
    eager = RouteSpec(cache_threshold=0.1)
    strict = RouteSpec(cache_threshold=0.1, balance_abs=2)
    assert choose("sglang", FakeView(pool, hits={"warm": 2}, spec=eager)).worker == "warm"
    assert choose("sglang", FakeView(pool, hits={"warm": 2}, spec=strict)).worker == "cold"
