"""Flags onto a deployment: each gives a new, validated deployment, or one ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError

from kvasir.core.errors import ConfigError
from kvasir.core.specs import Deployment, PoolSpec, Role
from kvasir.core.specs.base import Spec

AnySpec = TypeVar("AnySpec", bound=Spec)


def changed(deployment: Deployment, changes: Mapping[str, object], flag: str) -> Deployment:
    """A copy with values at dotted paths replaced, validated again. `flag` names it in errors."""
    spec = deployment
    for path, value in changes.items():
        spec = _put(spec, path.split("."), value)
    try:
        return Deployment.model_validate(spec.model_dump(warnings=False))
    except ValidationError as error:
        what = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{flag}: {what}", where=deployment.name) from None


def _put(spec: AnySpec, path: list[str], value: object) -> AnySpec:
    if len(path) > 1:
        value = _put(getattr(spec, path[0]), path[1:], value)
    return spec.model_copy(update={path[0]: value})


def with_policy(deployment: Deployment, route: str | None) -> Deployment:
    """Another route policy by name; None leaves the deployment's own."""
    from kvasir.runtime.policies import ensure

    if route is None:
        return deployment
    ensure(route, "--policy")
    return changed(deployment, {"policy.route.name": route}, "--policy")


def with_counts(deployment: Deployment, counts: Mapping[Role, int | None]) -> Deployment:
    """Other numbers of workers. A role that is not given (None) keeps its pools, except that
    giving `mixed` drops the others; 0 drops a role. A role without a pool gets a copy of the first.
    """
    given = {role: n for role, n in counts.items() if n is not None}
    if not given:
        return deployment
    flags = " ".join(f"--{role} {n}" for role, n in given.items())
    pools: list[PoolSpec] = []
    for role in ("prefill", "decode", "mixed"):
        own = [p for p in deployment.pools if p.role == role]
        if role in given:
            pools += _resized(own or [_new(deployment, role)], given[role], f"--{role}")
        elif not given.get("mixed"):
            pools += own
    if not pools:
        raise ConfigError(f"{flags}: no worker is left", next_step="--prefill 1 --decode 2")
    return changed(deployment, {"pools": tuple(pools)}, flags)


def _resized(pools: list[PoolSpec], count: int, flag: str) -> list[PoolSpec]:
    if count < 0:
        raise ConfigError(f"{flag} {count}: a number of workers is 0 or more")
    if len(pools) > 1:
        names = ", ".join(p.name for p in pools)
        raise ConfigError(f"{flag}: several pools have this role ({names}); set them in the file")
    return [pools[0].model_copy(update={"count": count})] if count else []


def _new(deployment: Deployment, role: Role) -> PoolSpec:
    taken = {p.name for p in deployment.pools}
    name = role if role not in taken else f"{role}-pool"
    return deployment.pools[0].model_copy(update={"name": name, "role": role})
