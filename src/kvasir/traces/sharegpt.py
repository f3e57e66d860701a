"""ShareGPT's conversations: text, so lengths need a tokenizer, and times have to be made up.

As `vllm bench serve --dataset-name sharegpt` does, a conversation of two turns or more is one
request: its first turn is the prompt, its second the answer. Keeps no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from kvasir.core.errors import TraceError
from kvasir.traces.generators import poisson
from kvasir.traces.record import Arrival
from kvasir.traces.source import broken

Tokens = Callable[[str], int]  # how many a text has


class _Turn(msgspec.Struct):
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] = []


def sharegpt(
    data: bytes, name: str, tokens: Tokens | None, rate: float, seed: int
) -> Iterator[Arrival]:
    """Poisson arrivals at `rate` requests per second, in the order of the file.

    Raises TraceError without `tokens`, or for a document that is not a list of conversations.
    """
    if tokens is None:
        raise TraceError(
            "ShareGPT holds text: lengths depend on a tokenizer, and times on a rate",
            where=name,
            next_step=f"kvasir trace convert {name} OUT.jsonl --tokenizer bytes|FOLDER --rate 4",
        )
    try:
        found = msgspec.json.decode(data, type=list[_Conversation])
    except msgspec.ValidationError as error:
        raise broken(f"not a list of conversations: {error}", name) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise broken(f"not JSON: {error}", name) from None
    times = poisson(rate, seed)
    for one in found:
        if len(one.conversations) >= 2:
            prompt, answer = one.conversations[:2]
            yield Arrival(next(times), tokens(prompt.value), tokens(answer.value))
