"""Reading a request's body within its limits. Knows ASGI messages; nothing of what they say."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.types import Receive

from kvasir.core.errors import TooLarge
from kvasir.core.units import show_bytes
from kvasir.gateway.errors import Refused, of_status

BODY_WAIT_S: Final = 60.0
DRAIN_FACTOR: Final = 8  # of a body over the limit, so much is read so that the answer gets through


class ClientGone(Exception):
    """The client hung up before its body was complete; there is nobody to answer."""


async def read_body(receive: Receive, declared: int | None, limit: int) -> bytes:
    """The whole body. Raises TooLarge, ClientGone, or Refused (408) when it does not arrive.

    A declared length over the limit is refused unread; the server below skips what still comes.
    """
    if declared is not None and declared > limit:
        raise _too_large(limit)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        whole: bytes = message.get("body", b"")
        if len(whole) > limit:
            raise _too_large(limit)
        return whole
    try:
        async with asyncio.timeout(BODY_WAIT_S):
            return await _gather(receive, dict(message), limit)
    except TimeoutError:
        late = f"the body did not arrive within {BODY_WAIT_S:.0f} s"
        raise Refused(of_status(408, late)) from None


async def _gather(receive: Receive, message: dict[str, object], limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] != "http.request":
            raise ClientGone
        part = message.get("body", b"")
        assert isinstance(part, bytes)
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        done = not message.get("more_body", False)
        if size > limit and (done or size > DRAIN_FACTOR * limit):
            raise _too_large(limit)
        if done:
            return b"".join(parts)
        message = dict(await receive())


def drop_line(declared: int | None, limit: int, *, expects: bool) -> bool:
    """Whether the connection is of no more use after a body that was refused.

    True for a body too big (or endless) to skip, and for a client that waits for leave to send it.
    """
    return expects or declared is None or declared > DRAIN_FACTOR * limit


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"the body is over the limit of {show_bytes(limit)}",
        next_step="shorten it, or raise limits.body_bytes_max",
    )
