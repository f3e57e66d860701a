"""One side of bench/engine.py, in a process of its own: prints one JSON line of timings.

    python -m bench.engine_side SIDE DTYPE FOLDER SEED CASE...

Sides: `ours` (the torch runner, attending by the compiled kernel if it is built), `torch` (the same
without it), `apart` (the same, nothing shared between sequences), `modules`
(the runner over transformers' modules), `hf` (transformers' generate on one left-padded batch),
`floor` (linear layers alone, as packed as ours: seconds of one decode step).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from bench.engine_cases import BLOCK, CASES, SHAPE, Case, Generator, blocks_for, timed
from kvasir.engine.linear import Linear, linear_of
from kvasir.engine.loader import quiet
from kvasir.engine.torch_runner import TorchRunner

FLOOR_STEPS: Final = 15

Run = Callable[[list[list[int]], int], object]


def ours(folder: Path, dtype: Any, case: Case, side: str) -> Run:
    runner = TorchRunner(
        folder, blocks_count=blocks_for(case), block_size=BLOCK, dtype=dtype,
        fused=side != "modules", native=False if side == "torch" else None,
    )  # fmt: skip
    shared = 0 if side == "apart" else case.shared
    return lambda prompts, outputs: Generator(runner).generate(prompts, outputs, shared)


def hf(folder: Path, dtype: Any) -> Run:
    import transformers

    torch.set_num_threads(1)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], outputs: int) -> object:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return model.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), max_new_tokens=outputs,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip

    return run


def floor_s(dtype: Any, rows: int) -> float:
    """CPU seconds of a decode step's linear layers for `rows` rows."""
    torch.set_num_threads(1)
    layers = linears(getattr(torch, dtype))
    inputs = {width: torch.randn(rows, width).to(getattr(torch, dtype)) for width, _ in layers}
    took = []
    with torch.inference_mode():
        for _ in range(FLOOR_STEPS):
            began = time.process_time()
            for width, layer in layers:
                layer(inputs[width])
            took.append(time.process_time() - began)
    return median(took)


def linears(dtype: torch.dtype) -> list[tuple[int, Linear]]:
    """Width of the input and the layer, of all that one token passes."""
    hidden, inner = SHAPE["hidden"], SHAPE["intermediate"]
    query, kv = (SHAPE[name] * SHAPE["head_dim"] for name in ("heads", "kv_heads"))
    one = ((query + 2 * kv, hidden), (hidden, query), (2 * inner, hidden), (hidden, inner))
    sizes = (*one * SHAPE["layers"], (SHAPE["vocab"], hidden))
    return [(width, linear_of(torch.randn(out, width).to(dtype), None)) for out, width in sizes]


def main() -> None:
    side, dtype, folder, seed, *names = sys.argv[1:]
    found: dict[str, Any] = {}
    for case in (CASES[name] for name in names):
        if side == "floor":
            found[case.name] = floor_s(dtype, len(case.lengths))
            continue
        path = Path(folder)
        run = hf(path, dtype) if side == "hf" else ours(path, dtype, case, side)
        found[case.name] = timed(run, case, int(seed))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
