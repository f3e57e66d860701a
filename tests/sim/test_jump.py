"""A jump over many decode iterations equals stepping through them, in whole simulated clusters.

The same requests on workers that plan one iteration at a time, and on workers that plan hundreds,
with memory for all: every first token and every end comes at the same time, to 1e-9, whatever
interrupts the runs: arrivals, cancellations, and cuts out of nowhere.
"""

import math
import random
from typing import Any

import pytest

from kvasir.core.effects import Cut
from kvasir.core.specs import Deployment
from kvasir.core.specs.deployment import FittedCost, MeasuredCost
from kvasir.core.specs.faults import FaultSpec
from kvasir.traces.record import Arrival
from kvasir.world.sim.faults import Faults
from kvasir.world.sim.world import SimWorld
from tests.sims import FITTED, arrivals, cluster

COSTS: dict[str, tuple[str, FittedCost | MeasuredCost | None]] = {
    "fitted": ("tiny", FITTED),
    "fitted steep": ("tiny", FittedCost(overhead_s=1e-3, per_token_s=0.0, per_context_s=1e-6)),
    "roofline dense": ("llama-3-8b", None),
    "roofline experts": ("mixtral-8x7b", None),
    "measured": ("llama-3-8b", MeasuredCost()),
}
CANCELS = FaultSpec(cancel=0.3, cancel_s_max=1.5, until_s=0.0)


def simulated(cost: str, steps_max: int, **more: Any) -> Deployment:
    shape, fitted = COSTS[cost]
    pool = {"kv_blocks": 100_000, "tp": 4, "batch_max": more.pop("batch_max", 64)}
    roles = more.pop("roles", ("prefill", "decode"))
    return cluster(
        *roles, shape=shape, cost=fitted, batch={"steps_max": steps_max}, pool=pool,
        topology={"nic_bandwidth": 1e10}, **more,
    )  # fmt: skip


def run(
    d: Deployment, requests: list[Arrival], seed: int, cuts: random.Random | None = None
) -> SimWorld:
    """Cancellations by seed; with `cuts`, runs of steps end at random times too."""
    world = SimWorld(d, requests, faults=Faults(CANCELS, seed))
    if cuts is not None:
        for _ in range(300):
            world.schedule(cuts.random() * 3.0, lambda: cut_all(world))
    world.run()
    assert not world.requests.lives
    return world


def cut_all(world: SimWorld) -> None:
    for host in list(world.hosts.values()):
        if host.executor is not None and host.executor.step is not None:
            world._cut(host, Cut(host.executor.step.id))


def times(world: SimWorld) -> dict[str, tuple[str, int, float, float]]:
    """How each request ended, with how many tokens, its TTFT and its end."""
    return {
        o.request_id: (o.error, o.output_tokens if o.ok else -1, o.ttft_s,
                       (o.start_s or 0.0) + o.e2e_s)
        for o in world.recorder.outcomes
    }  # fmt: skip


def assert_equal(stepped: SimWorld, jumped: SimWorld) -> None:
    one, other = times(stepped), times(jumped)
    assert one.keys() == other.keys()
    for name, (error, tokens, ttft_s, end_s) in one.items():
        assert other[name][:2] == (error, tokens), name
        assert math.isclose(other[name][2], ttft_s, rel_tol=1e-9), (name, ttft_s, other[name])
        assert math.isclose(other[name][3], end_s, rel_tol=1e-9), (name, end_s, other[name])


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("cost", COSTS)
def test_a_jump_equals_stepping(cost: str, first_token: Any, seed: int) -> None:
    requests = arrivals(60, seed, rate=40.0, output=200)
    stepped = run(simulated(cost, 1, first_token=first_token), requests, seed)
    jumped = run(simulated(cost, 256, first_token=first_token), requests, seed)
    assert_equal(stepped, jumped)
    assert jumped.events < stepped.events - 300, "it did jump"
    assert {o.error for o in stepped.recorder.outcomes} == {"", "cancelled"}


@pytest.mark.parametrize("cost", COSTS)
def test_it_does_when_both_phases_share_a_worker(cost: str) -> None:
    requests = arrivals(50, 3, rate=30.0, output=200)
    one, many = (simulated(cost, steps, roles=("mixed",)) for steps in (1, 256))
    assert_equal(run(one, requests, 3), run(many, requests, 3))


def test_it_does_when_the_batch_is_full() -> None:
    """Sequences wait for a place; the end of a run gives it to them at once."""
    requests = arrivals(60, 4, rate=100.0, output=200)
    route = {"name": "least_loaded"}
    for roles in (("prefill", "decode"), ("mixed",)):
        one, many = (simulated("fitted", steps, roles=roles, batch_max=4, route=route)
                     for steps in (1, 256))  # fmt: skip
        assert_equal(run(one, requests, 4), run(many, requests, 4))


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize("cost", COSTS)
def test_a_cut_at_any_time_changes_nothing(cost: str, seed: int) -> None:
    requests = arrivals(40, seed, rate=40.0, output=200)
    d = simulated(cost, 256)
    whole = run(d, requests, seed)
    cut = run(d, requests, seed, cuts=random.Random(seed))
    assert_equal(whole, cut)
    assert cut.events > whole.events + 300, "they did cut"


def test_looking_changes_nothing() -> None:
    """Invariants bring every count up to date after each event; without them counts lag behind, and
    nobody can tell."""
    d = cluster(
        "prefill", "decode", "mixed", count=1, pool={"kv_blocks": 40},
        route={"output_reserve_tokens": 0}, first_token="decode",
    )  # fmt: skip
    requests = arrivals(80, 7, rate=40.0, output=80)
    faults = FaultSpec(loss=0.01, delay_s_max=0.01, deaths=2, down_s=0.5, cancel=0.1, until_s=3.0)
    runs = []
    for look in (None, SimWorld.check_touched):
        world = SimWorld(d, requests, faults=Faults(faults, 7), after_event=look)
        world.run()
        runs.append((world.recorder.outcomes, world.recorder.counts, list(world.recorder.itl)))
    assert runs[0] == runs[1]
    assert runs[0][1]["Preempted"] > 3 and runs[0][1]["Retried"] > 0
