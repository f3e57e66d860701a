"""Server-sent events of a streamed answer, from byte templates. Knows bytes; no desk, no tokenizer.

One event a token, also when its text is still held back; then one with the finish reason; then one
with usage if asked; then [DONE]. Only the delta's text is encoded per token, and log-probabilities
where they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from kvasir.gateway.schema import ChatLogprobs, CompletionLogprobs, Timing, Usage

AnyLogprobs = ChatLogprobs | CompletionLogprobs
DONE: Final = b"data: [DONE]\n\n"
_encode: Final = msgspec.json.Encoder().encode


class Chunks:
    """The events of one choice, in order: `token` ..., `last`."""

    __slots__ = ("_asked_ids", "_chat", "_close", "_end", "_fresh", "_head", "_key", "_later",
                 "_shared", "_tail")  # fmt: skip

    def __init__(
        self,
        shared: Shared,
        index: int,
        *,
        token_ids: bool = False,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._shared, self._chat, self._asked_ids = shared, shared.chat, token_ids
        self._fresh = True
        ids = b'"prompt_token_ids":%b,' % _encode(prompt_ids) if token_ids else b""
        choice = b'"choices":[{"index":%d,' % index
        self._close = b"}]" + shared.usage_null + b"}\n\n"
        if shared.chat:
            self._later = shared.head + choice + b'"delta":{'
            self._head = shared.head + ids + choice + b'"delta":{"role":"assistant",'
            self._key, self._end = b'"content":', b"}"
        else:
            self._later = shared.head + choice
            self._head = shared.head + choice + ids
            self._key, self._end = b'"text":', b""
        self._tail = self._end + b',"logprobs":null,"finish_reason":null'
        if not token_ids:
            self._tail += self._close

    def token(self, text: str, token: int) -> bytes:
        """The event of one token; `text` may be empty."""
        head, self._head, self._fresh = self._head, self._later, False
        if self._asked_ids:
            ids = b',"token_ids":[%d]' % token
            return b"".join((head, self._key, _encode(text), self._tail, ids, self._close))
        return b"".join((head, self._key, _encode(text), self._tail))

    def rich(self, text: str, token: int, reasoning: str, logprobs: AnyLogprobs | None) -> bytes:
        """The event of one token that brings more than text."""
        head, self._head, self._fresh = self._head, self._later, False
        told = b',"logprobs":%b,"finish_reason":null' % _encode(logprobs)
        ids = b',"token_ids":[%d]' % token if self._asked_ids else b""
        delta = self._delta(text, reasoning)
        return b"".join((head, delta, self._end, told, ids, self._close))

    def last(self, rest: str, reason: str, timing: bytes = b"", *, reasoning: str = "") -> bytes:
        """The finish reason, with the text that was held back to the end."""
        close = b',"logprobs":null,"finish_reason":%b}]%b%b}\n\n' % (
            _encode(reason), self._shared.usage_null, timing
        )  # fmt: skip
        empty = self._chat and not rest and not reasoning and not self._fresh
        delta = b"" if empty else self._delta(rest, reasoning)
        return self._head + delta + self._end + close

    def _delta(self, text: str, reasoning: str) -> bytes:
        if not reasoning:
            return self._key + _encode(text)
        thought = b'"reasoning_content":' + _encode(reasoning)
        return thought + (b"," + self._key + _encode(text) if text else b"")


class Shared:
    """What all events of one answer have in common."""

    __slots__ = ("chat", "head", "usage_null")

    def __init__(
        self, *, chat: bool, answer_id: str, created: int, model: str, usage: bool
    ) -> None:
        self.chat = chat
        kind = b"chat.completion.chunk" if chat else b"text_completion"
        self.head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,' % (
            _encode(answer_id), kind, created, _encode(model)
        )  # fmt: skip
        self.usage_null = b',"usage":null' if usage else b""

    def usage(self, usage: Usage, timing: bytes = b"") -> bytes:
        """The event after the last choice: no choices, but usage."""
        return self.head + b'"choices":[],"usage":%b%b}\n\n' % (_encode(usage), timing)


def timing_part(timing: Timing | Sequence[Timing]) -> bytes:
    """The `kvasir` block, as it is appended inside an event's object."""
    return b',"kvasir":' + _encode(timing)


def error_event(body: bytes) -> bytes:
    return b"data: %b\n\n" % body
