"""Speed of the embedded engine beside transformers: output tokens per CPU second of one thread.

    python -m bench.engine [--repeat 3] [--dtypes float32 bfloat16] [--cases "1 x 128" ...]
    python -m bench.engine --device cuda     an 8B Llama shape on a GPU; says so where there is none

Every side is a fresh process, and the sides take turns; new prompts in each repeat; greedy, 64
outputs a prompt, prompts included in the rate. `generate` gets one batch: equal lengths as they
are, ragged ones padded on the left, its worst arrangement. `prefix 16` is 16 prompts that begin
with the same 1,024 tokens, against ourselves with nothing shared. The floor is the time of a decode
step's linear layers alone, packed as ours are. Where the compiled kernel is built (`make native`),
ours attends by it, and is measured against itself without it too (`torch`).

A script of ten lines says that `generate` is not slowed down by how it is called here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from bench.engine_cases import (
    BUDGET,
    CASES,
    SHAPE_WORDS,
    Case,
    Speed,
    Timing,
    make_model,
    processor,
    speed_of,
)
from kvasir.engine.native.build import library

ROOT: Final = Path(__file__).parents[1]
DTYPES: Final = ("float32", "bfloat16")
PREFIX: Final = "prefix 16"
AGAINST_HF: Final = ("1 x 128", "8 x 128", "ragged 16")
GOALS: Final = {
    ("1 x 128", "float32"): 1.15, ("1 x 128", "bfloat16"): 1.15, ("8 x 128", "float32"): 1.05,
    ("8 x 128", "bfloat16"): 1.15, ("ragged 16", "float32"): 4.0, ("ragged 16", "bfloat16"): 4.0,
    (PREFIX, "float32"): 2.0, (PREFIX, "bfloat16"): 2.0,
}  # fmt: skip
SCRIPT_GOAL: Final = 0.05
SCRIPT: Final = '''\
import time, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype=torch.{dtype})
model.generation_config.eos_token_id = None
prompts = torch.randint(300, 32000, ({batch}, 128))
model.generate(prompts, max_new_tokens=2, do_sample=False, pad_token_id=0)
began = time.process_time()
model.generate(prompts, max_new_tokens=64, do_sample=False, pad_token_id=0)
print({batch} * 64 / (time.process_time() - began))
'''


class Row(NamedTuple):
    """`ratio` of our rate to the other side's; `floor`: share of the linear layers in our step."""

    case: str
    dtype: str
    ours: Speed
    other: Speed
    against: str
    ratio: float
    step_ratio: float
    goal: float | None
    floor: float
    other_floor: float


