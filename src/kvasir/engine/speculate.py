"""Guesses from the text itself: what followed the last tokens when they stood there before.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023; vLLM's `ngram`). Knows token ids; must not
know models: whoever verifies decides which guesses stay.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.core.ids import RequestId
from kvasir.engine.steps import Guess, Wish

Key = tuple[RequestId, int]


class NgramGuesser:
    """Satisfies `engine.steps.Guesser`. Looks for the last `longest` tokens, then for fewer, down
    to `shortest`."""

    def __init__(self, shortest: int, longest: int) -> None:
        assert 0 < shortest <= longest, (shortest, longest)
        self._lengths = range(longest, shortest - 1, -1)
        self._indexes: dict[Key, NgramIndex] = {}

    def guess(self, wishes: Sequence[Wish]) -> list[Guess]:
        return [
            Guess(self._index(wish.key).guess(wish.attempt.tokens, wish.count)) for wish in wishes
        ]

    def forget(self, key: Key) -> None:
        self._indexes.pop(key, None)

    def _index(self, key: Key) -> NgramIndex:
        found = self._indexes.get(key)
        if found is None:
            found = self._indexes[key] = NgramIndex(self._lengths)
        return found


class NgramIndex:
    """Where each run of so many tokens of one growing text ended last. `lengths`: longest first.

    A text is indexed as it grows, so a guess costs what was added since the last one. A run that
    ends the text is not in it yet: nothing has followed it there.
    """

    __slots__ = ("_ends", "_indexed")

    def __init__(self, lengths: Sequence[int]) -> None:
        self._ends: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}
        self._indexed = 0  # runs that end at or before this position are known

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` tokens that may follow `tokens`, or none: what followed the longest run of
        tokens that ends the text, where it stood last before. A text that overlaps with itself is
        taken to go on so."""
        self._grow(tokens)
        for length, ends in self._ends.items():
            at = ends.get(tuple(tokens[-length:])) if length <= len(tokens) else None
            if at is not None:
                period = len(tokens) - at
                return [tokens[at + i % period] for i in range(count)]
        return []

    def _grow(self, tokens: Sequence[int]) -> None:
        for length, ends in self._ends.items():
            for end in range(max(length, self._indexed + 1), len(tokens)):
                ends[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
