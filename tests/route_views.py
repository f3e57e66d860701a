"""Views for tables of route decisions: every field set by hand, costs that can be summed in the
head. Knows the contract of `policy.route.view` and no node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvasir.core.specs import RouteSpec
from kvasir.policy.route import ROUTES, Choice, RouteMemory
from kvasir.policy.route.view import Transfer

PREFILL_TOKEN_S = 0.001
STEP_S, ROW_S, CONTEXT_S = 0.01, 0.001, 1e-6
DEFAULTS, FRESH = RouteSpec(), RouteMemory()


@dataclass(frozen=True)
class FakeWorker:
    """Prefill takes 1 ms an uncached token; an iteration 10 ms + 1 ms a row + 1 us a KV token."""

    id: str
    mixed: bool = False
    requests: int = 0
    prefilling: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decoding: int = 0
    batch_max: int = 8
    context_tokens: int = 0
    blocks_reserved: int = 0
    blocks_total: int = 100
    iteration_s: float | None = None

    def predict_prefill(self, tokens: int, cached: int) -> float:
        return PREFILL_TOKEN_S * max(tokens - cached, 0)

    def predict_iteration(self, decoding: int, context_tokens: int) -> float:
        return STEP_S + ROW_S * decoding + CONTEXT_S * context_tokens


@dataclass(frozen=True)
class FakeView:
    """`transfers[source, target]` seconds of all that the target lacks, whatever the arm."""

    candidates: Sequence[FakeWorker]
    stage: Literal["prefill", "decode"] = "prefill"
    hits: dict[str, int] = field(default_factory=dict)
    decoders: Sequence[FakeWorker] = ()
    input_tokens: int = 1000
    block_size: int = 100
    request_id: str = "r0"
    attempt: int = 1
    session: str | None = None
    keys: Sequence[bytes] = ()
    seed: int = 0
    fetches: bool = False
    source: str = ""
    prefill_ahead_s: float = 0.0
    spec: RouteSpec = DEFAULTS
    cached: Mapping[str, int] = field(default_factory=dict)
    transfers: Mapping[tuple[str, str], float] = field(default_factory=dict)
    arms: list[str | None] = field(default_factory=list)  # what the oracle was asked

    def blocks_cached(self, worker: str) -> int:
        return self.cached.get(worker, 0)

    def transfer(
        self, target: str, source: str = "", blocks: int | None = None, arm: Any = None
    ) -> Transfer:
        self.arms.append(arm)
        seconds = self.transfers.get((source or self.source, target), 0.0)
        return Transfer(seconds, arm or self.spec.oracle)


def workers(**each: dict[str, Any]) -> tuple[FakeWorker, ...]:
    return tuple(FakeWorker(name, **fields) for name, fields in each.items())


def choose(policy: str, view: FakeView, memory: RouteMemory = FRESH) -> Choice:
    return ROUTES[policy](view, memory)[0]


def counts(policy: str, views: Sequence[FakeView]) -> dict[str, int]:
    """How often each worker was chosen, the memory handed on."""
    memory, found = RouteMemory(), dict[str, int]()
    for view in views:
        choice, memory = ROUTES[policy](view, memory)
        found[choice.worker] = found.get(choice.worker, 0) + 1
    return found
