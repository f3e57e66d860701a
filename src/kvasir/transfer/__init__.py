"""KV transfer between workers: `open_media` by kind of transport, `make_sender`, `make_receiver`.

The contract is in base.py. Importing this package needs no numpy; making an end of a transfer does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvasir.core.errors import ConfigError, UnsupportedEffect, nearest
from kvasir.transfer.base import (
    WHOLE,
    Key,
    Kind,
    KvForm,
    OnOver,
    OnReceived,
    OnSent,
    Receiver,
    ReceiveResult,
    Sender,
    Shard,
    Timeline,
    Trailer,
)

if TYPE_CHECKING:
    from kvasir.transfer.arena import Arena
    from kvasir.transfer.base import Planes
    from kvasir.transfer.medium import Medium

KINDS: tuple[Kind, ...] = ("shm", "nixl", "mooncake", "tcp")  # in order of preference
PLAIN: tuple[Kind, ...] = ("shm", "tcp")  # need nothing installed
ANY_PORT: Final = "127.0.0.1:0"

__all__ = [
    "ANY_PORT", "KINDS", "PLAIN", "Key", "Kind", "KvForm", "OnOver", "OnReceived", "OnSent",
    "ReceiveResult", "Receiver", "Sender", "Shard", "Timeline", "Trailer", "able", "make_receiver",
    "make_sender", "open_media",
]  # fmt: skip


def able() -> list[Kind]:
    """The kinds that work in this process, as far as can be told without trying."""
    parts = {"nixl": "nixl_cu12", "mooncake": "mooncake"}
    found: list[Kind] = []
    for kind in KINDS:
        missing = kind in parts and importlib.util.find_spec(parts[kind]) is None
        if not missing and (kind != "shm" or sys.platform == "linux"):
            found.append(kind)
    return found


def open_media(
    kind: str,
    planes: Planes,
    *,
    run_dir: str = "",
    bind: str = ANY_PORT,
    arena: Arena | None = None,
) -> list[Medium]:
    """The ways in and out of one process: of one kind, or with `auto` of all that work here.

    `run_dir` must exist and is for shm, `bind` (`host:port`) for the others. `arena`: where the
    planes stand, so that shm needs one copy only. Raises ConfigError for an unknown kind or one
    that is not installed, UnsupportedEffect for shm where there is none.
    """
    if kind != "auto":
        return [_medium(kind, planes, run_dir, bind, arena)]
    found = []
    for one in able():
        try:
            found.append(_medium(one, planes, run_dir, bind, arena))
        except ConfigError:
            if one in PLAIN:
                raise
    return found


def make_sender(
    media: Sequence[Medium],
    planes: Planes,
    *,
    on_over: OnOver,
    bytes_per_s_max: float | None = None,
    frame_bytes_max: int | None = None,
    shard: Shard = WHOLE,
    form: KvForm | None = None,
    on_sent: OnSent | None = None,
    streams: int = 1,
) -> Sender:
    """The prefill side. `bytes_per_s_max` caps all its transfers together; `frame_bytes_max` is for
    frames whose bytes travel on a stream. With `form` it can code KV. `streams`: so many side by
    side, at both ends, of one medium and without `form`. Raises ConfigError for planes that do not
    fit, or KV that has no coded form."""
    from kvasir.transfer.sender import FRAME_BYTES_MAX, StreamSender

    def make(planes: Planes, on_over: OnOver) -> StreamSender:
        return StreamSender(
            planes, media, on_over=on_over,
            bytes_per_s_max=bytes_per_s_max / streams if bytes_per_s_max else bytes_per_s_max,
            frame_bytes_max=FRAME_BYTES_MAX if frame_bytes_max is None else frame_bytes_max,
            shard=shard, form=form, on_sent=on_sent,
        )  # fmt: skip

    if streams == 1:
        return make(planes, on_over)
    from kvasir.transfer.stripes import StripedSender

    return StripedSender(planes, streams, make, on_over)


def make_receiver(
    media: Sequence[Medium], planes: Planes, *, on_received: OnReceived, shard: Shard = WHOLE,
    form: KvForm | None = None, streams: int = 1,
) -> Receiver:  # fmt: skip
    """The decode side. Without `form` it takes nothing that is coded. `streams` as the senders'.
    Raises ConfigError for planes that do not fit, KV that has no coded form, or if it cannot listen
    (shm: OSError)."""
    from kvasir.transfer.receiver import StreamReceiver

    def make(planes: Planes, on_received: OnReceived) -> StreamReceiver:
        return StreamReceiver(planes, media, on_received=on_received, shard=shard, form=form)

    if streams == 1:
        return make(planes, on_received)
    from kvasir.transfer.stripes import StripedReceiver

    return StripedReceiver(planes, streams, make, on_received)


def _medium(
    kind: str, planes: Planes, run_dir: str, bind: str, arena: Arena | None
) -> Medium:
    if kind not in KINDS:
        raise ConfigError(f"unknown transport {kind!r}", nearest=nearest(kind, [*KINDS, "auto"]))
    if kind == "tcp":
        from kvasir.transfer.tcp import TcpMedium

        return TcpMedium(bind)
    if kind == "shm":
        if sys.platform != "linux":
            raise UnsupportedEffect("transport shm needs Linux", next_step="use transport tcp")
        from kvasir.transfer.shm import ShmMedium

        return ShmMedium(run_dir, arena)
    from kvasir.transfer.onesided import OneSidedMedium

    flat = [plane for layer in planes for plane in layer]
    if kind == "nixl":
        from kvasir.transfer.nixl import NixlMover

        return OneSidedMedium(NixlMover(), flat, bind)
    from kvasir.transfer.mooncake import MooncakeMover

    return OneSidedMedium(MooncakeMover(bind.rpartition(":")[0].strip("[]")), flat, bind)
