"""What importers share: options, a tree of switches as an explicit topology, and its YAML.

Knows names and rates. Must not know where they were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from kvasir.core.errors import ConfigError
from kvasir.core.specs.topology import LinkSpec, NodeSpec, TopologySpec

RACK_LABELS = (
    "topology.kubernetes.io/rack", "topology.kubernetes.io/zone", "topology.kubernetes.io/region",
)  # fmt: skip


class Options(NamedTuple):
    """What the sources do not say. Rates are bytes per second.

    `gpus_per_node` of nodes that do not tell; `nic_bandwidth` of one NIC (nvidia-smi), or of an
    accelerator's share of its node's link; `oversubscription` of each level of switches; `nodes`
    like the one that was looked at (nvidia-smi); `labels` of Kubernetes nodes, from the rack up.
    """

    gpus_per_node: int = 8
    nic_bandwidth: float = 12.5e9
    oversubscription: float = 1.0
    nodes: int = 1
    labels: tuple[str, ...] = RACK_LABELS


class Imported(NamedTuple):
    """`notes` say what was supposed; they stand above the section as comments."""

    spec: TopologySpec
    notes: tuple[str, ...]

    def yaml(self) -> str:
        """A `topology:` section that `parse_deployment` reads back equal."""
        given = self.spec.model_dump(mode="json", exclude_unset=True)
        lines = [*(f"# {note}" for note in self.notes), "topology:"]
        for key, value in given.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                lines.append(f"  {key}:")
                lines += [f"    - {_flow(_readable(item))}" for item in value]
            else:
                lines.append(f"  {key}: {_flow(_readable({key: value})[key])}")
        return "\n".join(lines) + "\n"


class Uplink(NamedTuple):
    """A node or switch below a switch; `bandwidth` None: by the members' NICs."""

    below: str
    above: str
    bandwidth: float | None = None


def explicit(
    gpus: Mapping[str, int], uplinks: Sequence[Uplink], options: Options, where: str
) -> TopologySpec:
    """Nodes with their accelerators, and who is below whom.

    A node's link has its accelerators' NICs, a switch's what its members send up, divided by the
    oversubscription; several uplinks share it. Raises ConfigError for a circle of switches, or
    nodes without a path.
    """
    members: dict[str, list[str]] = {}
    above: dict[str, list[Uplink]] = {}
    for link in uplinks:
        members.setdefault(link.above, []).append(link.below)
        above.setdefault(link.below, []).append(link)
    rates: dict[str, float] = {}

    def rate(name: str, seen: tuple[str, ...] = ()) -> float:
        """What an element sends up in all."""
        if name in seen:
            raise ConfigError(f"switch {name!r} is above itself", where=where)
        if name in gpus:
            return gpus[name] * options.nic_bandwidth
        if name not in rates:
            below = sum(
                _share(above[m], name, rate(m, (*seen, name))) for m in members.get(name, ())
            )
            rates[name] = below / options.oversubscription
        return rates[name]

    links = []
    for below, top, _ in uplinks:
        bandwidth = _share(above[below], top, rate(below))
        links.append(LinkSpec(between=(below, top), bandwidth=bandwidth))
    switches = dict.fromkeys(u.above for u in uplinks)
    try:
        return TopologySpec(
            preset="explicit",
            nodes=tuple(NodeSpec(name=name, gpus=count) for name, count in gpus.items()),
            switches=tuple(switches),
            links=tuple(links),
        )
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(what, where=where) from None


def _share(uplinks: Sequence[Uplink], above: str, total: float) -> float:
    """What one of an element's links carries."""
    (own,) = [u for u in uplinks if u.above == above]
    return total / len(uplinks) if own.bandwidth is None else own.bandwidth


def _readable(item: dict[str, Any]) -> dict[str, Any]:
    """Rates as people write them, where that is exact."""
    shown = dict(item)
    for key, value in item.items():
        if key.endswith("bandwidth") and float(f"{value / 1e9:g}") * 1e9 == value:
            shown[key] = f"{value / 1e9:g} GB/s"
    return shown


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
