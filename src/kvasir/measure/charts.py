"""The charts of a run: what is drawn, and what is said about it. Page and plots share them.

Knows outcomes, a summary and, when it was sampled, detail. Charts without data are left out.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.units import GB, show_bytes, show_seconds
from kvasir.measure import svg
from kvasir.measure.detail import ITL_EDGES_S, Detail, LinkUse
from kvasir.measure.distribution import distribution
from kvasir.measure.summary import RequestOutcome, SloReport, Split, Summary, good, split_of
from kvasir.measure.svg import Chart, HeatRow, Series

WINDOWS: Final = 60
ROWS_MAX: Final = 24
TABLE_ROWS_MAX: Final = 200
PARTS: Final = ("queue", "prefill", "transfer", "first step", "other")
TIERS: Final = ("node", "rack", "pod", "core")


class Window(NamedTuple):
    """Requests that were sent within one stretch of the run. `attained` None: no SLO."""

    at_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    attained: float | None
    requests: int


def charts(
    summary: Summary, outcomes: Sequence[RequestOutcome], detail: Detail | None = None
) -> list[Chart]:
    """In the order in which a reader asks. `outcomes` need `start_s` for those over time."""
    windows = _windows(outcomes, summary)
    found = [
        _parts(summary, outcomes),
        _ttft(windows, summary.duration_s),
        _attainment(windows, summary),
        _itl(summary, detail),
        _links(detail),
        _cache(outcomes, summary),
    ]
    return [chart for chart in found if chart is not None]


class Plots(msgspec.Struct, frozen=True):
    """Charts of a run. A notebook shows them by itself; `save` makes a file of each."""

    charts: tuple[Chart, ...]

    def only(self, names: Sequence[str]) -> Plots:
        """These, in this order. Raises ConfigError for a chart that this run does not have."""
        known = {chart.name: chart for chart in self.charts}
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"no chart {name!r} of this run",
                    nearest=nearest(name, known),
                    next_step="links and itl need simulate(..., detail=True)",
                )
        return Plots(tuple(known[name] for name in names))

    def save(self, folder: str | Path) -> list[Path]:
        """`<name>.svg` of each, in a folder that is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = [Path(folder) / f"{chart.name}.svg" for chart in self.charts]
        for path, chart in zip(paths, self.charts, strict=True):
            path.write_text(chart.document(), encoding="utf-8")
        return paths

    def _repr_html_(self) -> str:
        style = f"<style>{svg.COLOURS}{svg.SHAPES}</style>"
        return style + "".join(chart.inline() for chart in self.charts)


# --- time to first token --------------------------------------------------------------------------


def parts_s(split: Split, first_token: str) -> tuple[float, ...]:
    """Seconds in the order of PARTS; what comes after the first token is no part of it."""
    late = first_token == "prefill"
    hand_over = (0.0, 0.0) if late else (split.transfer_s, split.first_step_s)
    return (split.queue_s, split.prefill_s, *hand_over, max(split.other_s, 0.0))


