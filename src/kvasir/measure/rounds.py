"""In which order things are timed, again and again, within a limit of time.

Knows a clock; must not know what is timed. Slow moments of a shared machine come in stretches, so
everything is gone through in rounds, each in a new order, and a thing's time is the median over the
rounds: a stretch then spoils one round of all things and not all rounds of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from random import Random
from typing import Generic, TypeVar

from kvasir.core.errors import ConfigError

T = TypeVar("T", bound=Hashable)
Clock = Callable[[], float]


class Rounds(Generic[T]):
    """Gives each of `things` in up to `most` rounds; none begins that would not end within
    `seconds_max`. The first must: it raises ConfigError in the middle of one that does not.

    `done` is how many rounds were whole.
    """

    def __init__(
        self, things: Sequence[T], most: int, seconds_max: float, *, seed: int, clock: Clock,
        progress: Callable[[float], None],
    ) -> None:  # fmt: skip
        assert things and most > 0
        self.done = 0
        self._things, self._most, self._seconds_max = list(things), most, seconds_max
        self._random, self._clock, self._progress = Random(seed), clock, progress

    def __iter__(self) -> Iterator[T]:
        began = self._clock()
        count = len(self._things)
        while self.done < self._most and self._time_left(self._clock() - began):
            self._random.shuffle(self._things)
            for i, thing in enumerate(self._things):
                yield thing
                self._progress((self.done + (i + 1) / count) / self._most)
                if not self.done and i + 1 < count and self._clock() - began > self._seconds_max:
                    raise self._too_slow(i + 1)
            self.done += 1

    def _time_left(self, spent_s: float) -> bool:
        """Whether another round as long as those before is over in time."""
        return not self.done or spent_s * (self.done + 1) / self.done <= self._seconds_max

    def _too_slow(self, timed: int) -> ConfigError:
        return ConfigError(
            f"{self._seconds_max:g} s are not enough to time everything once: "
            f"{timed} of {len(self._things)} were",
            next_step="more --seconds, or a smaller --tokens-max, --batch-max or --context-max",
        )
