"""What a route policy may look at, and what it answers. The prose is the contract.

The conductor asks twice: once with `stage` "prefill", once with "decode" (at arrival or when
prefill ends, as the deployment says). It has already left out workers that are dead, draining, of
the wrong role or model, or whose free KV could not hold the request (NetKV's feasibility filter),
so a policy only ranks. Never empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from kvasir.core.ids import RequestId, WorkerId
from kvasir.core.specs import RouteSpec


class WorkerView(Protocol):
    """One worker as the conductor knows it: own bookkeeping, plus the last beat where it is known.

    `prefill_s` predicted seconds of prefill work dispatched and not done. `decoding` sequences it
    decodes or will decode; `batch_max` its bound on them. `context_tokens` KV tokens they hold.
    `blocks_reserved` of `blocks_total`. `iteration_s` measured by the worker; None is unknown.
    """

    @property
    def id(self) -> WorkerId: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def decoding(self) -> int: ...
    @property
    def batch_max(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def blocks_reserved(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def iteration_s(self) -> float | None: ...

    def predict_prefill(self, tokens: int, cached: int) -> float: ...
    def predict_iteration(self, decoding: int, context_tokens: int) -> float: ...


class Transfer(NamedTuple):
    """The oracle's answer: seconds, and where it comes from."""

    seconds: float
    source: str


class RouteView(Protocol):
    """`hits[worker]` leading blocks cached there. `source` prefill worker (stage decode), or "".

    `transfer(target)` is the predicted time to ship what `target` lacks from `source`; zero when
    they are the same. `prefill_ahead_s` seconds of prefill still to come, which can hide a
    transfer.
    """

    @property
    def stage(self) -> Literal["prefill", "decode"]: ...
    @property
    def request_id(self) -> RequestId: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def candidates(self) -> Sequence[WorkerView]: ...
    @property
    def hits(self) -> dict[WorkerId, int]: ...
    @property
    def source(self) -> WorkerId: ...
    @property
    def prefill_ahead_s(self) -> float: ...
    @property
    def spec(self) -> RouteSpec: ...

    def transfer(self, target: WorkerId) -> Transfer: ...


class RouteMemory(NamedTuple):
    """What round robin must remember."""

    prefill_turn: int = 0
    decode_turn: int = 0


class Choice(NamedTuple):
    """`estimate_s` is the transfer that the choice counted on (decode stage)."""

    worker: WorkerId
    why: str
    estimate_s: float = 0.0


Route = Callable[[RouteView, RouteMemory], tuple[Choice, RouteMemory]]


def cached_tokens(view: RouteView, worker: WorkerView) -> int:
    """Prompt tokens that `worker` need not compute; the last one is always computed."""
    hit = view.hits.get(worker.id, 0) * view.block_size
    return min(hit, max(view.input_tokens - 1, 0))
