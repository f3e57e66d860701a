"""A decoder's layers on a device: engine.layers.Stack with what stands between the matrix products
in one kernel each, 10 a layer in place of 17 or 19. At small batches a kernel's start is what it
costs. Knows layers and one packed batch; must not know requests, or how logits are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvasir.engine.attention import Paged
from kvasir.engine.cuda.batch import DeviceBatch
from kvasir.engine.layers import Layer, Norm, Rotation, Stack
from kvasir.engine.lora import AdapterBatch

GATED_TILE = 1024


class DeviceStack:
    """Where Triton's kernels run (engine.cuda.decode.triton_runs). A batch with adapters, or of
    another kind than DeviceBatch, goes the plain way."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers, self._plain = layers, Stack(layers)

    def __call__(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        paged: Paged,
        adapters: AdapterBatch | None = None,
    ) -> torch.Tensor:
        """As engine.layers.Stack; `x` may be written over."""
        if adapters is not None or not isinstance(paged, DeviceBatch):
            return self._plain(x, rotation, paged, adapters)
        more: torch.Tensor | None = None  # what is yet to be added to x
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(add_norm(x, more, layer.before_attention))
            more = layer.output(_mixed(index, layer, qkv, rotation, paged))
            both = layer.gate_up(add_norm(x, more, layer.before_mlp))
            more = layer.down(gated(both))
        return x if more is None else x.add_(more)


def _mixed(
    index: int, layer: Layer, qkv: torch.Tensor, rotation: Rotation, paged: DeviceBatch
) -> torch.Tensor:
    """[tokens, heads * head_dim], after KV was written."""
    heads, kv_heads = layer.heads, layer.kv_heads
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, layer.dim)
    rotate_and_write(qkv, rotation, layer, *paged.places(index))
    query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
    return paged.seen(index, query, key, value, layer.scale, layer.window).flatten(1)


def add_norm(x: torch.Tensor, more: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """The norm of x + more, both [rows, size]; `x` becomes that sum."""
    from kvasir.engine.cuda import kernels

    rows, size = x.shape
    out = torch.empty_like(x)
    pad = 1 << (size - 1).bit_length()
    kernels.add_norm[(rows,)](
        x, x if more is None else more, norm.weight, out, norm.eps, SIZE=size, PAD=pad,
        ADDS=more is not None, num_warps=8 if pad >= 4096 else 4,
    )  # fmt: skip
    return out


def rotate_and_write(
    qkv: torch.Tensor, rotation: Rotation, layer: Layer, slots: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor,
) -> None:  # fmt: skip
    """Norms (Qwen3) and rotates queries and keys in `qkv` [tokens, heads + 2 * kv_heads, head_dim]
    where they stand, and writes keys and values to `slots` of the layer's caches."""
    from kvasir.engine.cuda import kernels

    cos, sin = rotation  # halves of one table, [tokens, 1, head_dim] each
    rotated, half, norm = layer.heads + layer.kv_heads, layer.dim // 2, layer.qk_norm
    assert cos.stride(0) == sin.stride(0) and qkv.is_contiguous() and key.is_contiguous()
    kernels.rotate_and_write[(len(qkv), rotated + layer.kv_heads)](
        qkv, cos, sin, cos if norm is None else norm.weight, slots, key, value,
        0.0 if norm is None else norm.eps, cos.stride(0),
        ROTATED=rotated, HEADS=layer.heads, KV_HEADS=layer.kv_heads, HALF=half,
        HALF_PAD=1 << (half - 1).bit_length(), NORMED=norm is not None, num_warps=1,
    )  # fmt: skip


def gated(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [rows, size], of gate and up side by side."""
    from kvasir.engine.cuda import kernels

    rows, size = len(both), both.shape[1] // 2
    out = both.new_empty(rows, size)
    kernels.gated[(rows, -(-size // GATED_TILE))](both, out, SIZE=size, TILE=GATED_TILE)
    return out
