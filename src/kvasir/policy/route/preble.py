"""Preble's E2, exploit or explore (arXiv 2407.00023, section 3.2, Algorithm 1).

Exploit when more of the prompt is cached at the best worker than is not; else explore the least
    load + eviction + own prefill,        all in seconds of work
Its load is over a sliding window, ours is what is outstanding; its eviction cost weighs each block
by its hit rate, ours counts those that must go at the mean cost of a token. A worker with
`balance_ratio` times the load of the least loaded is not exploited further (Preble's rebalancing).
Its replication of hot prefixes follows from that: the next worker computes them too.
"""

from __future__ import annotations

from kvasir.policy.route.view import (
    OUTPUT_TOKENS_MEAN,
    Choice,
    RouteMemory,
    RouteView,
    WorkerView,
    cached_tokens,
)


def preble(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Both stages by the same rule; what a decode worker has cached need not be shipped."""
    lightest = min(_load(view, w) for w in view.candidates)
    best = min(view.candidates, key=lambda w: (-cached_tokens(view, w), _load(view, w), w.id))
    cached = cached_tokens(view, best)
    own_s = best.predict_prefill(view.input_tokens, cached)
    balanced = _load(view, best) <= view.spec.balance_ratio * lightest + own_s
    if cached > view.input_tokens - cached and balanced:
        return Choice(best.id, f"exploit, {cached} tokens cached"), memory
    found = min(view.candidates, key=lambda w: (_cost(view, w), w.id))
    return Choice(found.id, f"explore, cost {_cost(view, found):.3g} s"), memory


def _load(view: RouteView, worker: WorkerView) -> float:
    """Seconds of prefill outstanding, and of the decodes that stand behind it."""
    if not worker.decoding:
        return worker.prefill_s
    token_s = worker.predict_iteration(worker.decoding, worker.context_tokens)
    return worker.prefill_s + OUTPUT_TOKENS_MEAN * token_s


def _cost(view: RouteView, worker: WorkerView) -> float:
    cached = cached_tokens(view, worker)
    own_s = worker.predict_prefill(view.input_tokens, cached)
    new_blocks = -(-view.input_tokens // view.block_size) - view.hits.get(worker.id, 0)
    evicted = min(max(new_blocks - _free_blocks(view, worker), 0), new_blocks)
    eviction_s = own_s * evicted / new_blocks if new_blocks > 0 else 0.0
    return _load(view, worker) + eviction_s + own_s


def _free_blocks(view: RouteView, worker: WorkerView) -> int:
    """Neither spoken for nor cached. Blocks that are both count twice, so this is at most it."""
    spoken_for = worker.blocks_reserved + view.blocks_cached(worker.id)
    return max(worker.blocks_total - spoken_for, 0)
