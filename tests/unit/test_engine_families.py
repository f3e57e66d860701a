"""Real configs of each family: the KV that the engine keeps is what simulation counts, and what the
engine would compute wrong is refused by name. No weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvasir.core.errors import LINES_MAX, ModelError  # noqa: E402
from kvasir.core.specs import LayerSpec, ModelShape  # noqa: E402
from kvasir.engine import families, latent  # noqa: E402
from kvasir.engine.attention import make_caches  # noqa: E402

DEEPSEEK: dict[str, Any] = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "moe_layer_freq": 1, "rope_theta": 10000, "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
}  # fmt: skip


class Family(NamedTuple):
    """`config`: what the makers' config.json says; `token_bytes`: published, in bfloat16.
    `windows`: layers that see only so much, and how much."""

    architecture: str
    kind: str
    config: dict[str, Any]
    token_bytes: int
    windows: tuple[int, int] = (0, 0)


def sizes(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int,
          **more: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
        "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


FAMILIES = {
    "llama-3.1-8b": Family("LlamaForCausalLM", "llama", sizes(
        4096, 32, 32, 8, 14336, 128256, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"}), 131_072),
    "mistral-7b-v0.1": Family("MistralForCausalLM", "mistral", sizes(
        4096, 32, 32, 8, 14336, 32000, sliding_window=4096, max_position_embeddings=32768),
        131_072, (32, 4096)),
    "qwen2.5-7b": Family("Qwen2ForCausalLM", "qwen2", sizes(
        3584, 28, 28, 4, 18944, 152064, use_sliding_window=False, sliding_window=131072,
        max_window_layers=28, max_position_embeddings=32768), 57_344),
    "qwen2-windowed": Family("Qwen2ForCausalLM", "qwen2", sizes(
        3584, 28, 28, 4, 18944, 152064, use_sliding_window=True, sliding_window=8192,
        max_window_layers=20, max_position_embeddings=32768), 57_344, (8, 8192)),
    "mixtral-8x7b": Family("MixtralForCausalLM", "mixtral", sizes(
        4096, 32, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=None, max_position_embeddings=32768), 131_072),
    "qwen1.5-moe-a2.7b": Family("Qwen2MoeForCausalLM", "qwen2_moe", sizes(
        2048, 24, 16, 16, 5632, 151936, moe_intermediate_size=1408, num_experts=60,
        shared_expert_intermediate_size=5632, num_experts_per_tok=4, norm_topk_prob=False,
        use_sliding_window=False, sliding_window=32768, max_window_layers=21), 196_608),
    "qwen3-30b-a3b": Family("Qwen3MoeForCausalLM", "qwen3_moe", sizes(
        2048, 48, 32, 4, 6144, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, use_sliding_window=False, sliding_window=None,
        max_window_layers=48), 98_304),
    "deepseek-v2-lite": Family("DeepseekV2ForCausalLM", "deepseek_v2", sizes(
        2048, 27, 16, 16, 10944, 102400, **DEEPSEEK, q_lora_rank=None, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408, n_group=1,
        topk_group=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
        first_k_dense_replace=1), 31_104),
    "deepseek-v2": Family("DeepseekV2ForCausalLM", "deepseek_v2", sizes(
        5120, 60, 128, 128, 12288, 102400, **DEEPSEEK, q_lora_rank=1536, n_routed_experts=160,
        n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1536, n_group=8,
        topk_group=3, topk_method="group_limited_greedy", scoring_func="softmax",
        norm_topk_prob=False, first_k_dense_replace=1), 69_120),
    "deepseek-v3": Family("DeepseekV3ForCausalLM", "deepseek_v3", sizes(
        7168, 61, 128, 128, 18432, 129280, **DEEPSEEK, q_lora_rank=1536, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8,
        topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
        first_k_dense_replace=3), 70_272),
    "gemma-7b": Family("GemmaForCausalLM", "gemma", sizes(
        3072, 28, 16, 16, 24576, 256000, head_dim=256), 458_752),
    "gemma-2-9b": Family("Gemma2ForCausalLM", "gemma2", sizes(
        3584, 42, 16, 8, 14336, 256000, head_dim=256, sliding_window=4096,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0), 344_064, (21, 4096)),
    "gemma-3-1b": Family("Gemma3ForCausalLM", "gemma3_text", sizes(
        1152, 26, 4, 1, 6912, 262144, head_dim=256, sliding_window=512, sliding_window_pattern=6,
        rope_theta=1000000, rope_local_base_freq=10000, query_pre_attn_scalar=256,
        attn_logit_softcapping=None, final_logit_softcapping=None), 26_624, (22, 512)),
}  # fmt: skip


def whole(name: str, **changed: Any) -> dict[str, Any]:
    one = FAMILIES[name]
    kept = {"architectures": [one.architecture], "model_type": one.kind, **one.config}
    return {**kept, **changed}


def layers_of(folder: Path, config: dict[str, Any]) -> tuple[LayerSpec, ...]:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return families.layers_of(read, "bfloat16", str(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_keeps_what_simulation_counts(name: str, tmp_path: Path) -> None:
    one, config = FAMILIES[name], whole(name)
    families.check(config, "config.json")
    layers, shape = layers_of(tmp_path, config), ModelShape.from_hf(config)
    assert len(layers) == shape.layers
    assert sum(layer.token_bytes for layer in layers) == shape.kv_token_bytes == one.token_bytes
    seen = [layer.window for layer in layers if layer.window]
    count, window = one.windows
    assert seen == [window] * count
    assert (shape.window, shape.global_layers) == (
        (window, shape.layers - count) if count else (None, 0)
    )


def test_deepseek_v3_keeps_576_values_a_layer(tmp_path: Path) -> None:
    """Not by its own word only: the cache that is allocated has 576 x 61 x 2 bytes a token."""
    layers = layers_of(tmp_path, whole("deepseek-v3"))
    caches = make_caches(layers, blocks_count=3, block_size=16, dtype=torch.bfloat16)
    nbytes = sum(plane.nbytes for cache in caches for plane in cache)
    assert nbytes == 3 * 16 * 576 * 61 * 2 == 3 * 16 * 70_272


def test_every_supported_family_is_known_to_simulation_and_tested() -> None:
    tested = {one.architecture for one in FAMILIES.values()} | {"Qwen3ForCausalLM"}
    assert tested == set(families.ARCHITECTURES)


V3 = latent.Up(
    both=torch.empty(128 * 256, 512, device="meta"),
    key=torch.empty(128, 128, 512, device="meta"),
    value=torch.empty(128, 128, 512, device="meta"),
)


@pytest.mark.parametrize(
    ("count", "length", "absorbs"),
    [
        (1, 2, True), (1, 100_000, True), (160, 100_000, True), (180, 100_000, False),
        (64, 128, True), (64, 64, False), (4096, 4096, False),
    ],
)  # fmt: skip
def test_what_multiplies_less_is_done(count: int, length: int, absorbs: bool) -> None:
    """A head of DeepSeek-V3 spends 131,072 multiplications to project a position and 768 more on
    each pair when nothing is expanded, so the two ways meet at 170 tokens after a long context."""
    assert latent.absorbing_is_cheaper(count, length, V3, rope=64) is absorbs


# --- what is refused --------------------------------------------------------------------------


def refusal(name: str, **changed: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        families.check(whole(name, **changed), "config.json")
    assert len(str(caught.value).splitlines()) <= LINES_MAX
    return caught.value


@pytest.mark.parametrize(
    ("name", "field", "value", "near"),
    [
        ("deepseek-v2", "topk_method", "noaux_tc", "greedy or group_limited_greedy"),
        ("deepseek-v2", "scoring_func", "sigmoid", "softmax"),
        ("deepseek-v2", "norm_topk_prob", True, "none or False"),
        ("deepseek-v2-lite", "moe_layer_freq", 2, "1"),
        ("deepseek-v3", "topk_method", "greedy", "noaux_tc"),
        ("deepseek-v3", "scoring_func", "softmax", "sigmoid"),
        ("deepseek-v3", "quantization_config", {"quant_method": "fp8"}, "none"),
        ("qwen1.5-moe-a2.7b", "use_sliding_window", True, "none or False"),
        ("gemma-2-9b", "use_bidirectional_attention", True, "none or False"),
        ("gemma-3-1b", "attn_logit_softcapping", 50.0, "none"),
    ],
)
def test_what_transformers_would_not_compute(name: str, field: str, value: Any, near: str) -> None:
    error = refusal(name, **{field: value})
    assert field in error.what and FAMILIES[name].architecture in error.what
    assert error.nearest == near and error.where == "config.json"


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"n_group": 7}, "256 experts do not fall into 7 groups"),
        ({"n_group": 256}, "do not fall into 256 groups"),
        ({"topk_group": 9}, "of which 9 are chosen"),
        ({"n_group": None}, "must be numbers"),
        ({"n_group": 64, "topk_group": 1}, "1 groups of 4 experts do not have 8"),
    ],
)
def test_groups_that_do_not_work_out(changed: dict[str, Any], what: str) -> None:
    assert what in refusal("deepseek-v3", **changed).what


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM"),
        ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        ("MixtrallForCausalLM", "MixtralForCausalLM"),
        ("Qwen3NextForCausalLM", "Qwen3ForCausalLM"),
    ],
)
def test_the_nearest_family(name: str, near: str) -> None:
    error = refusal("llama-3.1-8b", architectures=[name])
    assert name in error.what and error.nearest == near


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rope_that_follows_the_batch_is_refused_in_either_kind_of_layer(kind: str) -> None:
    ropes = {"full_attention": {"rope_type": kind}, "sliding_attention": {"rope_type": "default"}}
    config = transformers.Gemma3TextConfig()
    config.rope_parameters = ropes
    with pytest.raises(ModelError, match=kind):
        families.layers_of(config, "float32", "config.json")
