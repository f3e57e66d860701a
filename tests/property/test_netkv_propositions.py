"""NetKV's propositions and the invariants of its choice, through the policies and the oracle that
serve: views are made by hand, every transfer time is the oracle's.

P1 and P2 are those of arXiv 2606.03910 as far as it is known; P3, of the choice itself, and P4, of
bursts, are ours. `test_oracle.py` has P1 and P2 on the oracle alone, `test_ranking.py` invariants
without a network.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvasir.core.messages import Location, NetReading
from kvasir.core.specs import TierSpec, TopologySpec
from kvasir.core.specs.faults import FaultSpec
from kvasir.net.oracle import UTILISATION_MAX, InFlight, Oracle
from kvasir.net.topology import Topology
from kvasir.policy.route import ROUTES, Choice, RouteMemory
from kvasir.policy.route.netkv import decode_queue_s, first_step_s, visible_s
from kvasir.policy.route.view import Transfer
from kvasir.world.sim.faults import Faults
from kvasir.world.sim.world import SimWorld
from tests.route_views import FakeView, FakeWorker
from tests.sim.test_policies import deployment, trace

BLOCK = 512
KAPPA = 4 * 80 * 1024  # KV bytes a token of Llama-3-70B, 80 KiB for each of 4 shard pairs
BANDWIDTH = (450e9, 12.5e9, 6.25e9, 3.125e9)
PLACES = {  # first accelerator of four; the source is in rack 0 of pod 0
    "src": 0, "t0": 4, "t1": 8, "t1b": 12, "t2": 16, "t2b": 20, "t3": 32, "t3b": 36, "t3c": 40,
}  # fmt: skip
TIER = {name: int(name[1]) for name in PLACES if name != "src"}
ARMS = ("netkv_static", "netkv_self", "netkv", "netkv_path", "exact_maxmin")


def oracle(bandwidth: Sequence[float] = BANDWIDTH, latency_s: float = 0.0) -> Oracle:
    """NetKV's caps per tier; links are so wide that they never bind."""
    tiers = tuple(TierSpec(flow_bandwidth=b, latency_s=latency_s) for b in bandwidth)
    spec = TopologySpec(
        tiers=tiers, nic_bandwidth=1e13, rack_oversubscription=1, pod_oversubscription=1
    )
    made = Oracle(Topology(spec))
    for name, first in PLACES.items():
        made.add_worker(name, Location(tuple(range(first, first + 4))))
    return made


def read(o: Oracle, c: Sequence[float]) -> None:
    o.reading(NetReading(measured_at=0.0, utilisation=tuple(c)))


