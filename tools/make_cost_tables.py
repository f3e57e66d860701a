"""Turn AIConfigurator's csv tables into the package's compact form.

    python tools/make_cost_tables.py SOURCE_FOLDER [--out src/kvasir/cost/data]

Reads SYSTEM--TABLE--VERSION.csv.gz, writes one SYSTEM.msgpack.gz a system: the latencies alone, as
16-bit logarithmic codes over named axes (format: src/kvasir/cost/tables.py). The same input gives
the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvasir.cost.tables import Key, Packed, Table, encode

SOURCE = "AIConfigurator (NVIDIA), commit 095f58a51, Apache-2.0; vLLM {version}"


class Recipe(NamedTuple):
    """What of a csv becomes an operator: rows with `only`; `axes` for each of `keys`."""

    op: str
    file: str
    keys: tuple[str, ...]
    axes: tuple[str, ...]
    only: dict[str, str]


ATTENTION = ("kv_cache_dtype", "num_heads", "num_key_value_heads", "head_dim", "window_size")
RECIPES = (
    Recipe("gemm", "gemm_perf", ("gemm_dtype",), ("n", "k", "m"), {}),
    Recipe("prefill_attention", "context_attention_perf", ATTENTION, ("batch_size", "isl"), {}),
    Recipe("decode_attention", "generation_attention_perf", ATTENTION,
           ("batch_size", "context"), {}),
    Recipe("moe", "moe_perf",
           ("moe_dtype", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size",
            "moe_ep_size", "distribution"), ("num_tokens",), {}),
    Recipe("all_reduce", "custom_allreduce_perf", ("num_gpus",), ("message_size",),
           {"backend": "vllm_graph"}),
    Recipe("all_reduce_eager", "custom_allreduce_perf", ("num_gpus",), ("message_size",),
           {"backend": "vllm_eager"}),
    Recipe("all_to_all", "nccl_perf", ("num_gpus",), ("message_size",),
           {"op_name": "alltoall", "nccl_dtype": "half"}),
    Recipe("all_gather", "nccl_perf", ("num_gpus",), ("message_size",),
           {"op_name": "all_gather", "nccl_dtype": "half"}),
    Recipe("reduce_scatter", "nccl_perf", ("num_gpus",), ("message_size",),
           {"op_name": "reduce_scatter", "nccl_dtype": "half"}),
)  # fmt: skip


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """Rows with what the recipes need added: decode context, and no window where none is named."""
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            row.setdefault("window_size", "0")
            if "step" in row:
                row["context"] = str(int(row["isl"]) + int(row["step"]))
            yield row


def plain(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def table(recipe: Recipe, path: Path) -> Table:
    """One operator's grid. Of several kernels that were measured at a point the fastest counts:
    the engine's own choice is tuned to be it."""
    found: dict[Key, dict[tuple[int, ...], float]] = {}
    for row in rows_of(path):
        if any(row[name] != value for name, value in recipe.only.items()):
            continue
        key = tuple(plain(row[name]) for name in recipe.keys)
        point = tuple(int(row[name]) for name in recipe.axes)
        grid = found.setdefault(key, {})
        seconds = float(row["latency"]) / 1e3
        grid[point] = min(seconds, grid.get(point, seconds))
    keys = sorted(found, key=lambda key: tuple((str(type(part)), part) for part in key))
    axes = tuple(
        tuple(sorted({point[i] for grid in found.values() for point in grid}))
        for i in range(len(recipe.axes))
    )
    codes = array("H")
    for key in keys:
        codes.extend(_grid(axes, found[key]))
    if sys.byteorder == "big":
        codes.byteswap()
    return Table(recipe.op, recipe.keys, recipe.axes, axes, tuple(keys), codes.tobytes())


def _grid(axes: tuple[tuple[int, ...], ...], grid: dict[tuple[int, ...], float]) -> list[int]:
    points: list[tuple[int, ...]] = [()]
    for axis in axes:
        points = [(*point, x) for point in points for x in axis]
    return [encode(grid[point]) if point in grid else 0 for point in points]


def pack(folder: Path, system: str) -> Packed:
    tables = []
    version = ""
    for recipe in RECIPES:
        (path,) = folder.glob(f"{system}--{recipe.file}--*.csv.gz")
        found = path.name.removesuffix(".csv.gz").rpartition("--")[2]
        if found.startswith("vllm-"):
            version = found.removeprefix("vllm-")
        tables.append(table(recipe, path))
    return Packed(system, SOURCE.format(version=version), tuple(tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("src/kvasir/cost/data"))
    flags = parser.parse_args()
    for system in sorted({p.name.split("--")[0] for p in flags.source.glob("*--*.csv.gz")}):
        packed = msgspec.msgpack.encode(pack(flags.source, system))
        path = flags.out / f"{system}.msgpack.gz"
        path.write_bytes(gzip.compress(packed, 9, mtime=0))
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
