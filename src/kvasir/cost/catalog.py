"""Shapes of known models, so that a deployment can be simulated without a download.

Knows the sizes in the makers' published `config.json` files, and nothing of how they are used. The
KV bytes per token that follow are the published ones (tests/unit/test_shapes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.specs.deployment import ModelSpec
from kvasir.core.specs.model import ModelShape

Config = Mapping[str, Any]


def _config(
    architecture: str, layers: int, hidden: int, heads: int, vocab: int, context: int, **more: Any
) -> Config:
    """What every `config.json` says, under its HuggingFace names."""
    return {
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "torch_dtype": "bfloat16",
        **more,
    }


def _opt(layers: int, hidden: int, heads: int) -> Config:
    return _config(
        "OPTForCausalLM", layers, hidden, heads, 50272, 2048,
        ffn_dim=4 * hidden, tie_word_embeddings=True, torch_dtype="float16",
    )  # fmt: skip


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, *,
    vocab: int, context: int, architecture: str = "LlamaForCausalLM", **more: Any,
) -> Config:  # fmt: skip
    return _config(
        architecture, layers, hidden, heads, vocab, context,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, **more,
    )  # fmt: skip


def _latent(
    layers: int, hidden: int, heads: int, vocab: int, context: int,
    experts: int, shared: int, per_token: int, expert: int, dense: int,
    architecture: str = "DeepseekV3ForCausalLM",
) -> Config:  # fmt: skip
    """DeepSeek's family: multi-head latent attention and fine-grained experts."""
    return _config(
        architecture, layers, hidden, heads, vocab, context,
        kv_lora_rank=512, qk_rope_head_dim=64, intermediate_size=dense,
        n_routed_experts=experts, n_shared_experts=shared, num_experts_per_tok=per_token,
        moe_intermediate_size=expert,
    )  # fmt: skip


CATALOG: Final[Mapping[str, Config]] = {
    "opt-13b": _opt(40, 5120, 40),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "bloom-176b": _config(
        "BloomForCausalLM", 70, 14336, 112, 250880, 2048, tie_word_embeddings=True
    ),
    "falcon-180b": _config(
        "FalconForCausalLM", 80, 14848, 232, 65024, 2048,
        num_kv_heads=8, new_decoder_architecture=True, tie_word_embeddings=True,
    ),
    "llama-1-30b": _llama(60, 6656, 52, 52, 17920, vocab=32000, context=2048),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, vocab=32000, context=4096),
    "llama-2-13b": _llama(40, 5120, 40, 40, 13824, vocab=32000, context=4096),
    "llama-2-70b": _llama(80, 8192, 64, 8, 28672, vocab=32000, context=4096),
    "llama-3-8b": _llama(32, 4096, 32, 8, 14336, vocab=128256, context=8192),
    "llama-3-70b": _llama(80, 8192, 64, 8, 28672, vocab=128256, context=8192),
    "llama-3.1-8b": _llama(32, 4096, 32, 8, 14336, vocab=128256, context=131072),
    "llama-3.1-70b": _llama(80, 8192, 64, 8, 28672, vocab=128256, context=131072),
    "llama-3.1-405b": _llama(126, 16384, 128, 8, 53248, vocab=128256, context=131072),
    "codellama-34b": _llama(48, 8192, 64, 8, 22016, vocab=32000, context=16384),
    "mistral-7b": _llama(  # v0.3: no sliding window
        32, 4096, 32, 8, 14336, vocab=32768, context=32768, architecture="MistralForCausalLM"
    ),
    "mixtral-8x7b": _llama(
        32, 4096, 32, 8, 14336, vocab=32000, context=32768, architecture="MixtralForCausalLM",
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen2.5-72b": _llama(
        80, 8192, 64, 8, 29568, vocab=152064, context=131072, architecture="Qwen2ForCausalLM"
    ),
    "qwen3-0.6b": _llama(
        28, 1024, 16, 8, 3072, vocab=151936, context=40960, architecture="Qwen3ForCausalLM",
        head_dim=128, tie_word_embeddings=True,
    ),
    "qwen3-32b": _llama(
        64, 5120, 64, 8, 25600, vocab=151936, context=40960, architecture="Qwen3ForCausalLM",
        head_dim=128,
    ),
    "qwen3-235b-a22b": _llama(
        94, 4096, 64, 4, 12288, vocab=151936, context=40960, architecture="Qwen3MoeForCausalLM",
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536,
    ),
    "gpt-oss-120b": _llama(  # every other layer sees 128 positions
        36, 2880, 64, 8, 2880, vocab=201088, context=131072, architecture="GptOssForCausalLM",
        head_dim=64, num_local_experts=128, num_experts_per_tok=4, sliding_window=128,
        layer_types=("sliding_attention", "full_attention") * 18,
    ),
    "minimax-m2.5": _llama(
        62, 3072, 48, 8, 1536, vocab=200064, context=196608, head_dim=128,
        architecture="MiniMaxM2ForCausalLM", num_local_experts=256, num_experts_per_tok=8,
    ),
    "deepseek-v2": _latent(
        60, 5120, 128, 102400, 163840, 160, 2, 6, 1536, 12288, "DeepseekV2ForCausalLM"
    ),
    "deepseek-v3": _latent(61, 7168, 128, 129280, 163840, 256, 1, 8, 2048, 18432),
    "kimi-k2": _latent(61, 7168, 64, 163840, 131072, 384, 1, 8, 2048, 18432),
    "tiny": _llama(  # the model that comes with the package
        2, 64, 4, 2, 96, vocab=259, context=4096, architecture="Qwen3ForCausalLM",
        head_dim=16, torch_dtype="float32",
    ),
}  # fmt: skip


def shape_name(model: ModelSpec) -> str:
    """The bundled shape that a model names, which may be unknown. An inline shape has no name."""
    if isinstance(model.shape, ModelShape):
        return "a model of your own"
    return (model.shape or model.name).lower()


def shape_of(model: ModelSpec) -> ModelShape:
    """The shape that a model gives inline, or the bundled one of its `shape`, else of its `name`.

    Raises ConfigError naming the nearest bundled shape.
    """
    if isinstance(model.shape, ModelShape):
        return model.shape
    name = shape_name(model)
    config = CATALOG.get(name)
    if config is None:
        raise ConfigError(
            f"model {model.name!r} has no known shape: {name!r} is not bundled",
            where="models",
            nearest=nearest(name, CATALOG),
            next_step="set its `shape` to a bundled name, or give the sizes there",
        )
    return ModelShape.from_hf(config, where=f"bundled shape {name!r}")