@dataclass(frozen=True)
class NetView(FakeView):
    """A view whose transfers are the oracle's."""

    net: Oracle = field(default_factory=oracle)

    def transfer(
        self, target: str, source: str = "", blocks: int | None = None, arm: Any = None
    ) -> Transfer:
        if blocks is None:
            blocks = max(-(-self.input_tokens // self.block_size) - self.hits.get(target, 0), 0)
        found = self.net.estimate(
            source or self.source, target, blocks * self.block_size * KAPPA, 1.0,
            arm or self.spec.oracle,
        )  # fmt: skip
        return Transfer(found.seconds, found.source)


def view(
    net: Oracle, pool: Sequence[FakeWorker], *, blocks: int, hits: dict[str, int] | None = None
) -> NetView:
    return NetView(
        pool, "decode", hits or {}, input_tokens=blocks * BLOCK, block_size=BLOCK, source="src",
        net=net,
    )  # fmt: skip


def choose(name: str, seen: FakeView) -> Choice:
    return ROUTES[name](seen, RouteMemory())[0]


def cost(seen: NetView, worker: FakeWorker, arm: Any = None) -> float:
    """What the policy adds up, unrounded."""
    moved_s = seen.transfer(worker.id, arm=arm).seconds
    waits_s = visible_s(seen.spec, moved_s, decode_queue_s(worker), seen.prefill_ahead_s)
    return waits_s + first_step_s(seen, worker)


def idle(*names: str) -> list[FakeWorker]:
    return [FakeWorker(name) for name in names]


# --- P1: a choice that is blind to the network ----------------------------------------------------

cache_only = FakeView([]).spec.model_copy(update={"load_weight": 0.0})
lengths = st.integers(10, 2000)  # blocks of a prompt


@given(
    near=st.floats(1e9, 100e9), ratio=st.floats(0.02, 0.98), blocks=lengths,
    share=st.floats(0.01, 0.99), latency_s=st.sampled_from([0.0, 1e-4]),
)  # fmt: skip
def test_p1_cache_only_goes_far_and_netkv_regrets_nothing(
    near: float, ratio: float, blocks: int, share: float, latency_s: float
) -> None:
    """Near: no hit, B1. Far: a hit of `share`, B2 < B1. The blind choice always goes far and loses
    kappa l / m ((1 - h) / B2 - 1 / B1); NetKV never loses."""
    net = oracle((near, near, near, near * ratio), latency_s)
    hit = max(1, int(share * blocks))
    seen = view(net, idle("t1", "t3"), blocks=blocks, hits={"t3": hit})
    assert choose("cache_load", replace(seen, spec=cache_only)).worker == "t3"
    times = {name: seen.transfer(name).seconds for name in ("t1", "t3")}
    regret = times["t3"] - times["t1"]
    pair_bytes = blocks * BLOCK * KAPPA / 4
    slope = (1 - hit / blocks) / (near * ratio) - 1 / near
    assert regret == pytest.approx(pair_bytes * slope, rel=1e-6, abs=1e-9)
    for arm in ARMS:
        assert times[choose(arm, seen).worker] == min(times.values())


@given(ratio=st.floats(0.05, 0.9), part=st.floats(0.05, 0.95), bound=st.floats(0.1, 1e4))
def test_p1_below_the_threshold_regret_grows_without_bound(
    ratio: float, part: float, bound: float
) -> None:
    """h = part * (1 - B2 / B1): regret rises with the prompt, and passes every bound."""
    net = oracle((12.5e9, 12.5e9, 12.5e9, 12.5e9 * ratio))
    share = part * (1 - ratio)

    def regret(blocks: int) -> float:
        whole = blocks * BLOCK * KAPPA
        far = net.estimate("src", "t3", round(whole * (1 - share)), 0.0, "static").seconds
        return far - net.estimate("src", "t1", whole, 0.0, "static").seconds

    one = regret(1000) / 1000
    needed = int(bound / one) + 1
    losses = [regret(needed * times) for times in (1, 2, 4)]
    assert bound < losses[0] < losses[1] < losses[2]


# --- P2 and P3: readings that are off -------------------------------------------------------------

levels = st.tuples(*[st.floats(0.0, 0.6)] * 4)
errors = st.tuples(*[st.floats(-1.0, 1.0)] * 4)


@given(
    pair=st.sampled_from([("t1", "t2"), ("t1", "t3"), ("t2", "t3")]), c=levels,
    n=st.tuples(st.integers(0, 3), st.integers(0, 3)), signs=errors, worst=st.booleans(),
    k=st.floats(0.001, 2), blocks=lengths,
)  # fmt: skip
def test_p2_the_choice_turns_at_epsilon_and_not_before(
    pair: tuple[str, str], c: tuple[float, ...], n: tuple[int, int], signs: tuple[float, ...],
    worst: bool, k: float, blocks: int,
) -> None:  # fmt: skip
    """Any errors within k * eps*, k < 1, leave the choice as in truth. Opposite ones of that size
    turn it once k > 1: the bound is tight. Load is the same, so the order of tiers decides."""
    a, b = (TIER[name] for name in pair)
    w = [BANDWIDTH[t] / (1 + m) for t, m in zip((a, b), n, strict=True)]
    kept = [w[0] * (1 - c[a]), w[1] * (1 - c[b])]
    margin = abs(kept[0] - kept[1]) / (w[0] + w[1])
    assume(margin > 1e-4 and abs(k - 1) > 1e-3 and (k < 1 or worst))
    near_first = kept[0] > kept[1]
    if worst:
        signs = tuple((t == a) - (t == b) if near_first else (t == b) - (t == a) for t in range(4))
    told = [level + sign * k * margin for level, sign in zip(c, signs, strict=True)]
    assume(all(0 <= told[t] <= UTILISATION_MAX for t in (a, b)))
    net = oracle()
    read(net, [max(level, 0.0) for level in told])
    for name, times in zip(pair, n, strict=True):
        for i in range(times):
            net.begin(f"{name}-{i}", "src", f"{name}b", 1, 1.0)
    chosen = choose("netkv", view(net, idle(*pair), blocks=blocks)).worker
    assert (chosen == pair[0]) == (near_first == (k < 1))


Row = tuple[int, int, float, int]
rows = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 12), st.sampled_from([0.01, 0.03]),
              st.sampled_from([0, 10_000, 200_000])),
    min_size=2, max_size=8,
)  # fmt: skip


