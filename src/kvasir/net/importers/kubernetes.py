"""Kubernetes nodes (`kubectl get nodes -o json`): accelerators from their resources, racks, zones
and regions from their labels.

Labels: https://kubernetes.io/docs/reference/labels-annotations-taints/ (zone and region are well
known; a rack's label is the cluster's own choice).
"""

from __future__ import annotations

import json
from typing import Any

from kvasir.core.errors import ConfigError, nearest
from kvasir.net.importers.tree import Imported, Options, Uplink, explicit

Chain = tuple[str, ...]  # label values from the rack up


def from_kubernetes(text: str, where: str, options: Options) -> Imported:
    """An explicit topology of the nodes with accelerators; each label value is a switch.

    Raises ConfigError that names the item.
    """
    gpus: dict[str, int] = {}
    uplinks: dict[Uplink, None] = {}
    names: dict[str, tuple[str, Chain]] = {}
    plain, seen = 0, dict[str, None]()
    for i, item in enumerate(_items(text, where)):
        here = f"{where}, items[{i}]"
        name, labels, count = _node(item, here)
        seen.update(dict.fromkeys(labels))
        if not count:
            plain += 1
            continue
        if name in gpus:
            raise ConfigError(f"node {name!r} is there twice", where=here)
        gpus[name] = count
        uplinks.update(dict.fromkeys(_chain(name, labels, options.labels, names)))
    if not gpus:
        what = f"none of {plain} nodes has a resource that ends in /gpu"
        raise ConfigError(what, where=where, next_step="install the device plugin, or edit by hand")
    roots = _roots(gpus, uplinks)
    if len(roots) > 1:  # nothing says what joins them
        uplinks.update(dict.fromkeys(Uplink(root, "core") for root in roots))
    notes = [f"{len(gpus)} nodes with accelerators, {plain} without left out"]
    for label in options.labels:
        if label not in seen:
            notes.append(f"no node has label {label}; nearest: {nearest(label, seen)}")
    return Imported(explicit(gpus, list(uplinks), options, where), tuple(notes))


def _items(text: str, where: str) -> list[Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error.msg}", where=f"{where}:{error.lineno}") from None
    items = data.get("items") if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise ConfigError(
            "not a list of nodes: no `items`", where=where,
            next_step="kubectl get nodes -o json > nodes.json",
        )  # fmt: skip
    return items


def _node(item: Any, where: str) -> tuple[str, dict[str, str], int]:
    """Name, labels and number of accelerators."""
    try:
        metadata, status = item["metadata"], item["status"]
        name = metadata["name"]
        labels = metadata.get("labels") or {}
        resources = status.get("allocatable") or status.get("capacity") or {}
        count = sum(int(value) for key, value in resources.items() if key.endswith("/gpu"))
        kind = item.get("kind", "Node")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"not a node: {type(error).__name__} {error}",
            where=where,
            next_step="kubectl get nodes -o json > nodes.json",
        ) from None
    if kind != "Node" or not isinstance(name, str) or not isinstance(labels, dict):
        raise ConfigError(f"not a node but a {kind}", where=where)
    return name, labels, count


def _chain(
    node: str, labels: dict[str, str], levels: Chain, names: dict[str, tuple[str, Chain]]
) -> list[Uplink]:
    """The node's links upwards; levels that it does not name are left out."""
    found: list[Uplink] = []
    below = node
    given = [(level, labels[level]) for level in levels if labels.get(level)]
    for i, (level, value) in enumerate(given):
        outer = tuple(v for _, v in given[i:])
        above = f"{level.rsplit('/', 1)[-1]}-{value}"
        if names.setdefault(above, (level, outer)) != (level, outer):  # r1 of another zone
            above = f"{above}.{'.'.join(outer[1:])}"
            names[above] = (level, outer)
        found.append(Uplink(below, above))
        below = above
    return found


def _roots(gpus: dict[str, int], uplinks: dict[Uplink, None]) -> list[str]:
    """Nodes and switches that have nothing above them."""
    below = {u.below for u in uplinks}
    every = dict.fromkeys((*gpus, *(u.above for u in uplinks)))
    return [name for name in every if name not in below]
