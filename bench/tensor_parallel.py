"""What ranks bring the torch engine on a CPU: tokens a second on one, and on several processes.

    OMP_NUM_THREADS=1 python -m bench.tensor_parallel [--tp 2] [--rounds 5] [--dtype float32]

Two Qwen3 shapes with random weights, one thread a rank, seconds of the clock (ranks wait for each
other, so CPU seconds would flatter them); the degrees take turns, and the best of the rounds
counts: what else runs on the machine only slows them. The limit of a gain is the number of ranks,
on as many idle cores; the load when it ended is printed beside. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kvasir.engine.parallel.team import Team
from kvasir.engine.tiny import make_tiny
from kvasir.engine.torch_runner import TorchRunner
from kvasir.transfer.arena import Arena
from tests.engine_driver import Driver, Job, close

SMALL = {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64,
         "intermediate": 1536, "vocab": 32_000, "tied": True}  # fmt: skip
LARGE = {"layers": 12, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64,
         "intermediate": 3072, "vocab": 32_000, "tied": True}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"41.6 M": SMALL, "184 M": LARGE}
PROMPT, OUTPUTS, BATCH_MAX = 256, 32, 8
BLOCKS = -(-(PROMPT + OUTPUTS) // 16)


def runner_of(folder: Path, tp: int, dtype: Any) -> TorchRunner:
    arena = Arena()
    team = Team(tp, arena) if tp > 1 else None
    return TorchRunner(
        folder, blocks_count=BLOCKS * BATCH_MAX, dtype=dtype, allocate=arena.take, team=team
    )


def measured(runner: TorchRunner, batch: int) -> tuple[float, float]:
    """Tokens a second of prefill and of decoding, of `batch` prompts together."""
    drive = Driver(runner)
    jobs = [
        Job(f"j{i}", [(7 * i + j) % 250 for j in range(PROMPT)], OUTPUTS,
            list(range(i * BLOCKS, (i + 1) * BLOCKS)))
        for i in range(batch)
    ]  # fmt: skip
    for job in jobs:
        drive.open(job)
    began = time.perf_counter()
    drive.step(jobs)
    prompts = time.perf_counter()
    drive.run(jobs)
    end = time.perf_counter()
    close(runner, jobs)
    return batch * PROMPT / (prompts - began), batch * (OUTPUTS - 1) / (end - prompts)


def compare(
    name: str, degrees: list[int], batches: list[int], rounds: int, dtype: Any
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(folder, **SHAPES[name], context_max=2048)
        runners = {tp: runner_of(Path(folder), tp, dtype) for tp in degrees}
        try:
            return [row_of(name, runners, batch, rounds) for batch in batches]
        finally:
            for runner in runners.values():
                runner.stop()


def row_of(
    name: str, runners: dict[int, TorchRunner], batch: int, rounds: int
) -> dict[str, Any]:
    seen: dict[int, list[tuple[float, float]]] = {tp: [] for tp in runners}
    for _ in range(rounds + 1):  # the first one warms up
        for tp, runner in runners.items():
            seen[tp].append(measured(runner, batch))
    row: dict[str, Any] = {"parameters": name, "batch": batch}
    for tp, figures in seen.items():
        prefill, decode = zip(*figures[1:], strict=True)
        row[f"prefill_tp{tp}"] = round(max(prefill), 1)
        row[f"decode_tp{tp}"] = round(max(decode), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, BATCH_MAX])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    degrees = [1, args.tp]
    rows = []
    for name in args.shapes:
        rows += compare(name, degrees, args.batches, args.rounds, args.dtype)
    print("| parameters | batch | prefill, tokens/s | decode, tokens/s |\n|---|---|---|---|")
    for row in rows:
        cells = [
            f"{row[f'{kind}_tp1']:.0f} to {row[f'{kind}_tp{args.tp}']:.0f} "
            f"({row[f'{kind}_tp{args.tp}'] / row[f'{kind}_tp1']:.2f}x)"
            for kind in ("prefill", "decode")
        ]
        print(f"| {row['parameters']} | {row['batch']} | {' | '.join(cells)} |")
    load = os.getloadavg()[0]
    print(json.dumps({"tp": args.tp, "dtype": args.dtype, "load": load, "rows": rows}))


if __name__ == "__main__":
    main()
