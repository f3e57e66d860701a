"""Prefill and decode worker chosen together, or one decode worker for both.

For each pair with room, T_queue(p) + T_prefill(p) + visible transfer(p, d) + T_queue(d) +
T_first(d), in NetKV's terms (arXiv 2606.03910), which chooses p first and d for that p. A decode
worker may also keep the whole request: no transfer, but its prefill holds up all that decode there
(Kairos, arXiv 2607.02043, deflects prefills so). Each second that one of them loses counts
`stay_weight`. A prefix that a peer has is fetched where that is sooner than computing it: the fetch
goes on while the worker's queue drains.

O(|P| * |D|); what depends on one side alone is computed once a worker.
"""

from __future__ import annotations

from typing import NamedTuple

from kvasir.core.ids import WorkerId
from kvasir.policy.route.netkv import decode_queue_s, first_step_s, least_cost_decode, visible_s
from kvasir.policy.route.view import (
    Choice,
    RouteMemory,
    RouteView,
    WorkerView,
    cached_tokens,
    prefill_left_s,
)

Best = tuple[float, float, str, str]  # cost, load of the decode worker, prefill and decode ids


class Source(NamedTuple):
    """A prefill worker: seconds until it would be done, and how it comes by the prefix."""

    ready_s: float
    worker: WorkerId
    prefill_s: float
    fetch_from: WorkerId = ""
    fetch_blocks: int = 0


def netkv_joint(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Arm `path` of the oracle. Without a decode worker with room: prefill first, then NetKV."""
    if view.stage == "decode":
        return least_cost_decode(view, "path"), memory
    if not view.decoders:
        first = min(view.candidates, key=lambda w: (prefill_left_s(view, w), w.id))
        return Choice(first.id, f"prefilled in {prefill_left_s(view, first):.3g} s"), memory
    best, transfer_s, source = _cheapest_pair(view)
    stay = min(_stay(view, worker) for worker in view.decoders)
    if best is None or stay[0] < best[0]:
        return Choice(stay[2], f"stays, cost {stay[0]:.4g} s", decode=stay[3]), memory
    why = f"cost {best[0]:.4g} s with {best[3]}, transfer {transfer_s:.4g} (path)"
    if source.fetch_from:
        why += f", {source.fetch_blocks} blocks from {source.fetch_from}"
    choice = Choice(best[2], why, transfer_s, best[3], source.fetch_from, source.fetch_blocks)
    return choice, memory


def _cheapest_pair(view: RouteView) -> tuple[Best | None, float, Source]:
    """The best of all pairs of two, and its transfer. Mixed workers keep what they prefill."""
    targets = [
        (w.id, w.blocks_reserved / w.blocks_total, decode_queue_s(w), first_step_s(view, w))
        for w in view.decoders
    ]
    spec, transfer = view.spec, view.transfer
    best: Best | None = None
    best_transfer_s, best_source = 0.0, Source(0.0, "", 0.0)
    sources = [_source(view, p) for p in view.candidates if not p.mixed]
    for at in sorted(sources):  # the soonest first, so that many drop out
        ready_s, source, prefill_s = at[:3]
        for name, load, queue_s, first_s in targets:
            if best is not None and ready_s + queue_s + first_s > best[0]:
                continue  # dear even with a free transfer
            moved_s = transfer(name, source, None, "path").seconds
            cost_s = ready_s + visible_s(spec, moved_s, queue_s, prefill_s) + first_s
            key = (cost_s, load, source, name)
            if best is None or key < best:
                best, best_transfer_s, best_source = key, moved_s, at
    return best, best_transfer_s, best_source


def _source(view: RouteView, worker: WorkerView) -> Source:
    """Prefill there, with the worker's own prefix or with the longest that anybody has."""
    own = view.hits.get(worker.id, 0)
    own_s = worker.predict_prefill(view.input_tokens, cached_tokens(view, worker))
    computed = Source(worker.prefill_s + own_s, worker.id, own_s)
    if not view.fetches or not view.hits:
        return computed
    holder = max(view.hits, key=lambda name: (view.hits[name], name))
    most = view.hits[holder]
    if most <= own:
        return computed
    fetch_s = view.transfer(worker.id, holder, most - own, "path").seconds
    tokens = min(most * view.block_size, view.input_tokens - 1)
    rest_s = worker.predict_prefill(view.input_tokens, tokens)
    fetched = Source(max(worker.prefill_s, fetch_s) + rest_s, worker.id, rest_s, holder, most)
    return min(computed, fetched)


def _stay(view: RouteView, worker: WorkerView) -> Best:
    """Everything on one decode worker."""
    own_s = worker.predict_prefill(view.input_tokens, cached_tokens(view, worker))
    held_up_s = view.spec.stay_weight * own_s * worker.decoding
    cost_s = (
        worker.prefill_s + own_s + held_up_s + decode_queue_s(worker) + first_step_s(view, worker)
    )
    return cost_s, worker.blocks_reserved / worker.blocks_total, worker.id, worker.id
