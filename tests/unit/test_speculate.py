"""Guesses: how many (policy), how often they are right where no model says, and which (n-grams)."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError
from kvasir.core.request import Sampling
from kvasir.core.specs.parse import parse_deployment
from kvasir.cost.acceptance import accepted_tokens
from kvasir.engine.speculate import NgramGuesser, NgramIndex
from kvasir.engine.steps import Attempt, Guess, Wish
from kvasir.policy.speculate import (
    FLOOR,
    ITERATIONS_MAX,
    PROBE_TOKENS,
    START,
    Drafting,
    draft_tokens,
    iterations_max,
    share_accepted,
)

RULE = Drafting(tokens=6, rows_max=4)

# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "accepted", "since", "tokens"),
    [
        (1, START, 0, 4),  # one more than three of six
        (4, START, 0, 4),
        (5, START, 0, 0),  # a large batch has no free positions
        (5, 1.0, 999, 0),
        (1, 1.0, 0, 6),
        (1, FLOOR, 0, 3),
        (1, 0.29, 0, 0),  # it costs more than it brings
        (1, 0.29, PROBE_TOKENS - 1, 0),
        (1, 0.0, PROBE_TOKENS, 1),  # a try
    ],
)
def test_how_many_tokens(running: int, accepted: float, since: int, tokens: int) -> None:
    assert draft_tokens(RULE, running, accepted, since) == tokens


def test_wrong_guesses_end_it_and_right_ones_bring_it_back() -> None:
    share, rounds = START, 0
    while tokens := draft_tokens(RULE, 1, share, 0):
        share, rounds = share_accepted(share, tokens, 0), rounds + 1
    assert 2 <= rounds <= 10, "soon, but not at the first mistake"
    while not draft_tokens(RULE, 1, share, 0):
        tokens = draft_tokens(RULE, 1, share, PROBE_TOKENS)
        share, rounds = share_accepted(share, 8 * tokens, 8 * tokens), rounds + 1
    assert rounds < 20, "a text that begins to repeat itself is noticed"


def test_a_step_ends_in_time_for_the_next_decision() -> None:
    assert iterations_max(RULE, 1, guessing=True) == ITERATIONS_MAX
    assert iterations_max(RULE, 4, guessing=False) == PROBE_TOKENS
    assert iterations_max(RULE, 5, guessing=False) > 10**6, "nobody may guess in such a batch"


# --- where no model says --------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_runs_of_right_guesses_are_geometric(acceptance: float) -> None:
    """The mean of min(geometric, 5) is the sum of the powers of the acceptance from 1 to 5."""
    drawn = [accepted_tokens(f"r{i % 100}", i // 100, 5, acceptance) for i in range(20_000)]
    assert all(0 <= n <= 5 for n in drawn)
    expected = sum(acceptance**k for k in range(1, 6))
    assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=0.05)


def test_the_same_request_has_the_same_luck() -> None:
    twice = [[accepted_tokens("r", i, 8, 0.8) for i in range(50)] for _ in range(2)]
    assert twice[0] == twice[1] != [accepted_tokens("s", i, 8, 0.8) for i in range(50)]


# --- n-grams --------------------------------------------------------------------------------------


def brute_force(tokens: list[int], count: int, shortest: int, longest: int) -> list[int]:
    """What followed the longest ending that stood before, where it stood last; over and over."""
    for length in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                return ((tokens[end:]) * count)[:count]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    grown=st.lists(st.integers(1, 7), max_size=8),
    count=st.integers(1, 9),
    lengths=st.sampled_from([(1, 1), (1, 3), (2, 4), (3, 3)]),
)
def test_the_index_finds_what_a_search_finds(
    tokens: list[int], grown: list[int], count: int, lengths: tuple[int, int]
) -> None:
    """However the text grew: asked at some lengths, and not at others."""
    shortest, longest = lengths
    index = NgramIndex(range(longest, shortest - 1, -1))
    ends = [sum(grown[:i]) for i in range(1, len(grown) + 1)]
    for end in [*(e for e in ends if 0 < e < len(tokens)), len(tokens)]:
        text = tokens[:end]
        assert index.guess(text, count) == brute_force(text, count, shortest, longest)


def wish(tokens: list[int], name: str = "r", count: int = 4) -> Wish:
    return Wish((name, 1), Attempt(tokens=tokens), 0, count, Sampling())


def test_each_attempt_has_its_own_text() -> None:
    guesser = NgramGuesser(2, 3)
    a, b = [1, 2, 3, 9, 1, 2, 3], [1, 2, 3, 7, 1, 2, 3]
    found = guesser.guess([wish(a, "a"), wish(b, "b")])
    assert [one.tokens for one in found] == [[9, 1, 2, 3], [7, 1, 2, 3]]
    guesser.forget(("a", 1))
    guesser.forget(("never", 1))
    assert guesser.guess([wish([5, 6], "a")]) == [Guess([])], "nothing is left of the old text"


def test_a_guess_costs_what_was_added_since_the_last() -> None:
    """At 10,000 tokens: far less than a look at each of them, which takes 300 us or more."""
    tokens = [(i * i) % 997 for i in range(10_000)]
    guesser = NgramGuesser(2, 4)
    guesser.guess([wish(tokens)])
    best = 1.0
    for i in range(50):
        tokens.append(i)
        asked = [wish(tokens)]
        began = time.perf_counter()
        guesser.guess(asked)
        best = min(best, time.perf_counter() - began)
    assert best < 100e-6


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{kind: ngrams}", "ngram"),
        ("{kind: draft}", "draft needs folder"),
        ("{kind: ngram, draft: small}", "takes no folder"),
        ("{ngram_min: 5, ngram_max: 3}", "more than ngram_max"),
        ("{tokens: 0}", "tokens"),
        ("{acceptance: 1.5}", "acceptance"),
        ("{token: 3}", "tokens"),
    ],
)
def test_a_wrong_value_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_deployment(
            f"models: [{{name: m, shape: tiny, speculate: {text}}}]\n"
            "pools: [{name: a, role: mixed, count: 1}]\n", "kvasir.yaml",
        )  # fmt: skip
    assert says in str(error.value) and "speculate" in str(error.value)
