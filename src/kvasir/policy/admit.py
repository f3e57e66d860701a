"""Whether a request may enter at all. Early refusal is cheaper than a late one (Mooncake,
arXiv 2407.00079, section 7). Knows counts, limits and predicted loads, not workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple, Protocol


class AdmitView(Protocol):
    """`stage` "arrival", then "decode" when prefill is over: the last moment to refuse.

    `queued` requests wait for a place now, at most `queue_max` may. `blocks_needed` is what the
    request needs at its longest, `blocks_max` the largest pool there is (0: no worker).

    Loads are predictions over their SLO, 1 is all that can be kept: `ttft_load` where this request
    would be prefilled first, `tbt_load` of the decode worker that is fastest now, `tbt_load_ahead`
    the mean over decode workers when its prefill ends. They cost something; ask only if needed.
    """

    @property
    def stage(self) -> Literal["arrival", "decode"]: ...
    @property
    def queued(self) -> int: ...
    @property
    def queue_max(self) -> int: ...
    @property
    def blocks_needed(self) -> int: ...
    @property
    def blocks_max(self) -> int: ...
    @property
    def ttft_load(self) -> float: ...
    @property
    def tbt_load(self) -> float: ...
    @property
    def tbt_load_ahead(self) -> float: ...


class Verdict(NamedTuple):
    """`status` 0 admits; otherwise it is the HTTP status of the refusal."""

    status: int = 0
    reason: str = ""
    retry_after_s: float | None = None


ADMITTED: Final = Verdict()
RETRY_S: Final = 1.0


def bounded(view: AdmitView) -> Verdict:
    """Admit unless the queue is full or no worker could ever hold the request."""
    if view.stage == "decode":
        return ADMITTED
    if view.blocks_max == 0:
        return Verdict(503, "no worker is ready for this model", RETRY_S)
    if view.blocks_needed > view.blocks_max:
        return Verdict(
            400,
            f"the request needs {view.blocks_needed} KV blocks at its longest, "
            f"the largest worker has {view.blocks_max}",
        )
    if view.queued >= view.queue_max:
        return Verdict(429, f"the queue is full ({view.queue_max} requests)", RETRY_S)
    return ADMITTED


def early_baseline(view: AdmitView) -> Verdict:
    """Each phase by itself, when it begins: a decode refused then has wasted its prefill."""
    if view.stage == "decode":
        return _over("TPOT", view.tbt_load)
    verdict = bounded(view)
    return verdict if verdict.status else _over("TTFT", view.ttft_load)


def early(view: AdmitView) -> Verdict:
    """Both on arrival, by the larger load. Decode load is read one prefill too early, so prefill
    and decode swing in anti-phase (section 7.3)."""
    verdict = bounded(view)
    if verdict.status or view.stage == "decode":
        return verdict
    verdict = _over("TTFT", view.ttft_load)
    return verdict if verdict.status else _over("TPOT", view.tbt_load)


def early_predicted(view: AdmitView) -> Verdict:
    """As `early`, with the decode load at the end of this request's prefill (section 7.4). There
    every decode lasts a given time; here it is the mean of those that finished."""
    verdict = bounded(view)
    if verdict.status or view.stage == "decode":
        return verdict
    verdict = _over("TTFT", view.ttft_load)
    return verdict if verdict.status else _over("TPOT", view.tbt_load_ahead)


def _over(what: str, load: float) -> Verdict:
    if load <= 1.0:
        return ADMITTED
    return Verdict(429, f"predicted {what} is {load:.2f} times its SLO", RETRY_S)


ADMITS: Final[dict[str, Callable[[AdmitView], Verdict]]] = {
    "bounded": bounded,
    "early_baseline": early_baseline,
    "early": early,
    "early_predicted": early_predicted,
}
