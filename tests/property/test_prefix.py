"""The prefix index against brute force, under whatever a network can do to a worker's events.

Workers log every event that they ever sent. An event comes at once, late, twice, never, or from a
past life. The index must hold what the worker held when it sent
the newest event that came, or nothing at all.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvasir.core.ids import BlockKey
from kvasir.core.keys import trace_key
from kvasir.kv.prefix import PrefixIndex

WORKERS = ("decode-0", "decode-1")
CHAINS = [[trace_key(chain * 100 + i) for i in range(6)] for chain in range(2)]
KEYS = [key for chain in CHAINS for key in chain]

workers = st.sampled_from(WORKERS)
key_sets = st.sets(st.sampled_from(KEYS), max_size=6)


@dataclass(frozen=True)
class Event:
    incarnation: int
    seq: int
    added: frozenset[BlockKey]
    removed: frozenset[BlockKey]
    reset: bool
    held: frozenset[BlockKey]  # by the worker when it was sent


@dataclass
class Sender:
    """A worker as it is, and all that it ever sent."""

    incarnation: int = 0
    seq: int = 0
    held: frozenset[BlockKey] = frozenset()
    log: list[Event] = field(default_factory=list)

    def send(self, added: set[BlockKey], removed: set[BlockKey], *, reset: bool = False) -> None:
        self.seq += 1
        self.held = (self.held - removed) | added
        whole = self.held if reset else frozenset(added)
        gone = frozenset() if reset else frozenset(removed)
        self.log.append(Event(self.incarnation, self.seq, whole, gone, reset, self.held))


@dataclass
class Known:
    """What the index must hold of a worker: `held` at event `seq`; None until a reset comes."""

    incarnation: int
    seq: int = 0
    held: frozenset[BlockKey] | None = frozenset()


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.senders = {w: Sender() for w in WORKERS}
        self.known: dict[str, Known] = {}

    @initialize()
    def start(self) -> None:
        for worker in WORKERS:
            self.restart(worker)

    @rule(worker=workers, comes_back=st.booleans())
    def die(self, worker: str, comes_back: bool) -> None:
        if comes_back:
            self.restart(worker)
        else:
            self.index.leave(worker)
            self.known.pop(worker, None)

    def restart(self, worker: str) -> None:
        sender = self.senders[worker]
        sender.incarnation, sender.seq, sender.held = sender.incarnation + 1, 0, frozenset()
        self.index.join(worker, sender.incarnation)
        self.known[worker] = Known(sender.incarnation)

    @rule(worker=workers, added=key_sets, removed=key_sets, comes=st.booleans())
    def change(
        self, worker: str, added: set[BlockKey], removed: set[BlockKey], comes: bool
    ) -> None:
        self.send(worker, added, removed - added, comes)

    @rule(worker=workers, comes=st.booleans())
    def tell_all(self, worker: str, comes: bool) -> None:
        self.send(worker, set(), set(), comes, reset=True)

    def send(
        self, worker: str, added: set[BlockKey], removed: set[BlockKey], comes: bool,
        *, reset: bool = False,
    ) -> None:  # fmt: skip
        self.senders[worker].send(added, removed, reset=reset)
        if comes:
            self.deliver(worker, self.senders[worker].log[-1])

    @rule(worker=workers, age=st.integers(0, 6))
    def deliver_late(self, worker: str, age: int) -> None:
        """Late, again, or from a past life."""
        log = self.senders[worker].log
        if age < len(log):
            self.deliver(worker, log[-1 - age])

    def deliver(self, worker: str, event: Event) -> None:
        whole = self.index.apply(
            worker, event.incarnation, event.seq, event.added, event.removed, reset=event.reset
        )
        known = self.known.get(worker)
        if known is None or known.incarnation != event.incarnation:
            assert whole, "a message of a past life asks for nothing"
            return
        if event.seq > known.seq:
            follows = known.held is not None and event.seq == known.seq + 1
            known.seq = event.seq
            known.held = event.held if event.reset or follows else None
        assert whole == (known.held is not None)

    @invariant()
    def agrees(self) -> None:
        self.index.check()
        held = {w: k.held or frozenset() for w, k in self.known.items()}
        for worker in WORKERS:
            assert self.index.blocks_of(worker) == len(held.get(worker, ()))
        for query in (*CHAINS, CHAINS[0][:3], CHAINS[1][2:] + CHAINS[0], []):
            assert self.index.match(query) == brute_force(held, query)


def brute_force(held: dict[str, frozenset[BlockKey]], query: list[BlockKey]) -> dict[str, int]:
    depths = {}
    for worker, own in held.items():
        lacking = [i for i, key in enumerate(query) if key not in own]
        depth = lacking[0] if lacking else len(query)
        if depth:
            depths[worker] = depth
    return depths


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=150, stateful_step_count=40)


@given(st.lists(st.sets(st.sampled_from(KEYS)), min_size=1, max_size=80))
def test_any_number_of_workers(parts: list[set[BlockKey]]) -> None:
    """More than a machine word of them."""
    index = PrefixIndex()
    held = {f"w{i}": frozenset(part) for i, part in enumerate(parts)}
    for worker, part in held.items():
        index.join(worker, 1)
        assert index.apply(worker, 1, 1, part, ())
    index.check()
    for query in CHAINS:
        assert index.match(query) == brute_force(held, query)


@pytest.mark.parametrize("late", ["event", "reset"])
def test_what_was_overtaken_does_not_come_back(late: str) -> None:
    """1 adds, 2 is late, 3 removes: once 3 was seen, 2 says nothing about what is there now."""
    index = PrefixIndex()
    index.join("w", 1)
    assert index.apply("w", 1, 1, CHAINS[0][:1], ())
    assert not index.apply("w", 1, 3, (), CHAINS[0])
    assert not index.apply("w", 1, 2, CHAINS[0], (), reset=late == "reset")
    assert index.match(CHAINS[0]) == {}
    assert index.apply("w", 1, 4, CHAINS[1][:2], (), reset=True)
    assert index.match(CHAINS[1]) == {"w": 2}
