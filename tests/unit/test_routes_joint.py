"""Prefill and decode chosen together: pairs that choosing in turn misses, and staying."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.specs import RouteSpec
from kvasir.policy.route.netkv import LAYERS
from tests.route_views import FakeView, FakeWorker, choose, workers

DECODE_S = 0.012  # first step on an idle worker, 1000 tokens of context


def pair(view: FakeView) -> tuple[str, str]:
    choice = choose("netkv_joint", view)
    return choice.worker, choice.decode


def test_a_near_pair_beats_the_soonest_prefill() -> None:
    """p1 is 0.1 s sooner, but 0.5 s away from any decode worker. In turn, NetKV takes p1."""
    view = FakeView(
        workers(p1={}, p2={"prefill_s": 0.1}), decoders=workers(d1={"decoding": 9}),
        transfers={("p1", "d1"): 0.5, ("p2", "d1"): 0.0},
    )  # fmt: skip
    assert pair(view) == ("p2", "d1")
    assert choose("netkv", view).worker == "p1"


STAYS = {  # decode worker; transfer; input; chosen
    "a transfer longer than nothing": ({}, 0.1, ("d1", "d1")),
    "a prefix makes it cheaper there": ({}, 0.0, ("d1", "d1")),
    "not while others decode there": ({"decoding": 2}, 0.1, ("p1", "d1")),
    "unless the transfer is slower still": ({"decoding": 2}, 3.0, ("d1", "d1")),
    "not behind other prefills": ({"prefill_s": 1.0}, 0.1, ("p1", "d1")),
}


@pytest.mark.parametrize("case", STAYS)
def test_staying(case: str) -> None:
    """Prefill takes 0.9 s on d1, which has a block, and 1 s on p1; each of d1's decodes loses as
    much."""
    d1, transfer_s, expected = STAYS[case]
    view = FakeView(
        workers(p1={}), decoders=workers(d1=d1), hits={"d1": 1},
        transfers={("p1", "d1"): transfer_s},
    )  # fmt: skip
    assert pair(view) == expected


def test_what_others_lose_weighs() -> None:
    view = FakeView(
        workers(p1={}), decoders=workers(d1={"decoding": 7}), hits={"d1": 1},
        transfers={("p1", "d1"): 0.1}, spec=RouteSpec(stay_weight=0.0),
    )  # fmt: skip
    assert pair(view) == ("d1", "d1")


def test_a_mixed_worker_keeps_what_it_prefills() -> None:
    mixed = workers(m={"mixed": True, "decoding": 1})
    decoders = (*mixed, FakeWorker("d1"))
    assert pair(FakeView(mixed, decoders=decoders, hits={"m": 9})) == ("m", "m")
    assert pair(FakeView(mixed, decoders=decoders)) == ("d1", "d1")


def test_without_room_to_decode_it_prefills_first() -> None:
    assert pair(FakeView(workers(p1={"prefill_s": 0.1}, p2={}))) == ("p2", "")


seconds = st.floats(0, 3)


@given(
    queues=st.tuples(seconds, seconds, seconds), decoding=st.tuples(*[st.integers(0, 12)] * 3),
    moves=st.lists(seconds, min_size=9, max_size=9), ahead=st.sampled_from(
        ["serial", "overlap", "streamed"]),
)  # fmt: skip
def test_it_is_the_best_of_all(queues, decoding, moves, ahead) -> None:
    """Against every pair, summed plainly."""
    pool = [FakeWorker(f"p{i}", prefill_s=q) for i, q in enumerate(queues)]
    targets = [FakeWorker(f"d{i}", decoding=n, iteration_s=0.02) for i, n in enumerate(decoding)]
    pairs = list(product(pool, targets))
    transfers = {(p.id, d.id): s for (p, d), s in zip(pairs, moves, strict=True)}
    view = FakeView(pool, decoders=targets, transfers=transfers, spec=RouteSpec(cost=ahead))

    def after(d: FakeWorker) -> tuple[float, float]:
        over = d.decoding - d.batch_max
        queue_s = (over + 1) * 256 * 0.02 / 8 if over >= 0 else 0.0
        return queue_s, d.predict_iteration(min(d.decoding + 1, 8), 1000)

    def cost(p: FakeWorker, d: FakeWorker) -> float:
        queue_s, first_s = after(d)
        if p is d:
            return d.prefill_s + 1.0 + 1.0 * d.decoding + queue_s + first_s
        move = transfers[p.id, d.id]
        seen = {
            "serial": move + queue_s,
            "overlap": max(move, queue_s),
            "streamed": max(move / LAYERS, move - 1.0 + 1.0 / LAYERS, queue_s),
        }
        return p.prefill_s + 1.0 + seen[ahead] + first_s

    both = {w.id: w for w in (*pool, *targets)}
    chosen = pair(view)
    least = min(cost(p, d) for p, d in (*pairs, *((d, d) for d in targets)))
    assert cost(both[chosen[0]], both[chosen[1]]) == pytest.approx(least, rel=1e-9)
