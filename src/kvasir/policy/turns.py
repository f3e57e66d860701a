"""When a session's next prompt will come: what a prefetch is timed by.

Pure arithmetic on gaps between the end of an answer and the next prompt of its session. Smoothed
mean and mean deviation as TCP keeps of round trips (RFC 6298, 2): both weigh the newest by 1/8 and
1/4.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MEAN_WEIGHT: Final = 1 / 8
DEVIATION_WEIGHT: Final = 1 / 4
DEVIATIONS: Final = 2.0  # so far before the mean gap a prompt is rare, where gaps are regular
GAPS_MIN: Final = 2  # of a session before it is known by its own


class Gaps(NamedTuple):
    """Seconds, and how many gaps were `seen`."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    seen: int = 0


def learned(gaps: Gaps, gap_s: float) -> Gaps:
    """One more gap."""
    if not gaps.seen:
        return Gaps(gap_s, gap_s / 2, 1)
    off = abs(gap_s - gaps.mean_s)
    return Gaps(
        gaps.mean_s + MEAN_WEIGHT * (gap_s - gaps.mean_s),
        gaps.deviation_s + DEVIATION_WEIGHT * (off - gaps.deviation_s),
        gaps.seen + 1,
    )


def fetch_after_s(own: Gaps, everyone: Gaps) -> float:
    """How long after an answer its session's next prompt is prepared: when it may come, not
    earlier, as what is brought too early takes room in vain. By the session's own gaps if it has
    had `GAPS_MIN`, else by everyone's; at once while nothing is known, or gaps vary."""
    gaps = own if own.seen >= GAPS_MIN else everyone
    return max(0.0, gaps.mean_s - DEVIATIONS * gaps.deviation_s)
