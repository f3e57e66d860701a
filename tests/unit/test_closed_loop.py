"""Closed loops: so many users at a time, each waiting for its answer; and what they measure."""

from itertools import pairwise

from kvasir.core.specs import Deployment, ModelSpec, PoolSpec
from kvasir.core.specs.deployment import FittedCost
from kvasir.traces.closed import ClosedLoop, ClosedSpec
from kvasir.world.sim.closed import simulate_closed

STEP_S = 0.01


def deployment() -> Deployment:
    pool = PoolSpec(name="serve", role="mixed", count=1, kv_blocks=10_000,
                    cost=FittedCost(overhead_s=STEP_S, per_token_s=0))  # fmt: skip
    return Deployment(models=(ModelSpec(name="llama-3-8b"),), pools=(pool,))


def test_lengths_come_from_the_seed_and_stay_in_their_range() -> None:
    spec = ClosedSpec(users=3, requests=500, input_tokens=1000, output_tokens=10,
                      length_min_share=0.8, think_s=1.0, spread_s=0.5)  # fmt: skip
    one, two = ClosedLoop(spec, 1), ClosedLoop(spec, 1)
    first = one.first()
    assert [a.at_s for a in first] == [1.0, 1.5, 2.0] and first == two.first()
    later = [one.again(10.0) for _ in range(497)]
    assert one.again(10.0) is None and all(a is not None and a.at_s == 11.0 for a in later)
    drawn = {a.output_tokens for a in later if a is not None}
    assert drawn == {8, 9, 10}
    assert all(800 <= a.input_tokens <= 1000 for a in later if a is not None)


def test_there_are_never_more_than_so_many_users() -> None:
    spec = ClosedSpec(users=4, requests=30, input_tokens=100, output_tokens=20,
                      length_min_share=0.5, think_s=0.05)  # fmt: skip
    outcomes = simulate_closed(deployment(), spec)
    assert len(outcomes) == 30 and all(o.ok for o in outcomes)
    spans = [((o.start_s or 0.0), (o.start_s or 0.0) + o.e2e_s) for o in outcomes]
    for start, _ in spans:
        assert sum(a <= start < b for a, b in spans) <= 4
    assert max(o.start_s or 0.0 for o in outcomes) > 5 * 20 * STEP_S / 2, "they waited"


def test_one_user_sees_its_own_steps() -> None:
    spec = ClosedSpec(users=1, requests=3, input_tokens=64, output_tokens=11, think_s=0.3)
    outcomes = simulate_closed(deployment(), spec)
    assert all(abs((o.tpot_s or 0) - STEP_S) < 1e-9 for o in outcomes)
    gaps = [(b.start_s or 0) - (a.start_s or 0) - a.e2e_s
            for a, b in pairwise(outcomes)]  # fmt: skip
    assert all(abs(gap - 0.3) < 2e-3 for gap in gaps)
