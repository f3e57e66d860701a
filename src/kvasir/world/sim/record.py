"""What a simulated run leaves behind: outcomes, inter-token gaps as runs, bytes by tier, events.

Listens at the gateway, where users would measure. Decides nothing.
"""

from __future__ import annotations

from kvasir.core.events import AnyEvent, Closed, Preempted, Recomputed, Retried, Routed
from kvasir.core.ids import RequestId
from kvasir.core.messages import Done, Report, RowDone
from kvasir.measure.itl import ItlRuns
from kvasir.measure.summary import RequestOutcome
from kvasir.world.sim.executor import Outcome


class Recorder:
    """Times are virtual seconds. `each_itl`: keep each request's own gaps, for an SLO on them."""

    def __init__(self, first_token: str = "decode", *, each_itl: bool = False) -> None:
        self._first_token = first_token
        self._own: dict[RequestId, ItlRuns] | None = {} if each_itl else None
        self.outcomes: list[RequestOutcome] = []
        self.itl = ItlRuns()
        self.counts: dict[str, int] = {}
        self._last_token: dict[RequestId, float] = {}
        self._second_delay: dict[RequestId, float] = {}
        self._reports: dict[RequestId, Report] = {}
        self._why: dict[RequestId, str] = {}

    def step(self, outcome: Outcome, first: dict[RequestId, int]) -> None:
        """Token times of a step. `first`: output index of each sampling row's first token.

        Rows that also sampled in the step before share one run; for others the gap before their
        first token here is a sample of its own.
        """
        together = 0
        first_at = outcome.started + outcome.first_s
        for row in outcome.rows:
            if not row.sampled:
                continue
            last = self._last_token.get(row.request_id)
            if self._own is not None:
                self._own_gaps(self._own, row, last, outcome)
            if last == outcome.started and first[row.request_id] > 1:
                together += 1
            else:
                self._joined(row.request_id, first[row.request_id], last, first_at)
                if row.sampled > 1:
                    second_s = outcome.first_s + self._slope(outcome)
                    self.itl.add(row.sampled - 1, second_s, outcome.last_s, 1, first_at)
            self._last_token[row.request_id] = outcome.ended
        if together:
            self.itl.add(outcome.steps, outcome.first_s, outcome.last_s, together, outcome.started)

    def _own_gaps(
        self, own: dict[RequestId, ItlRuns], row: RowDone, last: float | None, outcome: Outcome
    ) -> None:
        first_at = outcome.started + outcome.first_s
        runs = own.setdefault(row.request_id, ItlRuns())
        if last is not None and first_at >= last:
            runs.add(1, first_at - last, first_at - last)
        if row.sampled > 1:
            runs.add(row.sampled - 1, outcome.first_s + self._slope(outcome), outcome.last_s)

    def _joined(self, request_id: RequestId, index: int, last: float | None, at: float) -> None:
        if last is None or at < last:  # the second: a lost attempt that does not know it yet
            return
        self.itl.add(1, at - last, at - last, 1, last)
        if index == 1:
            self._second_delay[request_id] = at - last

    @staticmethod
    def _slope(outcome: Outcome) -> float:
        return (outcome.last_s - outcome.first_s) / (outcome.steps - 1) if outcome.steps > 1 else 0

    def done(self, event: Done) -> None:
        self._reports[event.request_id] = event.report

    def event(self, now: float, event: AnyEvent) -> None:
        """Count everything; a Closed request becomes an outcome."""
        name = type(event).__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        if isinstance(event, Closed):
            self._closed(now, event)
        elif isinstance(event, Routed):
            where = f"{event.prefill} -> {event.decode}" if event.decode else event.prefill
            self._why[event.request_id] = f"{where}: {event.why}"
        elif isinstance(event, (Recomputed, Preempted)):
            key = f"{name}.tokens"
            self.counts[key] = self.counts.get(key, 0) + event.tokens
        elif isinstance(event, Retried):
            key = f"Retried: {event.reason.split(' ', 1)[-1]}"
            self.counts[key] = self.counts.get(key, 0) + 1

    def _closed(self, now: float, event: Closed) -> None:
        report = self._reports.pop(event.request_id, None)
        self._last_token.pop(event.request_id, None)
        delay_s = self._second_delay.pop(event.request_id, None)
        ok = event.reason in ("stop", "length")
        prefill = report.prefill if report is not None else None
        late_s = 0.0  # what waits at the decode side is a part of TTFT only if it comes before
        if report is not None and self._first_token == "decode":
            late_s = report.decode_queue_s
        own = self._own.pop(event.request_id, None) if self._own is not None else None
        self.outcomes.append(
            RequestOutcome(
                ok=ok,
                request_id=event.request_id,
                why=self._why.pop(event.request_id, ""),
                prompt_tokens=event.prompt_tokens,
                output_tokens=event.output_tokens,
                cached_tokens=event.cached_tokens,
                start_s=now - event.duration_s,
                ttft_s=event.ttft_s or 0.0,
                tpot_s=event.tpot_s,
                e2e_s=event.duration_s,
                path=event.path,
                queue_s=prefill.queue_s + late_s if prefill else None,
                prefill_s=prefill.prefill_s if prefill else None,
                transfer_s=report.transfer_s if report else None,
                first_step_s=report.first_step_s if report else None,
                second_token_delay_s=delay_s,
                itl_p99_s=dict(own.distribution((99.0,)).percentiles)[99.0] if own else None,
                error="" if ok else event.reason,
            )
        )