def fresh(arguments: Sequence[str]) -> str:
    """The last line of a new process's output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:4])} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def side(name: str, dtype: str, folder: Path, seed: int, cases: Sequence[str]) -> dict[str, Any]:
    line = fresh(["-m", "bench.engine_side", name, dtype, str(folder), str(seed), *cases])
    found: dict[str, Any] = json.loads(line)
    return found


class Found(NamedTuple):
    """Timings by (side, case), floors in seconds by case, rates of the ten lines by batch."""

    timings: dict[tuple[str, str], list[Timing]]
    floors: dict[str, list[float]]
    ten_lines: dict[int, list[float]]


def measure(folder: Path, dtype: str, cases: Sequence[str], repeat: int) -> Found:
    found = Found(defaultdict(list), defaultdict(list), defaultdict(list))
    built = library().exists()
    plan = {
        "hf": [name for name in cases if name in AGAINST_HF], "ours": cases,
        "torch": cases if built else (),
        "apart": [name for name in cases if CASES[name].shared], "floor": cases,
    }  # fmt: skip
    for seed in range(repeat):
        for name, mine in plan.items():
            for case, value in side(name, dtype, folder, seed, mine).items() if mine else ():
                if name == "floor":
                    found.floors[case].append(value)
                else:
                    found.timings[name, case].append(Timing(*value["cpu"]))
        for batch in (1, 8):
            if f"{batch} x 128" in cases:
                found.ten_lines[batch].append(ten_lines(folder, dtype, batch))
    return found


def ten_lines(folder: Path, dtype: str, batch: int) -> float:
    path = folder / "ten_lines.py"
    path.write_text(SCRIPT.format(folder=folder, dtype=dtype, batch=batch), encoding="utf-8")
    return float(fresh([str(path)]))


def rows_of(found: Found, dtype: str, cases: Sequence[str]) -> list[Row]:
    rows = []
    for name in cases:
        against = "apart" if CASES[name].shared else "hf"
        floor = median(found.floors[name])
        rows.append(row(CASES[name], dtype, found.timings, against, floor))
        if found.timings["torch", name]:
            rows.append(row(CASES[name], dtype, found.timings, "torch", floor))
    return rows


def row(
    case: Case, dtype: str, timings: dict[tuple[str, str], list[Timing]], against: str, floor: float
) -> Row:
    ours, other = (speed_of(case, timings[name, case.name]) for name in ("ours", against))
    return Row(
        case.name, dtype, ours, other, against, ours.per_s / other.per_s,
        other.step_ms / ours.step_ms,
        None if against == "torch" else GOALS.get((case.name, dtype)),
        floor * 1e3 / ours.step_ms, floor * 1e3 / other.step_ms,
    )  # fmt: skip


def show(one: Row) -> None:
    ours, other = one.ours, one.other
    word = "" if one.goal is None else f", goal {one.goal}" + (
        " reached" if one.ratio >= one.goal else " MISSED"
    )
    print(
        f"{one.case:<10} {one.dtype:<9} ours {ours.per_s:6.1f} tok/s [{ours.per_s_min:.1f}-"
        f"{ours.per_s_max:.1f}], step {ours.step_ms:5.1f} ms ({one.floor:.0%} linear layers), "
        f"prefill {ours.prefill_per_s:6.0f}; {one.against} {other.per_s:6.1f} "
        f"[{other.per_s_min:.1f}-{other.per_s_max:.1f}], {other.step_ms:.1f} ms "
        f"({one.other_floor:.0%}), {other.prefill_per_s:.0f}: {one.ratio:.2f} times{word}, "
        f"steps {one.step_ratio:.2f}",
        flush=True,
    )


def show_ten_lines(found: Found, dtype: str) -> dict[str, Any]:
    """By batch, how far `generate` as called here is from the ten lines."""
    off = {}
    for batch, rates in found.ten_lines.items():
        case = f"{batch} x 128"
        rate = speed_of(CASES[case], found.timings["hf", case]).per_s
        off[case] = rate / median(rates) - 1
        print(
            f"{case:<10} {dtype:<9} ten lines {median(rates):.1f} tok/s [{min(rates):.1f}-"
            f"{max(rates):.1f}]; hf as called here {off[case]:+.1%}, goal within {SCRIPT_GOAL:.0%}"
        )
    return off


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    # With `--device cpu --shape tiny` the GPU's bench is rehearsed.
    parser.add_argument("--shape", choices=("8b", "tiny"), help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    cases = (*AGAINST_HF, PREFIX)
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    return parser.parse_args()


def main() -> None:
    asked = parsed()
    if asked.device == "cuda" or asked.shape is not None:
        from bench.engine_cuda import run

        print(json.dumps(run(asked.device, asked.shape or "8b")))
        return
    load = os.getloadavg()[0]
    by = "the compiled kernel" if library().exists() else "torch"
    print(f"{SHAPE_WORDS}; one thread of {processor()}; load {load:.1f}; token budget {BUDGET}")
    print(f"ours attends by {by}")
    rows, off = [], {}
    with tempfile.TemporaryDirectory() as home:
        folder = make_model(Path(home) / "model")
        for dtype in asked.dtypes:
            found = measure(folder, dtype, asked.cases, asked.repeat)
            rows += rows_of(found, dtype, asked.cases)
            for one in rows:
                if one.dtype == dtype:
                    show(one)
            off[dtype] = show_ten_lines(found, dtype)
    print("\nthe ten lines, run as `python ten_lines.py`:\n")
    print(SCRIPT.format(folder="model", dtype="float32", batch=8))
    print(json.dumps({
        "bench": "engine", "processor": processor(), "load": load, "repeat": asked.repeat,
        "hf_off_ten_lines": off,
        "rows": [{**one._asdict(), "ours": one.ours._asdict(), "other": one.other._asdict()}
                 for one in rows],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
