"""Layer kinds beyond plain attention, against transformers' `generate`: mixtures of experts, latent
attention, softcaps. CPU seconds of one thread, fresh processes, sides in turns, random weights.

    python -m bench.families [--repeats 3] [--families NAME,...] [--dtypes ...] [--out FILE.json]

Both sides run transformers' layers; ours has another cache and attention. Prompts of a case are
equally long, so nothing is padded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from bench.engine_cases import CASES, CONTEXT, Speed, Timing, processor, speed_of
from kvasir.engine.loader import load, quiet
from kvasir.engine.tiny import write_tokenizer

NAMES: Final = ("1 x 128", "8 x 128")
LAYERS: Final = 4
COMMON: Final = {
    "num_hidden_layers": LAYERS, "hidden_size": 512, "vocab_size": 32_000, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": CONTEXT,
    "initializer_range": 0.12,
}  # fmt: skip
EXPERTS: Final = {"moe_intermediate_size": 384, "num_experts_per_tok": 4}
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "Qwen3Moe": {**EXPERTS, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
                 "num_experts": 16},
    "DeepseekV2": {**EXPERTS, "num_attention_heads": 8, "num_key_value_heads": 8,
                   "kv_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
                   "v_head_dim": 64, "q_lora_rank": None, "n_routed_experts": 16,
                   "n_shared_experts": 1, "first_k_dense_replace": 1, "intermediate_size": 1536},
    "Gemma2": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
               "intermediate_size": 1536, "sliding_window": 512, "query_pre_attn_scalar": 64},
}  # fmt: skip


def make(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    with quiet():
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    write_tokenizer(folder, CONTEXT)
    return folder


def timings_of(side: str, dtype: str, folder: Path, seed: int) -> dict[str, Timing]:
    """Of each case, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine_side", side, dtype, str(folder), str(seed), *NAMES],
        check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Timing(*clocks["cpu"]) for name, clocks in found.items()}


def measure(family: str, dtype: str, repeats: int) -> dict[str, dict[str, Speed]]:
    """By case, then by side."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), family)
        token_bytes = sum(layer.token_bytes for layer in load(Path(folder), dtype).layers)  # type: ignore[arg-type]
        print(f"{family}, {dtype}: {token_bytes} bytes of cache a token", flush=True)
        runs: dict[str, list[dict[str, Timing]]] = {"ours": [], "hf": []}
        for seed in range(repeats):
            for side, found in runs.items():
                found.append(timings_of(side, dtype, Path(folder), seed))
    return {
        name: {
            side: speed_of(CASES[name], [one[name] for one in found])
            for side, found in runs.items()
        }
        for name in NAMES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    print(f"{processor()}, torch {torch.__version__}, transformers {transformers.__version__}")
    every: dict[str, Any] = {}
    for family in flags.families.split(","):
        for dtype in flags.dtypes.split(","):
            found = measure(family, dtype, flags.repeats)
            every[f"{family} {dtype}"] = {
                name: {side: speed._asdict() for side, speed in sides.items()}
                for name, sides in found.items()
            }
            for name, sides in found.items():
                ours, hf = sides["ours"], sides["hf"]
                print(f"  {name:10} ours {ours.per_s:7.1f} tok/s ({ours.per_s_min:.1f} to "
                      f"{ours.per_s_max:.1f}), hf {hf.per_s:7.1f}: {ours.per_s / hf.per_s:.2f} "
                      f"times; step {ours.step_ms:.1f} and {hf.step_ms:.1f} ms, prefill "
                      f"{ours.prefill_per_s:.0f} and {hf.prefill_per_s:.0f} tok/s",
                      flush=True)  # fmt: skip
    if flags.out:
        flags.out.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
