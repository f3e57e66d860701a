"""Summaries as text. The first part is the table of `vllm bench serve` byte for byte, since people
parse it; Kvasir's own sections follow in the same layout. Simulate, bench and compare share it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvasir.core.units import GB, show_bytes
from kvasir.measure.distribution import Dist
from kvasir.measure.summary import Summary

WIDTH: Final = 50
LATENCIES: Final = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)


def table(summary: Summary) -> str:
    """The whole table, without a newline at its end."""
    return "\n".join([*_vllm_rows(summary), *_own_rows(summary), "=" * WIDTH])


def vllm_table(summary: Summary) -> str:
    """Only what `vllm bench serve` prints, without a newline at its end."""
    return "\n".join([*_vllm_rows(summary), "=" * WIDTH])


def _row(label: str, value: str | int) -> str:
    return f"{label:<40} {value:<10}"


def _number(label: str, value: float) -> str:
    return f"{label:<40} {round(value, 2) + 0.0:<10.2f}"  # + 0.0: no row says -0.00


def _section(title: str) -> str:
    return f"{title:-^{WIDTH}}"


# --- vLLM's part ----------------------------------------------------------------------------------


def _vllm_rows(s: Summary) -> Iterator[str]:
    yield f"{' Serving Benchmark Result ':=^{WIDTH}}"
    yield _row("Successful requests:", s.completed)
    yield _row("Failed requests:", s.failed)
    if s.max_concurrency is not None:
        yield _row("Maximum request concurrency:", s.max_concurrency)
    if s.request_rate is not None:
        yield _number("Request rate configured (RPS):", s.request_rate)
    yield _number("Benchmark duration (s):", s.duration_s)
    yield _row("Total input tokens:", s.input_tokens)
    yield _row("Total generated tokens:", s.output_tokens)
    yield _number("Request throughput (req/s):", s.per_second(s.completed))
    if s.goodput is not None:
        yield _number("Request goodput (req/s):", s.goodput)
    yield _number("Output token throughput (tok/s):", s.per_second(s.output_tokens))
    if s.peak_output_tokens_per_s is not None:
        yield _number("Peak output token throughput (tok/s):", s.peak_output_tokens_per_s)
    if s.peak_concurrency is not None:
        yield _number("Peak concurrent requests:", s.peak_concurrency)
    tokens = s.input_tokens + s.output_tokens
    yield _number("Total token throughput (tok/s):", s.per_second(tokens))
    for attribute, short, title in LATENCIES:
        yield _section(title)
        yield from _latency_rows(short, getattr(s, attribute))


def _latency_rows(short: str, dist: Dist) -> Iterator[str]:
    yield _number(f"Mean {short} (ms):", dist.mean_s * 1e3)
    yield _number(f"Median {short} (ms):", dist.median_s * 1e3)
    for percentile, seconds in dist.percentiles:
        yield _number(f"P{percentile:g} {short} (ms):", seconds * 1e3)


# --- Kvasir's part --------------------------------------------------------------------------------


def _own_rows(s: Summary) -> Iterator[str]:
    yield from _goodput_rows(s)
    yield from _split_rows(s)
    yield from _cache_rows(s)
    yield from _counted("KV Bytes Moved", _shown(s.bytes_by_tier))
    yield from _counted("Errors", s.errors)
    if s.notes:
        yield _section("Notes")
    for note in s.notes:
        yield from textwrap.wrap(note, WIDTH, initial_indent="* ", subsequent_indent="  ")


def _goodput_rows(s: Summary) -> Iterator[str]:
    if s.slo is None:
        return
    yield _section("Goodput")
    limits = f"{s.slo.ttft_s * 1e3:g} / {s.slo.tpot_s * 1e3:g}"
    if s.slo.itl_p99_s is not None:
        limits += f" / {s.slo.itl_p99_s * 1e3:g}"
    names = "TTFT / TPOT" if s.slo.itl_p99_s is None else "TTFT / TPOT / p99 ITL"
    yield _row(f"SLO {names} (ms):", limits)
    yield _row("Good requests (all limits met):", s.slo.good)
    yield _number("SLO attainment (%):", 100 * s.slo.attainment)
    yield _number("TTFT attainment (%):", 100 * s.slo.ttft_met / max(s.slo.total, 1))
    yield _number("TPOT attainment (%):", 100 * s.slo.tpot_met / max(s.slo.total, 1))
    if s.gpus and s.goodput_per_gpu is not None:
        yield _row("GPUs:", s.gpus)
        yield f"{'Goodput per GPU (req/s):':<40} {s.goodput_per_gpu:<10.4f}"


def _split_rows(s: Summary) -> Iterator[str]:
    if s.split is None:
        return
    yield _section("Time to First Token, Parts")
    if s.first_token:
        yield _row("First token made by:", s.first_token)
    yield _number("Mean queue (ms):", s.split.queue_s * 1e3)
    yield _number("Mean prefill (ms):", s.split.prefill_s * 1e3)
    if s.first_token != "prefill":
        yield _number("Mean transfer (ms):", s.split.transfer_s * 1e3)
    yield _number("Mean first step (ms):", s.split.first_step_s * 1e3)
    yield _number("Mean other (ms):", s.split.other_s * 1e3)
    if s.first_token == "prefill":
        yield _number("Mean transfer, after it (ms):", s.split.transfer_s * 1e3)
    if s.split.second_token_delay_s is not None and s.first_token != "decode":
        yield _number("Mean second token delay (ms):", s.split.second_token_delay_s * 1e3)


def _cache_rows(s: Summary) -> Iterator[str]:
    yield _section("Prefix Cache and Paths")
    yield _row("Cached input tokens:", s.cached_tokens)
    yield _number("Cache hit ratio (%):", 100 * s.cache_hit_ratio)
    if s.prefix is not None:
        p = s.prefix
        yield _number("... on any worker (%):", 100 * p.ratio(p.attainable_tokens))
        if p.infinite_tokens is not None:
            yield _number("... in one infinite cache (%):", 100 * p.ratio(p.infinite_tokens))
    for path, count in s.paths.items():
        yield _row(f"Requests {path}:", count)


def _shown(sizes: dict[str, int]) -> dict[str, str]:
    return {name: show_bytes(size) for name, size in sizes.items()}


def _counted(title: str, values: dict[str, str] | dict[str, int]) -> Iterator[str]:
    if values:
        yield _section(title)
    for name, value in values.items():
        yield _row(f"{name[:39]}:", value)


# --- several runs ---------------------------------------------------------------------------------

LABEL: Final = 34
COLUMN: Final = 22


def compare_table(runs: Sequence[tuple[str, Summary]]) -> str:
    """One column a run; later ones say how many times the first run's figure theirs is.

    Raises ValueError when there is no run.
    """
    if not runs:
        raise ValueError("nothing to compare")
    names = "".join(f"{name[: COLUMN - 2]:>{COLUMN}}" for name, _ in runs)
    lines = [f"{'':<{LABEL}}{names}", "-" * (LABEL + COLUMN * len(runs))]
    tail = max((p for p, _ in runs[0][1].ttft.percentiles), default=99.0)
    rows = zip(*(_figures(summary, tail) for _, summary in runs), strict=True)
    lines += [_compared(row) for row in rows if any(f.value is not None for f in row)]
    for name, summary in runs:
        for note in summary.notes:
            lines += textwrap.wrap(f"* {name}: {note}", 100, subsequent_indent="  ")
    return "\n".join(lines)


class Figure(NamedTuple):
    label: str
    value: float | None
    decimals: int = 2


def _figures(s: Summary, tail: float) -> list[Figure]:
    """The same labels in the same order for every summary; `tail` is the percentile to show."""
    tokens = s.input_tokens + s.output_tokens
    figures = [
        Figure("Successful requests", s.completed, 0),
        Figure("Failed requests", s.failed, 0),
        Figure("GPUs", s.gpus, 0),
        Figure("Request throughput (req/s)", s.per_second(s.completed)),
        Figure("Request goodput (req/s)", s.goodput),
        Figure("Goodput per GPU (req/s)", s.goodput_per_gpu, 4),
        Figure("SLO attainment (%)", 100 * s.slo.attainment if s.slo else None),
        Figure("Output token throughput (tok/s)", s.per_second(s.output_tokens)),
        Figure("Total token throughput (tok/s)", s.per_second(tokens)),
    ]
    for attribute, short, _ in LATENCIES:
        dist: Dist = getattr(s, attribute)
        at_tail = dict(dist.percentiles).get(tail)
        figures.append(Figure(f"Mean {short} (ms)", dist.mean_s * 1e3))
        figures.append(Figure(f"Median {short} (ms)", dist.median_s * 1e3))
        figures.append(Figure(f"P{tail:g} {short} (ms)", at_tail and at_tail * 1e3))
    figures.append(Figure("Cache hit ratio (%)", 100 * s.cache_hit_ratio))
    figures.append(Figure("KV bytes moved (GB)", sum(s.bytes_by_tier.values()) / GB))
    return figures


def _compared(row: Sequence[Figure]) -> str:
    base = row[0].value
    cells = [_cell(row[0], None), *(_cell(figure, base) for figure in row[1:])]
    return f"{row[0].label:<{LABEL}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)


def _cell(figure: Figure, base: float | None) -> str:
    if figure.value is None:
        return "-"
    ratio = f" (x{figure.value / base:.2f})" if base else ""
    return f"{figure.value:.{figure.decimals}f}{ratio}"
