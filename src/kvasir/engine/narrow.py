"""KV of one byte a value: a head's vector of one token, then its own scale, in the block itself.

    | v v v ... v (head_dim bytes) | scale (2 bytes, bfloat16) |      one head of one token

So a block that is shipped or stored needs nothing beside it. int8 is symmetric, fp8 is e4m3, both
scaled to the vector's largest value (per token and head, finer than the tensor scales of vLLM's
`kv_cache_dtype`, at 2 bytes a vector). Knows rows of values; no blocks and no layers.
"""

from __future__ import annotations

from typing import Final, Literal

import torch

Narrow = Literal["int8", "fp8"]
SCALE_BYTES: Final = 2
TYPES: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
MOST: Final = {"int8": 127.0, "fp8": 448.0}


def pack(values: torch.Tensor, kind: Narrow) -> torch.Tensor:
    """uint8 [..., dim + SCALE_BYTES] of `values`, [..., dim] in a float type."""
    most = MOST[kind]
    scale = (values.abs().amax(dim=-1, keepdim=True).float() / most).clamp_(min=1e-12).bfloat16()
    scaled = (values.float() / scale.float()).clamp_(-most, most)  # its scale was rounded
    if kind == "int8":
        scaled = scaled.round_()
    parts = (scaled.to(TYPES[kind]).view(torch.uint8), scale.view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack(packed: torch.Tensor, kind: Narrow, dtype: torch.dtype) -> torch.Tensor:
    """[..., dim] in `dtype`; contiguous."""
    dim = packed.shape[-1] - SCALE_BYTES
    scale = packed[..., dim:].contiguous().view(torch.bfloat16)
    return packed[..., :dim].view(TYPES[kind]).to(dtype).mul_(scale)
