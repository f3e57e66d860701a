"""Clients before the gateway: they send earlier and see the first token later than it does.

Knows one figure, `host.request_s`. Half of it is on the way in, half on the way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from kvasir.core.specs.deployment import HostSpec
from kvasir.measure.summary import RequestOutcome
from kvasir.traces.record import Arrival


def reaching(arrivals: Iterable[Arrival], host: HostSpec) -> Iterator[Arrival]:
    """When the gateway decides on what clients send at the trace's times."""
    late_s = host.request_s / 2
    return (replace(a, at_s=a.at_s + late_s) for a in arrivals) if late_s else iter(arrivals)


def seen(outcomes: list[RequestOutcome], host: HostSpec) -> list[RequestOutcome]:
    """What the clients saw of what the gateway saw. TPOT is the same: all tokens are late alike."""
    if not host.request_s:
        return outcomes
    return [_seen(outcome, host.request_s) for outcome in outcomes]


def _seen(outcome: RequestOutcome, request_s: float) -> RequestOutcome:
    start_s = None if outcome.start_s is None else outcome.start_s - request_s / 2
    first = outcome.ttft_s + request_s if outcome.output_tokens else outcome.ttft_s
    return replace(outcome, start_s=start_s, ttft_s=first, e2e_s=outcome.e2e_s + request_s)