def candidates(found: Sequence[Row]) -> tuple[list[FakeWorker], dict[str, int]]:
    names = list(TIER)[: len(found)]
    pool = [
        FakeWorker(name, decoding=decoding, iteration_s=step_s, context_tokens=context)
        for name, (_, decoding, step_s, context) in zip(names, found, strict=True)
    ]
    return pool, {name: hit for name, (hit, *_) in zip(names, found, strict=True)}


@given(c=levels, signs=errors, eps=st.floats(0.001, 0.3), found=rows, blocks=st.integers(30, 300))
def test_p3_the_pick_is_within_twice_the_largest_error_of_the_best(
    c: tuple[float, ...], signs: tuple[float, ...], eps: float, found: list[Row], blocks: int
) -> None:
    """delta_d = s_d / w_d * eps / ((1 - c)(1 - c - eps)). cost(pick) <= OPT + 2 max delta, and the
    pick is the best itself where the next is farther than their deltas' sum."""
    told = [max(0.0, level + sign * eps) for level, sign in zip(c, signs, strict=True)]
    pool, hits = candidates(found)
    truth, stale = oracle(), oracle()
    read(truth, c)
    read(stale, told)
    seen = view(truth, pool, blocks=blocks, hits=hits)
    costs = {w.id: cost(seen, w) for w in pool}
    delta = {}
    for w in pool:
        level = c[TIER[w.id]]
        idle_s = seen.transfer(w.id, arm="static").seconds
        delta[w.id] = idle_s * eps / ((1 - level) * (1 - level - eps))
    pick = choose("netkv", replace(seen, net=stale)).worker
    best, *others = sorted(costs, key=lambda name: costs[name])
    assert costs[pick] <= costs[best] + 2 * max(delta.values()) + 1e-9
    if all(costs[o] - costs[best] > delta[o] + delta[best] + 1e-9 for o in others):
        assert pick == best


# --- P4: one after another, or all at once --------------------------------------------------------


def burst(net: Oracle, name: str, pool: Sequence[FakeWorker], sizes: Sequence[int]) -> list[str]:
    """Decisions of one instant; each sees those before it in flight."""
    picked = []
    for i, blocks in enumerate(sizes):
        seen = view(net, pool, blocks=blocks)
        picked.append(choose(name, seen).worker)
        net.begin(str(i), "src", picked[-1], blocks * BLOCK * KAPPA, 1.0)
    return picked


def shared_s(picked: Sequence[str], sizes: Sequence[int]) -> float:
    """Mean seconds where one source's transfers of a tier share B_tau equally (the model behind
    1 + n): by processor sharing, each waits for the lesser of its own and the others' bytes."""
    total = 0.0
    for name, blocks in zip(picked, sizes, strict=True):
        tier = TIER[name]
        beside = [s for n, s in zip(picked, sizes, strict=True) if TIER[n] == tier]
        total += sum(min(blocks, s) for s in beside) * BLOCK * KAPPA / 4 / BANDWIDTH[tier]
    return total / len(picked)


