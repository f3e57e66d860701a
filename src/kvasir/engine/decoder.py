"""The forward pass: tokens and positions in, hidden states and logits out. Knows layers; must not
know requests, blocks or sampling.

`TransformersDecoder` runs transformers' own modules, of any family. `FusedDecoder` computes the
same for plain dense families with fewer and larger operations: packed rows without a batch
dimension, one matrix for Q, K and V and one for gate and up, norm and rotation of Q and K in one
go, rotations looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch.nn.functional import embedding, rms_norm, silu

from kvasir.core.errors import ModelError
from kvasir.engine.attention import PagedBatch
from kvasir.engine.linear import Kind, Linear, linear_of
from kvasir.engine.loader import Loaded
from kvasir.engine.lora import AdapterBatch, LinearHooks

FUSED: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_ROWS: Final = 4096  # positions looked up at first; doubled when a sequence goes beyond


class Decoder(Protocol):
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        paged: PagedBatch,
        adapters: AdapterBatch | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm, [tokens, hidden], of int64 `tokens` at `positions`.

        KV goes into `paged`, whose spans say which tokens belong together.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab] of `hidden`, [rows, hidden]."""


def decoder_of(loaded: Loaded, fused: bool = True) -> Decoder:
    """The fused decoder for models that it covers, unless told otherwise; else transformers'.

    A fused decoder takes the weights out of `loaded.model`, which is of no use afterwards. Raises
    ModelError when the weights are to be rounded and the family has no fused decoder.
    """
    if fused and fusible(loaded.model):
        return FusedDecoder(loaded)
    if loaded.weights != "plain":
        raise ModelError(
            f"weights {loaded.weights} are not supported for {type(loaded.model).__name__}",
            nearest=", ".join(FUSED),
        )
    return TransformersDecoder(loaded.model)


def fusible(model: Any) -> bool:
    """A dense family whose rotation covers the whole head and depends on the position alone."""
    if type(model).__name__ not in FUSED or model.config.hidden_act not in ("silu", "swish"):
        return False
    head_dim = model.model.layers[0].self_attn.head_dim
    return 2 * len(model.model.rotary_emb.inv_freq) == int(head_dim)


class TransformersDecoder:
    """transformers' modules; `engine.attention` stands in for theirs."""

    def __init__(self, model: Any) -> None:
        self._body, self._head = model.model, model.lm_head
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._hooks: LinearHooks | None = None  # from the first batch with an adapter on

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        paged: PagedBatch,
        adapters: AdapterBatch | None = None,
    ) -> torch.Tensor:
        if adapters is not None and self._hooks is None:
            self._hooks = LinearHooks(self._body)
        if self._hooks is not None:
            self._hooks.batch = adapters
        out = self._body(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, paged=paged
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._head(hidden).float()
        return out if self._softcap is None else torch.tanh(out / self._softcap) * self._softcap


# --- fused --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm over the last dimension."""

    weight: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(module.weight.detach(), module.variance_epsilon)

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
    scale: float
    window: int | None


class Rope:
    """Cosines and sines by position, for whole heads: x cos + roll(x) sin.

    Rolling a head by half its width swaps its halves; the sign that one of them then needs
    (RoFormer, arXiv 2104.09864, section 3.4) is in the sines.
    """

    def __init__(self, module: Any, dtype: torch.dtype, rows_max: int) -> None:
        self._module, self._dtype, self._rows_max = module, dtype, rows_max
        self._table = self._make(min(ROPE_ROWS, rows_max))

    def at(self, positions: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two [tokens, 1, dim]; every position is below `end`."""
        if end > len(self._table):
            self._table = self._make(min(max(end, 2 * len(self._table)), self._rows_max))
        cos, sin = self._table.index_select(0, positions).split(1, dim=1)
        return cos, sin

    def _make(self, rows: int) -> torch.Tensor:
        """[rows, 2, dim]"""
        device = self._module.inv_freq.device
        like = torch.empty(1, dtype=self._dtype, device=device)
        cos, sin = self._module(like, torch.arange(rows, device=device)[None])
        half = sin.shape[-1] // 2
        return torch.stack((cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)), 1)


class FusedDecoder:
    """Llama, Qwen2, Qwen3 and Mistral, from the weights of a transformers model.

    `loaded.model` loses its layers one by one, so that no more than one is held twice.
    """

    def __init__(self, loaded: Loaded) -> None:
        model, config = loaded.model, loaded.model.config
        body = model.model
        first = body.layers[0].self_attn
        self._heads, self._dim = config.num_attention_heads, int(first.head_dim)
        self._kv_heads = config.num_key_value_heads
        self._embedding = body.embed_tokens.weight.detach()
        self._rope = Rope(body.rotary_emb, self._embedding.dtype, loaded.context_max)
        self._norm = Norm.of(body.norm)
        kind = loaded.weights
        self._head = _linear(kind, model.lm_head)
        modules, self._layers = list(body.layers), list[Layer]()
        body.layers = torch.nn.ModuleList()
        for spec in loaded.layers:
            self._layers.append(_layer(modules.pop(0), spec.window, kind))

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        paged: PagedBatch,
        adapters: AdapterBatch | None = None,
    ) -> torch.Tensor:
        x = embedding(tokens, self._embedding)
        rotation = self._rope.at(positions, paged.end)
        for index, layer in enumerate(self._layers):
            x = self._attention(index, layer, x, rotation, paged, adapters)
            x = self._mlp(index, layer, x, adapters)
        return self._norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()

    def _attention(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        paged: PagedBatch,
        adapters: AdapterBatch | None,
    ) -> torch.Tensor:
        heads, kv_heads, dim = self._heads, self._kv_heads, self._dim
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
        return out.add_(x)

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
        return out.add_(x)


def _layer(module: Any, window: int | None, kind: Kind) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        before_attention=Norm.of(module.input_layernorm),
        qkv=_linear(kind, attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=_head_norm(attention) if hasattr(attention, "q_norm") else None,
        output=_linear(kind, attention.o_proj),
        before_mlp=Norm.of(module.post_attention_layernorm),
        gate_up=_linear(kind, mlp.gate_proj, mlp.up_proj),
        down=_linear(kind, mlp.down_proj),
        scale=attention.scaling,
        window=window,
    )


def _linear(kind: Kind, *modules: Any) -> Linear:
    """One layer with the outputs of all `modules` side by side."""
    weight = _joined([one.weight for one in modules])
    biases = [one.bias for one in modules if one.bias is not None]
    return linear_of(weight, _joined(biases) if biases else None, kind)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _head_norm(attention: Any) -> HeadNorm:
    q, k = attention.q_norm, attention.k_norm
    heads = attention.q_proj.out_features // attention.head_dim
    kv_heads = attention.k_proj.out_features // attention.head_dim
    rows = [q.weight.detach()] * heads + [k.weight.detach()] * kv_heads
    return HeadNorm(torch.stack(rows), q.variance_epsilon)
