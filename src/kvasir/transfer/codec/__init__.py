"""KV for slow links: fewer bytes for some CPU time and, at most levels, some precision.

Knows chunks of KV and streams of bytes; whether to use one is `policy.codec`'s decision.
"""

from __future__ import annotations

from kvasir.transfer.codec.container import (
    FORMS,
    LEVELLED,
    Chunk,
    Coding,
    Form,
    Head,
    Tensor,
    decode,
    encode,
    read_head,
)
from kvasir.transfer.codec.rans import NUMPY, Kernels

__all__ = [
    "FORMS", "LEVELLED", "NUMPY", "Chunk", "Coding", "Form", "Head", "Kernels", "Tensor", "decode",
    "encode", "fastest_kernels", "read_head",
]  # fmt: skip


def fastest_kernels() -> Kernels:
    """Compiled by numba where it is installed (extra `codec`), else numpy's. The first import takes
    seconds: numba compiles, and keeps what it compiled beside this package where it may write."""
    try:
        from kvasir.transfer.codec.kernels import NUMBA
    except ImportError:
        return NUMPY
    return NUMBA
