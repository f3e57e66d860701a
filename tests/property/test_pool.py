"""The block pool against a model that knows every block by name, and the shape of what it gives."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from kvasir.core.ids import BlockKey
from kvasir.core.keys import trace_key
from kvasir.kv.pool import BlockPool, EvictView, FreeRuns
from kvasir.policy.evict import EVICTS, lru
from kvasir.policy.quota import furthest_over

CHAINS, CHAIN_BLOCKS = 3, 12


def chain_key(chain: int, position: int) -> BlockKey:
    return trace_key(chain * 1000 + position)


def chain_keys(chain: int, count: int = CHAIN_BLOCKS) -> list[BlockKey]:
    return [chain_key(chain, i) for i in range(count)]


def runs_of(blocks: set[int]) -> list[list[int]]:
    """Maximal runs of neighbours."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] + 1 == block:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def pieces(blocks: list[int]) -> int:
    """How many copies a transfer of these blocks, in this order, would be."""
    return sum(i == 0 or blocks[i - 1] + 1 != b for i, b in enumerate(blocks))


def fewest_pieces(free: set[int], count: int, after: int | None) -> int:
    """Continue after `after` as far as that run goes; the rest in as few runs as there can be."""
    extra = 0
    if after is not None and after + 1 in free and count:
        run = next(r for r in runs_of(free) if r[0] <= after + 1 <= r[-1])
        own = [b for b in run if b > after][:count]
        free, count, extra = free - set(own), count - len(own), 1
    for size in sorted((len(r) for r in runs_of(free)), reverse=True):
        if count <= 0:
            break
        count, extra = count - size, extra + 1
    return extra


class Sequence:
    """Blocks that somebody holds, in order, as blocks of a chain."""

    def __init__(self, chain: int, blocks: list[int]) -> None:
        self.chain, self.blocks = chain, blocks


