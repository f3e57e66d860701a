"""Where instances go: first fit on the nodes of a fabric.

Knows nodes, and what pools ask for. Must not know links, load or policy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.ids import WorkerId
from kvasir.core.messages import Location
from kvasir.core.specs import Deployment, PoolSpec
from kvasir.net.fabric import Gpus, Node


def place(nodes: Sequence[Node], deployment: Deployment) -> dict[WorkerId, Location]:
    """Where every instance of every pool stands, in the order of `worker_ids()`.

    First fit; pools bound to the fewest nodes go first, then those of large instances. An instance
    may share a node but no accelerator; it stays in one node, else in one NVLink domain or rack, if
    it can. Raises ConfigError when a pool does not fit.
    """
    free = [node.gpus for node in nodes]
    placed: dict[WorkerId, Location] = {}
    for pool in sorted(deployment.pools, key=_bound):
        usable = _usable(nodes, pool)
        room = sum(free[n] for n in usable)
        for done, worker in enumerate(pool.worker_ids()):
            gpus = _take(nodes, free, usable, pool.gpus)
            if not gpus:
                raise _full(pool, done, room)
            placed[worker] = Location(gpus)
    return {worker: placed[worker] for worker in deployment.worker_ids()}


def _bound(pool: PoolSpec) -> tuple[int, int, int]:
    """Sort key: the pool with the least choice first."""
    nodes = sys.maxsize if pool.nodes is None else len(pool.nodes)
    racks = sys.maxsize if pool.racks is None else len(pool.racks)
    return (nodes, racks, -pool.gpus)


def _usable(nodes: Sequence[Node], pool: PoolSpec) -> list[int]:
    """Nodes that a pool may use: those named, or those of its racks, in the order given."""
    if pool.nodes is not None:
        where = f"pools.{pool.name}.nodes"
        named = dict.fromkeys(node_named(nodes, name, where=where) for name in pool.nodes)
        return [nodes.index(node) for node in named]
    if pool.racks is None:
        return list(range(len(nodes)))
    racks = 1 + max(node.rack for node in nodes)
    for rack in pool.racks:
        if not 0 <= rack < racks:
            raise ConfigError(
                f"pool {pool.name!r} names rack {rack}, the topology has {racks}",
                where=f"pools.{pool.name}.racks",
                next_step=f"use racks 0 to {racks - 1}, counted over all pods",
            )
    chosen = dict.fromkeys(pool.racks)
    return [n for rack in chosen for n, node in enumerate(nodes) if node.rack == rack]


def _take(nodes: Sequence[Node], free: list[int], usable: Sequence[int], count: int) -> Gpus:
    """The first `count` accelerators that are free together; none if there are too few."""
    if count <= max((nodes[n].gpus for n in usable), default=0):
        chosen = [n for n in usable if free[n] >= count][:1]
    else:
        chosen = _whole_nodes(nodes, free, usable, count)
    gpus: list[int] = []
    for n in chosen:
        taken = min(count - len(gpus), free[n])
        first = nodes[n].first + nodes[n].gpus - free[n]
        gpus.extend(range(first, first + taken))
        free[n] -= taken
    return tuple(gpus)


def _whole_nodes(
    nodes: Sequence[Node], free: Sequence[int], usable: Sequence[int], count: int
) -> list[int]:
    """Empty nodes with `count` accelerators, of one NVLink domain, else of one rack, where that is
    possible; none if there are too few."""
    empty = [n for n in usable if free[n] == nodes[n].gpus]
    together: tuple[Callable[[int], int], ...] = (
        lambda n: nodes[n].domain, lambda n: nodes[n].rack, lambda n: 0,
    )  # fmt: skip
    for group in together:
        for start in range(len(empty)):
            run = _run(nodes, empty[start:], count)
            if run and len({group(n) for n in run}) == 1:
                return run
    return []


def _run(nodes: Sequence[Node], empty: Sequence[int], count: int) -> list[int]:
    """The first of `empty` that have `count` accelerators together; none if all have fewer."""
    room = 0
    for used, n in enumerate(empty, 1):
        room += nodes[n].gpus
        if room >= count:
            return list(empty[:used])
    return []


def _full(pool: PoolSpec, done: int, room: int) -> ConfigError:
    where = "the topology"
    if pool.racks is not None or pool.nodes is not None:
        where = f"racks {list(pool.racks)}" if pool.racks is not None else "its nodes"
    return ConfigError(
        f"pool {pool.name!r} wants {pool.count} x {pool.gpus} accelerators "
        f"({pool.count * pool.gpus}); {where} had {room} free, room for {done} x {pool.gpus}",
        where=f"pools.{pool.name}",
        next_step="lower count, tp or pp, or make the topology larger",
    )


def node_named(nodes: Sequence[Node], name: str, *, where: str) -> Node:
    """Raises ConfigError when there is none."""
    for node in nodes:
        if node.name == name:
            return node
    raise ConfigError(
        f"no node {name!r}",
        where=where,
        nearest=nearest(name, [node.name for node in nodes]),
        next_step="name a node of the topology",
    )
