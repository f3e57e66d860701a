"""Forms that KV may take on its way: what a worker reckons with, and what a world tells it
of KV that left or came. Knows bytes and seconds; which form is used is `policy.codec`'s matter."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from kvasir.core.ids import RequestId
from kvasir.core.message import Message
from kvasir.core.units import MIB

RAW: Final = "raw"
PIECE_BYTES: Final = 4 * MIB  # of KV that is coded together, about: the link waits for the first


class Offer(msgspec.Struct, frozen=True, gc=False):
    """A way to send KV. Rates in bytes of KV a second, infinite for none needed.

    `loss`: a measure of what it changes, 0 for nothing; `ratio`: bytes sent for a byte of KV.
    """

    name: str
    loss: float
    ratio: float = 1.0
    encode_bytes_s: float = math.inf
    decode_bytes_s: float = math.inf


class CodecRules(msgspec.Struct, frozen=True):
    """What a worker chooses from, raw aside, and by. `bytes_per_s_max`: it sends no faster to
    anybody. `ttft_s`: the budget of a request whose first token waits for its KV."""

    offers: tuple[Offer, ...]
    bytes_per_s_max: float | None = None
    ttft_s: float | None = None


def pieces_of(nbytes: int) -> int:
    """In how many pieces KV is coded, one beside the way of another."""
    return max(1, -(-nbytes // PIECE_BYTES))


class Coded(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The forms in which KV came (`lossless`, `cachegen-3+raw`), and its bytes on the wire."""

    forms: str
    wire_bytes: int


class Sent(Message, frozen=True):
    """A `Send` that names a codec has left, `wire_bytes` of it; only that it came is still unknown.

    Since the link to the peer said so last, it carried `link_bytes` in `link_s` seconds, in which
    nothing but itself held it back.
    """

    request_id: RequestId
    attempt: int
    first_block: int
    wire_bytes: int
    link_bytes: int
    link_s: float
