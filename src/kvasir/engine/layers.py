"""Decoder layers of dense families, with fewer and larger operations; whole, or a rank's part.
Knows weights and one packed batch; must not know models' folders, requests or processes.

A part has some of the heads and of the MLP's inner columns (Megatron-LM, arXiv 1909.08053, section
3). Two sums over all ranks, after attention and after the MLP, give what a whole layer does:

    qkv, gate and up    outputs cut, [out / size, in]       each rank: its heads, its columns
    output and down     inputs cut, [out, in / size]        their outputs are summed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.nn.functional import rms_norm, silu

from kvasir.engine.linear import Kind, Linear, linear_of

if TYPE_CHECKING:
    from kvasir.engine.attention import Paged
    from kvasir.engine.lora import AdapterBatch

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [tokens, 1, dim] each


# --- weights --------------------------------------------------------------------------------------


class Matrix(msgspec.Struct, frozen=True):
    """`weight` [out, in] and `bias` [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, module: Any) -> Matrix:
        """A transformers linear layer."""
        return cls(module.weight.detach(), None if module.bias is None else module.bias.detach())

    def outputs(self, rank: int, size: int) -> Matrix:
        """The rank's part of the outputs; parts differ by one where they do not divide."""
        bias = None if self.bias is None else self.bias.tensor_split(size)[rank]
        return Matrix(self.weight.tensor_split(size)[rank], bias)

    def inputs(self, rank: int, size: int) -> Matrix:
        """The rank's part of the inputs. One rank adds the bias, for all."""
        weight = self.weight.tensor_split(size, dim=1)[rank].contiguous()
        return Matrix(weight, self.bias if rank == 0 else None)


class LayerWeights(msgspec.Struct, frozen=True, tag=True):
    """One layer: `heads` heads of queries and `kv_heads` of keys and values, of `dim` each."""

    heads: int
    kv_heads: int
    dim: int
    eps: float
    scale: float
    window: int | None
    before_attention: torch.Tensor
    query: Matrix
    key: Matrix
    value: Matrix
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Matrix
    before_mlp: torch.Tensor
    gate: Matrix
    up: Matrix
    down: Matrix

    @classmethod
    def of(cls, module: Any, window: int | None) -> LayerWeights:
        """A transformers layer's own tensors."""
        attention, mlp, dim = module.self_attn, module.mlp, int(module.self_attn.head_dim)
        normed = hasattr(attention, "q_norm")
        return cls(
            heads=attention.q_proj.out_features // dim,
            kv_heads=attention.k_proj.out_features // dim,
            dim=dim,
            eps=module.input_layernorm.variance_epsilon,
            scale=attention.scaling,
            window=window,
            before_attention=module.input_layernorm.weight.detach(),
            query=Matrix.of(attention.q_proj),
            key=Matrix.of(attention.k_proj),
            value=Matrix.of(attention.v_proj),
            query_norm=attention.q_norm.weight.detach() if normed else None,
            key_norm=attention.k_norm.weight.detach() if normed else None,
            output=Matrix.of(attention.o_proj),
            before_mlp=module.post_attention_layernorm.weight.detach(),
            gate=Matrix.of(mlp.gate_proj),
            up=Matrix.of(mlp.up_proj),
            down=Matrix.of(mlp.down_proj),
        )

    def part(self, rank: int, size: int) -> LayerWeights:
        """What one of `size` ranks holds; `size` divides `kv_heads`."""
        assert self.kv_heads % size == 0, f"{self.kv_heads} KV heads for {size} ranks"
        return msgspec.structs.replace(
            self,
            heads=self.heads // size,
            kv_heads=self.kv_heads // size,
            query=self.query.outputs(rank, size),
            key=self.key.outputs(rank, size),
            value=self.value.outputs(rank, size),
            output=self.output.inputs(rank, size),
            gate=self.gate.outputs(rank, size),
            up=self.up.outputs(rank, size),
            down=self.down.inputs(rank, size),
        )


