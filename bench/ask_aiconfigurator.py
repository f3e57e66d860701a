"""AIConfigurator's own answers for rows of measured servers, one JSON line a row on stdout.

    tools/aiconfigurator.sh VENV                       # installs it beside, never into, Kvasir's
    VENV/bin/python bench/ask_aiconfigurator.py FILE > ANSWERS

Runs in AIConfigurator's environment, so it imports nothing of Kvasir. Each row is asked as its
users would: model, system, backend, lengths, batch size and layout; formats are left to its own
model files, or given where it has no file of the checkpoint; its version of vLLM is its newest.
Rows that it does not answer carry its error. `python -m bench.accuracy --aiconfigurator ANSWERS`
puts the answers beside ours.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

# What the rows call a checkpoint, by precision: the name of AIConfigurator's file, and formats.
FP8 = {"gemm_quant_mode": "fp8", "kvcache_quant_mode": "fp8"}
FP4 = {"gemm_quant_mode": "nvfp4", "kvcache_quant_mode": "fp8"}
NAMES: dict[tuple[str, str], tuple[str, dict[str, str]]] = {
    ("meta-llama/Llama-3.1-70B", "fp8"): ("nvidia/Llama-3.1-70B-Instruct-FP8", {}),
    ("meta-llama/Llama-3.1-70B", "fp4"): ("meta-llama/Meta-Llama-3.1-70B", FP4),
    ("nvidia/Llama-3.1-8B-Instruct-FP8", "fp8"): ("meta-llama/Meta-Llama-3.1-8B", FP8),
    ("MiniMaxAI/MiniMax-M2.5", "fp4"): ("nvidia/MiniMax-M2.5-NVFP4", {}),
    ("Qwen/Qwen3-32B", "fp8"): ("Qwen/Qwen3-32B", {"gemm_quant_mode": "fp8"}),
}
Row = dict[str, str]


class Answer(NamedTuple):
    ttft_s: float | None
    tpot_s: float | None
    error: str


def question(row: Row) -> dict[str, Any]:
    """Arguments of `cli_estimate`."""
    model = row["model_path"]
    name, formats = NAMES.get((model, row["precision"]), (model, {}))
    asked: dict[str, Any] = {
        "model_path": name, "system_name": row["system"], "mode": row["mode"],
        "backend_name": row["backend"], "isl": int(row["isl"]), "osl": int(row["osl"]), **formats,
    }  # fmt: skip
    if row["mode"] == "agg":
        return asked | {"batch_size": int(row["batch_size"])} | _layout(row, "")
    asked |= _layout(row, "prefill_") | _layout(row, "decode_")
    for key in ("prefill_batch_size", "prefill_num_workers", "decode_batch_size",
                "decode_num_workers"):  # fmt: skip
        asked[key] = int(row[key] or 1)
    return asked


def _layout(row: Row, prefix: str) -> dict[str, int]:
    keys = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    return {prefix + key: int(row[prefix + key]) for key in keys if row[prefix + key]}


def ask(asked: dict[str, Any]) -> Answer:
    from aiconfigurator.cli.api import cli_estimate

    try:
        found = cli_estimate(**asked)
    except Exception as error:  # whatever keeps it from answering is what the row shows
        return Answer(None, None, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return Answer(found.ttft / 1e3, found.tpot / 1e3, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="rows in the shape of silicon_sample.csv.gz")
    parser.add_argument("--backend", default="vllm", help="rows of this backend")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    known: dict[str, Answer] = {}
    with gzip.open(flags.file, "rt", newline="") as file:
        for row in csv.DictReader(file):
            if row["backend"] != flags.backend:
                continue
            asked = question(row)
            key = json.dumps(asked, sort_keys=True)
            if key not in known:
                known[key] = ask(asked)
            print(json.dumps({"id": row["id"], **known[key]._asdict()}), flush=True)
    print(f"{len(known)} different questions", file=sys.stderr)


if __name__ == "__main__":
    main()
