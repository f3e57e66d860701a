"""What each level of each form means. Knows layers and planes by number; no arrays.

Level 1 loses least. CacheGen's released code names its levels the other way round: its 3, 2 and 1
are our 2, 4 and 5; its limits, 10 and 20 of 32 layers, are thirds here. 1 and 3 are ours: keys need
more bins than values (docs/codec.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kvasir.core.errors import ConfigError

KEY = 0  # the plane that holds keys (or latents); every other one holds values

LEVELS: Final = (1, 2, 3, 4, 5)


class Bins(NamedTuple):
    """How many bins [-max, max] of a token is cut into: keys by third of the layers, values for the
    first two layers and the rest."""

    keys: tuple[int, int, int]
    values: tuple[int, int]


RELEASED: Final = {
    1: Bins((64, 64, 64), (32, 32)),
    2: Bins((32, 32, 32), (32, 32)),
    3: Bins((32, 32, 32), (16, 16)),
    4: Bins((32, 16, 16), (32, 16)),
    5: Bins((16, 16, 12), (16, 12)),
}

# Bin widths by third of the layers, in standard deviations of a channel's deltas: the paper's
# default (section 5.2), our level 4.
DELTA_WIDTHS: Final = (0.5, 1.0, 1.5)
DELTA_SCALE: Final = {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 5: 1.5}
GROUP_TOKENS: Final = 10  # an anchor and nine deltas (section 5.2)


def bins_of(level: int, layer: int, layers: int, plane: int) -> int:
    """Bins of the released form. Raises ConfigError for a level that there is not."""
    bins = RELEASED[checked(level)]
    if plane == KEY:
        return bins.keys[third(layer, layers)]
    return bins.values[layer >= 2]


def width_of(level: int, layer: int, layers: int) -> float:
    """Bin width of the delta form, in standard deviations. Raises ConfigError as `bins_of`."""
    return DELTA_SCALE[checked(level)] * DELTA_WIDTHS[third(layer, layers)]


def third(layer: int, layers: int) -> int:
    return 3 * layer // layers


def checked(level: int) -> int:
    if level not in LEVELS:
        raise ConfigError(f"there is no codec level {level}", nearest=", ".join(map(str, LEVELS)))
    return level
