"""Mixed requests, aborted at every stage, with caches, tiers, deaths and lost messages: at the end
nothing is held. Blocks, leases, quarantine, pins, reservations, loans and copies all count.

All invariants of the node that was touched hold after every event. A failing seed prints the
command that repeats it. `test_ten_thousand` is the whole of it; the default suite runs a part.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import pytest

from kvasir.core.caches import Mark, Retain
from kvasir.core.events import Closed
from kvasir.core.keys import trace_keys
from kvasir.core.messages import AnyMessage, Dispatch, Hangup, Submit, Tokens
from kvasir.core.request import Request, Sampling
from kvasir.core.specs import Deployment, TransportSpec
from kvasir.core.specs.codec import CodecSpec
from kvasir.core.specs.copies import CopiesSpec
from kvasir.core.specs.faults import FaultSpec
from kvasir.core.specs.tenants import CachesSpec, TenantSpec
from kvasir.core.specs.tiers import ClusterTier, DiskTier, HostTier, TiersSpec
from kvasir.world.sim.faults import Faults
from kvasir.world.sim.world import GATEWAY, Host, SimWorld
from tests.sim.test_faults import check_nothing_left, deployment

RATE = 30.0  # requests a second
SHORT = (0, 1, 2, 3)
SHORT_COUNT = 150
LONG_SEEDS, LONG_COUNT = 20, 500
ABORT = 0.004  # of the messages that name a request
STAGES = {
    "Placed", "Dispatch", "Accepted", "Prompt", "PrefillDone", "KvWant", "Received",
    "TransferReport", "SendOver", "Tokens", "Finished", "Done", "Restored",
}  # fmt: skip
TENANTS = ("a", "b", "c")


def mixed(rng: random.Random) -> Deployment:
    """As for the fault seeds, with tiers and every way to hand over."""
    d = deployment(rng)
    mode = rng.choice(["streamed", "serial", "pull"])
    route = {"name": rng.choice(["mooncake", "netkv_joint", "netkv", d.policy.route.name])}
    if mode == "pull":
        route["decode_choice"] = "prefill_end"
    tiers = rng.choice([
        None, TiersSpec(host=HostTier(blocks=60)),
        TiersSpec(host=HostTier(blocks=30), disk=DiskTier(blocks=200), load="always"),
        TiersSpec(host=HostTier(blocks=30), cluster=ClusterTier(blocks=300), load="always"),
    ])  # fmt: skip
    codec = CodecSpec(kind=rng.choice(["off", "lossless", "cachegen"]))
    copies = CopiesSpec(
        hot=rng.random() < 0.5, next_turn=rng.random() < 0.5, leaving=True, uses_per_copy=2.0
    )
    update = {"route": d.policy.route.model_copy(update=route), "copies": copies}
    policy = d.policy.model_copy(update=update)
    return d.model_copy(update={
        "policy": policy, "transport": TransportSpec(kind="tcp", mode=mode, codec=codec),
        "pools": tuple(p.model_copy(update={"tiers": tiers}) for p in d.pools),
        "caches": CachesSpec(
            pool_share_max=rng.choice([0.1, 0.3, 0.6]), tenant_blocks_max=40, tenant_caches_max=8
        ),
        "tenants": tuple(TenantSpec(name=t) for t in TENANTS),
    })  # fmt: skip


class Crowd(SimWorld):
    """Makes its own requests, and aborts some whenever a message names them."""

    def __init__(self, d: Deployment, seed: int, count: int, faults: FaultSpec) -> None:
        self.rng = random.Random(f"crowd {seed}")
        self.count, self.made = count, 0
        self.aborted: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.caches: list[tuple[str, str]] = []  # tenant and name
        super().__init__(d, [], faults=Faults(faults, seed), after_event=SimWorld.check_touched)
        told = self.recorder.event

        def listen(now: float, event: Any) -> None:
            told(now, event)
            if isinstance(event, Closed):
                self.done[event.reason] += 1

        self.recorder.event = listen  # type: ignore[method-assign]
        self.schedule(0.01, self._more_to_do)

    def _more_to_do(self) -> None:
        rng = self.rng
        if rng.random() < 0.1 and self.caches:
            tenant, cache = rng.choice(self.caches)
            retain = Retain(GATEWAY, tenant, cache, rng.choice([0.0, 0.0, 3.0]))
            self.deliver(self.hosts[GATEWAY], retain)
        else:
            self._ask()
        if self.made < self.count:
            self.schedule(self.now + rng.expovariate(RATE), self._more_to_do)

    def _ask(self) -> None:
        rng, name = self.rng, f"r{self.made}"
        self.made += 1
        tenant = rng.choice(TENANTS)
        tokens, group = rng.randint(1, 250), TENANTS.index(tenant) * 10 + rng.randint(0, 3)
        blocks, shared = tokens // 16, rng.randint(0, tokens // 16)
        ids = [group * 1000 + i for i in range(shared)]
        ids += [10**9 + self.made * 1000 + i for i in range(blocks - shared)]
        marks = self._marks(tenant, ids)
        output = 1 if marks and marks[0].must else rng.randint(1, 60)
        request = Request(
            id=name, model="m", prompt_tokens=tokens, max_tokens=output, tenant=tenant,
            keys=trace_keys(ids, None), gateway=GATEWAY, session=f"s{group}",
            sampling=Sampling(temperature=0.0, ignore_eos=True), arrival_s=self.now,
            deadline_s=self.now + rng.uniform(0.1, 3.0) if rng.random() < 0.05 else None,
        )  # fmt: skip
        self.arrive(request, output, marks)

    def _marks(self, tenant: str, ids: list[int]) -> tuple[Mark, ...]:
        rng, kind = self.rng, self.rng.random()
        if not ids or kind > 0.3:
            return ()
        ttl_s = rng.choice([0.2, 1.0, 5.0])
        if kind < 0.1:
            cache = f"cache-{self.made}"
            self.caches = [*self.caches[-20:], (tenant, cache)]
            return (Mark(cache, len(ids), ttl_s, must=True),)
        ends = sorted({rng.randint(1, len(ids)) for _ in range(rng.randint(1, 4))})
        return tuple(Mark(f"{tenant}/{ids[end - 1]}", end, ttl_s) for end in ends)

    def deliver(self, host: Host, event: AnyMessage) -> None:
        super().deliver(host, event)
        name = named(event)
        if name in self.requests.lives and self.rng.random() < ABORT:
            self.aborted[type(event).__name__] += 1
            self._push(self.now, self.hosts[GATEWAY], Hangup(name))


def named(event: AnyMessage) -> str:
    """The request that a message is about; of several the first."""
    if isinstance(event, Tokens):
        return event.drawn[0].request_id
    if isinstance(event, (Dispatch, Submit)):
        return event.request.id
    return getattr(event, "request_id", "")


def run(seed: int, count: int) -> Crowd:
    rng = random.Random(f"leak {seed}")
    span_s = count / RATE
    faults = FaultSpec(
        loss=rng.choice([0.0, 0.005, 0.02]), delay_s_max=rng.choice([0.0, 0.003, 0.05]),
        deaths=rng.randint(1, 4), down_s=rng.choice([0.3, 2.0]), cancel=0.05, cancel_s_max=1.0,
        until_s=span_s,
    )  # fmt: skip
    world = Crowd(mixed(rng), seed, count, faults)
    world.rest(span_s + 60.0)
    world.rest(60.0 if world.requests.lives else 0.0)
    assert world.made == count and not world.requests.lives, len(world.requests.lives)
    assert world.done.total() == count
    world.check()
    check_nothing_left(world)
    check_nothing_kept(world)
    return world


def check_nothing_kept(world: SimWorld) -> None:
    """Caches are over, and what peers and tiers borrowed is given back."""
    assert not world.conductor.caches.entries and not world.requests.caches
    for worker in world.workers():
        load = worker.load()
        assert (load.leases, load.quarantined, load.pinned, load.pins) == (0, 0, 0, ())
        assert not worker.pins.held and not worker.prefixes.lent and not worker.prefixes.wanted
        assert not worker.tiers.reading
        assert not any(state.writing for state in worker.tiers.states.values())
        assert load.kv_blocks_free == worker.pool.blocks_count
        assert world.conductor.caches.pinned(worker.config.worker) == 0


def repeat(seed: int, count: int) -> str:
    return (
        f"repeat: KVASIR_LEAK_SEED={seed} KVASIR_LEAK_COUNT={count} "
        "python -m pytest tests/sim/test_no_leak.py -k one_seed"
    )


def told(seed: int, count: int) -> Crowd:
    try:
        return run(seed, count)
    except Exception as error:
        raise AssertionError(f"{error!r}\n{repeat(seed, count)}") from error


@pytest.mark.parametrize("seed", SHORT)
def test_nothing_is_left(seed: int) -> None:
    told(seed, SHORT_COUNT)


@pytest.mark.skipif("KVASIR_LEAK_SEED" not in os.environ, reason="set KVASIR_LEAK_SEED")
def test_one_seed() -> None:
    run(int(os.environ["KVASIR_LEAK_SEED"]), int(os.environ.get("KVASIR_LEAK_COUNT", LONG_COUNT)))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand() -> None:
    """And it was what it says: aborts at every stage, and all that could leave something behind."""
    aborted: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for seed in range(100, 100 + LONG_SEEDS):
        world = told(seed, LONG_COUNT)
        aborted += world.aborted
        counts += Counter(world.recorder.counts) + Counter(world.done)
    assert LONG_SEEDS * LONG_COUNT == counts["Closed"] == 10_000
    assert aborted.keys() >= STAGES, STAGES - aborted.keys()
    met = ("WorkerLeft", "Retried", "Preempted", "Shipped", "TransferFailed", "TierHit",
           "CacheChanged", "length", "cancelled", "deadline", "failed")  # fmt: skip
    assert [name for name in met if not counts[name]] == []
