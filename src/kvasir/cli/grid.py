"""`--grid PATH=VALUE,VALUE`: deployments whose policy differs in a few parameters.

Knows specs and flags; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Final, NamedTuple, get_args

import yaml

from kvasir.cli.overrides import changed
from kvasir.core.errors import ConfigError, nearest
from kvasir.core.specs import Deployment, PolicySpec
from kvasir.core.specs.base import Spec
from kvasir.policy.admit import ADMITS
from kvasir.policy.batch import BATCHES
from kvasir.policy.evict import EVICTS
from kvasir.runtime.policies import ensure

CELLS_MAX: Final = 1000


class Axis(NamedTuple):
    """One parameter under `policy`, and the values that it takes."""

    path: str
    values: tuple[object, ...]


def axes(flags: Iterable[str]) -> tuple[Axis, ...]:
    """Raises ConfigError: not PATH=VALUES, a path that no policy has, one that is given twice."""
    found: list[Axis] = []
    for flag in flags:
        path, _, text = flag.partition("=")
        values = tuple(dict.fromkeys(v.strip() for v in text.split(",") if v.strip()))
        if not values:
            raise ConfigError(
                f"--grid {flag}: no values", next_step="--grid route.cache_weight=0.5,1,2"
            )
        known = list(_leaves(PolicySpec))
        if path not in known:
            raise ConfigError(
                f"--grid {path}: no policy parameter is called so", nearest=nearest(path, known)
            )
        if path in {axis.path for axis in found}:
            raise ConfigError(f"--grid {path}: given twice; put all values into one")
        _check_names(path, values)
        found.append(Axis(path, tuple(yaml.safe_load(v) for v in values)))
    return tuple(found)


def cells(specs: Mapping[str, Deployment], grid: Sequence[Axis]) -> dict[str, Deployment]:
    """Every combination of every deployment, by label; the last axis changes fastest. No axis: the
    deployments as they are.

    Raises ConfigError for a value that its parameter does not take, and for over 1,000 cells.
    """
    count = len(specs)
    for axis in grid:
        count *= len(axis.values)
    if count > CELLS_MAX:
        raise ConfigError(f"--grid: {count} cells, at most {CELLS_MAX}")
    found = {}
    for name, spec in specs.items():
        for values in product(*(axis.values for axis in grid)):
            chosen = dict(zip((axis.path for axis in grid), values, strict=True))
            shown = [f"{path.rpartition('.')[2]}={value}" for path, value in chosen.items()]
            found[" ".join((name, *shown))] = _cell(spec, chosen)
    return found


def _cell(spec: Deployment, chosen: Mapping[str, object]) -> Deployment:
    for path, value in chosen.items():
        spec = changed(spec, {f"policy.{path}": value}, f"--grid {path}={value}")
    return spec


def _check_names(path: str, values: Iterable[str]) -> None:
    """Values that name a policy must name one that is there; a package's is imported."""
    if path in ("route.name", "route.fallback"):
        for value in values:
            ensure(value, f"--grid {path}")
    tables: dict[str, Collection[str]] = {"batch.name": BATCHES, "admit": ADMITS, "evict": EVICTS}
    for value in values if path in tables else ():
        if value not in tables[path]:
            near = nearest(value, tables[path])
            raise ConfigError(f"--grid {path}: no {value!r}", nearest=near)


def _leaves(spec: type[Spec], before: str = "") -> Iterator[str]:
    """Dotted names of all fields that hold a value."""
    for name, field in spec.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if _is_spec(t)]
        if inner:
            yield from _leaves(inner[0], f"{before}{name}.")
        else:
            yield before + name


def _is_spec(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Spec)
