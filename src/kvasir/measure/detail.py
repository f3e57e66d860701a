"""What reports draw and tables leave out: links over time, and the shape of the ITL distribution.

Plain data of a run; knows neither how it was sampled nor how it is drawn.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from kvasir.measure.itl import ItlRuns

PER_DECADE: Final = 100  # bins are 2.3 % wide
ITL_EDGES_S: Final = tuple(10 ** (i / PER_DECADE) for i in range(-4 * PER_DECADE, PER_DECADE + 1))


class LinkUse(msgspec.Struct, frozen=True):
    """One direction of a link: `capacity` bytes per second when whole, and bytes moved in each
    window of `Detail.window_s`."""

    name: str
    tier: str
    capacity: float
    moved: tuple[float, ...]

    def shares(self, window_s: float) -> list[float]:
        """Utilisation by window. A faulty link's is of its whole capacity."""
        return [nbytes / (self.capacity * window_s) for nbytes in self.moved]


class Detail(msgspec.Struct, frozen=True):
    """`links` are those that carried anything, hottest first. `itl_counts[i]` gaps between tokens
    lie in [ITL_EDGES_S[i - 1], ITL_EDGES_S[i]); the first and last bins are open."""

    window_s: float
    links: tuple[LinkUse, ...]
    itl_counts: tuple[int, ...]


def itl_counts(itl: ItlRuns) -> tuple[int, ...]:
    return tuple(itl.bin_totals(list(ITL_EDGES_S)))


def hottest(links: list[LinkUse]) -> tuple[LinkUse, ...]:
    """By mean utilisation; equal ones by name."""
    return tuple(sorted(links, key=lambda u: (-math.fsum(u.moved) / u.capacity, u.name)))
