"""Whether a request may enter at all. Early refusal is cheaper than a late one (Mooncake,
arXiv 2407.00079, section 7). Knows counts and limits, not workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol


class AdmitView(Protocol):
    """`queued` requests wait for a place now, at most `queue_max` may. `blocks_needed` is what the
    request needs at its longest, `blocks_max` the largest pool there is (0: no worker)."""

    @property
    def queued(self) -> int: ...
    @property
    def queue_max(self) -> int: ...
    @property
    def blocks_needed(self) -> int: ...
    @property
    def blocks_max(self) -> int: ...


class Verdict(NamedTuple):
    """`status` 0 admits; otherwise it is the HTTP status of the refusal."""

    status: int = 0
    reason: str = ""
    retry_after_s: float | None = None


ADMITTED: Final = Verdict()


def bounded(view: AdmitView) -> Verdict:
    """Admit unless the queue is full or no worker could ever hold the request."""
    if view.blocks_max == 0:
        return Verdict(503, "no worker is ready for this model", 1.0)
    if view.blocks_needed > view.blocks_max:
        return Verdict(
            400,
            f"the request needs {view.blocks_needed} KV blocks at its longest, "
            f"the largest worker has {view.blocks_max}",
        )
    if view.queued >= view.queue_max:
        return Verdict(429, f"the queue is full ({view.queue_max} requests)", 1.0)
    return ADMITTED


ADMITS: Final[dict[str, Callable[[AdmitView], Verdict]]] = {"bounded": bounded}
