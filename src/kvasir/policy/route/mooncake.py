"""Mooncake's Conductor (arXiv 2407.00079, Algorithm 1): the instance with the least predicted TTFT.

    TTFT_i = queue_i + prefill(l, len_i)                       if best / len_i < prefix_ratio
           = fetch(best - len_i) + queue_i + prefill(l, best)  otherwise

The second branch fetches the best prefix from its holder; that hot blocks are replicated where they
are used is its side effect. Where workers do not fetch (`view.fetches`), a prefix that is not there
is computed again. Decode goes where a token takes least time. Refusing a request
whose prediction is over its SLO is admission's business (`policy.admit`).
"""

from __future__ import annotations

from kvasir.policy.route.view import (
    Choice,
    RouteMemory,
    RouteView,
    WorkerView,
    cached_tokens,
    prefill_left_s,
)


def mooncake(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Algorithm 1. `prefix_ratio` is the paper's kvcache_balancing_threshold (never published)."""
    if view.stage == "decode":
        return _fastest_token(view), memory
    holder = max(view.candidates, key=lambda w: (cached_tokens(view, w), -w.prefill_s))
    options = [(*_ttft(view, worker, holder), worker.id) for worker in view.candidates]
    ttft_s, fetched, best = min(options, key=lambda o: (o[0], o[2]))
    why = f"TTFT {ttft_s:.3g} s, hit {view.hits.get(best, 0)}"
    if not fetched:
        return Choice(best, why), memory
    why += f", {fetched} blocks from {holder.id}"
    blocks = view.hits.get(holder.id, 0)
    return Choice(best, why, fetch_from=holder.id, fetch_blocks=blocks), memory


def _ttft(view: RouteView, worker: WorkerView, holder: WorkerView) -> tuple[float, int]:
    """Predicted seconds, and the blocks that they count on fetching."""
    most, own = view.hits.get(holder.id, 0), view.hits.get(worker.id, 0)
    near = most == own or (own > 0 and most / own < view.spec.prefix_ratio)
    if near or not view.fetches:
        return prefill_left_s(view, worker), 0
    fetch_s = view.transfer(worker.id, holder.id, most - own).seconds
    computed_s = worker.predict_prefill(view.input_tokens, cached_tokens(view, holder))
    return fetch_s + worker.prefill_s + computed_s, most - own


def _fastest_token(view: RouteView) -> Choice:
    def token_s(worker: WorkerView) -> float:
        return worker.predict_iteration(
            worker.decoding + 1, worker.context_tokens + view.input_tokens
        )

    best = min(view.candidates, key=lambda w: (token_s(w), w.id))
    return Choice(best.id, f"a token in {token_s(best):.3g} s")
