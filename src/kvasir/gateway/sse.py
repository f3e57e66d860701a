"""Server-sent events of a streamed answer, from byte templates. Knows bytes; no desk, no tokenizer.

One event a token, also when its text is still held back; then one with the finish reason; then one
with usage if asked; then [DONE]. Only the delta's text is encoded per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from kvasir.gateway.schema import Timing, Usage

DONE: Final = b"data: [DONE]\n\n"
_encode: Final = msgspec.json.Encoder().encode


class Chunks:
    """The events of one choice, in order: `token` ..., `last`."""

    __slots__ = ("_asked_ids", "_chat", "_close", "_fresh", "_head", "_later", "_shared", "_tail")

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
            first = shared.head + ids + choice + b'"delta":{"role":"assistant","content":'
            self._head, self._later = first, shared.head + choice + b'"delta":{"content":'
            self._tail = b'},"logprobs":null,"finish_reason":null'
        else:
            first = shared.head + choice + ids + b'"text":'
            self._head, self._later = first, shared.head + choice + b'"text":'
            self._tail = b',"logprobs":null,"finish_reason":null'
        if not token_ids:
            self._tail += self._close

    def token(self, text: str, token: int) -> bytes:
        """The event of one token; `text` may be empty."""
        head, self._head, self._fresh = self._head, self._later, False
        if self._asked_ids:
            ids = b',"token_ids":[%d]' % token
            return b"".join((head, _encode(text), self._tail, ids, self._close))
        return b"".join((head, _encode(text), self._tail))

    def last(self, rest: str, reason: str, timing: bytes = b"") -> bytes:
        """The finish reason, with the text that was held back to the end."""
        close = b',"logprobs":null,"finish_reason":%b}]%b%b}\n\n' % (
            _encode(reason), self._shared.usage_null, timing
        )  # fmt: skip
        if self._chat and not rest and not self._fresh:
            head = self._later.removesuffix(b'"content":')
            return head + b"}" + close
        return self._head + _encode(rest) + (b"}" if self._chat else b"") + close


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