names = st.lists(
    st.sampled_from(["t1", "t1b", "t2", "t2b", "t3", "t3b"]), min_size=2, max_size=4, unique=True
)


@given(names, st.lists(st.integers(20, 400), min_size=2, max_size=3))
def test_p4_counting_own_transfers_never_hurts_a_burst(where: list[str], sizes: list[int]) -> None:
    """Against all |D|^k assignments: greedy choices lose less than a factor of two on the best one,
    and with equal prompts those that count own transfers are never worse than static tiers."""
    pool = idle(*where)
    best = min(
        shared_s(every, sizes) for every in itertools.product(where, repeat=len(sizes))
    )
    counted = shared_s(burst(oracle(), "netkv_self", pool, sizes), sizes)
    assert best * (1 - 1e-9) <= counted < 2 * best
    equal = sizes[:1] * len(sizes)
    static = shared_s(burst(oracle(), "netkv_static", pool, equal), equal)
    assert shared_s(burst(oracle(), "netkv_self", pool, equal), equal) <= static * (1 + 1e-3)


def test_p4_one_after_another_can_lose() -> None:
    """The short prompt comes first and takes the near tier; the long one then goes far, or shares.
    Chosen together they would change places."""
    sizes, pool = [200, 400], idle("t1", "t2")
    picked = burst(oracle(), "netkv_self", pool, sizes)
    best = min(shared_s(every, sizes) for every in itertools.product(("t1", "t2"), repeat=2))
    assert shared_s(picked, sizes) > 1.1 * best


def test_p4_the_count_is_too_dear_where_flows_have_caps() -> None:
    """On links that do not bind, a second flow gets its whole cap; 1 + n says half of it. Arm
    `path` counts on links and knows."""
    pool = [*idle("t2"), FakeWorker("t3", context_tokens=-100)]
    assert burst(oracle(), "netkv_self", pool, [100, 100]) == ["t2", "t3"]
    assert burst(oracle(), "netkv_path", pool, [100, 100]) == ["t2", "t2"]


# --- invariants of the choice ---------------------------------------------------------------------


@given(c=levels, found=rows, blocks=st.integers(30, 300), shuffle=st.randoms())
@pytest.mark.parametrize("name", [*ARMS, "netkv_joint"])
def test_the_order_of_candidates_does_not_matter(
    name: str, c: tuple[float, ...], found: list[Row], blocks: int, shuffle: Any
) -> None:
    net = oracle()
    read(net, c)
    pool, hits = candidates(found)
    seen = view(net, pool, blocks=blocks, hits=hits)
    other = list(pool)
    shuffle.shuffle(other)
    assert choose(name, replace(seen, candidates=other)) == choose(name, seen)


@given(found=rows, blocks=st.integers(30, 300), shuffle=st.randoms())
def test_the_joint_choice_does_not_depend_on_order_either(
    found: list[Row], blocks: int, shuffle: Any
) -> None:
    pool, hits = candidates(found)
    prefill = [FakeWorker("src", prefill_s=0.2)]
    seen = replace(
        view(oracle(), prefill, blocks=blocks, hits=hits), stage="prefill", decoders=pool
    )
    other = list(pool)
    shuffle.shuffle(other)
    assert choose("netkv_joint", replace(seen, decoders=other)) == choose("netkv_joint", seen)


@given(c=levels, found=rows, blocks=st.integers(31, 300), far=st.booleans(), less=st.integers(0, 3))
@pytest.mark.parametrize("name", ARMS)
def test_a_dominated_candidate_changes_nothing(
    name: str, c: tuple[float, ...], found: list[Row], blocks: int, far: bool, less: int
) -> None:
    """Like another of tier 3 or nearer, but in tier 3, with no longer hit and more context."""
    net = oracle()
    read(net, sorted(c))  # farther tiers are no emptier
    pool, hits = candidates(found[:7])
    model = pool[-1] if far else pool[0]
    worse = replace(model, id="t3c", context_tokens=model.context_tokens + 1000)
    seen = view(net, pool, blocks=blocks, hits=hits)
    more = replace(
        seen, candidates=[worse, *pool], hits=hits | {"t3c": max(hits[model.id] - less, 0)}
    )
    assert choose(name, more) == choose(name, seen)


