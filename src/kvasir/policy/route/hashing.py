"""Consistent hashing with bounded load (Mirrokni, Thorup, Zadimoghaddam, arXiv 1608.01350).

A prompt's first `hash_blocks` blocks name it, and every name has an order of workers that depends
on nothing else; the first that is not full takes it. Full is `load_bound` times the mean number of
requests. In place of points on a ring the order is by hash of (name, worker) (rendezvous hashing,
Thaler and Ravishankar 1998): a worker that comes or goes moves only the names that it takes or had,
and a pure function needs no ring.
"""

from __future__ import annotations

import math

from xxhash import xxh3_64_intdigest

from kvasir.policy.route.view import Choice, RouteMemory, RouteView, WorkerView


def consistent_hash(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """The first worker in the name's order with room; one always has."""
    name = _name(view)
    order = sorted(view.candidates, key=lambda w: (rank(name, w), w.id))
    limit = load_limit(view)
    for at, worker in enumerate(order):
        if worker.requests < limit:
            return Choice(worker.id, f"choice {at} of its hash, limit {limit}"), memory
    raise AssertionError("all workers are above their mean load")


def rank(name: bytes, worker: WorkerView) -> int:
    return xxh3_64_intdigest(name + worker.id.encode())


def load_limit(view: RouteView) -> int:
    """ceil(`load_bound` * mean requests, this one included): somebody is always below it."""
    total = sum(w.requests for w in view.candidates) + 1
    return math.ceil(view.spec.load_bound * total / len(view.candidates))


def _name(view: RouteView) -> bytes:
    """A block's key stands for all before it. A prompt without a full block is its own."""
    keys = view.keys
    if not keys:
        return view.request_id.encode()
    return keys[min(view.spec.hash_blocks, len(keys)) - 1]
