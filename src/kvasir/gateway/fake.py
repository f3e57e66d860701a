"""A desk without workers: it plays a script. For tests, benchmarks, and trying a client offline.

    FakeDesk(FakeText(), script=(72, 105), token_s=0.01)

It keeps what it was asked, and which requests were stopped, ended, or left by their client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from kvasir.core.errors import NotFound, nearest
from kvasir.core.messages import Path, PrefillReport, Report
from kvasir.gateway.port import (
    Ask,
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

    def detokenizer(self) -> FakeDetok:
        return FakeDetok()


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
    ) -> None:
        self._text, self._script, self._path = text, tuple(script), path
        self._placed_s, self._first_s, self._token_s = placed_s, first_s, token_s
        self._bundle, self._fail, self._fail_at = bundle, fail, fail_at
        self._cards = [ModelCard(model, created=1_700_000_000, max_context=max_context)]
        two: Mapping[str, WorkerState] = {"prefill-0": "ready", "decode-0": "ready"}
        self._workers = dict(two if workers is None else workers)
        self.asks: list[Ask] = []
        self.cancelled: list[str] = []
        self.ended: list[str] = []
        self.stopped: list[str] = []
        self.keep = True  # of the lists above; off for long runs

    def submit(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        if self.keep:
            self.asks.append(ask)
        return self._play(ask)

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

    async def _play(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        over = False
        try:
            await asyncio.sleep(self._placed_s)
            if self._fail is not None and self._fail_at < 0:
                over = True
                yield self._fail
                return
            yield PlacedPiece(self._path, "prefill-0", "decode-0")
            script = self._script[: ask.max_tokens]
            sent = 0
            while sent < len(script) and ask.request_id not in self.stopped:
                await asyncio.sleep(self._token_s if sent else self._first_s)
                if self._fail is not None and sent >= self._fail_at:
                    over = True
                    yield self._fail
                    return
                tokens = script[sent : sent + self._bundle]
                sent += len(tokens)
                yield TokensPiece(tokens)
            over = True
            yield self._end(ask, sent)
        finally:
            if self.keep:
                (self.ended if over else self.cancelled).append(ask.request_id)

    def _end(self, ask: Ask, sent: int) -> EndPiece:
        cut = sent == ask.max_tokens and ask.request_id not in self.stopped
        return EndPiece(
            reason="length" if cut else "stop",
            prompt_tokens=len(ask.tokens),
            cached_tokens=len(ask.tokens) // 16 * 16,
            output_tokens=sent,
            report=_report(ask),
            queue_s=self._placed_s,
            ttft_s=self._placed_s + self._first_s,
            second_token_delay_s=self._token_s,
            path=self._path,
        )


def _report(ask: Ask) -> Report:
    cached = len(ask.tokens) // 16 * 16
    prefill = PrefillReport("prefill-0", 0.001, 0.002, cached, len(ask.tokens) - cached)
    return Report(
        prefill, "decode-0", transfer_s=0.003, transfer_bytes=4096, transport="shm",
        first_step_s=0.004,
    )  # fmt: skip
