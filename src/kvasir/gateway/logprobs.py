"""Log-probabilities in OpenAI's two shapes. Knows single tokens' bytes; no stream, no desk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvasir.core.messages import Logprobs
from kvasir.gateway.schema import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

BytesOf = Callable[[int], bytes]


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[Logprobs], bytes_of: BytesOf
) -> ChatLogprobs:
    """One entry a token, with the likeliest tokens in its place, likeliest first."""
    content = []
    for token, one in zip(tokens, logprobs, strict=True):
        raw = bytes_of(token)
        top = [_top(other, logprob, bytes_of) for other, logprob in one.top]
        content.append(TokenLogprob(_shown(raw, ""), one.drawn, list(raw), top))
    return ChatLogprobs(content)


def _top(token: int, logprob: float, bytes_of: BytesOf) -> TopLogprob:
    raw = bytes_of(token)
    return TopLogprob(_shown(raw, ""), logprob, list(raw))


def completion_logprobs(
    tokens: Sequence[int], logprobs: Sequence[Logprobs], offsets: Sequence[int], bytes_of: BytesOf
) -> CompletionLogprobs:
    """Columns. `top_logprobs` holds the drawn token too, so one more than asked for, perhaps."""
    names = [_shown(bytes_of(token), "bytes:") for token in tokens]
    tops = []
    for name, one in zip(names, logprobs, strict=True):
        top = {_shown(bytes_of(other), "bytes:"): logprob for other, logprob in one.top}
        tops.append({**top, name: one.drawn})
    return CompletionLogprobs(list(offsets), [one.drawn for one in logprobs], names, tops)


def _shown(raw: bytes, mark: str) -> str:
    """A token as text; one that is only a part of a character, byte by byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in raw)
