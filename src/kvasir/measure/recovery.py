"""What faults cost: requests that met one against those that did not, and what was done again.

Knows outcomes and times. Must not know how a fault comes about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from kvasir.core.specs import SloSpec
from kvasir.measure.summary import RequestOutcome, good


class Span(NamedTuple):
    """Seconds [from_s, until_s) on the outcomes' clock."""

    from_s: float
    until_s: float


class Window(NamedTuple):
    """One fault, as a result names it, and when it was there."""

    name: str
    spans: tuple[Span, ...]


class Met(msgspec.Struct, frozen=True):
    """Requests that were under way during a fault, of `bad_s` seconds within the run.

    `good` met the SLO; `attempts` are all of theirs.
    """

    name: str
    bad_s: float
    requests: int
    good: int
    attempts: int


class Recovery(msgspec.Struct, frozen=True):
    """`retried` requests needed more than one of the `attempts`, or gave up. `recomputed_tokens`:
    whose KV had existed, or was being made, and was made again. A request that meets two faults
    counts in both windows; `calm` are those that met none of them."""

    requests: int
    retried: int
    attempts: int
    recomputed_tokens: int
    windows: tuple[Met, ...]
    calm: Met

    def lines(self) -> Iterator[str]:
        """For people."""
        yield (
            f"faults: {self.retried} of {self.requests} requests needed another attempt, "
            f"{self.attempts} attempts in all, {self.recomputed_tokens} tokens computed again"
        )
        for met in (*self.windows, self.calm):
            share = f"{met.good} of {met.requests} requests good" if met.requests else "no request"
            yield f"{met.name} ({met.bad_s:.1f} s): {share}"


def recovery(
    outcomes: Sequence[RequestOutcome], windows: Iterable[Window], duration_s: float,
    recomputed_tokens: int, slo: SloSpec,
) -> Recovery:  # fmt: skip
    """Sum up a run of `duration_s` seconds. Outcomes know when they began."""
    met: list[Met] = []
    touched: set[int] = set()
    every: list[Span] = []
    for window in windows:
        spans = _union(window.spans, duration_s)
        inside = [i for i, o in enumerate(outcomes) if _meets(o, spans)]
        touched.update(inside)
        every += spans
        met.append(_met(window.name, _seconds(spans), [outcomes[i] for i in inside], slo))
    rest = [o for i, o in enumerate(outcomes) if i not in touched]
    calm_s = duration_s - _seconds(_union(every, duration_s))
    return Recovery(
        requests=len(outcomes),
        retried=sum(o.attempts > 1 for o in outcomes),
        attempts=sum(o.attempts for o in outcomes),
        recomputed_tokens=recomputed_tokens,
        windows=tuple(met),
        calm=_met("none of these faults", calm_s, rest, slo),
    )


def _met(name: str, bad_s: float, outcomes: Sequence[RequestOutcome], slo: SloSpec) -> Met:
    return Met(
        name=name,
        bad_s=bad_s,
        requests=len(outcomes),
        good=sum(o.ok and good(o, slo) for o in outcomes),
        attempts=sum(o.attempts for o in outcomes),
    )


def _union(spans: Iterable[Span], duration_s: float) -> list[Span]:
    """Spans within the run, in order, that do not overlap."""
    found: list[Span] = []
    for from_s, until_s in sorted(spans):
        until_s = min(until_s, duration_s)
        if from_s >= until_s:
            continue
        if found and from_s <= found[-1].until_s:
            found[-1] = Span(found[-1].from_s, max(found[-1].until_s, until_s))
        else:
            found.append(Span(from_s, until_s))
    return found


def _seconds(spans: Iterable[Span]) -> float:
    return sum(until_s - from_s for from_s, until_s in spans)


def _meets(outcome: RequestOutcome, spans: Sequence[Span]) -> bool:
    start_s = outcome.start_s or 0.0
    end_s = start_s + outcome.e2e_s
    return any(from_s < end_s and start_s < until_s for from_s, until_s in spans)
