"""What each way to code KV loses, how many bytes it leaves, and how fast one core is at it.

Measured figures by name, for what has not been measured where it runs. Knows no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}  # of KV that has coded forms


class Known(NamedTuple):
    """Of a way, on bfloat16 KV of models/demo (bench/codec.py --quality): `loss`, the share of
    tokens predicted over it that are others than over KV as it is; `ratio`, bytes for a byte.

    Rates in bytes of KV a second of one core with numba (bench/codec.py, docs/measured.md).
    """

    loss: float
    ratio: float
    encode_bytes_s: float
    decode_bytes_s: float


_RELEASED: Final = (400e6, 520e6)
_DELTA: Final = (360e6, 465e6)
_GROUPS: Final = (250e6, 1080e6)

KNOWN: Final[Mapping[str, Known]] = {
    "lossless": Known(0.0, 0.644, 493e6, 1267e6),
    "int8": Known(0.0023, 0.531, *_GROUPS),
    "int4": Known(0.0316, 0.281, *_GROUPS),
    "cachegen-1": Known(0.0133, 0.311, *_RELEASED),
    "cachegen-2": Known(0.0163, 0.277, *_RELEASED),
    "cachegen-3": Known(0.0238, 0.243, *_RELEASED),
    "cachegen-4": Known(0.04, 0.237, *_RELEASED),
    "cachegen-5": Known(0.0443, 0.198, *_RELEASED),
    "cachegen_delta-1": Known(0.0234, 0.301, *_DELTA),
    "cachegen_delta-2": Known(0.0563, 0.244, *_DELTA),
    "cachegen_delta-3": Known(0.084, 0.212, *_DELTA),
    "cachegen_delta-4": Known(0.1097, 0.19, *_DELTA),
    "cachegen_delta-5": Known(0.1885, 0.159, *_DELTA),
}


def ratio_of(name: str, dtype: str) -> float:
    """Bytes for a byte of KV of `dtype`. A lossy form takes as many bits for a value, whatever it
    was kept in; the lossless one saves as many, since what it squeezes is the exponent. Raises
    KeyError for a way or dtype that there is not."""
    known, share = KNOWN[name].ratio, DTYPE_BYTES["bfloat16"] / DTYPE_BYTES[dtype]
    return 1 - (1 - known) * share if name == "lossless" else known * share
