"""NetKV (arXiv 2606.03910): the decode worker with the least transfer + queue + first step.

Prefill goes where it is over soonest: queue plus the prefill of what is not cached there (Mooncake,
arXiv 2407.00079, Algorithm 1 without its transfer term). Decode minimises

    T_xfer(p, d) + T_queue(d) + T_first(d)          `cost: serial`, the paper
    max(T_xfer, T_queue) + T_first                  `cost: overlap`
    max(T_xfer - T_prefill, T_queue) + T_first      `cost: streamed`, KV ships while prefill runs

One deviation: the paper's T_queue = (waiting - free slots)+ * t_iter supposes that one slot frees
per iteration. Here a waiting sequence waits for a departure, and with geometric output lengths of
mean `o` the j-th departure from a batch of b takes about j * o * t_iter / b.
"""

from __future__ import annotations

from kvasir.policy.route.view import Choice, RouteMemory, RouteView, WorkerView, cached_tokens

OUTPUT_TOKENS_MEAN = 256  # the o of T_queue, until lengths are measured


def netkv(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """One pass over the candidates; ties by load, then by id."""
    if view.stage == "prefill":
        return _soonest_prefill(view), memory
    return _least_cost_decode(view), memory


def _soonest_prefill(view: RouteView) -> Choice:
    best, best_key = view.candidates[0], (float("inf"), "")
    for worker in view.candidates:
        done_s = worker.prefill_s + worker.predict_prefill(
            view.input_tokens, cached_tokens(view, worker)
        )
        if (done_s, worker.id) < best_key:
            best, best_key = worker, (done_s, worker.id)
    return Choice(best.id, f"prefilled in {best_key[0]:.3g} s, hit {view.hits.get(best.id, 0)}")


def _least_cost_decode(view: RouteView) -> Choice:
    best: tuple[float, float, str] | None = None
    why, estimate_s = "", 0.0
    for worker in view.candidates:
        transfer = view.transfer(worker.id)
        queue_s, first_s = _queue(worker), _first_step(view, worker)
        cost_s = _combine(view, transfer.seconds, queue_s, first_s)
        key = (cost_s, worker.blocks_reserved / worker.blocks_total, worker.id)
        if best is None or key < best:
            best, estimate_s = key, transfer.seconds
            why = (
                f"cost {cost_s:.4g} s = transfer {transfer.seconds:.4g} ({transfer.source}), "
                f"queue {queue_s:.3g}, first step {first_s:.3g}"
            )
    assert best is not None
    return Choice(best[2], why, estimate_s)


def _queue(worker: WorkerView) -> float:
    over = worker.decoding - worker.batch_max
    if over < 0:
        return 0.0
    iteration_s = worker.iteration_s or worker.predict_iteration(
        worker.batch_max, worker.context_tokens
    )
    return (over + 1) * OUTPUT_TOKENS_MEAN * iteration_s / worker.batch_max


def _first_step(view: RouteView, worker: WorkerView) -> float:
    batch = min(worker.decoding + 1, worker.batch_max)
    return worker.predict_iteration(batch, worker.context_tokens + view.input_tokens)


def _combine(view: RouteView, transfer_s: float, queue_s: float, first_s: float) -> float:
    if view.spec.cost == "serial":
        return transfer_s + queue_s + first_s
    if view.spec.cost == "overlap":
        return max(transfer_s, queue_s) + first_s
    return max(transfer_s - view.prefill_ahead_s, queue_s) + first_s
