"""A node's journal: its header, then each input in the order handled with its decisions' digest.

    {"kvasir": 1, "version": ..., "node": ..., "kind": ..., "config": {...}, "state": digest}
    {"seq": 1, "now": 0.0, "event": {"type": "Start"}, "effects": ["Tell"], "digest": "..."}

Events hold lengths, keys and end reasons, never text or tokens. One JSON object a line, so that a
person can read it and a tool can cut it. Knows no node and no world; writes to a stream it is
given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from kvasir import __version__
from kvasir.core.effects import AnyEffect, Note
from kvasir.core.errors import ConfigError
from kvasir.core.messages import AnyMessage

JOURNAL_VERSION = 1


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class Listener(Protocol):
    """Whoever is told what one node handled and decided, in order: a journal, a timeline."""

    def add(self, now: float, event: AnyMessage, effects: Sequence[AnyEffect]) -> None: ...


class Header(msgspec.Struct, frozen=True):
    """`kind` is conductor, worker or gateway; `config` is all that the node was built from."""

    kvasir: int
    version: str
    node: str
    kind: str
    config: dict[str, Any]
    seed: int = 0
    state: str = ""


class Entry(msgspec.Struct, frozen=True):
    seq: int
    now: float
    event: AnyMessage
    effects: tuple[str, ...]
    digest: str


_encoder = msgspec.json.Encoder()
_binary = msgspec.msgpack.Encoder()
_header = msgspec.json.Decoder(Header)
_entry = msgspec.json.Decoder(Entry)


def digest(effects: Sequence[AnyEffect]) -> str:
    """16 hex digits over all effects; equal iff the decisions are equal, byte for byte."""
    return hashlib.blake2b(_binary.encode(effects), digest_size=8).hexdigest()


def kinds(effects: Iterable[AnyEffect]) -> tuple[str, ...]:
    """What was decided, in words: `Tell:Dispatch`, `Step`, ..."""
    names = []
    for effect in effects:
        name = type(effect).__name__
        inner = getattr(effect, "message", None) or getattr(effect, "event", None)
        names.append(f"{name}:{type(inner).__name__}" if inner is not None else name)
    return tuple(names)


class Journal:
    """Appends to a stream. Flushes nothing by itself; the owner closes."""

    def __init__(
        self, sink: Sink, node: str, kind: str, config: dict[str, Any], seed: int = 0
    ) -> None:
        self._sink = sink
        self._seq = 0
        state = hashlib.blake2b(_encoder.encode(config), digest_size=8).hexdigest()
        header = Header(JOURNAL_VERSION, __version__, node, kind, config, seed, state)
        sink.write(_encoder.encode(header) + b"\n")

    def add(self, now: float, event: AnyMessage, effects: Sequence[AnyEffect]) -> None:
        self._seq += 1
        entry = Entry(self._seq, now, event, kinds(effects), digest(effects))
        self._sink.write(_encoder.encode(entry) + b"\n")


class Listeners:
    """Several as one."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._all = tuple(listeners)

    def add(self, now: float, event: AnyMessage, effects: Sequence[AnyEffect]) -> None:
        for one in self._all:
            one.add(now, event, effects)


def read(lines: Iterable[bytes], where: str) -> tuple[Header, Iterator[Entry]]:
    """The header and the entries, lazily. Raises ConfigError with the line that is broken.

    A torn last line (the process was killed) ends the journal without an error.
    """
    rows = iter(lines)
    try:
        header = _header.decode(next(rows, b""))
    except msgspec.DecodeError as error:
        raise ConfigError(f"not a journal: {error}", where=f"{where}:1") from None
    if header.kvasir != JOURNAL_VERSION:
        raise ConfigError(
            f"journal format {header.kvasir}, this version reads {JOURNAL_VERSION}", where=where
        )
    return header, _entries(rows, where)


def _entries(rows: Iterator[bytes], where: str) -> Iterator[Entry]:
    for number, row in enumerate(rows, start=2):
        try:
            yield _entry.decode(row)
        except msgspec.DecodeError as error:
            if not row.endswith(b"\n"):
                return
            raise ConfigError(f"broken journal line: {error}", where=f"{where}:{number}") from None


def decisions(effects: Sequence[AnyEffect]) -> list[AnyEffect]:
    """Effects without notes: what a reader wants to see of a divergence."""
    return [e for e in effects if not isinstance(e, Note)]
