"""Several requests' pieces as one stream, each tagged with its choice. Knows no HTTP.

    Pieces 0 --.
    Pieces 1 ---+--> Tagged(index, piece) in order of arrival
    Pieces 2 --'
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Final

import msgspec

from kvasir.gateway.port import EndPiece, FailPiece, Piece, Pieces

WAITING_MAX: Final = 256  # pieces; a slow reader stops the sources, not the memory


class Tagged(msgspec.Struct, frozen=True):
    index: int
    piece: Piece


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
