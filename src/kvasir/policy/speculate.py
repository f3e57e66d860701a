"""How many tokens a decoding sequence guesses ahead, from how its guesses came true so far.

Verifying costs positions that memory-bound decoding has free; a large batch has them no longer, and
wrong guesses are paid for in any case. Knows counts; must not know who guesses, or how.
"""

from __future__ import annotations

import sys
from typing import Final, NamedTuple

START: Final = 0.5  # taken for a sequence that has not guessed yet
FLOOR: Final = 0.3  # below it guessing costs more than it brings
MEMORY_TOKENS: Final = 32  # guesses that weigh as much as all that were made before
PROBE_TOKENS: Final = 64  # output tokens after which a sequence that gave up tries once more
ITERATIONS_MAX: Final = 8  # of a step with guesses; then it is decided anew


class Drafting(NamedTuple):
    """`tokens`: at most so many guesses an iteration; `rows_max`: none in a batch with more
    running sequences."""

    tokens: int
    rows_max: int


def draft_tokens(rule: Drafting, running: int, accepted: float, since: int) -> int:
    """Guesses of one sequence in each iteration of the next step, 0 to `rule.tokens`.

    `accepted` is its share of guesses that came true, `since` counts the tokens that it has drawn
    since it guessed last. One more than come true on average are made, so that a share that grows
    shows (the aim of transformers' `heuristic` schedule in `AssistedCandidateGenerator`, which goes
    up by two after a good round and down by one after another; here in proportion). Below `FLOOR`
    none, but for a try now and then: a text may begin to repeat itself.
    """
    if running > rule.rows_max or (accepted < FLOOR and since < PROBE_TOKENS):
        return 0
    return min(rule.tokens, 1 + round(rule.tokens * accepted))


def iterations_max(rule: Drafting, running: int, *, guessing: bool) -> int:
    """Iterations after which a step must end so that this policy is asked again in time."""
    if guessing:
        return ITERATIONS_MAX
    return PROBE_TOKENS if running <= rule.rows_max else sys.maxsize


def share_accepted(before: float, drafted: int, accepted: int) -> float:
    """The share of guesses that come true, after `drafted` more of which `accepted` did: a mean in
    which older guesses count less and less."""
    return (before * MEMORY_TOKENS + accepted) / (MEMORY_TOKENS + drafted)
