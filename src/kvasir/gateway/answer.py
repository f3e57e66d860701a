"""One choice of an answer while it grows: tokens in, events or text out. Knows no desk."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.gateway.port import Ask, EndPiece, PlacedPiece, Text
from kvasir.gateway.schema import Cached, Timing, Usage, Workers
from kvasir.gateway.sse import Chunks
from kvasir.gateway.tokenize import StopMatcher


class Answer:
    """With `chunks` it makes events, without it gathers text and ids for one JSON answer."""

    __slots__ = (
        "ask", "attempts", "chunks", "end", "ids", "last_at", "parts", "path", "placed", "stops",
        "_detok", "_push", "_told",
    )  # fmt: skip

    def __init__(self, ask: Ask, text: Text, stops: Sequence[str], chunks: Chunks | None) -> None:
        self.ask, self.chunks = ask, chunks
        self.stops = StopMatcher(stops) if stops else None
        self._detok = text.detokenizer()
        self._push = self._detok.push if self.stops is None else self._push_matched
        self._told = False
        self.parts: list[str] = []
        self.ids: list[int] = []
        self.placed: PlacedPiece | None = None
        self.end: EndPiece | None = None
        self.path, self.attempts = "", 0
        self.last_at: float | None = None  # when its newest tokens came

    def place(self, piece: PlacedPiece) -> None:
        self.placed, self.path = piece, piece.path
        self.attempts += 1

    def take(self, tokens: Sequence[int]) -> bytes:
        """One event a token, or nothing to send yet."""
        push, chunks = self._push, self.chunks
        if chunks is None:
            self.ids += tokens
            self.parts += [push(token) for token in tokens]
            return b""
        if len(tokens) == 1:
            (token,) = tokens
            return chunks.token(push(token), token)
        return b"".join([chunks.token(push(token), token) for token in tokens])

    def _push_matched(self, token: int) -> str:
        assert self.stops is not None
        return self.stops.push(self._detok.push(token))

    def must_stop(self) -> bool:
        """Whether a stop string matched; true once."""
        if self.stops is None or self._told or not self.stops.matched:
            return False
        self._told = True
        return True

    def rest(self) -> str:
        """Text that was held back to the end."""
        text = self._detok.finish()
        if self.stops is None:
            return text
        return self.stops.push(text) + self.stops.finish()

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`; settled after `rest`."""
        assert self.end is not None
        stopped = self.stops is not None and self.stops.matched
        return "stop" if stopped else self.end.reason


def usage_of(answers: Sequence[Answer]) -> Usage:
    ends = [answer.end for answer in answers if answer.end is not None]
    prompt = sum(end.prompt_tokens for end in ends)
    output = sum(end.output_tokens for end in ends)
    cached = sum(end.cached_tokens for end in ends)
    return Usage(prompt, output, prompt + output, Cached(cached))


def timing_of(answers: Sequence[Answer]) -> Timing | list[Timing]:
    """One block; a list of them, in order, for several choices."""
    blocks = [_timing(answer) for answer in answers]
    return blocks[0] if len(blocks) == 1 else blocks


def _timing(answer: Answer) -> Timing:
    end, placed = answer.end, answer.placed
    assert end is not None
    report = end.report
    prefill = report.prefill.worker if report else placed.prefill if placed else ""
    decode = report.decode_worker if report else placed.decode if placed else ""
    return Timing(
        path=end.path or answer.path,
        workers=Workers(prefill, decode),
        attempts=max(1, answer.attempts),
        queue_s=end.queue_s,
        prefill_s=report.prefill.prefill_s if report else None,
        transfer_s=report.transfer_s if report else None,
        first_step_s=report.first_step_s if report else None,
        ttft_s=end.ttft_s,
        second_token_delay_s=end.second_token_delay_s,
        bytes=report.transfer_bytes if report else 0,
        transport=report.transport if report else "",
    )
