"""The sampler draws from the right distribution, and the same token whoever stands beside."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from kvasir.core.request import Sampling  # noqa: E402
from kvasir.engine import sampler  # noqa: E402
from kvasir.engine.sampler import Draw, draw, uniform  # noqa: E402

PROBS = torch.tensor([0.02, 0.4, 0.08, 0.3, 0.2])
LOGITS = PROBS.log()
DRAWS = 4000


def tokens_of(sampling: Sampling, rows: int = DRAWS, logits: torch.Tensor = LOGITS) -> list[int]:
    """One draw per output index of one request, all in one batch."""
    draws = [Draw("r", index, sampling) for index in range(rows)]
    return draw(logits.expand(rows, -1), draws)


def chi_square(tokens: list[int], probs: torch.Tensor) -> float:
    """Pearson's statistic over the tokens that can be drawn; the others must not be."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    assert not counts[expected == 0].any()
    kept = expected > 0
    return float(((counts - expected) ** 2 / expected)[kept].sum())


def noise(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


# --- greedy ----------------------------------------------------------------------------------


def test_temperature_zero_is_greedy() -> None:
    logits = noise(50, 300)
    draws = [Draw(f"r{i}", i, Sampling(temperature=0.0, top_p=0.1, seed=i)) for i in range(50)]
    assert draw(logits, draws) == logits.argmax(-1).tolist()


def test_tiny_temperature_is_greedy_and_finite() -> None:
    logits = noise(50, 300) * 1000
    for temperature in (1e-10, 1e-37, 1e-60):
        draws = [Draw(f"r{i}", i, Sampling(temperature=temperature)) for i in range(50)]
        assert draw(logits, draws) == logits.argmax(-1).tolist()


def test_greedy_and_warm_rows_share_a_batch() -> None:
    logits = noise(3, 40)
    cold = Sampling(temperature=0.0)
    draws = [Draw("a", 0, cold), Draw("b", 3, Sampling(seed=1)), Draw("c", 0, cold)]
    got = draw(logits, draws)
    assert [got[0], got[2]] == logits[[0, 2]].argmax(-1).tolist()
    assert got[1] == draw(logits[1:2], draws[1:2])[0]


# --- distribution ----------------------------------------------------------------------------
# 0.001 quantiles of chi-square: 18.5 with 4 degrees of freedom, 13.8 with 2, 10.8 with 1.


@pytest.mark.parametrize("seed", [None, 0, 12345, -1, 2**70])
def test_plain_draws_follow_the_softmax(seed: int | None) -> None:
    assert chi_square(tokens_of(Sampling(seed=seed)), PROBS) < 18.5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature: float) -> None:
    probs = (LOGITS / temperature).softmax(-1)
    assert chi_square(tokens_of(Sampling(temperature=temperature, seed=4)), probs) < 18.5


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]),
     (0.99, [0, 1, 2, 3, 4])],
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    probs = torch.zeros(5)
    probs[kept] = PROBS[kept] / PROBS[kept].sum()
    tokens = tokens_of(Sampling(top_p=top_p, seed=9))
    assert set(tokens) == set(kept)
    assert chi_square(tokens, probs) < 18.5


def test_top_p_counts_after_temperature() -> None:
    """Flattened, two tokens no longer reach half of the mass."""
    assert set(tokens_of(Sampling(top_p=0.5, seed=2))) == {1, 3}
    assert set(tokens_of(Sampling(temperature=4.0, top_p=0.5, seed=2))) == {1, 3, 4}


def test_a_nucleus_beyond_the_first_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = noise(1, 500)[0]
    whole = tokens_of(Sampling(top_p=0.9, seed=3), 500, logits)
    monkeypatch.setattr(sampler, "NUCLEUS_GUESS", 3)
    assert tokens_of(Sampling(top_p=0.9, seed=3), 500, logits) == whole


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 64), float("-inf"))
    logits[0, [5, 40]] = 0.0
    assert set(tokens_of(Sampling(seed=1), 300, logits[0])) == {5, 40}


# --- one number decides ----------------------------------------------------------------------


@given(
    at=st.integers(0, 7),
    company=st.integers(0, 7),
    seed=st.none() | st.integers(0, 5),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
)
def test_neighbours_do_not_matter(at: int, company: int, seed: int | None, top_p: float) -> None:
    logits = noise(8, 200, seed=company)
    others = [Sampling(temperature=0.5 * i, top_p=1 - i / 10, seed=i) for i in range(8)]
    draws = [Draw(f"n{i}", i, sampling) for i, sampling in enumerate(others)]
    mine = Draw("mine", 17, Sampling(temperature=0.8, top_p=top_p, seed=seed))
    draws[at] = mine
    assert draw(logits, draws)[at] == draw(logits[at : at + 1], [mine])[0]


def test_a_seed_counts_by_position_not_by_request() -> None:
    seeded, free = Sampling(seed=7), Sampling()
    assert uniform(Draw("a", 3, seeded)) == uniform(Draw("b", 3, seeded))
    assert uniform(Draw("a", 3, free)) != uniform(Draw("b", 3, free))
    assert uniform(Draw("a", 3, free)) == uniform(Draw("a", 3, Sampling(temperature=0.2)))
    numbers = {uniform(Draw("a", i, s)) for i in range(100)
               for s in (free, Sampling(seed=1), Sampling(seed=11))}  # fmt: skip
    assert len(numbers) == 300 and all(0 <= number < 1 for number in numbers)


def test_numbers_are_fixed_for_good() -> None:
    """Another platform or version must draw the same: a recorded answer can be drawn again."""
    assert uniform(Draw("a", 0, Sampling(seed=0))) == 0.030470426610744394


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_both_ends_of_the_interval_are_tokens(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda one: number)
    logits = noise(64, 1000).where(torch.arange(1000) % 7 == 3, float("-inf"))
    tokens = draw(logits, [Draw("r", i, Sampling()) for i in range(64)])
    assert all(token % 7 == 3 for token in tokens)
