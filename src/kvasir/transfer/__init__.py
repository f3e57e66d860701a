"""KV transfer between workers: `make_sender` and `make_receiver`, by transport kind.

The contract is in base.py. Importing this package needs no numpy; making an end of a transfer does.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvasir.core.errors import ConfigError, UnsupportedEffect, nearest
from kvasir.transfer.base import (
    WHOLE,
    Key,
    Kind,
    OnOver,
    OnReceived,
    Receiver,
    ReceiveResult,
    Sender,
    Shard,
    Timeline,
    Trailer,
)

if TYPE_CHECKING:
    from kvasir.transfer.base import Planes
    from kvasir.transfer.medium import Medium

KINDS: tuple[Kind, ...] = ("shm", "tcp")

__all__ = [
    "KINDS", "Key", "Kind", "OnOver", "OnReceived", "ReceiveResult", "Receiver", "Sender", "Shard",
    "Timeline", "Trailer", "make_receiver", "make_sender",
]  # fmt: skip


def make_sender(
    kind: str,
    planes: Planes,
    *,
    on_over: OnOver,
    bytes_per_s_max: float | None = None,
    frame_bytes_max: int | None = None,
    shard: Shard = WHOLE,
) -> Sender:
    """The prefill side. `bytes_per_s_max` caps all its transfers together.

    Raises ConfigError for an unknown kind or planes that do not fit, UnsupportedEffect for shm
    where there is none.
    """
    from kvasir.transfer.sender import FRAME_BYTES_MAX, StreamSender

    return StreamSender(
        planes,
        _medium(kind),
        on_over=on_over,
        bytes_per_s_max=bytes_per_s_max,
        frame_bytes_max=FRAME_BYTES_MAX if frame_bytes_max is None else frame_bytes_max,
        shard=shard,
    )


def make_receiver(
    kind: str,
    planes: Planes,
    *,
    on_received: OnReceived,
    bind: str | None = None,
    shard: Shard = WHOLE,
) -> Receiver:
    """The decode side. `bind`: `host:port` for tcp, by default any port on loopback; for shm the
    run directory, which must exist. Raises as `make_sender`; if it cannot listen, ConfigError for
    tcp and OSError for shm."""
    from kvasir.transfer.receiver import StreamReceiver

    medium = _medium(kind)
    if bind is None and medium.kind == "shm":
        raise ConfigError("transport shm needs a run directory to bind in")
    return StreamReceiver(
        planes, medium, bind=bind or "127.0.0.1:0", on_received=on_received, shard=shard
    )


def _medium(kind: str) -> Medium:
    if kind == "tcp":
        from kvasir.transfer.tcp import TcpMedium

        return TcpMedium()
    if kind != "shm":
        raise ConfigError(f"unknown transport {kind!r}", nearest=nearest(kind, KINDS))
    if sys.platform != "linux":
        raise UnsupportedEffect("transport shm needs Linux", next_step="use transport tcp")
    from kvasir.transfer.shm import ShmMedium

    return ShmMedium()
