"""Nodes driven by hand: one message in, effects out, invariants after each. No world, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from kvasir.core.effects import AnyEffect, Note, Tell
from kvasir.core.keys import trace_key
from kvasir.core.messages import (
    AnyMessage,
    Capacity,
    Dispatch,
    Drawn,
    Hello,
    Location,
    PrefillReport,
    Report,
    Tokens,
)
from kvasir.core.request import Request
from kvasir.node import Node

T = TypeVar("T")
N = TypeVar("N", bound=Node)

BLOCK = 4
TOKEN_BYTES = 10
GATEWAY = "gateway-0"
CAPACITY = Capacity(
    kv_blocks=32, block_size=BLOCK, kv_token_bytes=TOKEN_BYTES, batch_max=8, batch_tokens_max=64,
    context_max=1000,
)  # fmt: skip
PREFILL_REPORT = PrefillReport("p", 0.1, 0.2, cached_tokens=4, computed_tokens=6)
REPORT = Report(PREFILL_REPORT, decode_worker="d", transfer_s=0.05, transfer_bytes=400)


class Told(Generic[T]):
    """Messages of one kind, with their receivers."""

    def __init__(self, pairs: Sequence[tuple[str, T]]) -> None:
        self.pairs = list(pairs)

    @property
    def to(self) -> list[str]:
        return [to for to, _ in self.pairs]

    @property
    def messages(self) -> list[T]:
        return [message for _, message in self.pairs]

    def one(self) -> T:
        assert len(self.pairs) == 1, self.pairs
        return self.pairs[0][1]

    def __len__(self) -> int:
        return len(self.pairs)


class Effects(list[AnyEffect]):
    """What one message led to."""

    def told(self, kind: type[T]) -> Told[T]:
        tells = [e for e in self if isinstance(e, Tell)]
        return Told([(e.to, e.message) for e in tells if isinstance(e.message, kind)])

    def of(self, kind: type[T]) -> list[T]:
        return [e for e in self if isinstance(e, kind)]

    def one(self, kind: type[T]) -> T:
        (found,) = self.of(kind)
        return found

    def noted(self, kind: type[T]) -> list[T]:
        return [e.event for e in self if isinstance(e, Note) and isinstance(e.event, kind)]


class Driven(Generic[N]):
    """A node and its clock. `heard` collects all effects since the start."""

    def __init__(self, node: N) -> None:
        self.node = node
        self.now = 0.0
        self.heard = Effects()

    def __call__(self, event: AnyMessage, *, after: float = 0.0) -> Effects:
        self.now += after
        effects = Effects(self.node.handle(self.now, event))
        self.node.check()
        self.heard += effects
        return effects


def keys(count: int, group: int = 0) -> tuple[bytes, ...]:
    return tuple(trace_key(group * 1000 + i) for i in range(count))


def request(request_id: str = "r", tokens: int = 10, output: int = 5, **more: Any) -> Request:
    """Its full blocks have keys of their own unless `group` says otherwise."""
    group = more.pop("group", sum(map(ord, request_id)))
    defaults = {"keys": keys(tokens // BLOCK, group), "gateway": GATEWAY}
    return Request(request_id, "m", tokens, output, **(defaults | more))


def dispatch(of: Request, phase: Any = "both", attempt: int = 1, **more: Any) -> Dispatch:
    defaults = {"epoch": 1, "emitted": 0, "first_token": "prefill"}
    if phase == "decode":
        defaults["source"] = "p"
    if phase == "prefill":
        defaults["target"] = "d"
    fields = defaults | more
    return Dispatch(request=of, attempt=attempt, phase=phase, **fields)


def hello(worker: str, *roles: str, incarnation: int = 1, **more: Any) -> Hello:
    gpu = {"p": 0, "p2": 1, "d": 16, "d2": 17, "m": 2}[worker]
    return Hello(
        worker, incarnation, roles or (more.get("pool", "both"),), "m", "m",
        msgspec.structs.replace(CAPACITY, **more.pop("capacity", {})), Location((gpu,)), **more,
    )  # fmt: skip


def tokens(request_id: str, index: int, count: int = 1, attempt: int = 1) -> Tokens:
    return Tokens((Drawn(request_id, attempt, index, count),))
