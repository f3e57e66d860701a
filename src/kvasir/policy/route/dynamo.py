"""NVIDIA Dynamo's KV router (its docs and selector): blocks to prefill plus blocks that decode.

    cost = load_weight * max(active prefill + prompt - cache_weight * hits, 0) + decode blocks

In blocks. Decode is chosen by load alone: Dynamo gives a decode router no credit for overlap.
`temperature` 0 takes the least cost, at random among equals; above it, softmax of
-cost / (spread * temperature).
"""

from __future__ import annotations

import math

from kvasir.policy.route.view import Choice, RouteMemory, RouteView, WorkerView, draw

UNIT = 2.0**-64


def dynamo(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """One cost a candidate, then argmin or softmax."""
    costs = [_cost(view, worker) for worker in view.candidates]
    at = _pick(costs, view.spec.temperature, draw(view) * UNIT)
    return Choice(view.candidates[at].id, f"cost {costs[at]:.4g} blocks"), memory


def _cost(view: RouteView, worker: WorkerView) -> float:
    if view.stage == "decode":
        return float(worker.blocks_reserved)
    prompt = view.input_tokens / view.block_size
    active = worker.prefill_tokens / view.block_size
    credit = view.spec.cache_weight * view.hits.get(worker.id, 0)
    return view.spec.load_weight * max(active + prompt - credit, 0.0) + worker.blocks_reserved


def _pick(costs: list[float], temperature: float, uniform: float) -> int:
    """Index of the chosen cost; `uniform` in [0, 1)."""
    least, most = min(costs), max(costs)
    if temperature == 0 or least == most:
        equal = [at for at, cost in enumerate(costs) if cost == least]
        return equal[int(uniform * len(equal))]
    scale = (most - least) * temperature
    weights = [math.exp((least - cost) / scale) for cost in costs]
    left = uniform * math.fsum(weights)
    for at, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return at
    return len(costs) - 1
