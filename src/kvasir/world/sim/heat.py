"""How hot links were: bytes by link and window of virtual time, in bounded memory.

Knows link numbers, times and bytes. Must not know capacities, flows or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

WINDOWS_MAX: Final = 120
WINDOW_S: Final = 2.0**-6  # the first width; it doubles whenever the run outgrows its windows


class LinkHeat:
    """`moved[link][i]` is what a link carried from i * width_s to (i + 1) * width_s, in bytes.

    At most WINDOWS_MAX windows, and a row only for links that carried anything: when time runs
    beyond the last window, neighbours are added up and every window is twice as long.
    """

    __slots__ = ("_until", "moved", "width_s")

    def __init__(self) -> None:
        self.width_s = WINDOW_S
        self.moved: dict[int, list[float]] = {}
        self._until = WINDOW_S * WINDOWS_MAX

    def add(self, links: Sequence[int], start: float, end: float, nbytes: float) -> None:
        """`nbytes` went over each of `links` at an even rate from `start` to `end`."""
        while end >= self._until:
            self._widen()
        first, last = int(start / self.width_s), int(end / self.width_s)
        for link in links:
            row = self.moved.get(link)
            if row is None:
                row = self.moved[link] = [0.0] * WINDOWS_MAX
            if first == last:
                row[first] += nbytes
            else:
                self._spread(row, first, last, start, end, nbytes)

    def _spread(
        self, row: list[float], first: int, last: int, start: float, end: float, nbytes: float
    ) -> None:
        rate = nbytes / (end - start)
        row[first] += rate * ((first + 1) * self.width_s - start)
        for i in range(first + 1, last):
            row[i] += rate * self.width_s
        row[last] += rate * (end - last * self.width_s)

    def _widen(self) -> None:
        for row in self.moved.values():
            pairs = zip(row[::2], row[1::2], strict=True)
            row[:] = [a + b for a, b in pairs] + [0.0] * (WINDOWS_MAX // 2)
        self.width_s *= 2
        self._until *= 2
