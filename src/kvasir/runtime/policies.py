"""Route policies by name: our own, and those that installed packages offer.

A package offers one by an entry point of the group `kvasir.policies`, name = its name, value = the
function. It is imported when a deployment asks for it, never before, and joins `ROUTES`; simulator,
verify and a live conductor then find it like any other.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import cast

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.specs import RouteSpec
from kvasir.policy.route import ROUTES, Route

GROUP = "kvasir.policies"


def route_names() -> list[str]:
    """Every name that a deployment may use. Imports no package."""
    return [*ROUTES, *(p.name for p in _offered() if p.name not in ROUTES)]


def ready(spec: RouteSpec) -> None:
    """Make `ROUTES` hold what `spec` names."""
    for name in (spec.name, spec.fallback) if spec.name == "session" else (spec.name,):
        ensure(name)


def ensure(name: str, asked_by: str = "policy.route.name") -> None:
    """Make `ROUTES` hold `name`. Raises ConfigError: nobody offers it, or it cannot be loaded.

    Our own names cannot be taken over; of two packages that offer one name, neither is taken.
    """
    if name in ROUTES:
        return
    found = [p for p in _offered() if p.name == name]
    if not found:
        raise ConfigError(f"{asked_by}: no {name!r}", nearest=nearest(name, route_names()))
    if len(found) > 1:
        raise ConfigError(
            f"{asked_by}: {name!r} is offered by {' and '.join(p.value for p in found)}",
            next_step="uninstall one of them",
        )
    ROUTES[name] = _load(found[0])


def _load(point: EntryPoint) -> Route:
    where = f"entry point {point.name} = {point.value}"
    try:
        policy = point.load()
    except Exception as error:
        raise ConfigError(
            f"the policy cannot be loaded: {type(error).__name__}: {error}", where=where
        ) from error
    if not callable(policy):
        raise ConfigError(f"the policy is a {type(policy).__name__}, not a function", where=where)
    return cast(Route, policy)


def _offered() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP))
