"""NetKV (arXiv 2606.03910): the decode worker with the least transfer + queue + first step.

Prefill goes where it is over soonest: queue plus the prefill of what is not cached there (Mooncake,
arXiv 2407.00079, Algorithm 1 without its transfer term). Decode minimises

    T_xfer(p, d) + T_queue(d) + T_first(d)          `cost: serial`, the paper
    max(T_xfer, T_queue) + T_first                  `cost: overlap`
    max(T_xfer / L, T_xfer - T_prefill (L-1) / L, T_queue) + T_first
                                                    `cost: streamed`, L layers ship as they are made

The family differs in what it asks the oracle (`net.oracle`): `netkv_static` the tier's bandwidth,
`netkv_self` shared with own transfers, `netkv` with the switches' readings too (or the deployment's
`oracle` arm), `netkv_path` the narrowest share on the path's links, `exact_maxmin` the rate that
the transfer would get beside all own ones.

One deviation: the paper's T_queue = (waiting - free slots)+ * t_iter supposes that one slot frees
per iteration. Here a waiting sequence waits for a departure, and with geometric output lengths of
mean `o` the j-th departure from a batch of b takes about j * o * t_iter / b.
"""

from __future__ import annotations

from typing import Final

from kvasir.core.specs import RouteSpec
from kvasir.net.oracle import Arm
from kvasir.policy.route.view import (
    OUTPUT_TOKENS_MEAN,
    Choice,
    Route,
    RouteMemory,
    RouteView,
    WorkerView,
    prefill_left_s,
)

# Of a model, about: 32 to 126. It keeps a transfer that prefill hides from counting for nothing, or
# the network would not be looked at until it is too late.
LAYERS: Final = 64


def netkv_by(arm: Arm | None) -> Route:
    """NetKV with an oracle arm; None is the deployment's."""

    def netkv(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
        """One pass over the candidates; ties by load, then by id."""
        if view.stage == "prefill":
            return _soonest_prefill(view), memory
        return least_cost_decode(view, arm), memory

    return netkv


def _soonest_prefill(view: RouteView) -> Choice:
    best, best_key = view.candidates[0], (float("inf"), "")
    for worker in view.candidates:
        key = (prefill_left_s(view, worker), worker.id)
        if key < best_key:
            best, best_key = worker, key
    return Choice(best.id, f"prefilled in {best_key[0]:.3g} s, hit {view.hits.get(best.id, 0)}")


def least_cost_decode(view: RouteView, arm: Arm | None) -> Choice:
    best: tuple[float, float, str] | None = None
    why, estimate_s = "", 0.0
    for worker in view.candidates:
        transfer = view.transfer(worker.id, arm=arm)
        queue_s, first_s = decode_queue_s(worker), first_step_s(view, worker)
        waits_s = visible_s(view.spec, transfer.seconds, queue_s, view.prefill_ahead_s)
        cost_s = waits_s + first_s
        key = (cost_s, worker.blocks_reserved / worker.blocks_total, worker.id)
        if best is None or key < best:
            best, estimate_s = key, transfer.seconds
            why = (
                f"cost {cost_s:.4g} s = transfer {transfer.seconds:.4g} ({transfer.source}), "
                f"queue {queue_s:.3g}, first step {first_s:.3g}"
            )
    assert best is not None
    return Choice(best[2], why, estimate_s)


def decode_queue_s(worker: WorkerView) -> float:
    over = worker.decoding - worker.batch_max
    if over < 0:
        return 0.0
    iteration_s = worker.iteration_s or worker.predict_iteration(
        worker.batch_max, worker.context_tokens
    )
    return (over + 1) * OUTPUT_TOKENS_MEAN * iteration_s / worker.batch_max


def first_step_s(view: RouteView, worker: WorkerView) -> float:
    batch = min(worker.decoding + 1, worker.batch_max)
    return worker.predict_iteration(batch, worker.context_tokens + view.input_tokens)


def visible_s(spec: RouteSpec, transfer_s: float, queue_s: float, prefill_s: float) -> float:
    """Seconds of transfer and decode queue that a request waits after its prefill."""
    if spec.cost == "serial":
        return transfer_s + queue_s
    if spec.cost == "overlap":
        return max(transfer_s, queue_s)
    last_s, ahead_s = transfer_s / LAYERS, prefill_s * (1 - 1 / LAYERS)
    return max(last_s, transfer_s - ahead_s, queue_s)
