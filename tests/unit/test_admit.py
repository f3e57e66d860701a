"""Who may enter: bounds, and Mooncake's three ways of refusing early."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from kvasir.policy.admit import ADMITS


@dataclass(frozen=True)
class FakeView:
    stage: str = "arrival"
    queued: int = 0
    queue_max: int = 10
    blocks_needed: int = 5
    blocks_max: int = 5
    ttft_load: float = 1.0
    tbt_load: float = 1.0
    tbt_load_ahead: float = 1.0


@pytest.mark.parametrize("name", ADMITS)
@pytest.mark.parametrize(
    ("view", "status"),
    [
        (FakeView(), 0),
        (FakeView(queued=9), 0),
        (FakeView(queued=10), 429),
        (FakeView(blocks_needed=6), 400),
        (FakeView(blocks_max=0), 503),
        (FakeView(stage="decode", queued=99), 0),
    ],
)
def test_bounds_hold_under_every_policy(name: str, view: FakeView, status: int) -> None:
    """A prefilled request is not refused for the length of a queue that it has left."""
    assert ADMITS[name](view).status == status


PREFILL, DECODE, AHEAD = ({"ttft_load": 1.01}, {"tbt_load": 1.01}, {"tbt_load_ahead": 1.01})
REFUSED = {  # (on arrival, after prefill) for each load over its SLO
    "bounded": {"ttft": (0, 0), "tbt": (0, 0), "ahead": (0, 0)},
    "early_baseline": {"ttft": (429, 0), "tbt": (0, 429), "ahead": (0, 0)},
    "early": {"ttft": (429, 0), "tbt": (429, 0), "ahead": (0, 0)},
    "early_predicted": {"ttft": (429, 0), "tbt": (0, 0), "ahead": (429, 0)},
}


@pytest.mark.parametrize("name", ADMITS)
@pytest.mark.parametrize(("load", "fields"), [("ttft", PREFILL), ("tbt", DECODE), ("ahead", AHEAD)])
def test_which_load_is_refused_when(name: str, load: str, fields: dict) -> None:
    view = replace(FakeView(), **fields)
    found = ADMITS[name](view).status, ADMITS[name](replace(view, stage="decode")).status
    assert found == REFUSED[name][load]


def test_a_refusal_says_what_is_predicted_and_when_to_return() -> None:
    verdict = ADMITS["early"](FakeView(ttft_load=2.5))
    assert "TTFT is 2.50 times its SLO" in verdict.reason and verdict.retry_after_s
