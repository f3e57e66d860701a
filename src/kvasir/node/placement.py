"""The conductor's record of one request, and the window on it that a route policy reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

from kvasir.core.ids import RequestId, WorkerId
from kvasir.core.messages import Finished, Path, Submit
from kvasir.core.specs import RouteSpec
from kvasir.net.oracle import Oracle
from kvasir.node.registry import Member
from kvasir.policy.route.view import Transfer


class State(IntEnum):
    QUEUED = 0  # no worker yet
    PREFILL = 1  # dispatched; its KV is being made
    CHOOSING = 2  # prefilled; no decode worker has room yet
    DECODE = 3  # dispatched to decode; its KV is there or on the way
    FINISHED = 4  # a worker says so; the gateway has not yet


class Placement:
    """One attempt. A new attempt is a new placement."""

    __slots__ = (
        "attempt", "decode", "emitted", "finished", "hits", "path", "placed_at",
        "prefill", "prefill_hit", "queued_at", "request", "shipped", "state", "transfer_s",
    )  # fmt: skip

    def __init__(self, submit: Submit, now: float) -> None:
        self.request = submit.request
        self.attempt = submit.attempt
        self.emitted = submit.emitted
        self.state = State.QUEUED
        self.path: Path = "disaggregated"
        self.prefill: WorkerId = ""
        self.decode: WorkerId = ""
        self.hits: dict[WorkerId, int] = {}
        self.prefill_hit = 0
        self.transfer_s = 0.0
        self.shipped = False
        self.queued_at = now
        self.placed_at = now
        self.finished: Finished | None = None

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def input_tokens(self) -> int:
        return self.request.prompt_tokens + self.emitted

    @property
    def transfer_id(self) -> str:
        return f"{self.request.id}/{self.attempt}"

    def needs(self, worker: WorkerId) -> bool:
        """Whether the attempt would be lost with `worker`."""
        if self.state in (State.QUEUED, State.FINISHED):
            return False
        return worker == self.decode or (worker == self.prefill and not self.shipped)

    def workers(self) -> list[WorkerId]:
        return [w for w in dict.fromkeys((self.prefill, self.decode)) if w]


class RouteWindow:
    """`policy.route.RouteView` over a placement: read-only, valid during one decision."""

    __slots__ = (
        "_members", "_now", "_oracle", "_placement", "block_size", "candidates", "prefill_ahead_s",
        "source", "spec", "stage",
    )  # fmt: skip

    def __init__(
        self, placement: Placement, stage: Literal["prefill", "decode"],
        candidates: Sequence[Member], spec: RouteSpec, block_size: int, oracle: Oracle, now: float,
        *, source: Member | None = None,
    ) -> None:  # fmt: skip
        self._placement = placement
        self._oracle = oracle
        self._now = now
        self._members = {m.id: m for m in candidates}
        self.stage: Literal["prefill", "decode"] = stage
        self.candidates: Sequence[Member] = candidates
        self.spec = spec
        self.block_size = block_size
        self.source = source.id if source is not None else ""
        self.prefill_ahead_s = 0.0
        if source is not None and placement.state is State.QUEUED:
            cached = placement.hits.get(source.id, 0) * block_size
            self.prefill_ahead_s = source.predict_prefill(placement.input_tokens, cached)

    def only(self, worker: WorkerId) -> RouteWindow:
        """The same window with one candidate: what a policy would say of it alone."""
        window = copy.copy(self)
        window.candidates = [self._members[worker]]
        return window

    @property
    def request_id(self) -> RequestId:
        return self._placement.request.id

    @property
    def input_tokens(self) -> int:
        return self._placement.input_tokens

    @property
    def hits(self) -> dict[WorkerId, int]:
        return self._placement.hits

    def transfer_bytes(self, target: WorkerId) -> int:
        """Block-rounded input less what `target` holds, times KV bytes per token."""
        blocks = -(-self._placement.input_tokens // self.block_size)
        lacking = blocks - self._placement.hits.get(target, 0)
        token_bytes = self._members[target].hello.capacity.kv_token_bytes
        return max(lacking, 0) * self.block_size * token_bytes

    def transfer(self, target: WorkerId) -> Transfer:
        if target == self.source or not self.source:
            return Transfer(0.0, "stay")
        estimate = self._oracle.estimate(
            self.source, target, self.transfer_bytes(target), self._now, self.spec.oracle
        )
        return Transfer(estimate.seconds, estimate.source)
