"""A desk without workers: it plays a script. For tests, benchmarks, and trying a client offline.

    FakeDesk(FakeText(), script=(72, 105), token_s=0.01)

It keeps what it was asked, and which requests were stopped, ended, or left by their client.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvasir.core.errors import NotFound, nearest
from kvasir.core.ids import CacheId, TenantId, WorkerId
from kvasir.core.messages import Logprobs, Path, PrefillReport, Report
from kvasir.core.request import Grammar
from kvasir.core.specs import ModelSpec
from kvasir.gateway.caches import use_of
from kvasir.gateway.port import (
    Ask,
    CacheView,
    EndPiece,
    FailPiece,
    Health,
    ModelCard,
    Piece,
    PlacedPiece,
    Text,
    TokensPiece,
    WorkerState,
)
from kvasir.gateway.records import Records
from kvasir.gateway.served import Served

BLOCK = 16


class FakeDetok:
    """One character a token: its code point is the token id."""

    def push(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


class FakeText:
    """One token a byte in, one a code point out; no model's tokenizer, and next to no work."""

    eos_ids: tuple[int, ...] = (0,)
    vocab = 0xD800

    async def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(text.encode())

    def render(self, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)

    def detokenizer(self, *, skip_special: bool = True) -> FakeDetok:
        return FakeDetok()

    def token_bytes(self, token: int) -> bytes:
        return chr(token).encode()

    async def fault(self, grammar: Grammar) -> str:
        return "no text matches it" if grammar.text == "nothing" else ""


class FakeDesk:
    """Plays `script` for every request, cut at its `max_tokens`. Delays are seconds.

    `bundle` tokens come in one piece. With `fail`, the request ends with it after `fail_at` tokens,
    or before it has a place when `fail_at` is negative. A step without delay still lets the loop
    turn once, as a token from a socket would.
    """

    def __init__(
        self,
        text: Text,
        script: Sequence[int] = tuple(b"Hello, world!"),
        *,
        model: str = "fake",
        path: Path = "disaggregated",
        max_context: int = 4096,
        placed_s: float = 0.0,
        first_s: float = 0.0,
        token_s: float = 0.0,
        bundle: int = 1,
        fail: FailPiece | None = None,
        fail_at: int = -1,
        workers: Mapping[str, WorkerState] | None = None,
        reasons: bool = False,
        made_up: bool = False,
    ) -> None:
        self._text = text
        self.script, self.path, self.bundle = tuple(script), path, bundle
        self.placed_s, self.first_s, self.token_s = placed_s, first_s, token_s
        self.fail, self.fail_at = fail, fail_at
        card = ModelCard(model, 1_700_000_000, max_context, made_up=made_up, reasons=reasons)
        self._cards = [card]
        self.served = Served((ModelSpec(name=model),))
        self.caches = Records()
        self.block_size = BLOCK
        self.kept: dict[CacheId, CacheView] = {}
        two: Mapping[str, WorkerState] = {"prefill-0": "ready", "decode-0": "ready"}
        self._workers = dict(two if workers is None else workers)
        self.asks: list[Ask] = []
        self.cancelled: list[str] = []
        self.ended: list[str] = []
        self.stopped: list[str] = []
        self.keep = True  # of the lists above; off for long runs

    def submit(self, ask: Ask) -> FakePieces:
        if self.keep:
            self.asks.append(ask)
        return FakePieces(self, ask)

    def cache(self, cache: CacheId) -> CacheView | None:
        return self.kept.get(cache)

    def retain(self, tenant: TenantId, cache: CacheId, ttl_s: float) -> None:
        self.kept.pop(cache, None)
        if ttl_s:
            self.kept[cache] = CacheView("ready", ttl_s)

    def leave(self, worker: WorkerId, within_s: float) -> None:
        self._workers[worker] = "left"

    def stop(self, request_id: str) -> None:
        self.stopped.append(request_id)

    def models(self) -> Sequence[ModelCard]:
        return self._cards

    def health(self) -> Health:
        return Health(all(s == "ready" for s in self._workers.values()), self._workers)

    def text(self, model: str) -> Text:
        known = [card.id for card in self._cards]
        if model not in known:
            raise NotFound(f"no model {model!r} here", nearest=nearest(model, known))
        return self._text


class FakePieces:
    """One request's part of the script. Only closing it early, or its last piece, ends it."""

    __slots__ = ("_ask", "_desk", "_over", "_placed", "_script", "_sent")

    def __init__(self, desk: FakeDesk, ask: Ask) -> None:
        self._desk, self._ask = desk, ask
        self._script = desk.script[: ask.max_tokens]
        self._sent = 0
        self._placed = self._over = False

    def __aiter__(self) -> FakePieces:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        desk, sent = self._desk, self._sent
        if not self._placed:
            return await self._place()
        if sent == len(self._script) or self._ask.request_id in desk.stopped:
            return self._last(self._end())
        await asyncio.sleep(desk.token_s if sent else desk.first_s)
        if desk.fail is not None and sent >= desk.fail_at:
            return self._last(desk.fail)
        tokens = self._script[sent : sent + desk.bundle]
        self._sent += len(tokens)
        asked = self._ask.sampling.logprobs
        if asked is None:
            return TokensPiece(tokens)
        return TokensPiece(tokens, tuple(_logprobs(token, asked) for token in tokens))

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._desk.cancelled.append(self._ask.request_id)

    async def _place(self) -> Piece:
        await asyncio.sleep(self._desk.placed_s)
        if self._desk.fail is not None and self._desk.fail_at < 0:
            return self._last(self._desk.fail)
        self._placed = True
        return PlacedPiece(self._desk.path, "prefill-0", "decode-0")

    def _last(self, piece: EndPiece | FailPiece) -> Piece:
        self._over = True
        for keep in self._ask.keeps:
            if keep.must and isinstance(piece, EndPiece):
                self._desk.retain(self._ask.tenant, keep.cache, keep.ttl_s)
        if self._desk.keep:
            self._desk.ended.append(self._ask.request_id)
        return piece

    def _end(self) -> EndPiece:
        ask, desk, sent = self._ask, self._desk, self._sent
        cut = sent == ask.max_tokens and ask.request_id not in desk.stopped
        return EndPiece(
            reason="length" if cut else "stop",
            prompt_tokens=len(ask.tokens),
            cached_tokens=_cached(ask),
            output_tokens=sent,
            report=_report(ask),
            queue_s=desk.placed_s,
            ttft_s=desk.placed_s + desk.first_s,
            second_token_delay_s=desk.token_s,
            path=desk.path,
            cache=use_of(ask.keeps, (), BLOCK, _cached(ask)),
        )


def _logprobs(token: int, top: int) -> Logprobs:
    """Each token has half of what is left, then the code point after it."""
    halves = tuple((token + i, math.log(0.5 ** (i + 1))) for i in range(top))
    return Logprobs(math.log(0.5), halves)


def _cached(ask: Ask) -> int:
    """All full blocks, as if somebody had asked it before."""
    return len(ask.tokens) // BLOCK * BLOCK


def _report(ask: Ask) -> Report:
    cached = _cached(ask)
    prefill = PrefillReport("prefill-0", 0.001, 0.002, cached, len(ask.tokens) - cached)
    return Report(
        prefill, "decode-0", transfer_s=0.003, transfer_bytes=4096, transport="shm",
        first_step_s=0.004,
    )  # fmt: skip
