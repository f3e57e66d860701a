"""Splitwise (ISCA 2024, section 4.3; its simulator's `mixed_pool` scheduler) and its queue rule.

Prompt and token machine are assigned together on arrival. Left out: machines do not change pools.
A decode worker that gets both phases of a request is Splitwise's token machine in the mixed pool,
and back in its own when that work has drained. Memory is reserved for `output_reserve_tokens`, not
for the true output length, which the paper's simulator knows and a live system does not.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvasir.policy.route.view import Choice, RouteMemory, RouteView, WorkerView


def jsq(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Join the shortest queue, by pending tokens: uncached prompt tokens, one per decode."""
    best = min(view.candidates, key=lambda w: (pending_tokens(w), w.id))
    return Choice(best.id, f"{pending_tokens(best)} tokens pending"), memory


def splitwise(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Prompt by pending tokens, token machine by reserved memory, each overflowing to the mixed
    pool, then to the other pool, where one machine runs both phases."""
    if view.stage == "decode":
        token = _least_reserved(view.candidates, mixed=False) or _least_reserved(
            view.candidates, mixed=True
        )
        assert token is not None
        return Choice(token.id, f"{token.blocks_reserved} blocks reserved"), memory
    return _both(view), memory


def pending_tokens(worker: WorkerView) -> int:
    return worker.prefill_tokens + worker.decoding


def _both(view: RouteView) -> Choice:
    prompt = _least_pending(view, mixed=False) or _least_pending(view, mixed=True)
    token = _least_reserved(view.decoders, mixed=False) or _least_reserved(
        view.decoders, mixed=True
    )
    if prompt is not None and token is not None:
        why = f"{pending_tokens(prompt)} tokens pending, {token.blocks_reserved} blocks reserved"
        seconds = view.transfer(token.id, prompt.id).seconds
        return Choice(prompt.id, why, seconds, decode=token.id)
    if token is not None:  # every prompt queue is full
        least = min(view.decoders, key=lambda w: (pending_tokens(w), w.id))
        return Choice(least.id, "prompt queues are full, both phases here", decode=least.id)
    spare = min(view.candidates, key=lambda w: (w.blocks_reserved, w.id))
    return Choice(spare.id, "no token machine has room, both phases here", decode=spare.id)


def _least_pending(view: RouteView, *, mixed: bool) -> WorkerView | None:
    """None when the shortest queue is over `queue_tokens_max` with this prompt; an empty one takes
    any prompt."""
    pool = [w for w in view.candidates if w.mixed == mixed]
    if not pool:
        return None
    best = min(pool, key=lambda w: (pending_tokens(w), w.id))
    over = pending_tokens(best) + view.input_tokens > view.spec.queue_tokens_max
    return None if best.prefilling and over else best


def _least_reserved(workers: Iterable[WorkerView], *, mixed: bool) -> WorkerView | None:
    pool = [w for w in workers if w.mixed == mixed]
    return min(pool, key=lambda w: (w.blocks_reserved, w.id), default=None)