def _parts(s: Summary, outcomes: Sequence[RequestOutcome]) -> Chart | None:
    done = sorted((o for o in outcomes if o.ok), key=lambda o: (-o.ttft_s, o.request_id))
    groups = {"all requests": done}
    if len(done) >= 100:
        groups["slowest 10 %"] = done[: len(done) // 10]
        groups["slowest 1 %"] = done[: len(done) // 100]
    rows = []
    for label, members in groups.items():
        split = split_of(members, s.first_token)
        if split is not None:
            rows.append((label, parts_s(split, s.first_token)))
    if not rows:
        return None
    largest = max(range(len(PARTS)), key=lambda i: rows[0][1][i])
    by = f", made by {s.first_token}" if s.first_token else ""
    return Chart(
        "parts", "Time to first token: where it goes",
        f"Mean parts of the time to the first token{by}. The largest is {PARTS[largest]}, "
        f"{show_seconds(rows[0][1][largest])} of {show_seconds(math.fsum(rows[0][1]))}. "
        "Other: messages on their way, and attempts that were lost.",
        svg.stack_height(len(rows)), svg.stack(rows, PARTS), ("requests", *PARTS),
        tuple((label, *(f"{1e3 * v:.1f} ms" for v in values)) for label, values in rows),
    )  # fmt: skip


def _windows(outcomes: Sequence[RequestOutcome], summary: Summary) -> list[Window]:
    """Windows in which at least one request was served."""
    known = [o for o in outcomes if o.start_s is not None]
    if not known or summary.duration_s <= 0:
        return []
    width = summary.duration_s / WINDOWS
    bins: list[list[RequestOutcome]] = [[] for _ in range(WINDOWS)]
    for o, at in zip(known, _places(known, width), strict=True):
        bins[at].append(o)
    found = []
    for i, inside in enumerate(bins):
        done = [o.ttft_s for o in inside if o.ok]
        if done:
            dist = distribution(done, (90.0, 99.0))
            (_, p90), (_, p99) = dist.percentiles
            attained = _attained(inside, summary.slo)
            found.append(
                Window((i + 0.5) * width, dist.median_s, p90, p99, attained, len(inside))
            )
    return found


def _places(known: Sequence[RequestOutcome], width: float) -> Iterator[int]:
    """The window of each, from the first start on."""
    origin = min(o.start_s or 0.0 for o in known)
    for o in known:
        yield min(int(((o.start_s or 0.0) - origin) / width), WINDOWS - 1)


def _attained(inside: Sequence[RequestOutcome], slo: SloReport | None) -> float | None:
    if slo is None:
        return None
    return sum(o.ok and good(o, slo) for o in inside) / len(inside)


def _ttft(windows: Sequence[Window], span_s: float) -> Chart | None:
    if len(windows) < 2:
        return None
    worst = max(windows, key=lambda w: w.ttft_p99_s)
    series = [
        Series("p50", [w.ttft_p50_s for w in windows]),
        Series("p90", [w.ttft_p90_s for w in windows]),
        Series("p99", [w.ttft_p99_s for w in windows]),
    ]
    return Chart(
        "ttft", "Time to first token over time",
        f"By the time at which a request was sent. The p99 is worst around {worst.at_s:.0f} s: "
        f"{show_seconds(worst.ttft_p99_s)}.",
        svg.plot_height(), svg.lines([w.at_s for w in windows], series, "s", span_s),
        ("time", "requests", "p50", "p90", "p99"),
        tuple(
            (f"{w.at_s:.0f} s", f"{w.requests}", f"{w.ttft_p50_s:.3f} s", f"{w.ttft_p90_s:.3f} s",
             f"{w.ttft_p99_s:.3f} s")
            for w in windows
        ),
    )  # fmt: skip


def _attainment(windows: Sequence[Window], s: Summary) -> Chart | None:
    slo = s.slo
    if slo is None or len(windows) < 2:
        return None
    values = [100 * (w.attained or 0.0) for w in windows]
    low = min(range(len(values)), key=values.__getitem__)
    return Chart(
        "slo", "SLO attainment over time",
        f"Share of the requests sent in each stretch that met all limits (TTFT up to "
        f"{slo.ttft_s:g} s, TPOT up to {slo.tpot_s * 1e3:g} ms): {100 * slo.attainment:.1f} % in "
        f"all, least around {windows[low].at_s:.0f} s with {values[low]:.1f} %.",
        svg.plot_height(),
        svg.lines([w.at_s for w in windows], [Series("good", values)], "%", s.duration_s, 100.0),
        ("time", "requests", "attained"),
        tuple(
            (f"{w.at_s:.0f} s", f"{w.requests}", f"{v:.1f} %")
            for w, v in zip(windows, values, strict=True)
        ),
    )  # fmt: skip


# --- inter-token latency --------------------------------------------------------------------------


def _itl(s: Summary, detail: Detail | None) -> Chart | None:
    total = sum(detail.itl_counts) if detail is not None else 0
    if detail is None or not total:
        return None
    used = [i for i, count in enumerate(detail.itl_counts) if count]
    first, last = max(used[0], 1), min(used[-1], len(ITL_EDGES_S) - 1)  # the bins with two edges
    counts = list(detail.itl_counts[first : last + 1])
    counts[0] += sum(detail.itl_counts[:first])
    counts[-1] += sum(detail.itl_counts[last + 1 :])
    edges = ITL_EDGES_S[first - 1 : last + 1]
    marks = [("p50", s.itl.median_s), *((f"p{p:g}", v) for p, v in s.itl.percentiles)]
    low, high = math.log(edges[0]), math.log(edges[-1])
    placed = [
        (min(max((math.log(v) - low) / (high - low), 0.0), 1.0), f"{name} {show_seconds(v)}")
        for name, v in marks
        if v > 0
    ]
    return Chart(
        "itl", "Inter-token latency",
        f"Share of {total:,} gaps between tokens by their length, on a logarithmic scale: "
        + ", ".join(f"{name} {show_seconds(v)}" for name, v in marks) + ".",
        svg.plot_height(),
        svg.bars([c / total for c in counts], [show_seconds(e) for e in edges], placed),
        ("from", "to", "gaps", "share"),
        tuple(
            (show_seconds(a), show_seconds(b), f"{c:,}", f"{100 * c / total:.2f} %")
            for a, b, c in zip(edges, edges[1:], counts, strict=False)
            if c
        ),
    )  # fmt: skip


# --- links ----------------------------------------------------------------------------------------


def _links(detail: Detail | None) -> Chart | None:
    if detail is None or not detail.links:
        return None
    window_s = detail.window_s
    tiers = [t for t in TIERS if any(u.tier == t for u in detail.links)]
    rows = [_tier_row(t, [u for u in detail.links if u.tier == t], window_s) for t in tiers]
    shown = detail.links[:ROWS_MAX]
    rows += [_link_row(u, window_s) for u in shown]
    hottest = detail.links[0]
    shares = hottest.shares(window_s)
    more = "" if len(shown) == len(detail.links) else f" The {len(shown)} hottest are drawn."
    return Chart(
        "links", "Link heat",
        f"Utilisation of {len(detail.links)} links that carried KV, in windows of {window_s:g} s; "
        "first each tier as the mean of its used links. "
        f"The hottest is {hottest.name}: {_percent(_mean(shares))} on average, "
        f"{_percent(max(shares))} in its fullest window.{more}",
        svg.heat_height(len(rows)), svg.heat(rows, window_s * len(hottest.moved)),
        ("link", "tier", "capacity", "moved", "mean", "fullest window"),
        tuple(_link_cells(u, window_s) for u in detail.links[:TABLE_ROWS_MAX]),
    )  # fmt: skip


def _tier_row(tier: str, links: Sequence[LinkUse], window_s: float) -> HeatRow:
    capacity = math.fsum(u.capacity for u in links) * window_s
    moved = [math.fsum(column) for column in zip(*(u.moved for u in links), strict=True)]
    values = [nbytes / capacity for nbytes in moved]
    return HeatRow(f"tier {tier} ({len(links)} links)", _percent(_mean(values)), values)


def _link_row(use: LinkUse, window_s: float) -> HeatRow:
    shares = use.shares(window_s)
    return HeatRow(use.name, _percent(_mean(shares)), shares)


def _link_cells(use: LinkUse, window_s: float) -> tuple[str, ...]:
    shares = use.shares(window_s)
    moved = show_bytes(round(math.fsum(use.moved)))
    rate = f"{use.capacity / GB:.4g} GB/s"
    return (use.name, use.tier, rate, moved, _percent(_mean(shares)), _percent(max(shares)))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# --- cache ----------------------------------------------------------------------------------------


class _Cached:
    """Prompt tokens and those found, by window, of the requests that one worker prefilled."""

    def __init__(self) -> None:
        self.prompt = [0] * WINDOWS
        self.cached = [0] * WINDOWS

    def row(self, label: str) -> HeatRow:
        values = [c / p if p else None for c, p in zip(self.cached, self.prompt, strict=True)]
        return HeatRow(label, _percent(self.ratio), values)

    @property
    def ratio(self) -> float:
        return sum(self.cached) / max(sum(self.prompt), 1)


def _cache(outcomes: Iterable[RequestOutcome], s: Summary) -> Chart | None:
    """Every hit is in a worker's own memory, the one tier that there is; a miss is computed."""
    known = [o for o in outcomes if o.ok and o.start_s is not None]
    if not known or s.duration_s <= 0:
        return None
    every, workers = _Cached(), defaultdict[str, _Cached](_Cached)
    for o, at in zip(known, _places(known, s.duration_s / WINDOWS), strict=True):
        named = (every, workers[o.prefill_worker]) if o.prefill_worker else (every,)
        for held in named:
            held.prompt[at] += o.prompt_tokens
            held.cached[at] += o.cached_tokens
    busiest = heapq.nlargest(ROWS_MAX, workers, key=lambda w: (sum(workers[w].prompt), w))
    rows = [every.row("tier device, all"), *(workers[w].row(w) for w in sorted(busiest))]
    less = "" if len(busiest) == len(workers) else f" The {len(busiest)} busiest are drawn."
    return Chart(
        "cache", "Prefix cache by tier and worker",
        f"Share of the prompt tokens found in a cache, by prefill worker and time sent; blank: no "
        f"request. One tier, device memory: {s.cached_tokens:,} tokens hit, "
        f"{s.input_tokens - s.cached_tokens:,} missed ({_percent(s.cache_hit_ratio)} hit).{less}",
        svg.heat_height(len(rows)), svg.heat(rows, s.duration_s),
        ("tier", "worker", "hit tokens", "missed tokens", "hit ratio"),
        tuple(
            ("device", w, f"{sum(c.cached):,}", f"{sum(c.prompt) - sum(c.cached):,}",
             _percent(c.ratio))
            for w, c in [("all", every), *sorted(workers.items())][:TABLE_ROWS_MAX]
        ),
    )  # fmt: skip
