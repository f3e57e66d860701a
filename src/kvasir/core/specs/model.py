"""Model shapes: what cost, memory and KV layout need to know of a model. Knows no weights.

`ModelShape.from_hf` is the only place that knows the names in a HuggingFace `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kvasir.core.errors import ModelError, nearest
from kvasir.core.specs.base import Spec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}


class LayerSpec(Spec):
    """The KV that one layer keeps for one token.

    `kind` `kv`: K and V of `kv_heads` x `head_dim` each. `latent`: one vector of `head_dim`
    (DeepSeek MLA: kv_lora_rank + rope dim), `kv_heads` is 1. `scale_bytes`: beside each vector, of
    values that are kept in one byte.
    """

    kind: Literal["kv", "latent"] = "kv"
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    window: int | None = None
    dtype: str = "bfloat16"
    scale_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        planes = 2 if self.kind == "kv" else 1
        vector_bytes = self.head_dim * DTYPE_BYTES[self.dtype] + self.scale_bytes
        return planes * self.kv_heads * vector_bytes


class ModelShape(Spec):
    """Sizes of a decoder. `experts` 0 means dense; `intermediate` is per expert when it is not.

    With a `window`, `global_layers` of the layers see everything all the same.
    """

    architecture: str = "llama"
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    vocab: int = Field(gt=0)
    tied_embeddings: bool = False
    gated_mlp: bool = True
    max_context: int = Field(default=131072, gt=0)
    dtype: str = "bfloat16"
    window: int | None = None
    global_layers: int = 0
    kv_latent: int = 0
    experts: int = 0
    experts_per_token: int = 0
    shared_expert_intermediate: int = 0

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """One spec a layer, first to last."""
        if self.kv_latent:
            one = LayerSpec(kind="latent", kv_heads=1, head_dim=self.kv_latent, dtype=self.dtype)
        else:
            one = LayerSpec(
                kv_heads=self.kv_heads, head_dim=self.head_dim, window=self.window, dtype=self.dtype
            )
        return (one,) * self.layers

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of KV per token over all layers."""
        return sum(layer.token_bytes for layer in self.layer_specs)

    @property
    def attention_weights(self) -> int:
        """Parameters of the attention projections of one layer."""
        q = self.hidden * self.heads * self.head_dim
        kv = 2 * self.hidden * self.kv_heads * self.head_dim
        return 2 * q + kv

    def mlp_weights(self, *, active: bool) -> int:
        """Parameters of one layer's MLP: those one token uses (`active`) or all of them."""
        matrices = 3 if self.gated_mlp else 2
        shared = matrices * self.hidden * self.shared_expert_intermediate
        one = matrices * self.hidden * self.intermediate
        if not self.experts:
            return one
        return one * (self.experts_per_token if active else self.experts) + shared

    def linear_weights(self, *, active: bool) -> int:
        """Parameters of all layers' matrices plus the output head."""
        per_layer = self.attention_weights + self.mlp_weights(active=active)
        return self.layers * per_layer + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        embedding = 0 if self.tied_embeddings else self.vocab * self.hidden
        return self.linear_weights(active=False) + embedding

    @property
    def weight_bytes(self) -> int:
        return self.parameters * DTYPE_BYTES[self.dtype]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
        """Read a HuggingFace `config.json`. Raises ModelError naming what is missing."""
        return _from_hf(config, where)


ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe", "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3", "OPTForCausalLM": "opt", "BloomForCausalLM": "bloom",
    "FalconForCausalLM": "falcon", "GPT2LMHeadModel": "gpt2", "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "KimiK2ForCausalLM": "kimi_k2", "GptOssForCausalLM": "gpt_oss",
    "MiniMaxM2ForCausalLM": "minimax_m2",
}  # fmt: skip


def _from_hf(config: Mapping[str, Any], where: str) -> ModelShape:
    text: Mapping[str, Any] = config.get("text_config") or config
    names = config.get("architectures") or ["LlamaForCausalLM"]
    if names[0] not in ARCHITECTURES:
        raise ModelError(
            f"architecture {names[0]!r} is not known",
            where=where,
            nearest=nearest(names[0], ARCHITECTURES),
        )

    def need(*keys: str) -> int:
        for key in keys:
            if isinstance(text.get(key), int) and not isinstance(text.get(key), bool):
                return int(text[key])
        raise ModelError(f"{' or '.join(keys)} is missing or not a number", where=where)

    def maybe(*keys: str) -> int:
        return next((int(text[k]) for k in keys if isinstance(text.get(k), int)), 0)

    heads = need("num_attention_heads", "n_head")
    hidden = need("hidden_size", "n_embd")
    experts = maybe("num_local_experts", "num_experts", "n_routed_experts")
    kv_heads = maybe("num_key_value_heads", "num_kv_heads") or heads
    if names[0] == "FalconForCausalLM" and not config.get("new_decoder_architecture"):
        kv_heads = 1 if config.get("multi_query", True) else heads
    dense = maybe("intermediate_size", "ffn_dim") or 4 * hidden
    per_expert = maybe("moe_intermediate_size") or dense
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16")
    architecture, layers = ARCHITECTURES[names[0]], need("num_hidden_layers", "n_layer")
    window, everywhere = _window(text), _global_layers(text, architecture, layers)
    return ModelShape(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=maybe("head_dim") or hidden // heads,
        intermediate=per_expert if experts else dense,
        vocab=need("vocab_size"),
        tied_embeddings=bool(text.get("tie_word_embeddings", architecture.startswith("gemma"))),
        gated_mlp=architecture not in ("opt", "bloom", "falcon", "gpt2"),
        max_context=maybe("max_position_embeddings", "n_positions", "seq_length") or 2048,
        dtype=dtype if dtype in DTYPE_BYTES else "bfloat16",
        window=window if everywhere < layers else None,
        global_layers=everywhere if window and everywhere < layers else 0,
        kv_latent=_latent(text),
        experts=experts,
        experts_per_token=maybe("num_experts_per_tok"),
        shared_expert_intermediate=maybe("shared_expert_intermediate_size")
        or maybe("n_shared_experts") * per_expert,
    )


def _window(text: Mapping[str, Any]) -> int | None:
    window = text.get("sliding_window")
    in_use = text.get("use_sliding_window", True)
    return int(window) if window and in_use else None


def _global_layers(text: Mapping[str, Any], architecture: str, layers: int) -> int:
    """How many layers attend to everything, as `layer_types` says or the family implies."""
    if kinds := text.get("layer_types"):
        return list(kinds).count("full_attention")
    if architecture == "gemma2":
        return layers // 2
    if architecture == "gemma3":
        return layers // int(text.get("sliding_window_pattern") or 6)
    if architecture in ("qwen2", "qwen3"):  # the first ones
        return min(int(text.get("max_window_layers") or 0), layers)
    return 0


def _latent(text: Mapping[str, Any]) -> int:
    rank = text.get("kv_lora_rank")
    return int(rank) + int(text["qk_rope_head_dim"]) if rank else 0
