"""How often prompts began with which blocks of late. Knows keys and the times that it is given.

A key names a block and all before it, so one count by key is one of a whole prefix. Not every depth
is counted: all up to 16, then each an eighth deeper than the one before. A prompt of 6,250 blocks
then costs 68 counts, and a prefix is known to within an eighth of its length.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

from kvasir.core.ids import BlockKey

EVERY: Final = 16  # blocks up to which each depth is counted


class Count(NamedTuple):
    """Uses, as they count at `at`; halved every half-life after."""

    uses: float
    at: float


class Heat:
    """Of at most `keys_max` prefixes; the one unused for longest is forgotten first."""

    def __init__(self, half_life_s: float, keys_max: int) -> None:
        assert half_life_s > 0 and keys_max > 0
        self._half_life_s, self._keys_max = half_life_s, keys_max
        self._counts: OrderedDict[BlockKey, Count] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def use(self, keys: Sequence[BlockKey], now: float) -> list[tuple[int, float]]:
        """A prompt began with `keys`. Counted depths in blocks, growing, and the uses of each, this
        one among them. `now` never decreases."""
        counts, found = self._counts, []
        for depth in depths(len(keys)):
            key = keys[depth - 1]
            old = counts.get(key)
            uses = 1.0
            if old is not None:
                uses += old.uses * 2.0 ** ((old.at - now) / self._half_life_s)
                counts.move_to_end(key)
            counts[key] = Count(uses, now)
            found.append((depth, uses))
        while len(counts) > self._keys_max:
            counts.popitem(last=False)
        return found


@cache
def depths(blocks: int) -> tuple[int, ...]:
    """Those that are counted of a prompt of so many blocks."""
    found = list(range(1, min(EVERY, blocks) + 1))
    depth = EVERY
    while (depth := depth + depth // 8) <= blocks:
        found.append(depth)
    return tuple(found)
