"""A cap on bytes per second, as a schedule: when may the next frame leave? Knows no clock."""

from __future__ import annotations

import sys
from typing import Final

SLICE_S: Final = 0.01  # frames are cut to this much of the cap; also how much idle time is made up


class Pace:
    """None: no cap. Frames leave whole; their bytes push the next departure back."""

    def __init__(self, bytes_per_s_max: float | None) -> None:
        assert bytes_per_s_max is None or bytes_per_s_max > 0
        self._rate = bytes_per_s_max
        self._next_s = float("-inf")

    def slice_bytes(self) -> int:
        """No frame should be larger under the cap."""
        if self._rate is None:
            return sys.maxsize
        return max(1, round(self._rate * SLICE_S))

    def wait_until_s(self, now_s: float) -> float | None:
        """When the next frame may leave; None for now."""
        return self._next_s if self._next_s > now_s else None

    def spend(self, now_s: float, count: int) -> None:
        """`count` bytes leave now."""
        if self._rate is not None and count:
            self._next_s = max(self._next_s, now_s - SLICE_S) + count / self._rate
