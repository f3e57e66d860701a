"""SGLang's cache-aware router (sgl-model-gateway, `cache_aware`): prefix affinity while balanced.

Its approximate tree over characters is the cluster's true prefix index here.
"""

from __future__ import annotations

from kvasir.policy.route.view import Choice, RouteMemory, RouteView, WorkerView, cached_tokens


def sglang(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Unbalanced (most - least > `balance_abs` and most > `balance_ratio` * least requests): the
    least loaded. Else the longest match if it is over `cache_threshold` of the prompt, else the
    least loaded (comments in its source still say the smallest tree)."""
    least = min(view.candidates, key=lambda w: (w.requests, w.id))
    most = max(w.requests for w in view.candidates)
    apart = most - least.requests > view.spec.balance_abs
    if apart and most > view.spec.balance_ratio * least.requests:
        return Choice(least.id, f"unbalanced, {least.requests} to {most} requests"), memory
    best = min(view.candidates, key=lambda w: (-_match(view, w), w.requests, w.id))
    if _match(view, best) > view.spec.cache_threshold:
        return Choice(best.id, f"match {_match(view, best):.2f}"), memory
    return Choice(least.id, f"no match, {least.requests} requests"), memory


def _match(view: RouteView, worker: WorkerView) -> float:
    return cached_tokens(view, worker) / max(view.input_tokens, 1)
