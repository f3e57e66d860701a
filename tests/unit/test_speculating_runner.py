"""A runner that guesses draws the very tokens of one that does not, and counts what it guessed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.effects import Row, Step
from kvasir.core.request import Sampling
from kvasir.engine.fake import FakeRunner, Oracle, fake_tokens
from kvasir.engine.speculate import NgramGuesser
from kvasir.engine.steps import Guess, Wish
from tests.engine_driver import SALT, Driver, Hooks, Job, copy_blocks

PROMPT = [7, 1, 200, 3, 3, 3, 90, 14, 255, 0, 66]


def driver(acceptance: float = 0.7, block_size: int = 4, **values: object) -> Driver:
    runner = FakeRunner(blocks_count=100, block_size=block_size, **values)
    runner.guesser = Oracle(runner, acceptance)
    return Driver(runner)


def job(name: str = "a", n: int = 20, draft: int = 4, first: int = 0) -> Job:
    return Job(name, list(PROMPT), n, list(range(first, first + 20)), draft=draft)


@given(
    acceptance=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    draft=st.integers(1, 9),
    chunk=st.integers(1, 17),
    steps=st.integers(1, 5),
    block_size=st.sampled_from([1, 4, 16]),
    n=st.integers(1, 20),
)
def test_guesses_change_no_token(
    acceptance: float, draft: int, chunk: int, steps: int, block_size: int, n: int
) -> None:
    drive = driver(acceptance, block_size)
    one, plain = job(n=n, draft=draft), job("plain", 9, 0, first=40)
    one.free = list(range(40))
    for each in (one, plain):
        drive.open(each)
    drive.run([one, plain], chunk, steps)
    assert one.output == fake_tokens(PROMPT, n) and plain.output == fake_tokens(PROMPT, 9)
    assert 0 <= one.accepted <= one.drafted and plain.drafted == 0
    if acceptance == 1 and chunk > len(PROMPT):
        assert one.accepted == one.drafted > 0 or n < 3
    if acceptance == 0:
        assert one.accepted == 0


def test_tokens_of_an_iteration_come_together_in_order() -> None:
    drive, hooks = driver(1.0), Hooks()
    one = drive.open(job(n=12))
    drive.step([one])
    drive.step([one], steps=2, hooks=hooks)
    assert [[s.index for s in batch] for batch in hooks.batches] == [
        [1, 2, 3, 4, 5], [6, 7, 8, 9, 10],
    ]  # fmt: skip
    drive.step([one])
    assert one.end == "length" and one.drafted == one.accepted == 8, "none for the last token"


@pytest.mark.parametrize("at", range(2, 8))
def test_a_text_ends_in_the_middle_of_right_guesses(at: int) -> None:
    """What follows the stop token is dropped, whether it was guessed or drawn."""
    truth = fake_tokens(PROMPT, 20)
    stop = truth[at]
    assert stop not in truth[:at]
    drive, hooks = driver(1.0), Hooks()
    one = job(draft=5)
    one.sampling = Sampling(stop_token_ids=(stop,))
    drive.open(one)
    drive.step([one])
    while not one.end:
        drive.step([one], steps=3, hooks=hooks)
    assert one.end == "stop" and one.output == truth[: at + 1]
    assert [s.end for batch in hooks.batches for s in batch][-1] == "stop"


def test_keys_name_what_was_kept() -> None:
    """Blocks that wrong guesses reached into are not named before they are full of right ones."""
    told: list[list[bytes]] = []
    for acceptance in (0.0, 0.6, 1.0):
        drive = driver(acceptance)
        one = drive.open(job(n=20))
        while not one.end:
            drive.step([one], steps=2)
            assert len(one.keys) == one.computed // 4 - len(PROMPT) // 4
        told.append(one.keys)
    assert told[0] == told[1] == told[2] != []


def test_guessing_after_a_transfer() -> None:
    p, d = driver(), driver(1.0)
    source = p.open(job())
    p.step([source])
    copy_blocks(p.runner, d.runner, [(0, 11), (1, 2), (2, 17)])
    d.runner.adopt("a", 1, [11, 2, 17])
    d.runner.append("a", 1, source.output[0])
    d.runner.open("a", 1, PROMPT, 2, SALT)
    target = job(first=30)
    target.output, target.computed, target.held = list(source.output), len(PROMPT), 3
    assert d.run([target])[0] == fake_tokens(PROMPT, 20)
    assert target.accepted == target.drafted > 0


class Liar:
    """Guesses more than it was asked for never; otherwise anything."""

    def guess(self, wishes: Sequence[Wish]) -> list[Guess]:
        return [Guess([] if w.index % 3 == 0 else [1] * min(1, w.count)) for w in wishes]

    def forget(self, key: tuple[str, int]) -> None:
        pass


def test_a_guesser_may_have_nothing_to_say() -> None:
    drive = driver()
    drive.runner.guesser = Liar()  # type: ignore[attr-defined]
    one = drive.open(job(n=15))
    assert drive.run([one])[0] == fake_tokens(PROMPT, 15)
    assert 0 < one.drafted < 15


def test_without_a_guesser_such_a_row_draws_one_token() -> None:
    drive = Driver(FakeRunner(blocks_count=40, block_size=4))
    one = drive.open(job(n=6))
    drive.step([one])
    result = drive.step([one], steps=2)
    assert (result.rows[0].sampled, result.rows[0].drafted) == (2, 0)


def test_ngrams_of_a_small_vocabulary_come_true_at_times() -> None:
    runner = FakeRunner(blocks_count=200, block_size=4, vocab=3)
    runner.guesser = NgramGuesser(1, 3)
    drive = Driver(runner)
    one = drive.open(Job("a", [0, 1, 2], 200, list(range(200)), draft=4))
    assert drive.run([one])[0] == fake_tokens([0, 1, 2], 200, vocab=3)
    assert 0 < one.accepted < one.drafted


def test_guesses_beyond_the_row_s_blocks_are_an_assertion() -> None:
    drive = driver(1.0)
    one = drive.open(job())
    drive.step([one])
    row = Row("a", 1, one.computed, 1, sample=True, index=1, end_at=20, draft=9)
    with pytest.raises(AssertionError, match="its blocks end at 12"):
        drive.runner.step(Step(99, (row,)), Hooks())
