"""llm-d's inference scheduler: scorers in [0, 1], weighed and added, the highest sum wins.

prefix-cache: leading blocks held / blocks of the prompt. kv-cache-utilization: 1 - share in use.
load-aware: 0.5 * (1 - waiting / 128), not below 0. Weights are `cache_weight`, `kv_weight` and
`load_weight`. Its decider (stay where the prompt is cached) is `policy.route.stay`.
"""

from __future__ import annotations

from kvasir.policy.route.view import Choice, RouteMemory, RouteView, WorkerView

WAITING_MAX = 128


def llm_d(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Highest weighted sum; ties by id."""
    best = min(view.candidates, key=lambda w: (-_score(view, w), w.id))
    prefix, free, idle = _scores(view, best)
    why = f"score {_score(view, best):.3g} = prefix {prefix:.2f}, kv {free:.2f}, load {idle:.2f}"
    return Choice(best.id, why), memory


def _score(view: RouteView, worker: WorkerView) -> float:
    prefix, free, idle = _scores(view, worker)
    spec = view.spec
    return spec.cache_weight * prefix + spec.kv_weight * free + spec.load_weight * idle


def _scores(view: RouteView, worker: WorkerView) -> tuple[float, float, float]:
    blocks = max(view.input_tokens // view.block_size, 1)
    prefix = min(view.hits.get(worker.id, 0) / blocks, 1.0)
    free = max(1.0 - worker.blocks_reserved / worker.blocks_total, 0.0)
    idle = max(0.5 * (1.0 - waiting(view, worker) / WAITING_MAX), 0.0)
    return prefix, free, idle


def waiting(view: RouteView, worker: WorkerView) -> int:
    """Requests that do not run yet: behind the first prefill, or beyond the decode batch."""
    if view.stage == "prefill":
        return max(worker.prefilling - 1, 0)
    return max(worker.decoding - worker.batch_max, 0)
