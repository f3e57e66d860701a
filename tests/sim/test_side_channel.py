"""A tenant that tries to learn whether another's prompt is cached, by all that it can see.

Two worlds that differ in one thing: in one, Ann has asked the very prompt that Bob then tries; in
the other she asked one of the same length. Whatever Bob sees is the same, to the last digit. With
a group in common he can tell, which shows that the test could.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvasir.core.caches import CacheState, Mark, Retain
from kvasir.core.events import AnyEvent, Closed
from kvasir.core.keys import block_keys, salt_of
from kvasir.core.messages import Declined, Placed
from kvasir.core.request import Request, Sampling
from kvasir.core.specs import Deployment, ModelSpec
from kvasir.core.specs.tenants import CachesSpec, TenantSpec, group_of
from kvasir.core.specs.tiers import HostTier, TiersSpec
from kvasir.observe.metrics import Metrics
from kvasir.world.sim.world import GATEWAY
from tests.sims import BLOCK, Watched, cluster

ROUTES = ("netkv", "netkv_joint", "mooncake", "cache_load", "session")
SECRET = tuple(range(20 * BLOCK))
OTHER = tuple(range(9000, 9000 + 20 * BLOCK))


def deployment(group: str | None, route: str, **pool: Any) -> Deployment:
    tenants = (TenantSpec(name="ann", cache_group=group), TenantSpec(name="bob", cache_group=group))
    d = cluster(route={"name": route}, pool=pool, tenants=tenants,
                caches=CachesSpec(tenant_blocks_max=30, pool_share_max=0.5))  # fmt: skip
    return Deployment.model_validate(d.model_dump())


def seen_by_bob(
    d: Deployment, anns: tuple[int, ...], *, kept: bool, drop: bool = False
) -> list[Any]:
    """Bob tries the secret, half of it, and to keep it, after Ann asked for something."""
    world = Watched(d, [])

    def ask(tenant: str, name: str, prompt: tuple[int, ...], *marks: Mark) -> None:
        salt = salt_of("m@", None, group_of(d.tenants, tenant))
        output = 1 if marks else 6
        request = Request(
            id=name, model="m", prompt_tokens=len(prompt), max_tokens=output, gateway=GATEWAY,
            keys=block_keys(prompt, BLOCK, salt), tenant=tenant, salt=salt,
            sampling=Sampling(temperature=0.0, ignore_eos=True),
        )  # fmt: skip
        world.arrive(request, output, marks)
        world.rest(4.0)

    world.rest(0.1)
    ask("ann", "a1", (*anns, 1), *([Mark("of-ann", 20, 600.0, must=True)] if kept else []))
    if drop:
        world.deliver(world.hosts[GATEWAY], Retain(GATEWAY, "ann", "of-ann", 0.0))
    assert [e.reason for e in world.noted if isinstance(e, Closed)] == ["length"]
    before = len(world.noted)
    ask("bob", "b1", (*SECRET, 1))
    ask("bob", "b2", (*SECRET[: 10 * BLOCK], 2))
    ask("bob", "b3", (*SECRET, 3), Mark("of-bob", 20, 600.0, must=True))
    ask("bob", "b4", (*SECRET, *range(50, 50 + 20 * BLOCK)), Mark("more", 40, 600.0, must=True))
    world.deliver(world.hosts[GATEWAY], Retain(GATEWAY, "bob", "of-ann", 0.0))
    world.rest(1.0)
    world.check()
    answers = [s.message for s in world.seen if isinstance(s.message, (Placed, Declined))]
    told = [s.message for s in world.seen if isinstance(s.message, CacheState)]
    return [
        [a for a in answers if a.request_id.startswith("b")],
        [s for s in told if s.cache != "of-ann" or s.state == "ended"],
        [e for e in world.noted if isinstance(e, Closed) and e.request_id.startswith("b")],
        page(world.noted[before:]),
    ]


def page(events: list[AnyEvent]) -> bytes:
    """What /metrics shows of them."""
    metrics = Metrics(["m"])
    for event in events:
        metrics.see(event)
    return metrics.render()


def both(d: Deployment, **more: Any) -> tuple[list[Any], list[Any]]:
    return seen_by_bob(d, SECRET, **more), seen_by_bob(d, OTHER, **more)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_bob_cannot_tell(route: str, kept: bool) -> None:
    hit, miss = both(deployment(None, route), kept=kept)
    assert hit == miss
    assert hit[2][0].cached_tokens == 0


@pytest.mark.parametrize("kept", [False, True])
def test_nor_over_tiers_and_when_blocks_are_evicted(kept: bool) -> None:
    d = deployment(None, "netkv", kv_blocks=44, tiers=TiersSpec(host=HostTier(blocks=30)))
    hit, miss = both(d, kept=kept)
    assert hit == miss


def test_nor_from_the_end_of_anns_cache() -> None:
    hit, miss = both(deployment(None, "netkv"), kept=True, drop=True)
    assert hit == miss


@pytest.mark.parametrize("route", ROUTES)
def test_in_a_group_he_can_so_the_test_would_see_it(route: str) -> None:
    """Something differs under each policy; where he is sent to the cache, so does his time."""
    hit, miss = both(deployment("kin", route), kept=False)
    assert hit[3] != miss[3]
    if route == "cache_load":
        sees_more(hit, miss)


def sees_more(hit: list[Any], miss: list[Any]) -> None:
    assert (hit[2][0].cached_tokens, miss[2][0].cached_tokens) == (len(SECRET), 0)
    assert hit[2][0].ttft_s < miss[2][0].ttft_s


# --- salts ----------------------------------------------------------------------------------------


def test_kv_of_another_model_form_adapter_or_tenant_has_another_key() -> None:
    """All that changes the values of KV changes the keys of its blocks."""
    usual = ModelSpec(name="m", shape="tiny")
    models = [
        usual,
        usual.model_copy(update={"name": "n"}),
        usual.model_copy(update={"version": "2"}),
        usual.model_copy(update={"dtype": "bfloat16"}),
        usual.model_copy(update={"dtype": "float32"}),
        usual.model_copy(update={"weights": "int8"}),
        usual.model_copy(update={"weights": "int4"}),
        usual.model_copy(update={"kv": "int8"}),
        usual.model_copy(update={"kv": "fp8"}),
    ]
    adapters, groups = (None, "digest-1", "digest-2"), ("default", "tenant:a", "group:a")
    keys = {
        block_keys(SECRET, BLOCK, salt_of(model.kv_name, adapter, group))
        for model in models for adapter in adapters for group in groups
    }  # fmt: skip
    assert len(keys) == len(models) * len(adapters) * len(groups)
    assert usual.kv_name == "m@", "as it always was"


def test_a_group_is_no_tenant_of_its_name() -> None:
    tenants = (
        TenantSpec(name="x"), TenantSpec(name="a", cache_group="x"),
        TenantSpec(name="b", cache_group="x"),
    )  # fmt: skip
    groups = [group_of(tenants, name) for name in ("x", "a", "b", "default")]
    assert groups == ["tenant:x", "group:x", "group:x", "default"]
    assert group_of((), "default") == "default"