# --- compute --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm over the last dimension."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Root mean square norm of each head of Q and K (Qwen3). `weight`: [heads + kv_heads, dim]."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape[-1:], None, self.eps).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. `qkv`: Q, K and V of all heads in a row; `gate_up`: gate, then up."""

    before_attention: Norm
    qkv: Linear
    qk_norm: HeadNorm | None
    output: Linear
    before_mlp: Norm
    gate_up: Linear
    down: Linear
    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None

    @classmethod
    def of(cls, weights: LayerWeights, kind: Kind = "plain") -> Layer:
        """Ready to compute; `kind` as in engine.linear."""
        return cls(
            before_attention=Norm(weights.before_attention, weights.eps),
            qkv=linear_from(kind, weights.query, weights.key, weights.value),
            qk_norm=_head_norm(weights),
            output=linear_from(kind, weights.output),
            before_mlp=Norm(weights.before_mlp, weights.eps),
            gate_up=linear_from(kind, weights.gate, weights.up),
            down=linear_from(kind, weights.down),
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            dim=weights.dim,
            scale=weights.scale,
            window=weights.window,
        )


class Stack:
    """Layers, one after the other. `summed(x)`: the sum of every rank's `x`, where `layers` are
    parts; it may write over `x`."""

    def __init__(
        self, layers: Sequence[Layer], summed: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self._layers, self._summed = layers, summed

    def __call__(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        paged: Paged,
        adapters: AdapterBatch | None = None,
    ) -> torch.Tensor:
        """What comes out of the last layer for `x`, [tokens, hidden]."""
        for index, layer in enumerate(self._layers):
            x = self._attention(index, layer, x, rotation, paged, adapters)
            x = self._mlp(index, layer, x, adapters)
        return x

    def _attention(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        rotation: Rotation,
        paged: Paged,
        adapters: AdapterBatch | None,
    ) -> torch.Tensor:
        heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.dim
        h = layer.before_attention(x)
        qkv = layer.qkv(h)
        if adapters is not None:
            q, k, v = qkv.split((heads * dim, kv_heads * dim, kv_heads * dim), dim=1)
            for name, out in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
                adapters.add(index, name, h, out)
        qk, value = qkv.view(-1, heads + 2 * kv_heads, dim).split((heads + kv_heads, kv_heads), 1)
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        cos, sin = rotation
        query, key = torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin).split((heads, kv_heads), 1)
        mixed = paged.attend(index, query, key, value, layer.scale, layer.window).flatten(1)
        out = layer.output(mixed)
        if adapters is not None:
            adapters.add(index, "o_proj", mixed, out)
        return self._whole(out).add_(x)

    def _mlp(
        self, index: int, layer: Layer, x: torch.Tensor, adapters: AdapterBatch | None
    ) -> torch.Tensor:
        h = layer.before_mlp(x)
        gate, up = (both := layer.gate_up(h)).split(both.shape[1] // 2, dim=1)
        if adapters is not None:
            adapters.add(index, "gate_proj", h, gate)
            adapters.add(index, "up_proj", h, up)
        inner = silu(gate).mul_(up)
        out = layer.down(inner)
        if adapters is not None:
            adapters.add(index, "down_proj", inner, out)
        return self._whole(out).add_(x)

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        return part if self._summed is None else self._summed(part)


def linear_from(kind: Kind, *parts: Matrix) -> Linear:
    """One layer with the outputs of all `parts` side by side."""
    biases = [part.bias for part in parts if part.bias is not None]
    weight = _joined([part.weight for part in parts])
    return linear_of(weight, _joined(biases) if biases else None, kind)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _head_norm(weights: LayerWeights) -> HeadNorm | None:
    if weights.query_norm is None or weights.key_norm is None:
        return None
    rows = [weights.query_norm] * weights.heads + [weights.key_norm] * weights.kv_heads
    return HeadNorm(torch.stack(rows), weights.eps)
