"""A tier's cache against a model that ranks all blocks anew each time; pins against the pool."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvasir.core.keys import trace_key
from kvasir.kv.pool import BlockPool
from kvasir.kv.tiers import TierCache, Use, anyone
from kvasir.policy.evict import RANKS, lru
from kvasir.policy.quota import furthest_over

CHAINS, DEPTH, SLOTS = 4, 6, 7


class CacheMachine(RuleBasedStateMachine):
    """Prompts are stored block by block and used; slots are held while they are read. Chains may
    have owners, among whom shares are fair."""

    @initialize(name=st.sampled_from(sorted(RANKS)), owners=st.sampled_from(["", "ab", "abcd"]))
    def begin(self, name: str, owners: str) -> None:
        self.rank, self.owners = RANKS[name], owners
        gives_up = partial(furthest_over, weights={"a": 2.0}) if owners else anyone
        self.cache = TierCache(SLOTS, self.rank, gives_up)
        self.slots: dict[bytes, int] = {}
        self.uses: dict[bytes, Use] = {}
        self.held: dict[int, int] = {}
        self.tick = 0

    def idle(self) -> list[bytes]:
        return [key for key, slot in self.slots.items() if not self.held.get(slot)]

    @rule(chain=st.integers(0, CHAINS - 1), count=st.integers(1, DEPTH), seconds=st.floats(0, 9))
    def use(self, chain: int, count: int, seconds: float) -> None:
        """A prompt: what is there is used again, what is not is stored behind it."""
        self.tick += 1
        for depth in range(count):
            key, floor = trace_key(100 * chain + depth), self.cache.floor
            owner = self.owners[chain % len(self.owners)] if self.owners else ""
            known = self.cache.touch(key, self.tick, seconds, again=True, owner=owner)
            assert known == (key in self.slots)
            if not known:
                self.store(key, Use(depth, self.tick, seconds, floor=floor, owner=owner))

    def store(self, key: bytes, use: Use) -> None:
        full = len(self.slots) == SLOTS
        owner = self.giver(use.owner)
        ranks = {k: self.rank(self.uses[k]) for k in self.idle() if self.uses[k].owner == owner}
        slot = self.cache.reserve(use)
        own = owner == use.owner
        if full and (not ranks or (own and self.rank(use) <= min(ranks.values()))):
            assert slot is None
            return
        assert slot is not None
        if full:
            (gone,) = [k for k, s in self.slots.items() if s == slot]
            assert ranks[gone] == min(ranks.values())
            del self.slots[gone], self.uses[gone]
        self.cache.name(slot, key, use)
        self.cache.release([slot])
        self.slots[key], self.uses[key] = slot, use

    def giver(self, comer: str) -> str:
        """Who gives a block up for one of `comer`: whoever has most for their weight, of those that
        can, with the new block counted."""
        owned = Counter([comer, *(use.owner for use in self.uses.values())])
        able = {comer, *(self.uses[key].owner for key in self.idle())}
        return furthest_over({o: n for o, n in owned.items() if o in able}, {"a": 2.0})

    @precondition(lambda self: self.slots)
    @rule(pick=st.integers(0, 99))
    def read(self, pick: int) -> None:
        slot = list(self.slots.values())[pick % len(self.slots)]
        self.cache.pool.take([slot])
        self.held[slot] = self.held.get(slot, 0) + 1

    @precondition(lambda self: any(self.held.values()))
    @rule(pick=st.integers(0, 99), damaged=st.booleans())
    def over(self, pick: int, damaged: bool) -> None:
        slots = [slot for slot, count in self.held.items() if count]
        slot = slots[pick % len(slots)]
        names = [key for key, at in self.slots.items() if at == slot]
        if damaged and names and self.held[slot] == 1:
            self.cache.forget(slot)
            del self.slots[names[0]], self.uses[names[0]]
        self.cache.release([slot])
        self.held[slot] -= 1

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            assert {k: self.cache.find(k) for k in self.slots} == self.slots
            assert self.cache.pool.cached_keys == len(self.slots)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize("name", sorted(RANKS))
@given(prompts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.floats(0.1, 9))))
def test_a_chain_loses_its_tail_first(
    name: str, prompts: list[tuple[int, int, float]]
) -> None:
    """Whatever the rule: of a prompt, what is left is its beginning."""
    cache = TierCache(5, RANKS[name])
    for tick, (chain, count, seconds) in enumerate(prompts, start=1):
        keys = [trace_key(100 * chain + depth) for depth in range(count)]
        missing = [
            (key, Use(depth, tick, seconds, floor=cache.floor)) for depth, key in enumerate(keys)
            if not cache.touch(key, tick, seconds, again=True)
        ]  # fmt: skip
        for key, use in missing:
            slot = cache.reserve(use)
            if slot is not None:
                cache.name(slot, key, use)
                cache.release([slot])
        for chain in range(4):
            keys = [trace_key(100 * chain + depth) for depth in range(6)]
            there = [cache.find(key) is not None for key in keys]
            assert there == sorted(there, reverse=True)


@given(st.lists(st.tuples(st.sampled_from("ptfu"), st.integers(0, 3)), max_size=40))
def test_pinned_blocks_keep_their_place_and_are_not_given_away(acts: list[tuple[str, int]]) -> None:
    pool = BlockPool(6, lru)
    blocks = pool.allocate(4)
    for block in blocks:
        pool.commit(block, trace_key(block))
    held, pinned = dict.fromkeys(blocks, 1), dict.fromkeys(blocks, 0)
    order: list[int] = []
    for act, pick in acts:
        block = blocks[pick]
        if act == "p":
            pool.pin([block])
            pinned[block] += 1
        elif act == "u" and pinned[block]:
            pool.unpin([block])
            pinned[block] -= 1
        elif act == "t":
            pool.take([block])
            held[block] += 1
            order = [b for b in order if b != block]
        elif act == "f" and held[block]:
            pool.free([block])
            held[block] -= 1
            order += [block] * (not held[block])
        pool.check()
        idle = [b for b in order if not pinned[b]]
        assert list(pool.in_order()) == idle
        assert pool.available == 2 + len(idle)
        assert pool.held == sum(map(bool, held.values()))
