"""Charts as SVG text: lines, bars, stacked parts, heat. Knows numbers, not what they mean.

A chart is its drawing, one sentence that says what it shows, and its numbers as a table, so that
whoever cannot see it reads the same. Colours are CSS variables with a light and a dark value each;
series differ by dash as well as by colour. Colours after Okabe and Ito (2008).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final, NamedTuple

import msgspec

from kvasir.core.units import show_seconds

WIDTH: Final = 760
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 22, 26
PLOT_HEIGHT: Final = 170
ROW: Final = 17  # a row of heat, or of stacked parts
LABEL: Final = 148
VALUE: Final = 64
LEVELS: Final = 10
DASHES: Final = ("", "6 3", "2 3", "9 3 2 3")
COLOURS: Final = """
.k{--ink:#1a2230;--dim:#566072;--line:#d8dee8;--page:#f7f9fc;--card:#fff;--heat:#0b5fa5;
--s1:#0b5fa5;--s2:#c25400;--s3:#007a5c;--s4:#9c4486;--s5:#8c96a8}
@media(prefers-color-scheme:dark){.k{--ink:#e7ecf3;--dim:#a4b0c2;--line:#2c3646;--page:#10151d;
--card:#171e29;--heat:#63b7f7;--s1:#63b7f7;--s2:#f0984a;--s3:#3fcb9f;--s4:#dc92cb;--s5:#77839a}}
"""
SHAPES: Final = """
.k text{fill:var(--dim);font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}
.k text.w{fill:var(--ink)}.k .g{stroke:var(--line);stroke-width:1}.k .e{text-anchor:end}
.k .m{text-anchor:middle}.k .q{fill:none;stroke-width:1.8;stroke-linejoin:round}
.k .t{fill:var(--line);fill-opacity:.55}
"""


class Chart(msgspec.Struct, frozen=True):
    """`name` is a file's; `says` stands for the drawing where it is not seen; `rows`: numbers."""

    name: str
    title: str
    says: str
    height: float
    shapes: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def inline(self) -> str:
        """For a page that has COLOURS and SHAPES already."""
        return self._svg("")

    def document(self) -> str:
        """A file of its own."""
        ground = '<rect width="100%" height="100%" fill="var(--card)"/>'
        style = f"<style>{COLOURS}{SHAPES}</style>{ground}"
        return self._svg(' xmlns="http://www.w3.org/2000/svg"', style) + "\n"

    def _svg(self, more: str, style: str = "") -> str:
        return (
            f'<svg class="k"{more} viewBox="0 0 {WIDTH} {self.height:g}" role="img" '
            f'aria-labelledby="{self.name}-t {self.name}-d">'
            f'<title id="{self.name}-t">{escape(self.title)}</title>'
            f'<desc id="{self.name}-d">{escape(self.says)}</desc>{style}{self.shapes}</svg>'
        )


class Series(NamedTuple):
    name: str
    values: Sequence[float]


class HeatRow(NamedTuple):
    """A value is a share of 1, or None where there is nothing to say."""

    label: str
    shown: str
    values: Sequence[float | None]


# --- kinds of charts ------------------------------------------------------------------------------


def lines(
    xs: Sequence[float], series: Sequence[Series], unit: str, span: float, top: float = 0.0,
    x_unit: str = "s",
) -> str:  # fmt: skip
    """Curves over `x_unit` from 0 to `span`, and from 0 up to `top` or the largest value."""
    high = ticks(top or max((max(s.values) for s in series), default=0.0))

    def place(x: float, y: float) -> str:
        return f"{_x(x / span):.1f},{_y(min(y / high[-1], 1.0)):.1f}"

    shapes = [_grid(high, unit), _across(span, x_unit)]
    for i, one in enumerate(series):
        points = " ".join(place(x, y) for x, y in zip(xs, one.values, strict=True))
        dash = f' stroke-dasharray="{DASHES[i]}"' if DASHES[i] else ""
        pen = f'class="q" stroke="var(--s{i + 1})"{dash}'
        at = WIDTH - RIGHT - 70 * (len(series) - i)
        shapes.append(
            f'<polyline {pen} points="{points}"/>'
            f'<line {pen} x1="{at}" x2="{at + 24}" y1="9" y2="9"/>'
            f'<text class="w" x="{at + 29}" y="13">{escape(one.name)}</text>'
        )
    return "".join(shapes)


def bars(shares: Sequence[float], edges: Sequence[str], marks: Sequence[tuple[float, str]]) -> str:
    """A histogram: `shares` of all in bins whose `edges` are one more; `marks` are places on the
    axis, from 0 to 1, with a word each."""
    high = ticks(100 * max(shares, default=0.0))
    wide = (WIDTH - LEFT - RIGHT) / max(len(shares), 1)
    path = "".join(
        f"M{LEFT + i * wide:.1f} {_y(0):.1f}V{_y(100 * share / high[-1]):.1f}"
        f"h{max(wide - 1, 0.5):.1f}V{_y(0):.1f}z"
        for i, share in enumerate(shares)
        if share
    )
    shapes = [_grid(high, "%"), f'<path d="{path}" fill="var(--s1)"/>']
    every = max(1, math.ceil(len(edges) / 8))
    for i in range(0, len(edges), every):
        at, side = LEFT + i * wide, "e" if i + 1 == len(edges) else "m"
        word = f'<text class="{side}" x="{at:.0f}" y="{_y(0) + 16:.0f}">{escape(edges[i])}</text>'
        shapes.append(word)
    for n, (share, word) in enumerate(marks):
        at, side = _x(share), " class='w e'" if share > 0.8 else " class='w'"
        shift = -4 if share > 0.8 else 4
        shapes.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 12}" y2="{_y(0):.0f}" '
            f'stroke="var(--s2)" stroke-width="1.4" stroke-dasharray="4 3"/>'
            f'<text{side} x="{at + shift:.1f}" y="{TOP - 4 + 13 * n}">{escape(word)}</text>'
        )
    return "".join(shapes)


def stack(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> str:
    """One bar a row, in parts of seconds, all on one scale; a legend above."""
    high = ticks(max((math.fsum(values) for _, values in rows), default=0.0))
    left, wide = LABEL, WIDTH - LABEL - VALUE - RIGHT
    shapes = []
    for i, name in enumerate(names):
        at = left + i * 104
        shapes.append(
            f'<rect x="{at}" y="3" width="11" height="11" rx="2" fill="var(--s{i + 1})"/>'
            f'<text class="w" x="{at + 16}" y="13">{escape(name)}</text>'
        )
    for n, (label, values) in enumerate(rows):
        y, x = TOP + 8 + n * (ROW + 15), float(left)
        shapes.append(f'<text class="w e" x="{left - 8}" y="{y + 15}">{escape(label)}</text>')
        for i, value in enumerate(values):
            length = max(value, 0.0) / high[-1] * wide
            if length > 0.05:
                shapes.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="22" '
                    f'fill="var(--s{i + 1})"/>'
                )
            x += length
        total = show_seconds(math.fsum(values))
        shapes.append(f'<text class="w" x="{x + 6:.1f}" y="{y + 15}">{total}</text>')
    return "".join(shapes)


def stack_height(rows: int) -> int:
    return TOP + 8 + rows * (ROW + 15)


def heat(rows: Sequence[HeatRow], seconds: float) -> str:
    """One row of cells each; the deepest colour is the largest value, rounded up."""
    top = ticks(100 * max((v for r in rows for v in r.values if v is not None), default=0.0))[-1]
    wide = WIDTH - LABEL - VALUE - RIGHT
    paths: list[list[str]] = [[] for _ in range(LEVELS + 1)]
    shapes = [_ramp(top)]
    for n, row in enumerate(rows):
        y = TOP + 4 + n * ROW
        shapes.append(
            f'<text class="w e" x="{LABEL - 8}" y="{y + 11}">{escape(row.label)}</text>'
            f'<text x="{LABEL + wide + 6}" y="{y + 11}">{escape(row.shown)}</text>'
        )
        for start, count, level in _runs(row.values, top):
            each = wide / len(row.values)
            x, w = LABEL + start * each, count * each
            paths[level].append(f"M{x:.1f} {y}h{w:.1f}v{ROW - 3}h-{w:.1f}z")
    for level, cells in enumerate(paths):
        if cells:
            deep = f'fill="var(--heat)" fill-opacity="{level / LEVELS:.2g}"'
            paint = deep if level else 'class="t"'
            shapes.append(f"<path d='{''.join(cells)}' {paint}/>")
    y = TOP + 4 + len(rows) * ROW + 12
    shapes.append(f'<text x="{LABEL}" y="{y}">0 s</text>')
    shapes.append(f'<text class="e" x="{LABEL + wide}" y="{y}">{seconds:.0f} s</text>')
    return "".join(shapes)


def heat_height(rows: int) -> int:
    return TOP + 4 + rows * ROW + 18


# --- parts ----------------------------------------------------------------------------------------


def ticks(top: float) -> list[float]:
    """0 and up to five steps of 1, 2 or 5 times a power of ten; the last is at least `top`."""
    if top <= 0:
        return [0.0, 1.0]
    scale = 10.0 ** math.floor(math.log10(top / 4))
    step = next(s * scale for s in (1, 2, 5, 10) if top / (s * scale) <= 5)
    return [i * step for i in range(math.ceil(top / step * (1 - 1e-9)) + 1)]


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return TOP + (1 - share) * PLOT_HEIGHT


def plot_height() -> int:
    return TOP + PLOT_HEIGHT + BOTTOM


def _grid(at: Sequence[float], unit: str) -> str:
    return "".join(
        f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(v / at[-1]):.1f}" '
        f'y2="{_y(v / at[-1]):.1f}"/>'
        f'<text class="e" x="{LEFT - 6}" y="{_y(v / at[-1]) + 4:.1f}">{v:.3g} {unit}</text>'
        for v in at
    )


