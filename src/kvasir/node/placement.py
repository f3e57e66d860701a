"""The conductor's record of one request, and the window on it that a route policy reads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Final, Literal, NamedTuple

from kvasir.core.ids import BlockKey, RequestId, WorkerId
from kvasir.core.messages import Finished, Path, Submit
from kvasir.core.specs import RouteSpec
from kvasir.kv.prefix import PrefixIndex
from kvasir.net.oracle import Arm, Oracle
from kvasir.node.registry import Member
from kvasir.policy.route.view import Transfer

STAY: Final = Transfer(0.0, "stay")


class State(IntEnum):
    QUEUED = 0  # no worker yet
    PREFILL = 1  # dispatched; its KV is being made
    CHOOSING = 2  # prefilled; no decode worker has room yet
    DECODE = 3  # dispatched to decode; its KV is there or on the way
    FINISHED = 4  # a worker says so; the gateway has not yet


class Placement:
    """One attempt. A new attempt is a new placement."""

    __slots__ = (
        "attempt", "decode", "emitted", "fetch_blocks", "fetch_from", "finished", "hits",
        "link_bytes_s", "marks", "path", "placed_at", "prefill", "prefill_hit", "prefilled_at",
        "queued_at", "request", "resident", "shipped", "state", "transfer_s",
    )  # fmt: skip

    def __init__(self, submit: Submit, now: float) -> None:
        self.request = submit.request
        self.attempt = submit.attempt
        self.emitted = submit.emitted
        self.marks = submit.marks
        self.state = State.QUEUED
        self.path: Path = "disaggregated"
        self.prefill: WorkerId = ""
        self.decode: WorkerId = ""
        self.hits: dict[WorkerId, int] = {}  # leading blocks that each worker has, at any tier
        self.resident: dict[WorkerId, int] = {}  # those on its device
        self.prefill_hit = 0
        self.fetch_from: WorkerId = ""
        self.fetch_blocks = 0  # leading blocks that come from there
        self.transfer_s = 0.0
        self.link_bytes_s = 0.0  # what the network should give the KV, where it may be coded
        self.shipped = False
        self.queued_at = now
        self.placed_at = now
        self.prefilled_at = now  # until prefill is over: when it should be
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

    @property
    def fetch_id(self) -> str:
        return f"{self.transfer_id}/prefix"

    def needs(self, worker: WorkerId) -> bool:
        """Whether the attempt would be lost with `worker`."""
        if self.state in (State.QUEUED, State.FINISHED):
            return False
        return worker == self.decode or (worker == self.prefill and not self.shipped)

    def workers(self) -> list[WorkerId]:
        return [w for w in dict.fromkeys((self.prefill, self.decode)) if w]


class Ground(NamedTuple):
    """What all decisions of one conductor stand on. `members` and `prefixes` are its own, live."""

    spec: RouteSpec
    block_size: int
    seed: int
    members: Mapping[WorkerId, Member]
    prefixes: PrefixIndex
    oracle: Oracle


class RouteWindow:
    """`policy.route.RouteView` over a placement: read-only, valid during one decision."""

    __slots__ = (
        "_ground", "_now", "_placement", "block_size", "candidates", "decoders", "fetches",
        "prefill_ahead_s", "seed", "source", "spec", "stage",
    )  # fmt: skip

    def __init__(
        self, ground: Ground, placement: Placement, stage: Literal["prefill", "decode"],
        candidates: Sequence[Member], now: float, *, source: Member | None = None,
        decoders: Sequence[Member] = (),
    ) -> None:  # fmt: skip
        self._ground = ground
        self._placement = placement
        self._now = now
        self.stage: Literal["prefill", "decode"] = stage
        self.candidates: Sequence[Member] = candidates
        self.decoders: Sequence[Member] = decoders
        self.spec = ground.spec
        self.block_size = ground.block_size
        self.seed = ground.seed
        self.fetches = ground.spec.fetch_prefix
        self.source = source.id if source is not None else ""
        self.prefill_ahead_s = 0.0
        if source is not None and placement.state is State.QUEUED:
            cached = placement.hits.get(source.id, 0) * self.block_size
            self.prefill_ahead_s = source.predict_prefill(placement.input_tokens, cached)

    def only(self, worker: WorkerId) -> RouteWindow:
        """The same window with one candidate: what a policy would say of it alone."""
        window = copy.copy(self)
        window.candidates = [self._ground.members[worker]]
        return window

    @property
    def request_id(self) -> RequestId:
        return self._placement.request.id

    @property
    def attempt(self) -> int:
        return self._placement.attempt

    @property
    def session(self) -> str | None:
        return self._placement.request.session

    @property
    def keys(self) -> Sequence[BlockKey]:
        return self._placement.request.keys

    @property
    def input_tokens(self) -> int:
        return self._placement.input_tokens

    @property
    def hits(self) -> dict[WorkerId, int]:
        """Who prefills can load what a tier has; who decodes has what is on its device."""
        return self._placement.hits if self.stage == "prefill" else self._placement.resident

    def blocks_cached(self, worker: WorkerId) -> int:
        return self._ground.prefixes.blocks_of(worker)

    def transfer_bytes(self, target: WorkerId, blocks: int | None = None) -> int:
        """KV bytes of `blocks`; unless given, those of the block-rounded input that `target` does
        not hold."""
        if blocks is None:
            whole = -(-self._placement.input_tokens // self.block_size)
            blocks = whole - self._placement.resident.get(target, 0)
        token_bytes = self._ground.members[target].hello.capacity.kv_token_bytes
        return max(blocks, 0) * self.block_size * token_bytes

    def transfer(
        self, target: WorkerId, source: WorkerId = "", blocks: int | None = None,
        arm: Arm | None = None,
    ) -> Transfer:  # fmt: skip
        source = source or self.source
        if target == source or not source:
            return STAY
        estimate = self._ground.oracle.estimate(
            source, target, self.transfer_bytes(target, blocks), self._now, arm or self.spec.oracle
        )
        return Transfer(estimate.seconds, estimate.source)
