"""What a simulated run leaves behind: outcomes, inter-token gaps as runs, bytes by tier, events.

Listens at the gateway, where users would measure. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.core.events import (
    AnyEvent,
    BlocksCopied,
    Closed,
    CopiesUsed,
    Preempted,
    PrefixUsed,
    Recomputed,
    Retried,
    Routed,
    Speculated,
    TierHit,
    TierPassed,
)  # fmt: skip
from kvasir.core.ids import RequestId
from kvasir.core.messages import Done, Report
from kvasir.measure.itl import ItlRuns
from kvasir.measure.summary import RequestOutcome
from kvasir.world.sim.executor import Outcome
from kvasir.world.sim.guesses import Round


class Recorder:
    """Times are virtual seconds. `each_itl`: keep each request's own gaps, for an SLO on them."""

    def __init__(self, first_token: str = "decode", *, each_itl: bool = False) -> None:
        self._first_token = first_token
        self._own: dict[RequestId, ItlRuns] | None = {} if each_itl else None
        self.outcomes: list[RequestOutcome] = []
        self.itl = ItlRuns()
        self.counts: dict[str, int] = {}
        self.prefix_queries = self.prefix_hits = self.prefix_attainable = 0  # tokens
        self._last_token: dict[RequestId, float] = {}
        self._second_delay: dict[RequestId, float] = {}
        self._reports: dict[RequestId, Report] = {}
        self._story: dict[RequestId, list[str]] = {}  # decisions and losses, in order

    def step(self, outcome: Outcome) -> None:
        """Token times of a step. Rows that drew in the step before share one run of gaps; for
        others the gap before their first token here is a sample of its own."""
        started, steps = outcome.started, outcome.steps
        first_at, second_s = started + outcome.first_s, outcome.first_s + self._slope(outcome)
        for request_id, index, count in outcome.joined:
            last = self._last_token.get(request_id)
            self._joined(request_id, index, last, first_at)
            if count > 1:
                self.itl.add(count - 1, second_s, outcome.last_s, 1, first_at)
                if index == 0:
                    self._second_delay[request_id] = second_s
            self._last_token[request_id] = outcome.ended
            if self._own is not None:
                gap_s = first_at - last if last is not None and first_at >= last else None
                self._own_gaps(self._own, request_id, gap_s, outcome)
        together, gap_s = outcome.together, outcome.first_s + outcome.idle_s
        if together and outcome.idle_s:
            self.itl.add(1, gap_s, gap_s, together, started - outcome.idle_s)
            if steps > 1:
                self.itl.add(steps - 1, second_s, outcome.last_s, together, first_at)
        elif together:
            self.itl.add(steps, outcome.first_s, outcome.last_s, together, started)
        for request_id, rounds in outcome.rounds:
            self._guessed(request_id, rounds, started)
        for request_id in outcome.everyone:
            assert self._own is not None
            self._own_gaps(self._own, request_id, gap_s, outcome)

    def _guessed(self, request_id: RequestId, rounds: Sequence[Round], started: float) -> None:
        """A row that guesses: the tokens of one iteration come together."""
        runs = [self.itl]
        if self._own is not None:
            runs.append(self._own.setdefault(request_id, ItlRuns()))
        for one in rounds:
            at, last = started + one.at, self._last_token.get(request_id)
            gap_s = at - last if last is not None and at >= last else None
            for run in runs:
                if gap_s is not None:
                    run.add(1, gap_s, gap_s, 1, at - gap_s)
                if one.sampled > 1:
                    run.add(one.sampled - 1, 0.0, 0.0, 1, at)
            if one.first <= 1 < one.first + one.sampled and (one.first == 0 or gap_s is not None):
                self._second_delay[request_id] = gap_s if one.first == 1 and gap_s else 0.0
            self._last_token[request_id] = at

    def left(self, request_id: RequestId, at: float) -> None:
        """A row left its batch; `at` is when it drew its last token there."""
        self._last_token[request_id] = at

    def _own_gaps(
        self, own: dict[RequestId, ItlRuns], request_id: RequestId, gap_s: float | None,
        outcome: Outcome,
    ) -> None:  # fmt: skip
        runs = own.setdefault(request_id, ItlRuns())
        if gap_s is not None:
            runs.add(1, gap_s, gap_s)
        if outcome.steps > 1:
            second_s = outcome.first_s + self._slope(outcome)
            runs.add(outcome.steps - 1, second_s, outcome.last_s)

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
            self._story.setdefault(event.request_id, []).append(f"{where}: {event.why}")
        elif isinstance(event, PrefixUsed):
            self.prefix_queries += event.input_tokens
            self.prefix_hits += event.hit_tokens
            self.prefix_attainable += event.attainable_tokens
        elif isinstance(event, (Recomputed, Preempted)):
            key = f"{name}.tokens"
            self.counts[key] = self.counts.get(key, 0) + event.tokens
        elif isinstance(event, (TierHit, TierPassed)):
            what = event.tier if isinstance(event, TierHit) else event.why
            key = f"{name}: {what}, tokens"
            self.counts[key] = self.counts.get(key, 0) + event.tokens
        elif isinstance(event, Speculated):
            for key, tokens in (("drafted", event.drafted), ("accepted", event.accepted)):
                self.counts[f"{name}.{key}"] = self.counts.get(f"{name}.{key}", 0) + tokens
        elif isinstance(event, (BlocksCopied, CopiesUsed)):
            self._copies(event)
        elif isinstance(event, Retried):
            key = f"Retried: {event.reason.split(' ', 1)[-1]}"
            self.counts[key] = self.counts.get(key, 0) + 1
            lost = f"attempt {event.attempt} lost, {event.reason}"
            self._story.setdefault(event.request_id, []).append(lost)

    def _copies(self, event: BlocksCopied | CopiesUsed) -> None:
        """Blocks, by why they were copied; what is neither used nor wasted still waits."""
        if isinstance(event, BlocksCopied):
            counts = {"copied": event.blocks}
        else:
            counts = {"used": event.used, "wasted": event.wasted}
        for what, blocks in counts.items():
            key = f"Copies: {event.purpose}, {what} blocks"
            self.counts[key] = self.counts.get(key, 0) + blocks

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
                why="; ".join(self._story.pop(event.request_id, ())),
                attempts=event.attempts,
                prefill_worker=prefill.worker if prefill else "",
                decode_worker=report.decode_worker if report else "",
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
