"""Small models with random weights of each family, and transformers' own answers to prompts.

Knows transformers only; must not know the engine.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers

from kvasir.engine.tiny import EOS_TOKEN_ID, VOCAB, write_tokenizer

WINDOW = 20  # not a multiple of the block size
LENGTHS = (1, 16, 17, 33, 61)
N = 12

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": VOCAB, "initializer_range": 0.12,
    "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7,
        "mscale_all_dim": 0.7, "original_max_position_embeddings": 256}  # fmt: skip
# Softcaps so low that a text without them is another one.
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True,
                               "mlp_only_layers": [1]}),
    "deepseek-v2": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek-v2-groups": ("DeepseekV2", {**LATENT, "q_lora_rank": 24, "n_group": 4,
                                          "topk_group": 2, "topk_method": "group_limited_greedy"}),
    "deepseek-v3": ("DeepseekV3", {**LATENT, "q_lora_rank": 24, "n_group": 4, "topk_group": 2,
                                   "rope_parameters": YARN}),
    "deepseek-v3-halves": ("DeepseekV3", {**LATENT, "q_lora_rank": None, "n_group": 1,
                                          "topk_group": 1, "rope_interleave": False}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {**GEMMA, **CAPS}),
    "gemma3": ("Gemma3", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2,
                          "num_hidden_layers": 4, "final_logit_softcapping": 3.0,
                          "rope_parameters": {
                              "full_attention": {"rope_type": "linear", "factor": 8.0,
                                                 "rope_theta": 1e6},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
}  # fmt: skip
LATENTS = [name for name in FAMILIES if name.startswith("deepseek")]


def make(folder: Path, name: str) -> Path:
    """A family's model with random weights; none is a constant, be it a norm or a bias."""
    family, values = FAMILIES[name]
    config_name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    torch.manual_seed(9)  # with some seeds, texts settle into one repeated token
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, config_name)(**{**SMALL, **values})
    )
    for key, weight in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            weight.data += torch.randn_like(weight) * 0.2
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer += torch.randn_like(buffer) * 0.2
    model.save_pretrained(folder)
    write_tokenizer(folder, 1024)
    return folder


def reference_of(folder: Path) -> Any:
    """transformers' model, in float32, that does not stop at an end of sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    return model


def answers(reference: Any) -> dict[int, list[int]]:
    """transformers' answer to the prompt of each length."""
    return {length: generated(reference, prompt_of(length)) for length in LENGTHS}


def logs_of(reference: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """transformers' log-probabilities where `output` was drawn, [output, vocab]."""
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *output]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def generated(model: Any, prompt: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=N, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in out[0, len(prompt) :]]


def prompt_of(length: int) -> list[int]:
    return [random.Random(f"{length}:{i}").randrange(256) for i in range(length)]
