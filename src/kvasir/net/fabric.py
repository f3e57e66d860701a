"""What a fabric is to the rest: links, nodes, and the equal paths between two sets of accelerators.

Knows indices and capacities. Must not know which kind of fabric it is, time, traffic or policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import msgspec

NODE, RACK, POD, CORE = range(4)
Gpus = tuple[int, ...]
Path = tuple[int, ...]  # indices of links, in the order in which they are crossed


class Link(msgspec.Struct, frozen=True, gc=False):
    """One direction of a wire, or of several that act as one. `capacity` is bytes per second.

    `tier` says whose counters it belongs to: 0 NVLink, 1 NIC, 2 rack uplink, 3 pod uplink.
    """

    name: str
    capacity: float
    tier: int


class Node(msgspec.Struct, frozen=True, gc=False):
    """A server: accelerators [first, first + gpus). Nodes of one `domain` share NVLink, nodes of
    one `rack` are a switch apart."""

    name: str
    first: int
    gpus: int
    domain: int
    rack: int


class Lane(msgspec.Struct, frozen=True, gc=False):
    """Shard `pairs` of a bundle that have the same equal `paths` to choose from."""

    pairs: tuple[int, ...]
    paths: tuple[Path, ...]


class Fabric(Protocol):
    """One kind of network. Links that it adds to the table it was built with are never taken back.

    Shard pair i of a bundle runs from accelerator i of `src` to accelerator i of `dst`, each
    counted around, and there are as many pairs as the larger side has accelerators.
    """

    @property
    def nodes(self) -> Sequence[Node]:
        """In the order of their accelerators."""

    def tier(self, src: Gpus, dst: Gpus) -> int:
        """0 same node or NVLink domain, 1 a switch apart, 2 same pod, 3 farther."""

    def lanes(self, src: Gpus, dst: Gpus) -> list[Lane]:
        """Every pair in one lane."""

    def latency_s(self, src: Gpus, dst: Gpus) -> float:
        """Seconds beside those of the tier."""

    def nics(self, gpus: Gpus) -> list[int]:
        """The links over which an instance sends to and receives from other nodes."""


class LinkTable:
    """Links and their capacities, in parallel. It grows; an index keeps its meaning."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.capacities: list[float] = []

    def add(self, name: str, capacity: float, tier: int) -> int:
        """The new link's index."""
        self.links.append(Link(name, capacity, tier))
        self.capacities.append(capacity)
        return len(self.links) - 1

    def pair(self, name: str, one: str, other: str, capacity: float, tier: int) -> int:
        """Both directions; the index of the first, the second has the next."""
        first = self.add(f"{name}-{one}", capacity, tier)
        self.add(f"{name}-{other}", capacity, tier)
        return first

    def trunk(self, name: str, capacity: float, count: int, tier: int) -> list[int]:
        """The upward directions of `count` equal links that have `capacity` together."""
        names = [name] if count == 1 else [f"{name}.{i}" for i in range(count)]
        return [self.pair(each, "up", "down", capacity / count, tier) for each in names]


def firsts(sizes: Sequence[int]) -> list[int]:
    """The first accelerator of each node."""
    return [0, *accumulate(sizes)][: len(sizes)]


def pair_ends(src: Gpus, dst: Gpus) -> list[tuple[int, int]]:
    """The accelerators of each shard pair."""
    count = max(len(src), len(dst))
    return [(src[i % len(src)], dst[i % len(dst)]) for i in range(count)]


def instance_name(gpus: Gpus) -> str:
    """How an instance's own links are called."""
    return f"gpus-{gpus[0]}" if len(gpus) == 1 else f"gpus-{gpus[0]}..{gpus[-1]}"


def nvlink(table: LinkTable, gpus: Gpus, bandwidth: float) -> int:
    """An instance's NVLink, one link each way of the summed rate; the index of the way out."""
    capacity = len(gpus) * bandwidth
    return table.pair(instance_name(gpus), "nvlink-out", "nvlink-in", capacity, NODE)
