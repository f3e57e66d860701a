"""Batches from a budget, in order of arrival or of cached prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from kvasir.policy.batch import BATCHES, LPM_WAITING_MAX, Admission


@dataclass(frozen=True)
class FakeWork:
    known: int
    cached: int = 0
    computed: int = 0
    blocks_held: int = 0
    output_left: int = 10
    fresh: bool = False
    keys: Sequence[int] = ()
    draft: int = 0


@dataclass(frozen=True)
class FakeView:
    waiting: Sequence[FakeWork]
    running: Sequence[FakeWork] = ()
    blocks_available: int = 1000
    block_size: int = 10
    batch_max: int = 256
    batch_tokens_max: int = 100
    chunk_tokens: int = 100
    steps_max: int = 8
    decoding: None = None

    def admission(self, index: int) -> Admission:
        work = self.waiting[index]
        return Admission(work.cached, -(-work.known // self.block_size))


WAITING = (FakeWork(50), FakeWork(60, cached=20), FakeWork(50, cached=40), FakeWork(60, cached=20))


def entered(name: str, view: FakeView) -> list[tuple[int, int]]:
    """(index in waiting, tokens) of those that enter."""
    batch = BATCHES[name](view)
    order = batch.order or range(len(batch.admitted))
    return list(zip(order, batch.admitted, strict=True))


def test_first_come_first_served() -> None:
    assert entered("token_budget", FakeView(WAITING)) == [(0, 50), (1, 40), (2, 10)]


def test_lpm_takes_the_longest_cached_prefix_first() -> None:
    """Equal prefixes in order of arrival; the last gets what is left of the budget."""
    assert entered("lpm", FakeView(WAITING)) == [(2, 10), (1, 40), (3, 40), (0, 10)]


def test_lpm_stops_at_the_first_without_room() -> None:
    assert entered("lpm", FakeView(WAITING, blocks_available=10)) == [(2, 10)]
    assert entered("lpm", FakeView(WAITING, batch_max=2)) == [(2, 10), (1, 40)]


@pytest.mark.parametrize(("count", "first"), [(LPM_WAITING_MAX, 1), (LPM_WAITING_MAX + 1, 0)])
def test_lpm_is_first_come_first_served_beyond_128(count: int, first: int) -> None:
    waiting = [FakeWork(60), FakeWork(60, cached=20)] + [FakeWork(60)] * (count - 2)
    assert entered("lpm", FakeView(waiting))[0][0] == first


@pytest.mark.parametrize("name", BATCHES)
def test_running_ones_go_first_and_nothing_enters_beside_a_preemption(name: str) -> None:
    old = FakeWork(21, computed=20, blocks_held=2)
    view = FakeView(WAITING, running=(old, old), batch_tokens_max=11)
    assert BATCHES[name](view).counts == (1, 1)
    assert sum(BATCHES[name](view).admitted) == 9
    full = FakeView(WAITING, running=(old, old), blocks_available=0)
    assert BATCHES[name](full).preempted == (1,) and BATCHES[name](full).admitted == ()
