"""From what happened to each request to the figures people compare. One definition of each figure.

Definitions are those of `vllm bench serve`: TPOT is the mean time per output token after the first,
TTFT and E2EL start when the request is sent, rates divide by the whole duration. A request is good
iff it ended well and met *all* limits of the SLO; a share of requests counts the failed ones too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from kvasir.core.request import Slo
from kvasir.core.specs import SloSpec
from kvasir.measure.distribution import Dist, distribution
from kvasir.measure.itl import ItlRuns

PERCENTILES: Final = (99.0,)
ERRORS_MAX: Final = 10


class RequestOutcome(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """What became of one request. Seconds and tokens; None is unknown, or does not apply.

    `why` is the router's word on where it ran, attempts that were lost included; the workers are
    those of the last attempt. `start_s` is when it was sent, on any clock that all
    outcomes share. Without `tpot_s` the times and `output_tokens` give it. `transfer_s` is part of
    the TTFT when the decode side makes the first token; otherwise it shows in
    `second_token_delay_s`.
    """

    ok: bool
    request_id: str = ""
    why: str = ""
    attempts: int = 1
    prefill_worker: str = ""
    decode_worker: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    start_s: float | None = None
    ttft_s: float = 0.0
    tpot_s: float | None = None
    e2e_s: float = 0.0
    itl_p99_s: float | None = None
    path: str = ""
    queue_s: float | None = None
    prefill_s: float | None = None
    transfer_s: float | None = None
    first_step_s: float | None = None
    second_token_delay_s: float | None = None
    error: str = ""


class Split(msgspec.Struct, frozen=True):
    """Means over the `count` requests that reported their parts. `other_s` is the rest of TTFT.

    `transfer_s` belongs to the TTFT unless prefill makes the first token.
    """

    count: int
    queue_s: float
    prefill_s: float
    transfer_s: float
    first_step_s: float
    other_s: float
    second_token_delay_s: float | None = None


class PrefixUse(msgspec.Struct, frozen=True):
    """Prompt tokens of all prefills: what was looked up, found, and could have been found.

    `attainable`: in the longest prefix that any worker had when the request was routed. `infinite`:
    in a cache without end that all share and that has a prompt's blocks as soon as it is sent; None
    where it is not known. Hits can be more than attainable: blocks come while a request waits.
    """

    queries_tokens: int
    hits_tokens: int
    attainable_tokens: int
    infinite_tokens: int | None = None

    def ratio(self, tokens: int) -> float:
        return tokens / self.queries_tokens if self.queries_tokens else 0.0


class SloReport(msgspec.Struct, frozen=True):
    """Requests within each limit, and within all of them (`good`), of `total` that ended."""

    ttft_s: float
    tpot_s: float
    itl_p99_s: float | None
    good: int
    ttft_met: int
    tpot_met: int
    total: int

    @property
    def attainment(self) -> float:
        return self.good / self.total if self.total else 0.0


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that tables and result files show. Seconds, tokens and bytes."""

    completed: int
    failed: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    ttft: Dist
    tpot: Dist
    itl: Dist
    e2el: Dist
    peak_output_tokens_per_s: float | None = None
    peak_concurrency: int | None = None
    request_rate: float | None = None
    max_concurrency: int | None = None
    first_token: str = ""
    slo: SloReport | None = None
    split: Split | None = None
    paths: dict[str, int] = {}
    bytes_by_tier: dict[str, int] = {}
    prefix: PrefixUse | None = None
    gpus: int | None = None
    errors: dict[str, int] = {}
    notes: tuple[str, ...] = ()

    def per_second(self, count: float) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def goodput(self) -> float | None:
        """Good requests per second; None without an SLO."""
        return self.per_second(self.slo.good) if self.slo else None

    @property
    def goodput_per_gpu(self) -> float | None:
        return self.goodput / self.gpus if self.goodput is not None and self.gpus else None

    @property
    def cache_hit_ratio(self) -> float:
        """Share of the prompt tokens whose KV was found instead of computed."""
        return self.cached_tokens / self.input_tokens if self.input_tokens else 0.0


def tpot(ttft_s: float, e2e_s: float, output_tokens: int) -> float | None:
    """Mean seconds per output token after the first; None when there is no second one."""
    return (e2e_s - ttft_s) / (output_tokens - 1) if output_tokens > 1 else None


