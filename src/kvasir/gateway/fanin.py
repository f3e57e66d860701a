"""Several requests' pieces as one stream, each tagged with its choice. Knows no HTTP.

    Pieces 0 --.
    Pieces 1 ---+--> Tagged(index, piece) in order of arrival
    Pieces 2 --'
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

import msgspec

from kvasir.gateway.port import EndPiece, FailPiece, Piece, Pieces, TokensPiece

WAITING_MAX: Final = 256  # pieces; a slow reader stops the sources, not the memory


class Tagged(msgspec.Struct, frozen=True):
    index: int
    piece: Piece


class Leader:
    """The first of several choices of one prompt. Its second token sets `ready`: by then the
    prompt's blocks are cached both where it was prefilled and where it decodes."""

    __slots__ = ("_pieces", "_ready", "_tokens")

    def __init__(self, pieces: Pieces, ready: asyncio.Event) -> None:
        self._pieces, self._ready, self._tokens = pieces, ready, 0

    def __aiter__(self) -> Leader:
        return self

    async def __anext__(self) -> Piece:
        piece = await self._pieces.__anext__()
        self._tokens += len(piece.tokens) if isinstance(piece, TokensPiece) else 0
        if self._tokens > 1 or isinstance(piece, EndPiece | FailPiece):
            self._ready.set()
        return piece

    async def aclose(self) -> None:
        await self._pieces.aclose()


class Follower:
    """Another choice of that prompt, submitted when `ready`, so that it finds the prompt cached."""

    __slots__ = ("_pieces", "_ready", "_submit")

    def __init__(self, submit: Callable[[], Pieces], ready: asyncio.Event) -> None:
        self._submit, self._ready = submit, ready
        self._pieces: Pieces | None = None

    def __aiter__(self) -> Follower:
        return self

    async def __anext__(self) -> Piece:
        if self._pieces is None:
            await self._ready.wait()
            self._pieces = self._submit()
        return await self._pieces.__anext__()

    async def aclose(self) -> None:
        if self._pieces is not None:
            await self._pieces.aclose()


async def merge(sources: Sequence[Pieces]) -> AsyncGenerator[Tagged, None]:
    """Until each source gave its last piece. Closing it closes every source."""
    queue: asyncio.Queue[Tagged] = asyncio.Queue(WAITING_MAX)
    pumps = [asyncio.create_task(_pump(queue, i, source)) for i, source in enumerate(sources)]
    left = len(sources)
    try:
        while left:
            tagged = await queue.get()
            left -= isinstance(tagged.piece, EndPiece | FailPiece)
            yield tagged
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def _pump(queue: asyncio.Queue[Tagged], index: int, source: Pieces) -> None:
    last: Piece | None = None
    try:
        async for last in source:
            await queue.put(Tagged(index, last))
    except Exception as error:
        last = FailPiece(500, f"internal error: {type(error).__name__}")
        await queue.put(Tagged(index, last))
    if not isinstance(last, EndPiece | FailPiece):
        await queue.put(Tagged(index, FailPiece(503, "the answer broke off")))
