"""Inter-token latencies as runs, so that millions of tokens stay a few thousand numbers.

A run is `count` samples spaced linearly from `first_s` to `last_s`, counted `times` times: a step
of k decode iterations over b rows is one run, because iterations grow linearly with the context.
Percentiles are exact over the expanded samples; only the few that decide one are ever expanded.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, repeat
from typing import Final, NamedTuple

from kvasir.measure.distribution import Dist, interpolated, ranks

EDGES_MAX: Final = 512
GOLDEN: Final = (math.sqrt(5) - 1) / 2  # multiples of it fill [0, 1) evenly


class Run(NamedTuple):
    """`slope` is the step from one sample to the next, in seconds."""

    length: int
    first_s: float
    last_s: float
    times: int
    start_s: float

    @property
    def slope(self) -> float:
        return (self.last_s - self.first_s) / (self.length - 1) if self.length > 1 else 0.0


class ItlRuns:
    """Append-only columns; 40 bytes a run."""

    __slots__ = ("_count", "_first", "_last", "_start", "_times")

    def __init__(self) -> None:
        self._count, self._times = array("q"), array("q")
        self._first, self._last, self._start = array("d"), array("d"), array("d")

    def add(
        self,
        count: int,
        first_s: float,
        last_s: float,
        times: int = 1,
        start_s: float = math.nan,
    ) -> None:
        """`count` samples from `first_s` to `last_s`, `times` times each.

        `start_s`: when the token before the first sample's came, for peak throughput; nan: unknown.
        """
        assert count > 0 and times > 0, (count, times)
        assert first_s >= 0 and last_s >= 0, (first_s, last_s)
        if count == 1:
            assert math.isclose(first_s, last_s, rel_tol=1e-9, abs_tol=1e-12), (first_s, last_s)
            last_s = first_s
        self._count.append(count)
        self._first.append(first_s)
        self._last.append(last_s)
        self._times.append(times)
        self._start.append(start_s)

    def add_each(self, gaps: Iterable[float], start_s: float = math.nan) -> None:
        """One request's gaps between tokens, the first of which came at `start_s`."""
        for gap in gaps:
            self.add(1, gap, gap, 1, start_s)
            start_s += gap

    def __iter__(self) -> Iterator[Run]:
        columns = (self._count, self._first, self._last, self._times, self._start)
        return map(Run._make, zip(*columns, strict=True))

    def __len__(self) -> int:
        """Runs, not samples."""
        return len(self._count)

    @property
    def samples(self) -> int:
        return sum(c * t for c, t in zip(self._count, self._times, strict=True))

    # --- statistics -------------------------------------------------------------------------------

    def distribution(self, percentiles: Sequence[float]) -> Dist:
        """Statistics of the expanded samples: mean and deviation in closed form, ranks exact."""
        total = self.samples
        if not total:
            return Dist(percentiles=tuple((p, 0.0) for p in percentiles))
        mean = math.fsum(r.length * r.times * (r.first_s + r.last_s) / 2 for r in self) / total
        variance = math.fsum(_squares(r, mean) for r in self) / total
        wanted = (50.0, *percentiles)
        at = self._order_statistics({r for p in wanted for r in ranks(total, p)[:2]})
        values = [interpolated(at.__getitem__, total, p) for p in wanted]
        return Dist(
            count=total,
            mean_s=mean,
            median_s=values[0],
            std_s=math.sqrt(variance),
            percentiles=tuple(zip(percentiles, values[1:], strict=True)),
        )

    def _order_statistics(self, wanted: set[int]) -> dict[int, float]:
        """The samples of these ranks (from 0, each below `samples`).

        Samples are counted into bins whose edges follow the data; only bins that hold a wanted rank
        are expanded and sorted.
        """
        edges = self._edges()
        totals = self.bin_totals(edges)
        found: dict[int, float] = {}
        before = 0
        for index, total in enumerate(totals):
            inside = sorted(r for r in wanted if before <= r < before + total)
            if inside:
                found.update(_pick(self._expand(edges, index), inside, before))
            before += total
        return found

    def _edges(self) -> list[float]:
        """Up to EDGES_MAX increasing values, about as many samples between each two: one value of
        each run, at a place that goes evenly through the runs, so that equal runs are cut too."""
        places = zip(self._first, self._last, count(), strict=False)
        values = sorted(a + (b - a) * (i * GOLDEN % 1.0) for a, b, i in places)
        stride = max(1, len(values) // EDGES_MAX)
        return sorted(set(values[stride::stride]))

    def bin_totals(self, edges: list[float]) -> list[int]:
        """Samples in each bin of increasing edges; bin i holds edges[i - 1] <= value < edges[i]."""
        totals = [0] * (len(edges) + 1)
        columns = zip(self._first, self._last, self._count, self._times, strict=True)
        for first, last, length, times in columns:
            low, high = (first, last) if first <= last else (last, first)
            start, stop = bisect_right(edges, low), bisect_right(edges, high)
            done = 0
            for index in range(start, stop):
                cut = _below(edges[index], low, high, length)
                totals[index] += (cut - done) * times
                done = cut
            totals[stop] += (length - done) * times
        return totals

    def _expand(self, edges: list[float], index: int) -> list[tuple[float, int]]:
        """(value, times) of the samples in one bin, cut exactly as `bin_totals` cuts."""
        samples: list[tuple[float, int]] = []
        columns = zip(self._first, self._last, self._count, self._times, strict=True)
        lowest = edges[index - 1] if index else -math.inf
        highest = edges[index] if index < len(edges) else math.inf
        for first, last, length, times in columns:
            low, high = (first, last) if first <= last else (last, first)
            if high < lowest or low >= highest:
                continue
            start = _below(lowest, low, high, length) if low < lowest else 0
            stop = _below(highest, low, high, length) if high >= highest else length
            if low == high:
                samples.append((low, (stop - start) * times))
                continue
            slope, top = (high - low) / (length - 1), length - 1
            values = [low + j * slope if j < top else high for j in range(start, stop)]
            samples += zip(values, repeat(times), strict=False)
        samples.sort()
        return samples

    # --- throughput -------------------------------------------------------------------------------

    def count_tokens(self, seconds: Counter[int], origin_s: float) -> bool:
        """Add each token to its whole second since `origin_s`. False: some time is unknown."""
        for run in self:
            if math.isnan(run.start_s):
                return False
            start_s, slope = run.start_s - origin_s, run.slope
            span_s = run.length * (run.first_s + run.last_s) / 2
            if int(start_s + run.first_s) == int(start_s + span_s):
                seconds[int(start_s + span_s)] += run.length * run.times
                continue
            for j in range(run.length):
                at_s = start_s + (j + 1) * (run.first_s + slope * j / 2)
                seconds[int(at_s)] += run.times
        return True


def _squares(run: Run, mean: float) -> float:
    """Sum of squared deviations from `mean`: those of an arithmetic progression."""
    middle = (run.first_s + run.last_s) / 2 - mean
    spacing = run.slope**2 * (run.length**2 - 1) / 12
    return run.length * run.times * (middle**2 + spacing)


def _below(edge: float, low: float, high: float, count: int) -> int:
    """How many of `count` samples from `low` up to `high` are less than `edge`."""
    if edge <= low:
        return 0
    if edge > high:
        return count
    return min(math.ceil((edge - low) * (count - 1) / (high - low)), count - 1)


def _pick(samples: list[tuple[float, int]], wanted: list[int], before: int) -> dict[int, float]:
    """The values at increasing ranks; `before` samples are smaller than all of these."""
    found: dict[int, float] = {}
    walk = iter(samples)
    value, passed = 0.0, before
    for rank in wanted:
        while passed <= rank:
            value, times = next(walk)
            passed += times
        found[rank] = value
    return found
