"""Attention of the CPU engine alone: the compiled kernel beside torch's, one call a layer.

    python -m kvasir.engine.native && python -m bench.attention [--heads 8 4 64] [--dtypes ...]

Prompts by GFLOP/s and the share of what a linear layer reaches (1,024 rows, 1,024 by 1,024, packed
as the engine's); decoding by GB/s of keys and values and the share of what one thread reads in a
row from memory. Both sides go through `PagedBatch`, so torch's side gathers where blocks are
scattered, and both write new KV. CPU seconds of one thread, the fastest of --rounds; the sides take
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from bench.engine_cases import BLOCK, RAGGED, processor
from kvasir.engine.attention import LayerCache, PagedBatch, Span
from kvasir.engine.linear import linear_of
from kvasir.engine.native.kernel import Kernel, kernel_of
from kvasir.engine.steps import BlockTable

LAYERS: Final = 8  # so that decoding finds little of the last round in the processor's caches
DTYPES: Final = ("bfloat16", "float32")


class Case(NamedTuple):
    """Sequences that have `starts` positions and compute `count` more each."""

    name: str
    starts: tuple[int, ...]
    count: int
    scattered: bool = False

    @property
    def decodes(self) -> bool:
        return self.count == 1


CASES: Final = (
    Case("prompt of 256", (0,), 256), Case("prompt of 1,024", (0,), 1024),
    Case("prompt of 2,048", (0,), 2048), Case("512 after 1,024", (1024,), 512),
    Case("16 after 1,024", (1024,), 16), Case("decode 1 x 1,024", (1023,), 1),
    Case("decode 16 x 160", (159,) * 16, 1), Case("decode 16 of 100 to 1,600", RAGGED, 1),
    Case("the same, scattered", RAGGED, 1, scattered=True),
)  # fmt: skip


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    dim: int


def pairs(case: Case) -> int:
    """Of a query and a key that it sees."""
    return sum(case.count * start + case.count * (case.count + 1) // 2 for start in case.starts)


def spans_of(case: Case) -> list[Span]:
    needed = [-(-(start + case.count) // BLOCK) for start in case.starts]
    free = list(range(sum(needed)))
    if case.scattered:
        Random(0).shuffle(free)
    spans = []
    for start, count in zip(case.starts, needed, strict=True):
        table = BlockTable()
        table.extend(free[:count])
        free = free[count:]
        spans.append(Span(start, case.count, table))
    return spans


def call(case: Case, shape: Shape, dtype: torch.dtype, kernel: Kernel | None) -> Callable[[], None]:
    """Attention of all layers, planned anew each time, as an iteration does."""
    spans = spans_of(case)
    slots = BLOCK * sum(len(span.table.blocks) for span in spans)

    def random(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, shape.dim).to(dtype)

    caches = [
        LayerCache(random(slots, shape.kv_heads), random(slots, shape.kv_heads))
        for _ in range(LAYERS)
    ]
    tokens = case.count * len(spans)
    query, new = random(tokens, shape.heads), random(tokens, shape.kv_heads)

    def run() -> None:
        batch = PagedBatch(caches, BLOCK, spans, lambda _: None, kernel=kernel)
        for layer in range(LAYERS):
            batch.attend(layer, query, new, new, None, None)

    return run


def fastest(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    best = [float("inf")] * len(runs)
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for i, run in enumerate(runs):
                began = time.thread_time()
                run()
                if turn:  # the first one warms
                    best[i] = min(best[i], time.thread_time() - began)
    return best


def limits(dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """GFLOP/s of a linear layer, GB/s of reading 256 MB."""
    a, weight = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    layer, memory = linear_of(weight, None), torch.ones(1 << 26)
    product, read = fastest([lambda: layer(a), memory.sum], rounds)
    return 2 * 1024**3 / product / 1e9, memory.nbytes / read / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", nargs=3, type=int, default=(8, 4, 64), metavar="N",
                        help="query heads, KV heads, head size")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    kernel, shape = kernel_of(True), Shape(*asked.heads)
    torch.set_num_threads(1)
    print(f"{shape}; one thread of {processor()}; load {os.getloadavg()[0]:.1f}")
    rows = []
    for name in asked.dtypes:
        dtype = getattr(torch, name)
        product, read = limits(dtype, asked.rounds)
        print(f"{name}: a linear layer reaches {product:.0f} GFLOP/s, reading {read:.0f} GB/s")
        for case in CASES:
            runs = [call(case, shape, dtype, which) for which in (kernel, None)]
            ours, theirs = fastest(runs, asked.rounds)
            work, limit, unit = 4 * shape.heads * shape.dim * pairs(case), product, "GFLOP/s"
            if case.decodes:
                work = 2 * shape.kv_heads * shape.dim * dtype.itemsize * pairs(case)
                limit, unit = read, "GB/s"
            rate, other = (LAYERS * work / seconds / 1e9 for seconds in (ours, theirs))
            rows.append((name, case.name, unit, rate, other, rate / limit))
            print(
                f"  {case.name:<26} {ours * 1e3:7.2f} ms, {rate:6.1f} {unit} ({rate / limit:.0%}); "
                f"torch {theirs * 1e3:7.2f} ms, {other:6.1f}: {theirs / ours:.2f} times",
                flush=True,
            )
    print(json.dumps({"bench": "attention", "processor": processor(), "rows": rows}))


if __name__ == "__main__":
    main()