def _across(span: float, unit: str) -> str:
    """The axis from left to right: round numbers, and the end."""
    y = _y(0) + 16
    inner = [v for v in ticks(span) if v < span * 0.93]
    words = [
        f'<text class="m" x="{_x(v / span):.0f}" y="{y:.0f}">{v:g} {unit}</text>' for v in inner
    ]
    words.append(f'<text class="e" x="{WIDTH - RIGHT}" y="{y:.0f}">{span:.4g} {unit}</text>')
    return "".join(words)


def _ramp(top: float) -> str:
    """The legend of a heat map."""
    cells = "".join(
        f'<rect x="{LABEL + 30 + i * 14}" y="3" width="14" height="10" fill="var(--heat)" '
        f'fill-opacity="{i / LEVELS:.2g}"/>'
        for i in range(1, LEVELS + 1)
    )
    return (
        f'<text class="e" x="{LABEL + 24}" y="12">0 %</text>{cells}'
        f'<text x="{LABEL + 30 + LEVELS * 14 + 20}" y="12">{top:g} %</text>'
    )


def _runs(values: Iterable[float | None], top: float) -> Iterable[tuple[int, int, int]]:
    """(start, count, level) of equal neighbours; None leaves a gap, level 0 is exactly nothing."""
    start, count, last = 0, 0, -1
    for i, value in enumerate([*values, None]):
        level = -1 if value is None else min(math.ceil(100 * value / top * LEVELS), LEVELS)
        if level != last:
            if count and last >= 0:
                yield start, count, last
            start, count, last = i, 0, level
        count += 1
    if count and last >= 0:
        yield start, count, last
