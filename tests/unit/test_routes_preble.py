"""Preble's E2: exploit a long prefix while the worker is not overloaded, else explore by cost."""

import pytest

from tests.route_views import FakeView, choose, workers

# hits of `warm`; its queue; blocks reserved and cached at `cold`; what is chosen
TABLE = {
    "more cached than not": (6, 0.0, 0, 0, "warm", "exploit"),
    "half is not more": (5, 0.7, 0, 0, "cold", "explore"),
    "half, and cheaper all the same": (5, 0.4, 0, 0, "warm", "explore"),
    "overloaded": (6, 1.5, 0, 0, "cold", "explore"),
    "exploring pays for eviction": (5, 0.7, 20, 75, "warm", "explore"),
}


@pytest.mark.parametrize("case", TABLE)
def test_preble(case: str) -> None:
    """Cold: 1 s of own prefill, of which half again for 5 of 10 blocks evicted; warm: 0.5 s + its
    queue."""
    hits, queue_s, reserved, cached, chosen, how = TABLE[case]
    view = FakeView(
        workers(warm={"prefill_s": queue_s}, cold={"blocks_reserved": reserved}),
        hits={"warm": hits}, cached={"cold": cached},
    )  # fmt: skip
    choice = choose("preble", view)
    assert (choice.worker, choice.why.split(",")[0]) == (chosen, how)


def test_decodes_are_load() -> None:
    pool = workers(a={"decoding": 4}, b={"prefill_s": 0.5})
    assert choose("preble", FakeView(pool)).worker == "b"
