"""Kept prefixes in the simulator, by the nodes that serve: made, used, lost, made again, ended."""

from __future__ import annotations

from typing import Any

import pytest

from kvasir.core.caches import CacheState, Keep, Kept, Mark, Retain
from kvasir.core.events import Closed, Prefilled, Rejected
from kvasir.core.keys import block_keys, salt_of
from kvasir.core.messages import Dispatch, Drain
from kvasir.core.request import Request, Sampling
from kvasir.core.specs import Deployment
from kvasir.core.specs.tenants import CachesSpec, TenantSpec, group_of
from kvasir.world.sim.faults import Death
from kvasir.world.sim.world import GATEWAY, SimWorld
from tests.sims import BLOCK, Watched, cluster

SYSTEM = tuple(range(1000, 1160))  # ten blocks
TTL_S = 60.0


def request(
    d: Deployment, name: str, prompt: tuple[int, ...], output: int = 1, tenant: str = "default"
) -> Request:
    salt = salt_of("m@", None, group_of(d.tenants, tenant))
    return Request(
        id=name, model="m", prompt_tokens=len(prompt), max_tokens=output, gateway=GATEWAY,
        keys=block_keys(prompt, BLOCK, salt), tenant=tenant, salt=salt,
        sampling=Sampling(temperature=0.0, ignore_eos=True),
    )  # fmt: skip