def summarise(
    outcomes: Iterable[RequestOutcome],
    itl: ItlRuns,
    duration_s: float,
    slo: SloSpec | Slo | None = None,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    gpus: int | None = None,
    first_token: str = "",
    bytes_by_tier: Mapping[str, int] | None = None,
    prefix: PrefixUse | None = None,
    request_rate: float | None = None,
    max_concurrency: int | None = None,
    notes: Iterable[str] = (),
) -> Summary:
    """Sum up a run of `duration_s` seconds. `itl` holds the gaps of the requests that ended well.

    `request_rate` None or infinite: all at once, or as a trace says. Raises ValueError for a
    percentile outside [0, 100], or an SLO on p99 ITL of outcomes that do not know theirs.
    """
    everything = list(outcomes)
    done = [o for o in everything if o.ok]
    failed = Counter(o.error or "unknown" for o in everything if not o.ok)
    return Summary(
        completed=len(done),
        failed=len(everything) - len(done),
        duration_s=duration_s,
        input_tokens=sum(o.prompt_tokens for o in done),
        output_tokens=sum(o.output_tokens for o in done),
        cached_tokens=sum(o.cached_tokens for o in done),
        ttft=distribution([o.ttft_s for o in done], percentiles),
        tpot=distribution([t for o in done if (t := _tpot(o)) is not None], percentiles),
        itl=itl.distribution(percentiles),
        e2el=distribution([o.e2e_s for o in done], percentiles),
        peak_output_tokens_per_s=_peak_tokens_per_s(done, itl),
        peak_concurrency=_peak_concurrency(done),
        request_rate=None if request_rate is None or math.isinf(request_rate) else request_rate,
        max_concurrency=max_concurrency,
        first_token=first_token,
        slo=_slo_report(done, len(everything), slo) if slo else None,
        split=split_of(done, first_token),
        paths=dict(sorted(Counter(o.path for o in done if o.path).items())),
        bytes_by_tier=dict(bytes_by_tier or {}),
        prefix=prefix,
        gpus=gpus,
        errors=dict(sorted(failed.items(), key=lambda e: (-e[1], e[0]))[:ERRORS_MAX]),
        notes=tuple(notes),
    )


def good(outcome: RequestOutcome, slo: SloSpec | Slo | SloReport) -> bool:
    """Whether a request that ended well met all limits jointly. The one definition of goodput."""
    return all(_met(outcome, slo))


class _Met(NamedTuple):
    ttft: bool
    tpot: bool
    itl: bool


def _met(o: RequestOutcome, slo: SloSpec | Slo | SloReport) -> _Met:
    return _Met(
        o.ttft_s <= slo.ttft_s,
        (_tpot(o) or 0.0) <= slo.tpot_s,  # one token meets any TPOT
        slo.itl_p99_s is None or _itl_p99(o) <= slo.itl_p99_s,
    )


def _slo_report(done: Sequence[RequestOutcome], total: int, slo: SloSpec | Slo) -> SloReport:
    met = [_met(o, slo) for o in done]
    return SloReport(
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
        itl_p99_s=slo.itl_p99_s,
        good=sum(map(all, met)),
        ttft_met=sum(m.ttft for m in met),
        tpot_met=sum(m.tpot for m in met),
        total=total,
    )


def _tpot(outcome: RequestOutcome) -> float | None:
    if outcome.tpot_s is not None:
        return outcome.tpot_s
    return tpot(outcome.ttft_s, outcome.e2e_s, outcome.output_tokens)


def _itl_p99(outcome: RequestOutcome) -> float:
    if outcome.itl_p99_s is None and outcome.output_tokens > 1:
        raise ValueError("an SLO on p99 ITL needs `itl_p99_s` of every request")
    return outcome.itl_p99_s or 0.0


def split_of(done: Sequence[RequestOutcome], first_token: str) -> Split | None:
    """Mean parts of the outcomes that know theirs; None when none does.

    A part that a reporting request does not name took no time; a delay of the second token is
    averaged over those that had one."""
    known = [o for o in done if o.queue_s is not None]
    if not known:
        return None
    queue_s, prefill_s, transfer_s, first_step_s = (
        _mean([getattr(o, part) or 0.0 for o in known])
        for part in ("queue_s", "prefill_s", "transfer_s", "first_step_s")
    )
    inside = [queue_s, prefill_s]
    if first_token != "prefill":  # there the hand-over and the decode side's step come after it
        inside += [transfer_s, first_step_s]
    delays = [o.second_token_delay_s for o in known if o.second_token_delay_s is not None]
    return Split(
        count=len(known),
        queue_s=queue_s,
        prefill_s=prefill_s,
        transfer_s=transfer_s,
        first_step_s=first_step_s,
        other_s=_mean([o.ttft_s for o in known]) - math.fsum(inside),
        second_token_delay_s=_mean(delays) if delays else None,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _peak_concurrency(done: Sequence[RequestOutcome]) -> int | None:
    """Most requests at one instant, each in [start, end); None when a start is unknown."""
    if any(o.start_s is None for o in done):
        return None
    changes = [(o.start_s or 0.0, 1) for o in done]
    changes += [((o.start_s or 0.0) + o.e2e_s, -1) for o in done]
    now = peak = 0
    for _, change in sorted(changes):  # at one instant those that end come first
        now += change
        peak = max(peak, now)
    return peak


def _peak_tokens_per_s(done: Sequence[RequestOutcome], itl: ItlRuns) -> float | None:
    """Tokens in the fullest whole second from the first start; None when a time is unknown."""
    starts = [o.start_s for o in done if o.start_s is not None]
    if not starts or len(starts) < len(done):
        return None
    origin_s = min(starts)
    seconds = Counter(int((o.start_s or 0.0) + o.ttft_s - origin_s) for o in done)
    return float(max(seconds.values())) if itl.count_tokens(seconds, origin_s) else None
