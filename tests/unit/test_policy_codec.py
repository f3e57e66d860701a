"""Which form KV takes: tables of cases."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.codec import RAW, Offer
from kvasir.policy.codec import GAIN_MIN, RECOMPUTE, Task, allowed, choose, predicted_s

OFFERS = (
    Offer(RAW, 0.0),
    Offer("lossless", 0.0, 0.7, 400e6, 1000e6),
    Offer("int8", 0.001, 0.53, 800e6, 2000e6),
    Offer("int4", 0.02, 0.28, 800e6, 2000e6),
    Offer("cachegen-1", 0.005, 0.3, 250e6, 300e6),
    Offer("cachegen-2", 0.01, 0.25, 250e6, 300e6),
    Offer("cachegen-3", 0.03, 0.2, 250e6, 300e6),
)
MB = 1_000_000


def names(kind: str, level_max: int = 2) -> list[str]:
    return [o.name for o in allowed(OFFERS, kind, level_max)]  # type: ignore[arg-type]


def test_what_a_deployment_allows() -> None:
    assert names("off") == [RAW]
    assert names("lossless") == [RAW, "lossless"]
    assert names("int8") == [RAW, "lossless", "int8"]
    assert names("cachegen", 1) == [RAW, "lossless", "int8", "cachegen-1"]
    assert names("cachegen", 2) == [RAW, "lossless", "int8", "cachegen-1", "cachegen-2"]
    assert names("cachegen", 3) == [o.name for o in OFFERS]


@pytest.mark.parametrize(
    ("chunks", "link", "expected"),
    [
        (1, 100e6, 1 / 4 + 0.25 + 1 / 5),  # one after another
        (10, 100e6, (1 / 4 + 0.25 + 1 / 5) / 10 + 0.9 / 4),  # coding and the wire set the pace
        (10, 10e6, (1 / 4 + 2.5 + 1 / 5) / 10 + 0.9 * 2.5),  # the wire does
    ],
)
def test_predicted_seconds(chunks: int, link: float, expected: float) -> None:
    offer = Offer("x", 0.0, 0.25, 400 * MB, 500 * MB)
    assert predicted_s(offer, Task(100 * MB, link, chunks)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("link", "chosen"),
    [
        (10e9, RAW),  # a fast link: any coding is slower
        (1e9, RAW),
        (400e6, "int8"),
        (10e6, "cachegen-3"),
    ],
)
def test_the_fastest_without_a_budget(link: float, chosen: str) -> None:
    task = Task(100 * MB, link, chunks=10)
    choice = choose([o for o in OFFERS if o.name != "int4"], task)
    assert choice.name == chosen
    assert choice.seconds <= choice.raw_s == pytest.approx(100 * MB / link)


@pytest.mark.parametrize(
    ("budget", "recompute", "chosen", "why"),
    [
        (2.4, None, "lossless", "loses least within the budget"),  # sooner than raw, as exact
        (1.6, None, "lossless", "loses least within the budget"),
        (1.2, None, "int8", "loses least within the budget"),
        (0.9, None, "cachegen-1", "loses least within the budget"),
        (0.6, None, "int4", "loses least within the budget"),
        (0.5, None, "int4", "fastest, the budget is lost"),  # it may fit, without a reserve
        (0.9, 0.4, RECOMPUTE, "loses least within the budget"),
        (1.6, 0.95, "lossless", "loses least within the budget"),
        (0.1, 0.2, RECOMPUTE, "fastest, the budget is lost"),
        (None, 0.2, RECOMPUTE, "fastest"),
        (None, 0.99, "int4", "fastest"),  # recompute would not gain anything on raw
    ],
)
def test_the_least_loss_within_a_budget(
    budget: float | None, recompute: float | None, chosen: str, why: str
) -> None:
    task = Task(100 * MB, 100e6, 20, recompute_s=recompute, budget_s=budget)
    choice = choose(OFFERS, task)
    assert (choice.name, choice.why) == (chosen, why)


def test_the_last_chunk_needs_no_reserve() -> None:
    assert choose(OFFERS, Task(MB, 1e6, chunks=1, budget_s=0.54)).name == "int8"
    assert choose(OFFERS, Task(MB, 1e6, chunks=4, budget_s=0.54)).name == "cachegen-1"


def test_raw_wins_what_is_within_the_error_of_predictions() -> None:
    almost = Offer("almost", 0.0, 1 - GAIN_MIN / 2)
    clearly = Offer("clearly", 0.0, 1 - GAIN_MIN * 2)
    assert choose([almost], Task(MB, 1e6)).name == RAW
    assert choose([almost, clearly], Task(MB, 1e6)).name == "clearly"


@given(
    link=st.floats(1e5, 1e11), chunks=st.integers(1, 64), nbytes=st.integers(1, 10**10),
    budget=st.none() | st.floats(0, 100), recompute=st.none() | st.floats(0, 100),
)  # fmt: skip
def test_never_slower_than_raw(
    link: float, chunks: int, nbytes: int, budget: float | None, recompute: float | None
) -> None:
    choice = choose(OFFERS, Task(nbytes, link, chunks, recompute, budget))
    assert choice.seconds <= choice.raw_s
    assert choice.name == RAW or choice.seconds < choice.raw_s * (1 - GAIN_MIN) < math.inf
