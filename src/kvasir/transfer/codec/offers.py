"""The codec's ways as offers for `policy.codec`: what they lose, and how fast this machine is.

Knows the codec and a clock that is given; decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from kvasir.core.codec import RAW, Offer
from kvasir.cost.codec import KNOWN, ratio_of
from kvasir.transfer.codec.container import Chunk, Coding, decode, encode
from kvasir.transfer.codec.levels import LEVELS
from kvasir.transfer.codec.rans import Kernels

CODINGS: Final = (
    Coding("lossless"), Coding("int8"), Coding("int4"),
    *(Coding("cachegen", level) for level in LEVELS),
    *(Coding("cachegen_delta", level) for level in LEVELS),
)  # fmt: skip


class Rate(NamedTuple):
    """`ratio`: bytes coded for a byte of KV; rates in bytes of KV a second of one core."""

    coding: Coding
    ratio: float
    encode_bytes_s: float
    decode_bytes_s: float


def measure(
    chunk: Chunk, codings: Iterable[Coding], kernels: Kernels, clock: Callable[[], float],
    repeats: int = 3,
) -> Iterator[Rate]:  # fmt: skip
    """The best of `repeats`, by `clock` in seconds, after one that warms up. Raises as `encode`."""
    for coding in codings:
        data = encode(chunk, coding, kernels)
        decode(data, kernels)
        encode_s = decode_s = float("inf")
        for _ in range(repeats):
            started = clock()
            encode(chunk, coding, kernels)
            between = clock()
            decode(data, kernels)
            encode_s, decode_s = min(encode_s, between - started), min(decode_s, clock() - between)
        yield Rate(coding, len(data) / chunk.bytes, chunk.bytes / encode_s, chunk.bytes / decode_s)


def offers_of(
    rates: Iterable[Rate], cores: int = 1, dtype: str = "bfloat16"
) -> tuple[Offer, ...]:
    """What the policy chooses from, raw first; `cores` work on a transfer on either side. Sizes are
    those known of a model's KV, here of `dtype`, not of what was coded to measure rates."""
    coded = (
        Offer(name, KNOWN[name].loss, ratio_of(name, dtype), cores * rate.encode_bytes_s,
              cores * rate.decode_bytes_s)
        for rate in rates if (name := str(rate.coding))
    )  # fmt: skip
    return (Offer(RAW, 0.0), *coded)
