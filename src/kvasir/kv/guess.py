"""What an engine that tells nothing has probably cached: the blocks of what was sent to it.

Knows keys and the times that it is given. Like a cache it keeps the latest `blocks_max` blocks,
tails before heads; unlike one it forgets what was not sent for `ttl_s`, as it cannot see evictions
(SGLang's router keeps such a tree for each worker, Dynamo's predicts on route with a TTL).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from kvasir.core.ids import BlockKey


class Guess(NamedTuple):
    """Limits of a guessed cache: blocks that the worker has room for, seconds without use."""

    blocks_max: int
    ttl_s: float


class Change(NamedTuple):
    """Keys that a guessed cache took in, and those that it forgot. No key is in both."""

    added: list[BlockKey]
    removed: list[BlockKey]


class GuessedCache:
    """The least recently sent block goes first."""

    def __init__(self, guess: Guess) -> None:
        assert guess.blocks_max > 0 and guess.ttl_s > 0
        self._guess = guess
        self._until: OrderedDict[BlockKey, float] = OrderedDict()  # the next one to go first

    def use(self, keys: Sequence[BlockKey], now: float) -> Change:
        """A prompt was sent. `now` never decreases. Of a prompt that is larger than the cache, the
        head stays."""
        kept, until = keys[: self._guess.blocks_max], self._until
        added = [key for key in dict.fromkeys(kept) if key not in until]
        for key in reversed(kept):
            until[key] = now + self._guess.ttl_s
            until.move_to_end(key)
        excess = len(until) - self._guess.blocks_max
        return Change(added, [until.popitem(last=False)[0] for _ in range(excess)])

    def expire(self, now: float) -> list[BlockKey]:
        """Forget what was not sent for too long."""
        gone: list[BlockKey] = []
        while self._until and next(iter(self._until.values())) <= now:
            gone.append(self._until.popitem(last=False)[0])
        return gone