class PoolMachine(RuleBasedStateMachine):
    """Sequences of three chains open, grow, commit and close; every answer is foreseen. Under
    `fair` each chain has an owner."""

    sequences = Bundle("sequences")

    @initialize(count=st.integers(1, 24), evict=st.sampled_from(sorted(EVICTS)))
    def start(self, count: int, evict: str) -> None:
        self.fair = evict == "fair"
        self.pool = BlockPool(count, EVICTS[evict], {"owner 1": 2.0})
        self.owner: dict[int, str] = {}
        self.count = count
        self.free = set(range(count))
        self.refs: dict[int, int] = {}
        self.key: dict[int, BlockKey] = {}
        self.cached: list[int] = []  # oldest release first
        self.mirror: set[BlockKey] = set()  # what somebody who follows changes() knows

    # --- the model --------------------------------------------------------------------------------

    def by_key(self) -> dict[BlockKey, int]:
        return {key: block for block, key in self.key.items()}

    def model_match(self, keys: list[BlockKey]) -> list[int]:
        known, found = self.by_key(), list[int]()
        for key in keys:
            if key not in known:
                break
            found.append(known[key])
        return found

    def model_take(self, blocks: list[int]) -> None:
        for block in blocks:
            if block in self.cached:
                self.cached.remove(block)
            self.refs[block] = self.refs.get(block, 0) + 1

    def model_evict(self, count: int) -> None:
        """Exactly as many of the oldest as `count` new blocks lack."""
        for _ in range(max(0, count - len(self.free))):
            block = self.model_victim()
            self.cached.remove(block)
            del self.key[block], self.owner[block]
            self.free.add(block)

    def model_victim(self) -> int:
        """The oldest; under `fair` of whoever has most named blocks for their weight, if any of
        them may go."""
        named = Counter(self.owner.values())
        able = {self.owner[block] for block in self.cached}
        who = furthest_over({o: n for o, n in named.items() if o in able}, {"owner 1": 2.0})
        return next(block for block in self.cached if self.owner[block] == who)

    def model_free(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                del self.refs[block]
                if block in self.key:
                    self.cached.append(block)
                else:
                    self.free.add(block)

    # --- rules ------------------------------------------------------------------------------------

    @rule(target=sequences, chain=st.integers(0, CHAINS - 1), length=st.integers(1, CHAIN_BLOCKS))
    def open(self, chain: int, length: int) -> object:
        hits = self.pool.match(chain_keys(chain, length))
        revived = sum(b in self.cached for b in hits)
        room = len(self.free) + len(self.cached) - revived
        missing = self.pool.missing_for(hits, length)
        assert missing == length - len(hits) - room
        if missing > 0:
            return multiple()
        self.pool.take(hits)
        self.model_take(hits)
        blocks = hits + self.allocate(length - len(hits), hits[-1] if hits else None)
        return Sequence(chain, blocks)

    @rule(sequence=sequences, more=st.integers(0, 4))
    def grow(self, sequence: Sequence, more: int) -> None:
        assume(more <= self.pool.available)
        sequence.blocks += self.allocate(more, sequence.blocks[-1])

    def allocate(self, count: int, after: int | None) -> list[int]:
        self.model_evict(count)
        blocks = self.pool.allocate(count, after)
        assert len(blocks) == len(set(blocks)) == count
        assert set(blocks) <= self.free
        assert pieces(blocks) == fewest_pieces(self.free, count, after)
        self.free -= set(blocks)
        self.refs |= dict.fromkeys(blocks, 1)
        return blocks

    @rule(sequence=sequences, upto=st.integers(0, CHAIN_BLOCKS))
    def commit(self, sequence: Sequence, upto: int) -> None:
        for block, key in zip(sequence.blocks[:upto], chain_keys(sequence.chain), strict=False):
            owner = f"owner {sequence.chain}" if self.fair else ""
            self.pool.commit(block, key, owner)
            if block not in self.key and key not in self.key.values():
                self.key[block], self.owner[block] = key, owner

    @rule(sequence=consumes(sequences))
    def close(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        self.model_free(sequence.blocks)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        for block in self.cached:
            del self.key[block], self.owner[block]
        self.free |= set(self.cached)
        self.cached = []

    @rule()
    def changes(self) -> None:
        added, removed = self.pool.changes()
        assert not set(added) & set(removed)
        self.mirror = (self.mirror - set(removed)) | set(added)
        assert self.mirror == set(self.pool.all_keys())
        assert self.pool.changes() == ((), ())

    # --- after each of them -----------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        pool = self.pool
        pool.check()
        assert pool.available == len(self.free) + len(self.cached)
        assert pool.held == len(self.refs)
        assert [pool.refs(b) for b in range(self.count)] == [
            self.refs.get(b, 0) for b in range(self.count)
        ]
        assert list(pool.in_order()) == self.cached
        assert set(pool.all_keys()) == set(self.key.values())
        for chain in range(CHAINS):
            assert pool.match(chain_keys(chain)) == self.model_match(chain_keys(chain))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40)


# --- neighbours are handed out together -----------------------------------------------------------


def runs_with(free: set[int], blocks_count: int) -> FreeRuns:
    """A free list of exactly `free`."""
    runs = FreeRuns(blocks_count)
    runs.take(blocks_count, None)
    for block in free:
        runs.give((block,))
    return runs


@st.composite
def demands(draw: st.DrawFn) -> tuple[set[int], int, int | None]:
    """Free blocks of 32, how many are wanted, and a held block that they may follow."""
    states = draw(st.lists(st.booleans(), min_size=32, max_size=32).filter(any))
    free = {i for i, is_free in enumerate(states) if is_free}
    held = sorted(set(range(32)) - free)
    after = draw(st.sampled_from([None, *held]))
    return free, draw(st.integers(1, len(free))), after


@given(demands())
def test_blocks_come_in_as_few_runs_as_there_can_be(
    demand: tuple[set[int], int, int | None],
) -> None:
    free, count, after = demand
    runs = runs_with(free, 32)
    assert runs.check() == free
    taken = runs.take(count, after)
    assert set(taken) <= free and runs.check() == free - set(taken)
    assert len(taken) == count and pieces(taken) == fewest_pieces(free, count, after)
    if after is not None and after + 1 in free:
        assert taken[0] == after + 1


@given(demands())
def test_the_smallest_run_that_fits_is_used(demand: tuple[set[int], int, int | None]) -> None:
    """Large runs are kept for those who need them."""
    free, most, _ = demand
    count = min(most, max(map(len, runs_of(free))))
    fitting = [r for r in runs_of(free) if len(r) >= count]
    taken = runs_with(free, 32).take(count, None)
    (home,) = [r for r in fitting if taken[0] in r]
    assert len(home) == min(len(r) for r in fitting)


@given(st.permutations(range(16)))
def test_runs_join_whatever_the_order_of_return(order: list[int]) -> None:
    runs = runs_with(set(order), 16)
    assert runs.take(16, None) == list(range(16))


# --- what goes first ------------------------------------------------------------------------------


def held_chain(pool: BlockPool, chain: int, count: int) -> list[int]:
    blocks = pool.allocate(count)
    for block, key in zip(blocks, chain_keys(chain, count), strict=True):
        pool.commit(block, key)
    return blocks


def test_a_chain_loses_its_tail_before_its_head() -> None:
    pool = BlockPool(6, lru)
    pool.free(held_chain(pool, 0, 6))
    for left in (5, 4, 3, 2, 1, 0):
        pool.allocate(1)
        assert len(pool.match(chain_keys(0))) == left


def test_the_chain_released_first_goes_first() -> None:
    pool = BlockPool(8, lru)
    first, second = held_chain(pool, 0, 4), held_chain(pool, 1, 4)
    pool.free(second)
    pool.free(first)
    pool.allocate(5)
    assert len(pool.match(chain_keys(1))) == 0
    assert len(pool.match(chain_keys(0))) == 3


def test_a_chain_that_is_used_again_is_young_again() -> None:
    pool = BlockPool(8, lru)
    first, second = held_chain(pool, 0, 4), held_chain(pool, 1, 4)
    pool.free(first)
    pool.free(second)
    pool.take(first)
    pool.free(first)
    pool.allocate(4)
    assert len(pool.match(chain_keys(0))) == 4
    assert len(pool.match(chain_keys(1))) == 0


def test_blocks_in_use_are_never_evicted() -> None:
    pool = BlockPool(4, lru)
    held_chain(pool, 0, 3)
    with pytest.raises(AssertionError):
        pool.allocate(2)
    assert len(pool.match(chain_keys(0))) == 3


def test_the_victim_is_the_policys_choice() -> None:
    def youngest(view: EvictView, count: int) -> list[int]:
        return list(view.in_order())[-count:]

    pool = BlockPool(4, youngest)
    pool.free(held_chain(pool, 0, 4))  # the head is released last
    pool.allocate(1)
    assert pool.match(chain_keys(0)) == []
    assert pool.cached_keys == 3
