"""The bench against measured servers, on a file of made-up rows: that it reads, runs and counts."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import TYPE_CHECKING

from bench import accuracy
from bench.accuracy import Constants, errors
from bench.silicon import read

if TYPE_CHECKING:
    import pytest

LAYOUT = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
COLUMNS = [
    "id", "backend", "backend_version", "model_path", "system", "precision", "mode", "isl", "osl",
    "gemm_quant_mode", "moe_quant_mode", "batch_size", *LAYOUT,
    *(f"{role}_{name}" for role in ("prefill", "decode")
      for name in ("batch_size", "num_workers", *LAYOUT)),
    "silicon_ttft_ms", "silicon_tpot_ms",
]  # fmt: skip
ROW = {
    "backend": "vllm", "backend_version": "0.19.0", "model_path": "Qwen/Qwen3-32B",
    "system": "h100_sxm", "precision": "fp8", "mode": "agg", "isl": "512", "osl": "8",
    "gemm_quant_mode": "fp8", "batch_size": "4", "tp_size": "2", "pp_size": "1",
    "attention_dp_size": "1", "silicon_ttft_ms": "100", "silicon_tpot_ms": "10",
}  # fmt: skip


def file_of(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "rows.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows({**ROW, **row} for row in rows)
    return path


def test_rows_are_simulated_once_a_load_and_compared_with_their_own_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(
        tmp_path,
        {"id": "a"},
        {"id": "b", "silicon_ttft_ms": "200"},
        {"id": "c", "model_path": "nobody/knows"},
    )
    cases, skipped = read(path)
    assert [case.id for case in cases] == ["a", "b"]
    assert [(one.id, one.why) for one in skipped] == [("c", "no shape of nobody/knows")]
    assert {case.coverage for case in cases} == {"headline"}

    runs = []
    simulate = accuracy.simulate
    monkeypatch.setattr(accuracy, "simulate", lambda *of: runs.append(of) or simulate(*of))
    found = errors(cases, Constants())
    assert len(runs) == 1
    assert found["a"].tpot == found["b"].tpot
    halved = found["a"].ttft - found["b"].ttft
    assert abs(halved - 0.6931) < 1e-3  # the logarithm of 2
