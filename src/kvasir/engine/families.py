"""Which model families the torch engine computes, and the KV that their layers keep.

Knows the names in a HuggingFace config; must not know weights or caches. transformers ignores some
fields that change the result; a config that sets one is refused here, not computed wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from kvasir.core.errors import ModelError, nearest
from kvasir.core.specs import LayerSpec

ARCHITECTURES: Final = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
)  # fmt: skip
# Dense ones whose layers are ours (engine.layers), not transformers' modules.
FUSED: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FUSED_ACTIVATIONS: Final = ("silu", "swish")
# These recompute their frequencies from the longest sequence of a batch: text would depend on it.
ROPE_BY_BATCH: Final = ("dynamic", "longrope")


class Covered(NamedTuple):
    """The values of `field` that are computed right. Absent is one of them, null only if here."""

    field: str
    values: tuple[Any, ...]


EVERY: Final = (Covered("quantization_config", (None,)),)
# What transformers 5.23 does not read, or only where it makes masks, of which there are none here.
ONLY: Final[Mapping[str, tuple[Covered, ...]]] = {
    "GemmaForCausalLM": (Covered("use_bidirectional_attention", (None, False)),),
    "Gemma2ForCausalLM": (Covered("use_bidirectional_attention", (None, False)),),
    "Gemma3ForCausalLM": (
        Covered("use_bidirectional_attention", (None, False)),
        Covered("attn_logit_softcapping", (None,)),
    ),
    "Qwen2MoeForCausalLM": (Covered("use_sliding_window", (None, False)),),
    "DeepseekV2ForCausalLM": (
        Covered("topk_method", ("greedy", "group_limited_greedy")),
        Covered("scoring_func", ("softmax",)),
        Covered("norm_topk_prob", (None, False)),
        Covered("moe_layer_freq", (1,)),
    ),
    "DeepseekV3ForCausalLM": (
        Covered("topk_method", ("noaux_tc",)),
        Covered("scoring_func", ("sigmoid",)),
        Covered("moe_layer_freq", (1,)),
    ),
}


def check(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError if `config`, a whole config.json read from `where`, is not covered."""
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {name!r} is not supported by the embedded engine",
            where=where,
            nearest=nearest(str(name), ARCHITECTURES),
            next_step="serve it with another engine behind the worker protocol",
        )
    for field, values in (*EVERY, *ONLY.get(name, ())):
        if field in config and config[field] not in values:
            raise ModelError(
                f"{name} with {field} {_short(config[field])} is not supported",
                where=where,
                nearest=" or ".join("none" if one is None else str(one) for one in values),
                next_step="serve it with another engine behind the worker protocol",
            )
    if name.startswith("Deepseek"):
        _check_groups(config, where)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_groups(config: Mapping[str, Any], where: str) -> None:
    """Group-limited routing: experts fall into equal groups, and a token's come from a few."""
    if config.get("topk_method") == "greedy" or "n_routed_experts" not in config:
        return
    names = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
    sizes: list[Any] = [config.get(name) for name in names]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ModelError(f"{', '.join(names)} must be numbers, not {sizes}", where=where)
    experts, groups, chosen, per_token = sizes
    # DeepSeek-V3 ranks groups by their two best experts.
    if experts % groups or experts // groups < 2 or chosen > groups:
        raise ModelError(
            f"{experts} experts do not fall into {groups} groups of which {chosen} are chosen",
            where=where,
        )
    if per_token > chosen * (experts // groups):
        raise ModelError(
            f"{chosen} groups of {experts // groups} experts do not have {per_token} for a token",
            where=where,
        )


def is_latent(config: Any) -> bool:
    """Whether layers cache a latent vector (DeepSeek's MLA). `config`: transformers' own."""
    return bool(getattr(config, "kv_lora_rank", None))


def layers_of(config: Any, dtype: str, where: str) -> tuple[LayerSpec, ...]:
    """The KV that each layer keeps. `config`: transformers' own, `dtype` that of the cache.

    Raises ModelError for layer and rope types that are not supported.
    """
    _check_rope(getattr(config, "rope_parameters", None) or {}, where)
    if is_latent(config):
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        one = LayerSpec(kind="latent", kv_heads=1, head_dim=latent, dtype=dtype)
        return (one,) * config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads
    return tuple(
        LayerSpec(kv_heads=kv_heads, head_dim=dim, window=window, dtype=dtype)
        for window in _windows(config, where)
    )


def _check_rope(rope: Mapping[str, Any], where: str) -> None:
    """One rope for all layers, or one for each type of layer (Gemma 3)."""
    nested = [one for one in rope.values() if isinstance(one, Mapping)]
    for one in nested or [rope]:
        kind = one.get("rope_type", "default")
        if kind in ROPE_BY_BATCH:
            raise ModelError(f"rope type {kind!r} is not supported", where=where, nearest="yarn")


def _windows(config: Any, where: str) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    types = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(types) - set(windows)):
        raise ModelError(
            f"layer type {unknown[0]!r} is not supported",
            where=where,
            nearest=nearest(unknown[0], windows),
        )
    return [windows[one] for one in types]
