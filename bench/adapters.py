"""What LoRA adapters cost the torch engine: a decode step under none to sixteen, and reading one.

    OMP_NUM_THREADS=1 python -m bench.adapters [--batch 16] [--rank 16] [--rounds 40]

The 41.6 M-parameter Qwen3 shape of bench/engine.py with random weights, adapters on all seven
linears of each layer, one thread, CPU seconds of that thread; the cases take turns, medians. The
bare sum of a case's small matmuls is its limit: what is above it is Python and gathering rows.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvasir.core.effects import Row, Step
from kvasir.core.request import Adapter, Sampling
from kvasir.engine.lora import read_lora
from kvasir.engine.peft import adapter_of
from kvasir.engine.tiny import make_tiny
from kvasir.engine.torch_runner import TorchRunner
from tests.adapters import write_adapter

SHAPE = {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64,
         "intermediate": 1536, "vocab": 32_000, "tied": True}  # fmt: skip
CONTEXT = 128
GREEDY = Sampling(temperature=0.0, ignore_eos=True)


class Case(NamedTuple):
    """Adapters of the batch's rows, in turn; None: a row without one."""

    name: str
    adapters: tuple[Adapter | None, ...]


class Hooks:
    def layer_done(self, layer: int) -> None: ...

    def sampled(self, batch: Any) -> None: ...

    def cut(self) -> bool:
        return False


class Bench:
    """One runner; a batch of rows for each case, with the prompt in its KV."""

    def __init__(self, folder: Path, cases: list[Case], batch: int, dtype: Any) -> None:
        per_row = -(-(CONTEXT + 256) // 16)
        self.runner = TorchRunner(
            folder, blocks_count=per_row * batch * len(cases), dtype=dtype, adapters_max=32
        )
        self._step = 0
        self._positions = dict.fromkeys((case.name for case in cases), CONTEXT)
        self._batch = batch
        for c, case in enumerate(cases):
            for i in range(batch):
                name, first = f"{case.name}/{i}", (c * batch + i) * per_row
                adapter = case.adapters[i % len(case.adapters)]
                if adapter is not None:
                    self.runner.adapters.load(adapter, (name, 1))
                self.runner.open(name, 1, [(i * 7 + j) % 250 for j in range(CONTEXT)], 0, b"")
                self.runner.adopt(name, 1, range(first, first + per_row))
            self._run([self._row(case, i, 0, CONTEXT) for i in range(batch)])

    def _row(self, case: Case, i: int, start: int, count: int) -> Row:
        index = start + count - CONTEXT
        return Row(f"{case.name}/{i}", 1, start, count, sample=True, index=index, end_at=10_000,
                   sampling=GREEDY)  # fmt: skip

    def _run(self, rows: list[Row]) -> None:
        self._step += 1
        self.runner.step(Step(self._step, tuple(rows)), Hooks())

    def decode(self, case: Case) -> float:
        """CPU seconds of one step."""
        at = self._positions[case.name]
        self._positions[case.name] += 1
        rows = [self._row(case, i, at, 1) for i in range(self._batch)]
        return cpu_s(lambda: self._run(rows))


def cpu_s(action: Callable[[], Any]) -> float:
    began = time.thread_time()
    action()
    return time.thread_time() - began


def floor_s(folder: Path, case: Case, batch: int, dtype: torch.dtype) -> float:
    """The matmuls of a case alone, rows already side by side."""
    groups: dict[Adapter, int] = {}
    for i in range(batch):
        adapter = case.adapters[i % len(case.adapters)]
        if adapter is not None:
            groups[adapter] = groups.get(adapter, 0) + 1
    work = []
    for adapter, rows in groups.items():
        for pair in read_lora(adapter, folder).pairs.values():
            work.append((pair, torch.randn(rows, pair.down.shape[1], dtype=dtype)))

    def run() -> None:
        for pair, x in work:
            pair.delta(x)

    with torch.inference_mode():
        return statistics.median(cpu_s(run) for _ in range(20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = make_tiny(root / "base", "qwen3", **SHAPE)
        written = [write_adapter(root / f"a{i}", folder, r=args.rank, seed=i) for i in range(16)]
        adapters = [adapter_of(one.name, one, str(folder)) for one in written]
        cases = [
            Case("none", (None,)), Case("one for all", tuple(adapters[:1])),
            Case("one for a quarter", (adapters[0], None, None, None)),
            Case("4", tuple(adapters[:4])), Case("16", tuple(adapters)),
        ]  # fmt: skip
        found = [figures(folder, cases, args, dtype) for dtype in ("float32", "bfloat16")]
        nbytes = (root / "a0" / "adapter_model.safetensors").stat().st_size
        read_s = [cpu_s(lambda: read_lora(adapters[1], folder)) for _ in range(9)]
        read = {"bytes": nbytes, "cpu_s": statistics.median(read_s)}
    print(f"\nreading one ({nbytes / 1e6:.1f} MB): {1e3 * read['cpu_s']:.1f} ms of CPU")
    print(json.dumps({"batch": args.batch, "rank": args.rank, "steps": found, "read": read}))


def figures(
    folder: Path, cases: list[Case], args: argparse.Namespace, dtype: Any
) -> dict[str, Any]:
    bench = Bench(folder, cases, args.batch, dtype)
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            times[case.name].append(bench.decode(case))
    base = statistics.median(times["none"])
    print(f"\n{dtype}, batch {args.batch}, rank {args.rank}, one thread")
    print(f"{'adapters in the batch':24}{'step, ms':>10}{'over none':>11}{'matmuls alone, ms':>19}")
    rows = {}
    for case in cases:
        step = statistics.median(times[case.name])
        floor = floor_s(folder, case, args.batch, getattr(torch, dtype))
        rows[case.name] = {"step_s": step, "over": step / base, "matmuls_s": floor}
        print(f"{case.name:24}{1e3 * step:10.2f}{step / base:10.2f}x{1e3 * floor:19.2f}")
    return {"dtype": dtype, "cases": rows}


if __name__ == "__main__":
    main()
