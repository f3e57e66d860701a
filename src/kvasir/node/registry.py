"""The conductor's picture of its workers: what they said of themselves, and what was sent to them.

Satisfies `policy.route.WorkerView`. A hold is a guess of what an attempt will cost a worker; it
goes when the worker or the gateway says that the attempt is over. Knows no request beyond its id.
"""

from __future__ import annotations

import msgspec

from kvasir.core.ids import Incarnation, RequestId, WorkerId
from kvasir.core.messages import Hello, Load
from kvasir.cost.step import StepModel


class Hold(msgspec.Struct):
    """What one attempt is expected to cost a worker. `prefill_s` is zero once it is done."""

    attempt: int
    blocks: int
    prefill_s: float = 0.0
    prefill_tokens: int = 0  # not cached; zero once it is done
    context_tokens: int = 0  # KV tokens that it decodes over; 0: it does not decode here
    since: float = 0.0


class Member:
    """One worker that said Hello and has been heard since."""

    __slots__ = (
        "batch_max", "blocks_reserved", "blocks_total", "context_tokens", "cost", "decoding",
        "draining", "heard_at", "hello", "holds", "id", "incarnation", "load", "mixed",
        "model", "prefill_s", "prefill_tokens", "prefilling", "resync_asked", "roles",
    )  # fmt: skip

    def __init__(self, hello: Hello, cost: StepModel, now: float) -> None:
        self.hello = hello
        self.id: WorkerId = hello.worker
        self.incarnation: Incarnation = hello.incarnation
        self.batch_max = hello.capacity.batch_max
        self.blocks_total = hello.capacity.kv_blocks
        self.model = hello.model
        self.roles = ("prefill", "decode") if "mixed" in hello.roles else hello.roles
        self.mixed = "mixed" in hello.roles
        self.cost = cost
        self.heard_at = now
        self.load: Load | None = None
        self.draining = False
        self.resync_asked = False
        self.holds: dict[RequestId, Hold] = {}
        self.prefill_s = 0.0
        self.prefill_tokens = 0
        self.prefilling = 0
        self.decoding = 0
        self.context_tokens = 0
        self.blocks_reserved = 0

    @property
    def requests(self) -> int:
        return len(self.holds)

    @property
    def iteration_s(self) -> float | None:
        return self.load.iteration_s if self.load is not None else None

    def predict_prefill(self, tokens: int, cached: int) -> float:
        return self.cost.prefill_seconds(tokens, cached, self.hello.capacity.batch_tokens_max)

    def predict_iteration(self, decoding: int, context_tokens: int) -> float:
        line = self.cost.decode_line(max(decoding, 1))
        return line.base_s + line.per_context_s * context_tokens

    def hold(self, request_id: RequestId, hold: Hold) -> None:
        self.drop(request_id)
        self.holds[request_id] = hold
        self.prefill_s += hold.prefill_s
        self.prefill_tokens += hold.prefill_tokens
        self.prefilling += hold.prefill_tokens > 0
        self.blocks_reserved += hold.blocks
        if hold.context_tokens:
            self.decoding += 1
            self.context_tokens += hold.context_tokens

    def prefilled(self, request_id: RequestId, attempt: int) -> None:
        hold = self.holds.get(request_id)
        if hold is not None and hold.attempt == attempt:
            self._no_prefill(hold)
            self._settle()

    def drop(self, request_id: RequestId) -> None:
        hold = self.holds.pop(request_id, None)
        if hold is None:
            return
        self._no_prefill(hold)
        self.blocks_reserved -= hold.blocks
        if hold.context_tokens:
            self.decoding -= 1
            self.context_tokens -= hold.context_tokens
        self._settle()

    def _no_prefill(self, hold: Hold) -> None:
        self.prefill_s -= hold.prefill_s
        self.prefill_tokens -= hold.prefill_tokens
        self.prefilling -= hold.prefill_tokens > 0
        hold.prefill_s, hold.prefill_tokens = 0.0, 0

    def _settle(self) -> None:
        """Sums of floats drift; with nothing held the sum is zero."""
        if not self.holds or self.prefill_s < 0.0:
            self.prefill_s = max(0.0, sum(h.prefill_s for h in self.holds.values()))

    def check(self) -> None:
        holds = self.holds.values()
        assert self.blocks_reserved == sum(h.blocks for h in holds)
        assert self.decoding == sum(h.context_tokens > 0 for h in holds)
        assert self.prefill_tokens == sum(h.prefill_tokens for h in holds)
        assert self.prefilling == sum(h.prefill_tokens > 0 for h in holds)
        assert self.context_tokens == sum(h.context_tokens for h in holds)
        assert abs(self.prefill_s - sum(h.prefill_s for h in holds)) < 1e-6
