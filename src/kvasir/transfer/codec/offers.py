"""The codec's ways as offers for `policy.codec`: what they lose, and how fast this machine is.

Knows the codec and a clock that is given; decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from kvasir.policy.codec import RAW, Offer
from kvasir.transfer.codec.container import Chunk, Coding, decode, encode
from kvasir.transfer.codec.levels import LEVELS
from kvasir.transfer.codec.rans import Kernels

CODINGS: Final = (
    Coding("lossless"), Coding("int8"), Coding("int4"),
    *(Coding("cachegen", level) for level in LEVELS),
    *(Coding("cachegen_delta", level) for level in LEVELS),
)  # fmt: skip


class Known(NamedTuple):
    """Of a way, on the KV of models/demo (bench/codec.py --quality): `loss`, the share of tokens
    predicted over it that are others than over bfloat16 KV; `ratio`, bytes for a byte of it."""

    loss: float
    ratio: float


KNOWN: Final[Mapping[str, Known]] = {
    "lossless": Known(0.0, 0.644),
    "int8": Known(0.0023, 0.531),
    "int4": Known(0.0316, 0.281),
    "cachegen-1": Known(0.0133, 0.311),
    "cachegen-2": Known(0.0163, 0.277),
    "cachegen-3": Known(0.0238, 0.243),
    "cachegen-4": Known(0.04, 0.237),
    "cachegen-5": Known(0.0443, 0.198),
    "cachegen_delta-1": Known(0.0234, 0.301),
    "cachegen_delta-2": Known(0.0563, 0.244),
    "cachegen_delta-3": Known(0.084, 0.212),
    "cachegen_delta-4": Known(0.1097, 0.19),
    "cachegen_delta-5": Known(0.1885, 0.159),
}


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


def offers_of(rates: Iterable[Rate], cores: int = 1) -> tuple[Offer, ...]:
    """What the policy chooses from, raw first; `cores` work on a transfer on either side. Sizes are
    those known of a model's KV, not of what was coded to measure rates."""
    coded = (
        Offer(name, *KNOWN[name], cores * rate.encode_bytes_s, cores * rate.decode_bytes_s)
        for rate in rates if (name := str(rate.coding))
    )  # fmt: skip
    return (Offer(RAW, 0.0), *coded)