@given(c=levels, tier=st.integers(0, 3), more=st.floats(0, 0.5), n=st.integers(0, 3), found=rows,
       blocks=st.integers(30, 300))  # fmt: skip
def test_a_tier_that_gets_busier_never_gains_a_request(
    c: tuple[float, ...], tier: int, more: float, n: int, found: list[Row], blocks: int
) -> None:
    """More of c or of n on a tier: whoever did not go there does not go there now."""
    pool, hits = candidates(found)
    before, after = oracle(), oracle()
    read(before, c)
    read(after, [level + more * (t == tier) for t, level in enumerate(c)])
    target = {0: "t0", 1: "t1b", 2: "t2b", 3: "t3c"}[tier]
    for i in range(n):
        after.begin(str(i), "src", target, 1, 1.0)
    seen = view(before, pool, blocks=blocks, hits=hits)
    was, now = (choose("netkv", s).worker for s in (seen, replace(seen, net=after)))
    assert TIER[now] != tier or TIER[was] == tier


@given(c=levels, blocks=st.integers(30, 300), hit=st.integers(0, 30), longer=st.integers(0, 30),
       name=st.sampled_from(sorted(TIER)))  # fmt: skip
@pytest.mark.parametrize("arm", ["static", "self", "tier", "path", "exact_maxmin"])
def test_a_longer_hit_never_costs_more(
    arm: str, c: tuple[float, ...], blocks: int, hit: int, longer: int, name: str
) -> None:
    net = oracle()
    read(net, c)
    worker = FakeWorker(name)
    costs = [
        cost(view(net, [worker], blocks=blocks, hits={name: h}), worker, arm)
        for h in (hit, hit + longer)
    ]
    assert costs[1] <= costs[0]


@given(hits=st.lists(st.integers(0, 30), min_size=3, max_size=3), blocks=st.integers(31, 300),
       loads=st.lists(st.integers(0, 90), min_size=3, max_size=3, unique=True))  # fmt: skip
@pytest.mark.parametrize("name", ARMS)
def test_on_an_idle_network_of_one_tier_it_is_cache_and_load(
    name: str, hits: list[int], blocks: int, loads: list[int]
) -> None:
    """Equal loads: the longest hit, as cache_load. Equal hits: the least load, as least_loaded."""
    where = ("t3", "t3b", "t3c")
    net = oracle()
    read(net, [0.0] * 4)
    cached = view(net, idle(*where), blocks=blocks, hits=dict(zip(where, hits, strict=True)))
    assert choose(name, cached).worker == choose("cache_load", cached).worker
    loaded = [
        FakeWorker(n, context_tokens=1000 * x, blocks_reserved=x)
        for n, x in zip(where, loads, strict=True)
    ]
    seen = view(net, loaded, blocks=blocks)
    assert choose(name, seen).worker == choose("least_loaded", seen).worker


# --- counters drain -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["netkv", "netkv_path", "netkv_joint"])
def test_no_transfer_is_left_counted_after_aborts_and_deaths(name: str, seed: int) -> None:
    spec = FaultSpec(cancel=0.3, cancel_s_max=0.5, deaths=3, down_s=0.3, until_s=1.0)
    d = deployment(name, roles=("prefill", "decode"), count=3)
    world = SimWorld(d, trace(40).arrivals, faults=Faults(spec, seed))
    world.run()
    world.rest(5.0)
    counts = Counter(world.recorder.counts)
    assert counts["Closed"] == 40
    oracle_ = world.conductor.oracle
    oracle_.check()
    for worker in d.worker_ids():
        assert oracle_.inbound(worker) == InFlight()
        assert all(oracle_.in_flight(worker, tier) == InFlight() for tier in range(4))
