"""One choice of an answer while it grows: tokens in, events or text out. Knows no desk."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvasir.core.messages import Logprobs
from kvasir.gateway.logprobs import chat_logprobs, completion_logprobs
from kvasir.gateway.port import Ask, EndPiece, PlacedPiece, Text
from kvasir.gateway.reasoning import Part, Splitter
from kvasir.gateway.schema import (
    Cached,
    ChatLogprobs,
    CompletionLogprobs,
    Created,
    Reasoned,
    Timing,
    Usage,
    Workers,
)
from kvasir.gateway.sse import AnyLogprobs, Chunks
from kvasir.gateway.tokenize import StopMatcher


class Style(msgspec.Struct, frozen=True):
    """How an answer's tokens become text. `reasons`: whether thinking is told apart, and whether
    the prompt's end began it (None: it is not)."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    reasons: bool | None = None
    chat: bool = False


class Answer:
    """With `chunks` it makes events, without it gathers text and ids for one JSON answer."""

    __slots__ = (
        "ask", "attempts", "chunks", "end", "ids", "last_at", "parts", "path", "placed",
        "reasoning_tokens", "stops", "thoughts",
        "_count", "_detok", "_length", "_logprobs", "_offsets", "_rich", "_silent", "_splitter",
        "_style", "_text", "_told",
    )  # fmt: skip

    def __init__(self, ask: Ask, text: Text, style: Style, chunks: Chunks | None) -> None:
        self.ask, self.chunks = ask, chunks
        stops, self._style, self._text = style.stops, style, text
        self.stops = StopMatcher(stops, include=style.include_stop) if stops else None
        self._splitter = Splitter(inside=style.reasons) if style.reasons is not None else None
        self._detok = text.detokenizer(skip_special=style.skip_special)
        # A token that ends the text has none, as vLLM has it, unless it is to be included.
        self._silent = frozenset(() if style.include_stop else ask.sampling.stop_token_ids)
        self._told = False
        self._rich = self._splitter is not None or ask.sampling.logprobs is not None
        self._count = self._length = 0  # tokens taken; characters they stand for
        self.parts: list[str] = []
        self.thoughts: list[str] = []
        self.reasoning_tokens = 0
        self.ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._offsets: list[int] = []
        self.placed: PlacedPiece | None = None
        self.end: EndPiece | None = None
        self.path, self.attempts = "", 0
        self.last_at: float | None = None  # when its newest tokens came

    def place(self, piece: PlacedPiece) -> None:
        self.placed, self.path = piece, piece.path
        self.attempts += 1

    def take(self, tokens: Sequence[int], logprobs: Sequence[Logprobs] = ()) -> bytes:
        """One event a token, or nothing to send yet."""
        if self._rich:
            return b"".join([self._take_rich(i, tokens, logprobs) for i in range(len(tokens))])
        push, chunks = self._push, self.chunks
        if chunks is None:
            self.ids += tokens
            self.parts += [push(token) for token in tokens]
            return b""
        if len(tokens) == 1:
            (token,) = tokens
            return chunks.token(push(token), token)
        return b"".join([chunks.token(push(token), token) for token in tokens])

    def _take_rich(self, i: int, tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> bytes:
        token, offset = tokens[i], self._length
        part = Part(content=self._push(token))
        if self._splitter is not None:
            was_inside = self._splitter.inside
            part = self._splitter.push(part.content)
            self.reasoning_tokens += was_inside or self._splitter.inside
        told = logprobs[i : i + 1]
        if self.chunks is not None:
            shown = self._shape((token,), told, (offset,)) if told else None
            return self.chunks.rich(part.content, token, part.reasoning, shown)
        self.ids.append(token)
        self._gather(part)
        self._logprobs += told
        self._offsets.append(offset)
        return b""

    def _gather(self, part: Part) -> None:
        self.parts.append(part.content)
        self.thoughts.append(part.reasoning)

    def _push(self, token: int) -> str:
        """Text that may be shown with this token."""
        self._count += 1
        text = "" if token in self._silent else self._detok.push(token)
        self._length += len(text)
        if self.stops is None or self._count <= self.ask.sampling.min_tokens:
            return text
        return self.stops.push(text)

    def must_stop(self) -> bool:
        """Whether a stop string matched; true once."""
        if self.stops is None or self._told or not self.stops.matched:
            return False
        self._told = True
        return True

    def rest(self) -> Part:
        """Text that was held back to the end."""
        text = self._detok.finish()
        if self.stops is not None:
            text = self.stops.push(text) + self.stops.finish()
        if self._splitter is None:
            return Part(content=text)
        part, held = self._splitter.push(text), self._splitter.finish()
        return Part(part.reasoning + held.reasoning, part.content + held.content)

    def finish(self) -> None:
        """Gather the text that was held back to the end."""
        self._gather(self.rest())

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`; settled after `rest`."""
        assert self.end is not None
        stopped = self.stops is not None and self.stops.matched
        return "stop" if stopped else self.end.reason

    @property
    def reasons(self) -> bool:
        """Whether thinking is told apart."""
        return self._splitter is not None

    def logprobs(self) -> AnyLogprobs | None:
        """Of all tokens, if they were asked for."""
        if self.ask.sampling.logprobs is None:
            return None
        return self._shape(self.ids, self._logprobs, self._offsets)

    def _shape(
        self, tokens: Sequence[int], logprobs: Sequence[Logprobs], offsets: Sequence[int]
    ) -> ChatLogprobs | CompletionLogprobs:
        bytes_of = self._text.token_bytes
        if self._style.chat:
            return chat_logprobs(tokens, logprobs, bytes_of)
        return completion_logprobs(tokens, logprobs, offsets, bytes_of)


def usage_of(answers: Sequence[Answer], n: int = 1) -> Usage:
    """The first of each `n` choices counts their prompt, which they share."""
    ends = [answer.end for answer in answers if answer.end is not None]
    prompt = sum(end.prompt_tokens for end in ends[::n])
    cached = sum(end.cached_tokens for end in ends[::n])
    output = sum(end.output_tokens for end in ends)
    usage = Usage(prompt, output, prompt + output, Cached(cached))
    marked = [end.cache for end in ends[::n] if end.cache is not None]
    if marked:
        short, long = (sum(u.written_5m for u in marked), sum(u.written_1h for u in marked))
        usage.cache_read_input_tokens = sum(use.read for use in marked)
        usage.cache_creation_input_tokens = short + long
        usage.cache_creation = Created(short, long)
    if any(answer.reasons for answer in answers):
        thought = sum(answer.reasoning_tokens for answer in answers)
        usage.completion_tokens_details = Reasoned(thought)
    return usage


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
        codec=report.codec if report else "",
    )
