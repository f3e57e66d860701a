"""One run of DynoSim (NVIDIA Dynamo's offline replay) in this process: a peer of `bench/sim.py`.

Runs in the peer's own environment (`bench/peers.sh`); imports nothing of Kvasir.

    .peers/dynosim/bin/python bench/dynosim.py TRACE.jsonl --block 64 --prefix-cache

4 prefill and 4 decode engines, round robin, its own uncalibrated time model; KV travels at 100 GB/s
(8 NICs of 12.5) without contention. Prints one JSON line; CPU seconds are of the whole process.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource

BLOCKS, KV_TOKEN_BYTES, KV_GB_PER_S = 16384, 327_680, 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--prefix-cache", action="store_true")
    flags = parser.parse_args()
    os.environ.setdefault("DYNAMO_SKIP_PYTHON_LOG_INIT", "1")
    from dynamo.llm import MockEngineArgs
    from dynamo.replay import run_trace_replay

    engine = {
        "block_size": flags.block, "num_gpu_blocks": BLOCKS, "kv_bytes_per_token": KV_TOKEN_BYTES,
        "kv_transfer_bandwidth": KV_GB_PER_S, "enable_prefix_caching": flags.prefix_cache,
    }  # fmt: skip
    prefill, decode = (
        MockEngineArgs.from_json(json.dumps(engine | {role: True}))
        for role in ("is_prefill", "is_decode")
    )
    report = run_trace_replay(
        flags.trace, prefill_engine_args=prefill, decode_engine_args=decode,
        num_prefill_workers=4, num_decode_workers=4, router_mode="round_robin",
        trace_block_size=flags.block,
    )  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "version": importlib.metadata.version("ai-dynamo-runtime"),
        "cpu_s": round(used.ru_utime + used.ru_stime, 3),
        "requests": report["completed_requests"],
        "peak_mib": round(used.ru_maxrss / 1024, 1),
        "ttft_mean_s": report["mean_ttft_ms"] / 1e3,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
