"""A run as one HTML page that needs nothing else: no script, no font, no address but its own.

Lays out what `charts` drew; colours follow the reader's light or dark theme, and every chart has a
sentence and a table for readers who do not see it. Knows summaries and outcomes, not which world
they came from.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from html import escape
from typing import Final, NamedTuple

from kvasir.core.units import show_bytes, show_seconds
from kvasir.measure import svg
from kvasir.measure.charts import PARTS, charts, parts_s
from kvasir.measure.detail import Detail
from kvasir.measure.summary import RequestOutcome, Summary, split_of
from kvasir.measure.svg import Chart
from kvasir.measure.tables import table

WORST: Final = 10
WHY_CHARS_MAX: Final = 600
STYLE: Final = """
:root{color-scheme:light dark}*{box-sizing:border-box}
body{font:15px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0}
main{max-width:860px;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.5rem;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.02rem;margin:0 0 .25rem}p{color:var(--dim);margin:.15rem 0;max-width:74ch}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:1rem 1.1rem;margin:1rem 0}
svg{display:block;width:100%;min-width:600px;height:auto;margin-top:.5rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.7rem;margin:1.2rem 0}
dl div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.6rem .8rem}
dt{color:var(--dim);font-size:.8rem}dd{margin:0;font-size:1.25rem;font-variant-numeric:tabular-nums}
dd small{display:block;font-size:.76rem;color:var(--dim)}
details{margin-top:.6rem}summary{cursor:pointer;color:var(--dim);font-size:.85rem}
.x{overflow-x:auto}:focus-visible{outline:2px solid var(--s1);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.82rem;font-variant-numeric:tabular-nums}
td,th{text-align:right;padding:.28rem .5rem;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--dim);font-weight:600}td:first-child,th:first-child{text-align:left}
.y td{text-align:left;white-space:normal;color:var(--dim);padding-top:0}
.v td,.v th{border-bottom:0}pre{font-size:.78rem;overflow:auto;margin:0}
@media print{section{break-inside:avoid}}
"""


class Tile(NamedTuple):
    name: str
    value: str
    more: str = ""


def page(
    title: str,
    summary: Summary,
    outcomes: Sequence[RequestOutcome],
    notes: Sequence[str] = (),
    detail: Detail | None = None,
) -> str:
    """The whole page, UTF-8 text. `detail` adds link heat and the ITL distribution."""
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        _tiles(summary),
        *(_section(chart) for chart in charts(summary, outcomes, detail)),
        _moved(summary),
        _worst(outcomes, summary.first_token),
        f'<section><h2>All figures</h2><pre tabindex="0">{escape(table(summary))}</pre></section>',
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{svg.COLOURS}{svg.SHAPES}{STYLE}</style></head>"
        f'<body class="k"><main>{"".join(body)}</main></body></html>\n'
    )


# --- parts of the page ----------------------------------------------------------------------------


def _tiles(s: Summary) -> str:
    tiles = [Tile("requests served", f"{s.completed:,}", f"{s.failed:,} failed")]
    if s.slo is not None:
        limits = f"TTFT ≤ {s.slo.ttft_s:g} s, TPOT ≤ {s.slo.tpot_s * 1e3:g} ms"
        tiles.append(Tile("met the SLO", f"{100 * s.slo.attainment:.1f} %", limits))
        per_gpu = f"{s.goodput_per_gpu:.3f} per GPU" if s.goodput_per_gpu is not None else ""
        tiles.append(Tile("goodput", f"{s.goodput or 0.0:.2f} req/s", per_gpu))
    for name, dist in (("TTFT", s.ttft), ("TPOT", s.tpot), ("ITL", s.itl)):
        tail = ", ".join(f"p{p:g} {show_seconds(v)}" for p, v in dist.percentiles)
        tiles.append(Tile(f"{name}, median", show_seconds(dist.median_s), tail))
    hit = f"{100 * s.cache_hit_ratio:.1f} %"
    tiles.append(Tile("prompt tokens from cache", hit, f"{s.cached_tokens:,} tokens"))
    seconds = f"in {s.duration_s:.0f} s"
    tiles.append(Tile("tokens out", f"{s.per_second(s.output_tokens):,.0f} /s", seconds))
    cells = (
        f"<div><dt>{escape(t.name)}</dt><dd>{escape(t.value)} <small>{escape(t.more)}</small>"
        "</dd></div>"
        for t in tiles
    )
    return f"<dl>{''.join(cells)}</dl>"


def _section(chart: Chart) -> str:
    numbers = _table(chart.title, chart.head, chart.rows)
    return (
        f"<section><h2>{escape(chart.title)}</h2><p>{escape(chart.says)}</p>"
        f"{_scrolls(f'{chart.title}, drawn', chart.inline())}"
        f"<details><summary>The numbers</summary>{numbers}</details></section>"
    )


def _table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return _scrolls(label, f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def _scrolls(label: str, inside: str) -> str:
    """What may be wider than the page, for wheel, finger and arrow keys."""
    opened = f'<div class="x" role="region" tabindex="0" aria-label="{escape(label)}">'
    return f"{opened}{inside}</div>"


def _moved(s: Summary) -> str:
    if not any(s.bytes_by_tier.values()):
        return ""
    rows = [(tier, show_bytes(count)) for tier, count in s.bytes_by_tier.items()]
    title = "KV moved, by network tier"
    return f"<section><h2>{title}</h2>{_table(title, ('tier', 'moved'), rows)}</section>"


def _worst(outcomes: Sequence[RequestOutcome], first_token: str) -> str:
    worst = heapq.nlargest(WORST, outcomes, key=lambda o: (o.ttft_s, o.request_id))
    if not worst:
        return ""
    head = ("request", "sent", "TTFT", "prompt", "cached", "attempts", *PARTS)
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(_waited(o, first_token, len(head)) for o in worst)
    return (
        "<section><h2>The ten longest waits, and why</h2><p>Times in seconds. Below each: what the "
        "router said when it chose, and what happened to attempts that were lost.</p>"
        + _scrolls("The ten longest waits", f"<table><thead><tr>{top}</tr></thead>{body}</table>")
        + "</section>"
    )


def _waited(o: RequestOutcome, first_token: str, columns: int) -> str:
    split = split_of([o], first_token)
    parts = ["-"] * len(PARTS)
    if split is not None:
        parts = [f"{v:.2f}" for v in parts_s(split, first_token)]
    sent = "-" if o.start_s is None else f"{o.start_s:.1f}"
    cells = [sent, f"{o.ttft_s:.2f}", f"{o.prompt_tokens:,}", f"{o.cached_tokens:,}",
             f"{o.attempts}", *parts]  # fmt: skip
    why = "; ".join(word for word in (o.error and f"failed: {o.error}", o.why) if word)
    if len(why) > WHY_CHARS_MAX:
        why = why[: WHY_CHARS_MAX - 1] + "…"
    return (
        f'<tr class="v"><th scope="row">{escape(o.request_id)}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        f'<tr class="y"><td colspan="{columns}">{escape(why)}</td></tr>'
    )