class Kitchen:
    """A world whose requests are given by hand. Every wait ends with all invariants checked."""

    def __init__(self, d: Deployment | None = None, **more: Any) -> None:
        self.d = d or cluster(**more)
        self.world = Watched(self.d, [])
        self.wait(0.1)

    def wait(self, seconds: float) -> None:
        self.world.rest(seconds)
        self.world.check()

    def ask(self, name: str, prompt: tuple[int, ...], output: int = 4, *marks: Mark,
            tenant: str = "default", wait_s: float = 5.0) -> Closed:  # fmt: skip
        self.world.arrive(request(self.d, name, prompt, output, tenant), output, marks)
        self.wait(wait_s)
        return self.closed(name)

    def make(self, cache: str, prompt: tuple[int, ...] = SYSTEM, *, ttl_s: float = TTL_S,
             tenant: str = "default", wait_s: float = 5.0) -> Closed:  # fmt: skip
        mark = Mark(cache, len(prompt) // BLOCK, ttl_s, must=True)
        return self.ask(f"make-{cache}", prompt, 1, mark, tenant=tenant, wait_s=wait_s)

    def retain(self, cache: str, ttl_s: float, tenant: str = "default") -> None:
        world = self.world
        world.deliver(world.hosts[GATEWAY], Retain(GATEWAY, tenant, cache, ttl_s))
        self.wait(0.1)

    def closed(self, name: str) -> Closed:
        (found,) = [e for e in self.world.events_of(Closed) if e.request_id == name]
        return found

    def state(self, cache: str) -> str:
        known = self.world.requests.caches.get(cache)
        return known.state.state if known is not None else ""

    def keepers(self, cache: str) -> list[str]:
        return [w.config.worker for w in self.world.workers() if cache in w.pins.held]

    def kept(self) -> int:
        """Blocks that all workers keep, as they and as the conductor count them."""
        workers = {w.config.worker: w.pins.blocks_count for w in self.world.workers()}
        caches = self.world.conductor.caches
        assert workers == {worker: caches.pinned(worker) for worker in workers}
        return sum(workers.values())

    def why(self, name: str) -> str:
        return next(e.reason for e in self.world.events_of(Rejected) if e.request_id == name)


def flood(k: Kitchen, count: int = 30, blocks: int = 100) -> None:
    """Prompts that share nothing and together are larger than all caches."""
    for i in range(count):
        prompt = tuple(10**6 + i * 10**4 + j for j in range(blocks * BLOCK))
        k.world.arrive(request(k.d, f"flood-{i}", prompt, 2), 2)
    k.wait(30)


def test_a_cache_outlives_a_flood_that_flushes_everything_else() -> None:
    k = Kitchen(pool={"kv_blocks": 400}, count=1)
    k.make("a")
    plain = tuple(x + 10**5 for x in SYSTEM)
    k.ask("plain", plain)
    assert (k.state("a"), k.keepers("a"), k.kept()) == ("ready", ["prefill-0"], 10)
    flood(k)
    assert k.ask("kept", (*SYSTEM, 7, 8, 9)).cached_tokens == len(SYSTEM)
    assert k.ask("again", (*plain, 7, 8, 9)).cached_tokens == 0, "it was not kept"
    found = {e.request_id: e.cached_tokens for e in k.world.events_of(Prefilled)}
    assert found["kept"] == len(SYSTEM), "not only billed so: it was there"


def test_nothing_is_shipped_to_make_a_cache() -> None:
    k = Kitchen()
    closed = k.make("a")
    assert (closed.path, closed.output_tokens, closed.cached_tokens) == ("aggregated", 1, 0)
    assert {d.phase for d in k.world.messages(Dispatch)} == {"both"}


def test_a_cache_ends_on_time_and_can_be_kept_longer_or_ended() -> None:
    k = Kitchen()
    k.make("a", ttl_s=20.0, wait_s=1.0)
    k.make("b", SYSTEM[:80], ttl_s=20.0, wait_s=1.0)
    k.retain("a", 100.0)
    assert k.world.requests.caches["a"].ends_at > 100
    k.wait(25)
    assert (k.state("a"), k.state("b"), k.kept()) == ("ready", "", 10)
    k.retain("a", 0.0)
    assert (k.state("a"), k.kept(), k.keepers("a")) == ("", 0, [])
    assert not k.world.conductor.caches.entries
    assert {w.pool.held for w in k.world.workers()} == {0}


def test_a_worker_lets_go_in_time_though_nobody_tells_it() -> None:
    k = Kitchen()
    k.make("a", ttl_s=20.0)
    (keeper,) = [w for w in k.world.workers() if w.pins.held]
    keeper.handle(k.world.now, Keep(1, "a", 4.0))  # as if the conductor's word were older
    k.world.conductor.caches.entries["a"].ends_at = 10**6
    held = keeper.pins.held["a"].until
    k.wait(held - k.world.now + 1.0)
    assert "a" not in keeper.pins.held and keeper.pool.held == 0


def test_a_cache_of_a_dead_worker_is_made_again_by_its_next_use() -> None:
    k = Kitchen()
    k.make("a")
    (keeper,) = k.keepers("a")
    k.world._die(Death(k.world.now, keeper, k.world.now + 2.0))
    k.wait(0.5)
    assert (k.state("a"), k.kept()) == ("lost", 0)
    used = k.ask("next", (*SYSTEM, 1, 2))
    assert used.cached_tokens == len(SYSTEM), "its tenant keeps it: the loss is ours"
    found = {e.request_id: e.cached_tokens for e in k.world.events_of(Prefilled)}
    assert found["next"] == 0, "it was computed again"
    assert (k.state("a"), k.kept()) == ("ready", 10)
    k.retain("a", 0.0)
    assert k.kept() == 0


def test_a_draining_worker_gives_its_caches_up() -> None:
    k = Kitchen()
    k.make("a")
    (keeper,) = k.keepers("a")
    k.world.deliver(k.world.hosts[keeper], Drain(1))
    k.world.conductor.members[keeper].draining = True
    k.wait(2.0)
    assert (k.state("a"), k.kept()) == ("lost", 0)
    k.ask("next", (*SYSTEM, 1, 2))
    assert k.state("a") == "ready" and k.keepers("a") != [keeper]


def test_what_could_never_run_beside_a_cache_makes_it_give_way() -> None:
    """One worker with 40 blocks, 10 of them kept: a prompt of 32 needs more than the rest."""
    d = cluster("mixed", count=1, pool={"kv_blocks": 40}, caches=CachesSpec(pool_share_max=0.5))
    k = Kitchen(d)
    k.make("a")
    small = tuple(range(5000, 5000 + 25 * BLOCK))
    assert k.ask("small", small, 8).reason == "length" and k.state("a") == "ready"
    large = tuple(range(9000, 9000 + 32 * BLOCK))
    assert k.ask("large", large, 8).reason == "length"
    assert (k.state("a"), k.kept()) == ("lost", 0)
    reasons = [m.reason for m in k.world.messages(Kept) if not m.blocks]
    assert reasons == ["a request needed its blocks"]
    grows = tuple(range(20000, 20000 + 20 * BLOCK))
    assert k.make("b").reason == "length"
    closed = k.ask("grows", grows, 14 * BLOCK, wait_s=20.0)  # to 34 blocks
    assert closed.output_tokens == 14 * BLOCK and k.state("b") == "lost"


def test_a_prompt_that_fits_with_what_is_kept_of_it_lets_it_stay() -> None:
    d = cluster("mixed", count=1, pool={"kv_blocks": 40}, caches=CachesSpec(pool_share_max=0.5))
    k = Kitchen(d)
    k.make("a")
    longer = (*SYSTEM, *range(7000, 7000 + 24 * BLOCK))  # 34 blocks, 10 of them kept
    assert k.ask("longer", longer, 8).cached_tokens == len(SYSTEM)
    assert k.state("a") == "ready"


def test_limits_are_said_when_they_are_reached() -> None:
    d = cluster(
        caches=CachesSpec(tenant_blocks_max=14, tenant_caches_max=2, pool_share_max=0.01),
        tenants=(TenantSpec(name="small", pinned_blocks_max=5), TenantSpec(name="b")),
    )
    k = Kitchen(d)
    other = tuple(x + 10**5 for x in SYSTEM)
    assert k.make("s", tenant="small").reason == "failed"
    assert "0 of at most 5" in k.why("make-s")
    assert k.make("a", tenant="b").reason == "length"
    assert k.make("more", other, tenant="b").reason == "failed"
    assert "10 of at most 14" in k.why("make-more")
    head = SYSTEM[: 5 * BLOCK]
    assert k.make("head", head, tenant="b").reason == "length", "its blocks are counted once"
    assert k.make("third", head, tenant="b").reason == "failed"
    assert "2 caches" in k.why("make-third")
    k.retain("head", 0.0, tenant="b")
    big = tuple(range(30000, 30000 + 21 * BLOCK))  # over 1 % of 2,000 blocks on each worker
    assert k.make("big", big, tenant="default").reason == "failed"
    assert k.kept() == 10


@pytest.mark.parametrize("wrong", ["nobody", "b"])
def test_only_its_tenant_changes_a_cache(wrong: str) -> None:
    k = Kitchen(cluster(tenants=(TenantSpec(name="a"), TenantSpec(name="b"))))
    k.make("x", tenant="a")
    k.world.conductor.handle(k.world.now, Retain(GATEWAY, wrong, "x", 0.0))
    k.wait(1.0)
    assert k.kept() == 10
    k.retain("x", 0.0, tenant="a")
    assert k.kept() == 0


def test_a_marker_is_made_at_first_use_and_kept_longer_at_each() -> None:
    k = Kitchen()
    mark = Mark("eph", 10, 10.0)
    first = k.ask("first", (*SYSTEM, 1), 4, mark)
    assert (first.path, first.cached_tokens, k.state("eph")) == ("disaggregated", 0, "ready")
    for i in range(4):
        used = k.ask(f"use-{i}", (*SYSTEM, 2 + i), 4, mark, wait_s=7.0)
        assert used.cached_tokens == len(SYSTEM)
    assert k.kept() == 10, "28 s, at 10 s each"
    k.wait(12.0)
    assert (k.state("eph"), k.kept()) == ("", 0)


def test_a_marker_over_the_limit_costs_the_marker_only() -> None:
    k = Kitchen(cluster(caches=CachesSpec(tenant_blocks_max=5)))
    assert k.ask("first", (*SYSTEM, 1), 4, Mark("eph", 10, 10.0)).reason == "length"
    assert (k.state("eph"), k.kept()) == ("", 0)
    said = k.world.messages(CacheState)
    assert [(m.state, m.status) for m in said] == [("refused", 429)]


def test_a_request_that_ends_before_its_prompt_is_computed_keeps_nothing() -> None:
    k = Kitchen(cluster(cost=None, shape="tiny"))
    from kvasir.core.messages import Hangup

    prompt = tuple(range(50000, 50000 + 100 * BLOCK))
    mark = Mark("gone", 100, TTL_S, must=True)
    k.world.arrive(request(k.d, "make", prompt, 1), 1, (mark,))
    k.world.deliver(k.world.hosts[GATEWAY], Hangup("make"))
    k.wait(5.0)
    assert not k.world.conductor.caches.entries and k.kept() == 0
    assert k.state("gone") == ""


def test_equal_worlds_with_caches_are_equal_event_by_event() -> None:
    def history() -> list[Any]:
        k = Kitchen()
        k.make("a")
        k.ask("use", (*SYSTEM, 1))
        return k.world.seen

    assert history() == history()


def test_a_world_without_caches_says_nothing_of_them() -> None:
    k = Kitchen()
    k.ask("plain", SYSTEM)
    kinds = {type(s.message) for s in k.world.seen}
    assert not kinds & {CacheState, Keep, Kept, Retain}


def test_a_recording_with_caches_verifies(tmp_path: Any) -> None:
    from kvasir.runtime.verify import verify_dir
    from kvasir.world.journal import Journal

    sinks = []

    def journal(name: str, kind: str, config: dict[str, Any]) -> Journal:
        sinks.append((tmp_path / f"{name}.jsonl").open("wb"))
        return Journal(sinks[-1], name, kind, config)

    d = cluster(tenants=(TenantSpec(name="a", pinned_blocks_max=12),))
    world = SimWorld(d, [], journals=journal)
    world.rest(0.1)
    world.arrive(request(d, "make", SYSTEM, 1, "a"), 1, (Mark("x", 10, 5.0, must=True),))
    world.rest(2.0)
    world.arrive(request(d, "use", (*SYSTEM, 1), 3, "a"), 3)
    world.rest(10.0)
    for sink in sinks:
        sink.close()
    verdict = verify_dir(tmp_path)
    assert verdict.ok, verdict.lines
    assert "Keep" in (tmp_path / "conductor.jsonl").read_text()
