"""The embedded engine on a GPU: `python -m bench.engine --device cuda`. Knows one model shape, an
8B Llama with random bfloat16 weights; needs no download and about 30 GB of device memory.

First the tokens of small models in float32, on the GPU and on the CPU; then output tokens per
second at batch 1, with the share of the memory's bandwidth that reading the weights for each token
takes (against a copy inside the device, measured here), and at batch 64 and 256. The engine starts
kernels one by one here, without CUDA graphs and without kernels of its own.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

from bench.engine_cases import BLOCK, Case, Generator, blocks_for, prompts_of, speed_of, timed
from kvasir.core.specs import LayerSpec
from kvasir.engine.loader import Loaded
from kvasir.engine.tiny import VOCAB, Architecture, make_tiny
from kvasir.engine.torch_runner import TorchRunner

GOAL: Final = 0.7
CASES: Final = (
    Case("batch 1", (128,), outputs=128), Case("batch 64", (128,) * 64),
    Case("batch 256", (128,) * 256),
)  # fmt: skip
SMALL: Final = 12  # prompts of small models, of 1 to 221 tokens
COPY_BYTES: Final = 1 << 31
KV_HEADS, HEAD_DIM, LAYERS = 8, 128, 32
CONTEXT: Final = 8192
VOCAB_8B: Final = 128_256


def run() -> dict[str, Any]:
    """Measures and prints; what the bench's JSON line says."""
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here")
        return {"skipped": "no CUDA device"}
    name = torch.cuda.get_device_name()
    equal = {kind: same_tokens(kind) for kind in ("qwen3", "llama")}
    print(f"{name}; float32 tokens as on the CPU: {equal}", flush=True)
    bandwidth = copy_bandwidth()
    with tempfile.TemporaryDirectory() as home:
        folder = make_tiny(Path(home) / "tiny", "llama")  # for its tokenizer
        loaded = llama_8b()
        weights = weight_bytes(loaded.model)
        runner = TorchRunner(
            folder, blocks_count=max(map(blocks_for, CASES)), block_size=BLOCK, dtype="bfloat16",
            device="cuda", loaded=loaded,
        )  # fmt: skip
    rows = {case.name: rate(runner, case) for case in CASES}
    step_s = rows["batch 1"]["step_ms"] / 1e3
    share = weights / step_s / bandwidth
    print(f"batch 1: {share:.0%} of {bandwidth / 1e9:.0f} GB/s, goal {GOAL:.0%}")
    return {
        "bench": "engine", "device": name, "same_tokens": equal, "bandwidth": bandwidth,
        "weight_bytes": weights, "share": share, "rows": rows,
    }  # fmt: skip


def same_tokens(kind: Architecture) -> bool:
    case = Case(f"small {kind}", tuple(range(1, 1 + 20 * SMALL, 20)), outputs=32)
    prompts = [[token % VOCAB for token in one] for one in prompts_of(case, 0).whole]
    with tempfile.TemporaryDirectory() as home:
        folder = make_tiny(Path(home), kind, context_max=512)
        outputs = [
            Generator(TorchRunner(folder, blocks_count=blocks_for(case), device=device)).generate(
                prompts, case.outputs
            )
            for device in ("cpu", "cuda")
        ]
    return outputs[0] == outputs[1]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy inside the device: the best of ten."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * COPY_BYTES / best


def llama_8b() -> Loaded:
    """Llama 3.1 8B's shape with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        vocab_size=VOCAB_8B, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    layer = LayerSpec(kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="bfloat16")
    return Loaded(model, (layer,) * LAYERS, VOCAB_8B, CONTEXT, (), "random")


def weight_bytes(model: Any) -> int:
    """What one token's forward pass reads: all weights but the rows of the embedding."""
    every = sum(one.numel() * one.element_size() for one in model.parameters())
    table = model.model.embed_tokens.weight
    return int(every - table.numel() * table.element_size())


def rate(runner: TorchRunner, case: Case) -> dict[str, float]:
    generator = Generator(runner)
    speed = speed_of(case, [timed(generator.generate, case, 0)["wall"]])
    print(
        f"{case.name:<10} {speed.per_s:.0f} tok/s, step {speed.step_ms:.1f} ms, prefill "
        f"{speed.prefill_per_s:.0f} tok/s",
        flush=True,
    )
    return speed._asdict()

