"""Route policies that do not look at the network: turns, load, and load weighed with cache."""

from __future__ import annotations

from kvasir.policy.route.view import Choice, RouteMemory, RouteView, WorkerView, cached_tokens


def round_robin(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Each in turn, prefill and decode with a counter of their own."""
    if view.stage == "prefill":
        turn, memory = memory.prefill_turn, memory._replace(prefill_turn=memory.prefill_turn + 1)
    else:
        turn, memory = memory.decode_turn, memory._replace(decode_turn=memory.decode_turn + 1)
    worker = view.candidates[turn % len(view.candidates)]
    return Choice(worker.id, f"turn {turn}"), memory


def least_loaded(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Fewest queued prefill seconds, or the smallest share of KV memory reserved."""
    best = min(view.candidates, key=lambda w: (load(view, w), w.id))
    return Choice(best.id, f"load {load(view, best):.3g}"), memory


def cache_load(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Smallest `load_weight * load - cache_weight * cached share`, both in [0, 1].

    Load is normalised by the most loaded candidate, as llm-d's and AIBrix's scorers do.
    """
    heaviest = max(load(view, w) for w in view.candidates) or 1.0

    def score(worker: WorkerView) -> float:
        cached = cached_tokens(view, worker) / max(view.input_tokens, 1)
        return view.spec.load_weight * load(view, worker) / heaviest - (
            view.spec.cache_weight * cached
        )

    best = min(view.candidates, key=lambda w: (score(w), w.id))
    return Choice(best.id, f"score {score(best):.3g}, hit {view.hits.get(best.id, 0)}"), memory


def load(view: RouteView, worker: WorkerView) -> float:
    """Seconds of prefill waiting, or the share of KV memory spoken for."""
    if view.stage == "prefill":
        return worker.prefill_s
    return worker.blocks_reserved / worker.blocks_total
