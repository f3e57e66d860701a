"""The prefix index against brute force, under whatever a network can do to a worker's events.

Workers log every event that they ever sent. An event comes at once, late, twice, never, or from a
past life, with its keys in any order. The index must hold what the worker held when it sent
the newest event that came, or nothing at all; of a worker that sends none, what a cache of the
prompts that it was sent would hold. How blocks lie in runs shows nowhere.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvasir.core.ids import BlockKey
from kvasir.core.keys import trace_key
from kvasir.core.message import Tier
from kvasir.kv.guess import Guess
from kvasir.kv.prefix import TIERS, PrefixIndex, TierHits
from kvasir.kv.runs import RUN_MAX, Runs

TOLD = ("decode-0", "decode-1")
GUESSED = "decode-2"
WORKERS = (*TOLD, GUESSED)
ROOM, TTL_S = 5, 4.0

# Three chains: the second forks from the first, the third is longer than a run.
FIRST = [trace_key(i) for i in range(6)]
FORK = FIRST[:3] + [trace_key(100 + i) for i in range(4)]
LONG = [trace_key(200 + i) for i in range(RUN_MAX + 8)]
CHAINS = [FIRST, FORK, LONG]
KEYS = [*FIRST, *FORK[3:], *LONG[:3], *LONG[RUN_MAX - 2 :]]
QUERIES = [*CHAINS, FIRST[:3], FORK[2:] + FIRST, LONG[RUN_MAX - 1 :], []]

told = st.sampled_from(TOLD)
tiers = st.sampled_from(list(TIERS))
stretches = st.builds(
    lambda chain, start, size: chain[start : start + size],
    st.sampled_from(CHAINS), st.integers(0, RUN_MAX), st.integers(1, RUN_MAX + 8),
)  # fmt: skip
key_lists = st.one_of(
    st.lists(st.sampled_from(KEYS), max_size=8), stretches, stretches.map(lambda s: s[::-1])
)
Held = dict[Tier, frozenset[BlockKey]]
EMPTY: Held = {tier: frozenset() for tier in TIERS}


@dataclass(frozen=True)
class Event:
    incarnation: int
    seq: int
    tier: Tier
    added: list[BlockKey]
    removed: list[BlockKey]
    reset: bool
    held: Held  # by the worker when it was sent


@dataclass
class Sender:
    """A worker as it is, and all that it ever sent."""

    incarnation: int = 0
    seq: int = 0
    held: Held = field(default_factory=EMPTY.copy)
    log: list[Event] = field(default_factory=list)

    def change(self, tier: Tier, added: list[BlockKey], removed: list[BlockKey]) -> None:
        self.held = self.held | {tier: (self.held[tier] - frozenset(removed)) | frozenset(added)}
        self.send(tier, added, removed)

    def reset(self) -> None:
        """All of the device's blocks from nothing, then the other tiers'."""
        whole = self.held
        for tier in TIERS:
            self.held = EMPTY | {t: whole[t] for t in list(TIERS)[: TIERS[tier] + 1]}
            self.send(tier, sorted(whole[tier], reverse=True), [], reset=tier == "device")

    def send(
        self, tier: Tier, added: list[BlockKey], removed: list[BlockKey], *, reset: bool = False
    ) -> None:
        self.seq += 1
        self.log.append(
            Event(self.incarnation, self.seq, tier, added, removed, reset, self.held.copy())
        )


@dataclass
class Known:
    """What the index must hold of a worker: `held` at event `seq`; None until a reset comes."""

    incarnation: int
    seq: int = 0
    held: Held | None = field(default_factory=EMPTY.copy)


@dataclass
class Cache:
    """Brute force for a worker that tells nothing: when each block was last sent to it."""

    sent: dict[BlockKey, tuple[float, int]] = field(default_factory=dict)  # (when, rank then)
    turn: int = 0

    def use(self, prompt: list[BlockKey], now: float) -> None:
        kept = prompt[:ROOM]
        for at, key in enumerate(kept):
            self.sent[key] = (now, self.turn + len(kept) - at)
        self.turn += len(kept) + 1
        latest = sorted(self.sent, key=lambda key: self.sent[key][1])[-ROOM:]
        self.sent = {key: self.sent[key] for key in latest}

    def expire(self, now: float) -> None:
        self.sent = {k: at for k, at in self.sent.items() if at[0] + TTL_S > now}


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.senders = {w: Sender() for w in TOLD}
        self.known: dict[str, Known] = {}
        self.cache: Cache | None = None
        self.now = 0.0

    @initialize()
    def start(self) -> None:
        for worker in TOLD:
            self.restart(worker)
        self.join_guessed()

    @rule(worker=told, comes_back=st.booleans())
    def die(self, worker: str, comes_back: bool) -> None:
        if comes_back:
            self.restart(worker)
        else:
            self.index.leave(worker)
            self.known.pop(worker, None)

    def restart(self, worker: str) -> None:
        sender = self.senders[worker]
        sender.incarnation, sender.seq, sender.held = sender.incarnation + 1, 0, EMPTY.copy()
        self.index.join(worker, sender.incarnation)
        self.known[worker] = Known(sender.incarnation)

    @rule(worker=told, tier=tiers, added=key_lists, removed=key_lists, comes=st.booleans())
    def change(
        self, worker: str, tier: Tier, added: list[BlockKey], removed: list[BlockKey], comes: bool
    ) -> None:
        self.senders[worker].change(tier, added, [k for k in removed if k not in added])
        if comes:
            self.deliver(worker, self.senders[worker].log[-1])

    @rule(worker=told, come=st.tuples(st.booleans(), st.booleans(), st.booleans()))
    def tell_all(self, worker: str, come: tuple[bool, bool, bool]) -> None:
        self.senders[worker].reset()
        for event, comes in zip(self.senders[worker].log[-3:], come, strict=True):
            if comes:
                self.deliver(worker, event)

    @rule(worker=told, age=st.integers(0, 6))
    def deliver_late(self, worker: str, age: int) -> None:
        """Late, again, or from a past life."""
        log = self.senders[worker].log
        if age < len(log):
            self.deliver(worker, log[-1 - age])

    def deliver(self, worker: str, event: Event) -> None:
        whole = self.index.apply(
            worker, event.incarnation, event.seq, event.added, event.removed,
            tier=event.tier, reset=event.reset,
        )  # fmt: skip
        known = self.known.get(worker)
        if known is None or known.incarnation != event.incarnation:
            assert whole, "a message of a past life asks for nothing"
            return
        if event.seq > known.seq:
            follows = known.held is not None and event.seq == known.seq + 1
            known.seq = event.seq
            known.held = event.held if event.reset or follows else None
        assert whole == (known.held is not None)

    # --- the one that tells nothing ---------------------------------------------------------------

    @rule()
    def join_guessed(self) -> None:
        self.index.join(GUESSED, 1, Guess(ROOM, TTL_S))
        self.cache = Cache()

    @rule()
    def leave_guessed(self) -> None:
        self.index.leave(GUESSED)
        self.cache = None

    @rule(prompt=st.sampled_from(QUERIES), after=st.sampled_from([0.0, 0.5, 3.0]))
    def route(self, prompt: list[BlockKey], after: float) -> None:
        self.now += after
        for worker in WORKERS:  # of the others it knows better
            self.index.expect(worker, prompt, self.now)
        if self.cache is not None:
            self.cache.use(prompt, self.now)

    @rule(after=st.sampled_from([0.0, 1.0, TTL_S]))
    def expire(self, after: float) -> None:
        self.now += after
        self.index.expire(self.now)
        if self.cache is not None:
            self.cache.expire(self.now)

    @rule(added=key_lists)
    def tell_though_guessed(self, added: list[BlockKey]) -> None:
        """It said that it would not: what it says all the same is not folded into a guess."""
        assert self.index.apply(GUESSED, 1, 1, added, ())

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        self.index.check()
        held = {w: k.held or EMPTY for w, k in self.known.items()}
        if self.cache is not None:
            held[GUESSED] = EMPTY | {"device": frozenset(self.cache.sent)}
        for worker in WORKERS:
            own = held.get(worker, EMPTY)
            assert self.index.blocks_of(worker) == sum(map(len, own.values()))
            for tier in TIERS:
                assert self.index.blocks_of(worker, tier) == len(own[tier])
        everything = {key for own in held.values() for keys in own.values() for key in keys}
        assert self.index.blocks == len(everything)
        for query in QUERIES:
            found = brute_force(held, query)
            assert self.index.tiers(query) == found
            assert self.index.match(query) == {w: sum(hits) for w, hits in found.items()}


def brute_force(held: dict[str, Held], query: list[BlockKey]) -> dict[str, TierHits]:
    found = {}
    for worker, own in held.items():
        counts = dict.fromkeys(TIERS, 0)
        for key in query:
            at = next((tier for tier in TIERS if key in own[tier]), None)
            if at is None:
                break
            counts[at] += 1
        if any(counts.values()):
            found[worker] = TierHits(**counts)
    return found


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=300, stateful_step_count=40)


@given(st.lists(st.sets(st.sampled_from(KEYS)), min_size=1, max_size=80))
def test_any_number_of_workers(parts: list[set[BlockKey]]) -> None:
    """More than a machine word of them."""
    index = PrefixIndex()
    held = {f"w{i}": EMPTY | {"device": frozenset(part)} for i, part in enumerate(parts)}
    for worker, own in held.items():
        index.join(worker, 1)
        assert index.apply(worker, 1, 1, sorted(own["device"]), ())
    index.check()
    for query in QUERIES:
        assert index.tiers(query) == brute_force(held, query)


@pytest.mark.parametrize("workers", [7, 30])
def test_workers_that_hold_a_prompt_to_a_depth_each(workers: int) -> None:
    index = PrefixIndex()
    names = [f"w{i}" for i in range(workers)]
    for i, worker in enumerate(names):
        index.join(worker, 1)
        index.apply(worker, 1, 1, LONG[: i + 1], ())
    assert index.match(LONG) == {worker: i + 1 for i, worker in enumerate(names)}
    assert index.match(LONG[:1]) == dict.fromkeys(names, 1)
    for worker in names[::2]:
        index.leave(worker)
    assert index.match(LONG[:1]) == dict.fromkeys(names[1::2], 1)
    index.check()


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.booleans(), st.sampled_from([1, 2, 4]), key_lists), max_size=20),
)
def test_a_full_table_knows_less_and_says_so(
    blocks_max: int, changes: list[tuple[bool, int, list[BlockKey]]]
) -> None:
    """It never holds more than it may, never names who has nothing, and counts what it refused."""
    runs = Runs(blocks_max)
    held: dict[int, set[BlockKey]] = {1: set(), 2: set(), 4: set()}
    for add, holder, keys in changes:
        before, room = runs.refused, blocks_max - runs.blocks
        unknown = {k for k in keys if not list(runs.walk([k]))}
        if add:
            runs.add(holder, keys)
            held[holder] |= set(keys)
            assert runs.refused - before >= max(len(unknown) - room, 0)
            assert (runs.refused == before) == (len(unknown) <= room)
        else:
            runs.remove(holder, keys)
            held[holder] -= set(keys)
        runs.check()
        for key in KEYS:
            mask = next((mask for _, mask in runs.walk([key])), 0)
            assert not mask & ~sum(h for h, own in held.items() if key in own)
            if not runs.refused:
                assert mask == sum(h for h, own in held.items() if key in own)


@pytest.mark.parametrize("late", ["event", "reset"])
def test_what_was_overtaken_does_not_come_back(late: str) -> None:
    """1 adds, 2 is late, 3 removes: once 3 was seen, 2 says nothing about what is there now."""
    index = PrefixIndex()
    index.join("w", 1)
    assert index.apply("w", 1, 1, FIRST[:1], ())
    assert not index.apply("w", 1, 3, (), FIRST)
    assert not index.apply("w", 1, 2, FIRST, (), reset=late == "reset")
    assert index.match(FIRST) == {}
    assert index.apply("w", 1, 4, LONG[:2], (), reset=True)
    assert index.match(LONG) == {"w": 2}


def test_a_head_that_was_lost_comes_back() -> None:
    """Blocks behind a lost one are no hits, and are again when it is there again."""
    index = PrefixIndex()
    index.join("w", 1)
    index.join("v", 1)
    for worker in ("w", "v"):
        index.apply(worker, 1, 1, LONG, ())
    index.apply("w", 1, 2, (), LONG[:1])
    assert index.match(LONG) == {"v": len(LONG)}
    assert index.match(LONG[1:]) == {"w": len(LONG) - 1, "v": len(LONG) - 1}
    index.apply("w", 1, 3, LONG[:1], ())
    assert index.match(LONG) == {"w": len(LONG), "v": len(LONG)}


def test_blocks_that_came_one_by_one_become_runs_when_a_prompt_follows_them() -> None:
    """The order in which blocks came costs time once, and never a hit."""
    runs, size = Runs(1000), 2 * RUN_MAX + 9
    chains = [[trace_key(1000 * c + i) for i in range(size)] for c in (1, 2, 3)]
    for at in range(size):
        runs.add(1, [chain[at] for chain in chains])
    for _ in range(2):
        parts = [list(runs.walk(chain)) for chain in chains]
        assert all(part[-1] == (size, 1) for part in parts)
        runs.check()
    assert [len(part) for part in parts] == [3, 3, 3]


def test_a_prompt_that_names_a_block_twice_does_no_harm() -> None:
    """No chain does. Runs may join while it is walked, and the second time be the one before."""
    runs = Runs(10)
    runs.add(1, FORK)
    list(runs.walk(FIRST))
    for query in (FORK[2:] + FIRST, FIRST[:1] * 3, FORK + FORK):
        covered = [key for key in query if key in FORK]
        assert list(runs.walk(query))[-1] == (len(covered), 1)
        runs.check()


def test_a_key_that_two_neighbours_spell_is_not_found_in_them() -> None:
    """Keys lie side by side: the end of 1 and the start of 2 are the bytes of 256."""
    runs = Runs(10)
    one, two, both = (trace_key(i) for i in (1, 2, 256))
    runs.add(1, [one, two, both])
    assert runs.remove(1, [both]) == 1
    assert [list(runs.walk([key])) for key in (one, two, both)] == [[(1, 1)], [(1, 1)], []]
    runs.check()
