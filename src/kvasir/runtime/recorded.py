"""A recording's arrivals as a trace that can leave the house: lengths, times, and keyed hashes.

Knows journals. Block keys and sessions leave as HMACs of them, so that whoever has the trace cannot
test a guess at a prompt without the key (the idea of prefix ids in LiteLLM's spend logs). Two
recordings under one key can be told to share prefixes, under two keys they cannot.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvasir.core.errors import ConfigError, TraceError
from kvasir.core.ids import RequestId
from kvasir.core.messages import Ended, Submit
from kvasir.core.request import Request
from kvasir.runtime.replay import header_of, journals
from kvasir.traces.record import Arrival, Trace
from kvasir.world import journal

ID_BITS: Final = 53  # every JSON reader keeps these exactly
KEY_BYTES_MIN: Final = 16


def recorded(directory: Path, key: bytes, limit: int | None = None) -> Trace:
    """Requests that ended with an answer, in order of their submission to the conductor.

    `input_tokens` is the prompt's, `output_tokens` what was answered. Raises ConfigError when the
    folder holds no conductor's journal, TraceError for a key of less than KEY_BYTES_MIN bytes.
    """
    if len(key) < KEY_BYTES_MIN:
        raise TraceError(
            f"a key of {len(key)} bytes can be guessed",
            next_step=f"a key file of {KEY_BYTES_MIN} random bytes or more, or no --key-file",
        )
    path = next((p for p in journals(directory) if header_of(p).kind == "conductor"), None)
    if path is None:
        raise ConfigError("the recording has no conductor's journal", where=str(directory))
    block_size = int(header_of(path).config["block_size"])
    lives = _lives(path)
    served = [life for life in lives if life.answered]
    arrivals = tuple(_arrivals(served[:limit], block_size, key))
    keyed = any(a.hash_ids for a in arrivals)
    left_out = len(lives) - len(served)
    name = directory.resolve().name
    return Trace(
        name=name,
        block_size=block_size if keyed else None,
        arrivals=arrivals,
        notes=(f"{name}: {left_out} requests without an answer are left out",) if left_out else (),
    )


class _Life:
    """One request as the conductor saw it: when it was first submitted, and tokens answered."""

    __slots__ = ("answered", "at", "request")

    def __init__(self, at: float, request: Request) -> None:
        self.at, self.request, self.answered = at, request, 0


def _lives(path: Path) -> list[_Life]:
    lives: dict[RequestId, _Life] = {}
    with path.open("rb") as rows:
        _, entries = journal.read(rows, str(path))
        for entry in entries:
            event = entry.event
            if isinstance(event, Submit):
                lives.setdefault(event.request.id, _Life(entry.now, event.request))
            elif isinstance(event, Ended) and event.request_id in lives:
                lives[event.request_id].answered = event.usage.output_tokens
    return list(lives.values())


def _arrivals(lives: list[_Life], block_size: int, key: bytes) -> Iterator[Arrival]:
    """With ids for all blocks of a prompt or for none: a gateway may send no keys."""
    for life in lives:
        request = life.request
        ids = [_id(key, "block", block) for block in request.keys]
        if request.prompt_tokens % block_size:  # a partial block is nobody else's
            ids.append(_id(key, "partial", request.id.encode()))
        whole = len(ids) == -(-request.prompt_tokens // block_size)
        session = None
        if request.session is not None:
            session = f"{_id(key, 'session', request.session.encode()):014x}"
        yield Arrival(
            life.at - lives[0].at, request.prompt_tokens, life.answered,
            tuple(ids) if whole else (), session,
        )  # fmt: skip


def _id(key: bytes, kind: str, what: bytes) -> int:
    digest = hmac.digest(key, kind.encode() + b":" + what, "sha256")
    return int.from_bytes(digest[:8], "big") >> (64 - ID_BITS)
