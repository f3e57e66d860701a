"""vLLM's side of bench/vllm.py; runs in vLLM's own environment, without this project.

    python bench/vllm_side.py eager|compiled DTYPE FOLDER CASES.json OUT.json

Each case is [[prompts to warm], [prompts of one output], [prompts of all outputs], outputs], as
token ids. Writes {"wall": {case: [whole, first]}, "cpu": ...}: seconds by the wall, and CPU seconds
of the process that computes. vLLM schedules in another one, which polls, and whose CPU seconds are
not counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
AMX_PROMPT = 1024  # a first prompt so long asks the kernel for AMX before a decode step needs it


def cpu_s(pid: int) -> float:
    """User and system seconds so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker() -> int:
    """The process below this one that has used most CPU without being this one's own child: the
    engine's core is a child, its worker a child of that."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="utf-8")
            parents[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
    children = {pid for pid, parent in parents.items() if parent == os.getpid()}
    grandchildren = [pid for pid, parent in parents.items() if parent in children]
    return max(grandchildren, key=cpu_s)


def main() -> None:
    mode, dtype, folder, cases, out = sys.argv[1:]
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder, dtype=dtype, enforce_eager=mode == "eager", block_size=32, max_num_seqs=16,
        max_num_batched_tokens=2048, max_model_len=2048, enable_prefix_caching=False,
    )  # fmt: skip

    def seconds(prompts: list[list[int]], outputs: int) -> tuple[float, float]:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=outputs, ignore_eos=True, detokenize=False
        )
        asked: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        computes = worker()
        began, cpu_began = time.perf_counter(), cpu_s(computes)
        answers = llm.generate(asked, sampling, use_tqdm=False)
        took = time.perf_counter() - began, cpu_s(computes) - cpu_began
        assert all(len(answer.outputs[0].token_ids) == outputs for answer in answers)
        return took

    seconds([[300 + i for i in range(AMX_PROMPT)]], 2)
    found: dict[str, dict[str, tuple[float, float]]] = {"wall": {}, "cpu": {}}
    for name, (warm, first, whole, outputs) in json.loads(Path(cases).read_bytes()).items():
        seconds(warm, 2)
        pairs = seconds(first, 1), seconds(whole, outputs)
        for clock, (first_s, whole_s) in zip(found, zip(*pairs, strict=True), strict=True):
            found[clock][name] = whole_s, first_s
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
