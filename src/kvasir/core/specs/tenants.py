"""Who asks, and what of it is kept for them. Names, digests and limits; must not know requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from kvasir.core.errors import nearest
from kvasir.core.ids import TenantId
from kvasir.core.specs.base import Spec, wrong

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TenantSpec(Spec):
    """One who asks, known by an API key; the file holds only its digest
    (`printf %s KEY | sha256sum`).

    `cache_group`: tenants of one group find what any of them has cached, and can tell by the time
    it takes; without one a tenant finds its own only. `pinned_blocks_max`: KV blocks that its
    caches may keep, in place of `caches.tenant_blocks_max`. `cache_weight`: its part of what is
    cached beside theirs, under `policy.evict: fair`.
    """

    name: str = Field(min_length=1, max_length=128)
    keys_sha256: tuple[Digest, ...] = ()
    cache_group: str | None = Field(default=None, min_length=1, max_length=128)
    pinned_blocks_max: int | None = Field(default=None, ge=0)
    cache_weight: float = Field(default=1.0, gt=0)


class CachesSpec(Spec):
    """What prefixes may be kept (`POST /v1/caches`, `cache_control`). Blocks, seconds.

    `pool_share_max` of a worker's blocks, so that the rest serves. A tenant keeps at most
    `tenant_blocks_max` different blocks in `tenant_caches_max` caches.
    """

    pool_share_max: float = Field(default=0.25, ge=0, le=1)
    tenant_blocks_max: int = Field(default=4096, ge=0)
    tenant_caches_max: int = Field(default=256, ge=0)
    ttl_s: float = Field(default=3600.0, gt=0)
    ttl_s_max: float = Field(default=86400.0, gt=0)


def check_tenants(tenants: Sequence[TenantSpec]) -> None:
    """Names and keys are one tenant's each; a group has two members or more. Raises."""
    groups = Counter(tenant.cache_group for tenant in tenants)
    names: set[str] = set()
    keys: set[str] = set()
    for i, tenant in enumerate(tenants):
        if tenant.name in names:
            raise wrong(f"{tenant.name!r} is the name of two tenants", "tenants", i, "name")
        for j, key in enumerate(tenant.keys_sha256):
            if key in keys:
                raise wrong("this key is given twice", "tenants", i, "keys_sha256", j)
            keys.add(key)
        names.add(tenant.name)
        group = tenant.cache_group
        if group is not None and groups[group] < 2:
            near = nearest(group, [g for g in groups if g not in (None, group)])
            what = f"no other tenant is of the group {group!r}"
            raise wrong(what, "tenants", i, "cache_group", near=near)


def group_of(tenants: Sequence[TenantSpec], tenant: TenantId) -> str:
    """Whose cached blocks `tenant` finds, as block keys are salted with it. A group is never taken
    for a tenant of the same name."""
    found = next((one for one in tenants if one.name == tenant), None)
    if found is None:
        return tenant
    if found.cache_group is not None:
        return f"group:{found.cache_group}"
    return f"tenant:{found.name}"
