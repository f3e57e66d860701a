"""JSQ by pending tokens, and Splitwise's overflow from pool to mixed pool to the other pool."""

import pytest

from kvasir.core.specs import RouteSpec
from tests.route_views import FakeView, choose, workers

FULL = {"prefilling": 1, "prefill_tokens": 7500}  # and 1000 more is over 8192
QUEUED = {"prefilling": 1, "prefill_tokens": 7000}
MIXED = {"mixed": True}


@pytest.mark.parametrize(
    ("a", "b", "chosen"),
    [
        ({"prefill_tokens": 300}, {"prefill_tokens": 200, "prefill_s": 9.0}, "b"),
        ({"prefill_tokens": 200}, {"prefill_tokens": 195, "decoding": 6}, "a"),
        ({}, {}, "a"),
    ],
)
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_jsq(stage: str, a: dict, b: dict, chosen: str) -> None:
    assert choose("jsq", FakeView(workers(a=a, b=b), stage=stage)).worker == chosen


ROUTED = {
    "shortest prompt queue, least memory": (
        workers(p1=QUEUED, p2={"prefill_tokens": 50, "prefilling": 1}),
        workers(d1={"blocks_reserved": 5}, d2={"blocks_reserved": 4, "decoding": 9}),
        ("p2", "d2"),
    ),
    "mixed ones only when the pools are full": (
        workers(p1=QUEUED, m=MIXED), workers(d1={"blocks_reserved": 5}, m=MIXED), ("p1", "d1"),
    ),
    "full prompt queues overflow to mixed": (
        workers(p1=FULL, m=MIXED), workers(d1={}, m=MIXED), ("m", "d1"),
    ),
    "an empty prompt machine takes any prompt": (
        workers(p1={"decoding": 8000}), workers(d1={}), ("p1", "d1"),
    ),
    "full token machines overflow to mixed": (
        workers(p1={}, m=MIXED), workers(m=MIXED), ("p1", "m"),
    ),
    "both in the mixed pool": (workers(p1=FULL, m=MIXED), workers(m=MIXED), ("m", "m")),
    "no prompt machine: the token machine with least pending runs both": (
        workers(p1=FULL, m=MIXED | FULL),
        workers(d1={"decoding": 3}, d2={"decoding": 2, "blocks_reserved": 9}), ("d2", "d2"),
    ),
    "no token machine: the prompt machine with most room runs both": (
        workers(p1={"blocks_reserved": 5}, p2={"blocks_reserved": 2, "prefill_tokens": 99}), (),
        ("p2", "p2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUTED)
def test_splitwise(case: str) -> None:
    candidates, decoders, expected = ROUTED[case]
    choice = choose("splitwise", FakeView(candidates, decoders=decoders))
    assert (choice.worker, choice.decode) == expected


def test_the_queue_bound_is_a_parameter() -> None:
    view = FakeView(
        workers(p1=QUEUED, m=MIXED), decoders=workers(d1={}),
        spec=RouteSpec(queue_tokens_max=7000),
    )  # fmt: skip
    assert choose("splitwise", view).worker == "m"


def test_decode_alone_is_by_memory_too() -> None:
    pool = workers(m=MIXED, d1={"blocks_reserved": 3}, d2={"blocks_reserved": 2})
    assert choose("splitwise", FakeView(pool, stage="decode")).worker == "d2"
