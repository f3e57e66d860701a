"""A summary as a result file: the keys of `vllm bench serve`'s JSON, and Kvasir's own beside them.

The bytes depend on the summary alone: sorted keys, shortest exact floats, no time, path or host.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from kvasir.core.errors import ConfigError
from kvasir.measure.distribution import Dist
from kvasir.measure.summary import Summary

RESULT_VERSION = 1


def result(summary: Summary) -> dict[str, Any]:
    """Plain JSON types: ms under vLLM's names, and `summary` with all of it in seconds."""
    latencies = {"ttft": summary.ttft, "tpot": summary.tpot, "itl": summary.itl}
    own = {
        "slo_attainment": summary.slo.attainment if summary.slo else None,
        "goodput_per_gpu": summary.goodput_per_gpu,
        "total_cached_tokens": summary.cached_tokens,
        "cache_hit_ratio": summary.cache_hit_ratio,
        "result_version": RESULT_VERSION,
        "summary": msgspec.to_builtins(summary),
    }
    return _vllm(summary) | _milliseconds(latencies | {"e2el": summary.e2el}) | own


def canonical(content: dict[str, Any]) -> bytes:
    """The one byte form of a result. Raises ValueError for a float that is not finite."""
    text = json.dumps(content, sort_keys=True, indent=2, allow_nan=False)
    return text.encode() + b"\n"


def read_summary(data: bytes, *, where: str = "result") -> Summary:
    """The summary of a result file. Raises ConfigError when it is not one of ours."""
    try:
        return msgspec.json.decode(data, type=_File).summary
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"not a result file: {error}",
            where=where,
            next_step="name a file that `kvasir simulate` or `kvasir bench` wrote",
        ) from None


class _File(msgspec.Struct):
    summary: Summary


def _vllm(summary: Summary) -> dict[str, Any]:
    tokens = summary.input_tokens + summary.output_tokens
    return {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.input_tokens,
        "total_output_tokens": summary.output_tokens,
        "request_throughput": summary.per_second(summary.completed),
        "request_goodput": summary.goodput,
        "output_throughput": summary.per_second(summary.output_tokens),
        "total_token_throughput": summary.per_second(tokens),
        "max_output_tokens_per_s": summary.peak_output_tokens_per_s,
        "max_concurrent_requests": summary.peak_concurrency,
        "max_concurrency": summary.max_concurrency,
        "request_rate": "inf" if summary.request_rate is None else summary.request_rate,
    }


def _milliseconds(latencies: dict[str, Dist]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, dist in latencies.items():
        values[f"mean_{name}_ms"] = dist.mean_s * 1e3
        values[f"median_{name}_ms"] = dist.median_s * 1e3
        values[f"std_{name}_ms"] = dist.std_s * 1e3
        for percentile, seconds in dist.percentiles:
            values[f"p{percentile:g}_{name}_ms"] = seconds * 1e3
    return values
