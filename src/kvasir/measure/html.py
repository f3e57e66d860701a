"""A run as one HTML page that needs nothing else: no script, no font, no address but its own.

Charts are SVG made here; colours follow the reader's light or dark theme. Knows summaries and
outcomes, not which world they came from.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from html import escape
from typing import Final, NamedTuple

from kvasir.core.units import show_bytes
from kvasir.measure.distribution import distribution
from kvasir.measure.summary import RequestOutcome, SloReport, Summary, good
from kvasir.measure.tables import table

WIDTH, HEIGHT, MARGIN = 720, 180, 44
WINDOWS: Final = 60
WORST: Final = 10
PARTS: Final = ("queue", "prefill", "transfer", "first step", "other")
STYLE: Final = """
:root{--ink:#1c2430;--dim:#6b7686;--line:#d9dee6;--page:#fff;--a:#2f6fdb;--b:#d9822b;--c:#3a9d6e;
--d:#8a5cc2;--e:#98a2b3}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--dim:#98a2b3;--line:#323b49;--page:#141a22}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:2rem auto;
max-width:760px;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin:2rem 0 .3rem}p{color:var(--dim);margin:.2rem 0}
svg{width:100%;height:auto}text{fill:var(--dim);font-size:11px}.axis{stroke:var(--line)}
table{border-collapse:collapse;width:100%;font-size:13px}td,th{text-align:left;padding:.25rem .5rem;
border-bottom:1px solid var(--line);vertical-align:top}td.n{text-align:right;white-space:nowrap}
pre{font-size:12px;overflow:auto}
"""


class Window(NamedTuple):
    """Requests that were sent within one stretch of the run."""

    at_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    attained: float


def page(
    title: str, summary: Summary, outcomes: Sequence[RequestOutcome], notes: Sequence[str] = ()
) -> str:
    """The whole page, UTF-8 text. `outcomes` need `start_s` for the charts over time."""
    windows = _windows(outcomes, summary)
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        _headline(summary),
        *_over_time(windows),
        _split(summary),
        _tiers(summary),
        _worst(outcomes),
        f"<h2>All figures</h2><pre>{escape(table(summary))}</pre>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<body>{body}</body></html>\n"
    )


def _headline(s: Summary) -> str:
    words = [f"{s.completed} requests served, {s.failed} failed in {s.duration_s:.0f} s."]
    if s.slo is not None:
        words.append(
            f"{100 * s.slo.attainment:.1f} % met TTFT &le; {s.slo.ttft_s:g} s and "
            f"TPOT &le; {s.slo.tpot_s * 1e3:g} ms: {s.goodput or 0:.2f} good requests a second."
        )
    words.append(f"{100 * s.cache_hit_ratio:.1f} % of the prompt tokens came from cache.")
    return f"<p>{' '.join(words)}</p>"


def _windows(outcomes: Sequence[RequestOutcome], summary: Summary) -> list[Window]:
    known = [o for o in outcomes if o.start_s is not None]
    if not known or summary.duration_s <= 0:
        return []
    origin = min(o.start_s or 0.0 for o in known)
    width = summary.duration_s / WINDOWS
    bins: list[list[RequestOutcome]] = [[] for _ in range(WINDOWS)]
    for o in known:
        bins[min(int(((o.start_s or 0.0) - origin) / width), WINDOWS - 1)].append(o)
    found = []
    for i, inside in enumerate(bins):
        done = [o.ttft_s for o in inside if o.ok]
        if done:
            dist = distribution(done, (90.0,))
            attained = _attained(inside, summary.slo)
            found.append(
                Window((i + 0.5) * width, dist.median_s, dist.percentiles[0][1], attained)
            )
    return found


def _attained(inside: Sequence[RequestOutcome], slo: SloReport | None) -> float:
    if slo is None:
        return 0.0
    return sum(o.ok and good(o, slo) for o in inside) / len(inside)


def _over_time(windows: Sequence[Window]) -> list[str]:
    if len(windows) < 2:
        return []
    times = [w.at_s for w in windows]
    ttft = _lines(
        times,
        [("p50", "--a", [w.ttft_p50_s for w in windows]),
         ("p90", "--b", [w.ttft_p90_s for w in windows])],
        "s",
    )  # fmt: skip
    met = _lines(times, [("good", "--c", [100 * w.attained for w in windows])], "%")
    return [
        "<h2>Time to first token</h2><p>by the time a request was sent, seconds</p>" + ttft,
        "<h2>SLO attainment</h2><p>share of requests within all limits</p>" + met,
    ]


def _lines(xs: Sequence[float], series: Sequence[tuple[str, str, list[float]]], unit: str) -> str:
    top = max(max(values) for _, _, values in series) or 1.0
    left, right = xs[0], xs[-1]

    def place(x: float, y: float) -> str:
        px = MARGIN + (x - left) / (right - left) * (WIDTH - MARGIN - 8)
        return f"{px:.1f},{HEIGHT - 22 - y / top * (HEIGHT - 34):.1f}"

    shapes = [
        f'<line class="axis" x1="{MARGIN}" y1="{HEIGHT - 22}" x2="{WIDTH}" y2="{HEIGHT - 22}"/>',
        f'<text x="4" y="18">{top:.3g} {unit}</text><text x="4" y="{HEIGHT - 24}">0</text>',
        f'<text x="{MARGIN}" y="{HEIGHT - 6}">{left:.0f} s</text>',
        f'<text x="{WIDTH - 50}" y="{HEIGHT - 6}">{right:.0f} s</text>',
    ]
    for i, (name, colour, values) in enumerate(series):
        points = " ".join(place(x, y) for x, y in zip(xs, values, strict=True))
        shapes.append(
            f'<polyline points="{points}" fill="none" stroke="var({colour})" stroke-width="1.6"/>'
            f'<text x="{WIDTH - 50 - 60 * i}" y="14" style="fill:var({colour})">{name}</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'


def _split(s: Summary) -> str:
    if s.split is None:
        return ""
    p = s.split
    late = s.first_token == "prefill"
    values = [p.queue_s, p.prefill_s, 0.0 if late else p.transfer_s,
              0.0 if late else p.first_step_s, max(p.other_s, 0.0)]  # fmt: skip
    bars = _stack(values, PARTS)
    return f"<h2>Parts of the mean time to first token</h2>{bars}"


def _stack(values: Sequence[float], names: Sequence[str]) -> str:
    total = sum(values) or 1.0
    shapes, x = [], 0.0
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        width = value / total * WIDTH
        colour = "abcde"[i % 5]
        shapes.append(
            f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="26" fill="var(--{colour})"/>'
            f'<text x="{i * 144}" y="46" style="fill:var(--{colour})">'
            f"{name} {value * 1e3:.1f} ms</text>"
        )
        x += width
    return f'<svg viewBox="0 0 {WIDTH} 54" role="img">{"".join(shapes)}</svg>'


def _tiers(s: Summary) -> str:
    if not any(s.bytes_by_tier.values()):
        return ""
    rows = "".join(
        f'<tr><td>{escape(tier)}</td><td class="n">{show_bytes(count)}</td></tr>'
        for tier, count in s.bytes_by_tier.items()
    )
    return f"<h2>KV moved, by network tier</h2><table>{rows}</table>"


def _worst(outcomes: Sequence[RequestOutcome]) -> str:
    worst = heapq.nlargest(WORST, outcomes, key=lambda o: (o.ttft_s, o.request_id))
    if not worst:
        return ""
    rows = "".join(
        f'<tr><td>{escape(o.request_id)}</td><td class="n">{o.ttft_s:.2f} s</td>'
        f'<td class="n">{o.prompt_tokens}</td><td class="n">{o.cached_tokens}</td>'
        f'<td class="n">{_seconds(o.queue_s)}</td><td class="n">{_seconds(o.prefill_s)}</td>'
        f'<td class="n">{_seconds(o.transfer_s)}</td><td>{escape(o.why or o.error)}</td></tr>'
        for o in worst
    )
    head = "<tr><th>request<th>TTFT<th>prompt<th>cached<th>queue<th>prefill<th>transfer<th>why</tr>"
    return f"<h2>The ten longest waits</h2><table>{head}{rows}</table>"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
