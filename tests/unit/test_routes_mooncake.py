"""Mooncake's Algorithm 1, each branch; 1 ms a token, 1000 tokens, blocks of 100."""

import pytest

from kvasir.core.specs import RouteSpec
from tests.route_views import FakeView, choose, workers

IDLE = {"near": {}, "holder": {}}


def busy(name: str, seconds: float) -> dict:
    return IDLE | {name: {"prefill_s": seconds}}


# holder has 8 blocks; (pool, near's hits, seconds to fetch, fetches, chosen)
TABLE = {
    "the holder when it is idle": (IDLE, 0, 0.0, True, "holder"),
    "a fetch beats a queue": (busy("holder", 0.5), 0, 0.1, True, "near"),
    "a slow fetch does not": (busy("holder", 0.5), 0, 0.6, True, "holder"),
    "without fetching the prefix is computed": (busy("holder", 0.5), 0, 0.1, False, "holder"),
    "and a longer queue still loses": (busy("holder", 0.9), 0, 0.1, False, "near"),
    "a prefix nearly as long is used as it is": (busy("holder", 0.15), 7, 9.0, True, "near"),
    "a much shorter one is not": (busy("holder", 0.15), 5, 9.0, True, "holder"),
}


@pytest.mark.parametrize("case", TABLE)
def test_prefill(case: str) -> None:
    pool, near, fetch_s, fetches, chosen = TABLE[case]
    view = FakeView(
        workers(**pool), hits={"holder": 8, "near": near}, fetches=fetches,
        transfers={("holder", "near"): fetch_s},
    )  # fmt: skip
    assert choose("mooncake", view).worker == chosen


def test_the_threshold_is_a_parameter() -> None:
    """8 of 5 blocks is 1.6: a longer patience takes the shorter prefix."""
    pool = workers(**busy("holder", 0.35))
    fields = {"hits": {"holder": 8, "near": 5}, "transfers": {("holder", "near"): 9.0}}
    patient = FakeView(pool, fetches=True, spec=RouteSpec(prefix_ratio=2.0), **fields)
    assert choose("mooncake", patient).worker == "near"
    assert choose("mooncake", FakeView(pool, fetches=True, **fields)).worker == "holder"


def test_what_is_counted_on_is_said() -> None:
    view = FakeView(workers(**busy("holder", 0.5)), hits={"holder": 8}, fetches=True)
    assert "8 blocks from holder" in choose("mooncake", view).why


def test_decode_takes_the_least_time_for_a_token() -> None:
    """3 rows and 1,000 tokens: 15 ms; 1 row and 9,000: 22 ms."""
    pool = workers(
        a={"decoding": 1, "context_tokens": 9000}, b={"decoding": 3, "context_tokens": 1000}
    )
    assert choose("mooncake", FakeView(pool, stage="decode")).worker == "b"
