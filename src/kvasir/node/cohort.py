"""Sequences that decode in step with one another, at a cost that does not grow with their number.

Each iteration gives each member one token, so what grows by one per iteration is kept once, as
`ticks`; a member's own counts are brought up to date (`settle`) when somebody looks at it or when
it leaves. Knows counts and blocks; must not know messages or time.

    ticks            10        11        12        13
    a joined at 10   computed  +1        +2        +3
    b joined at 12                       computed  +1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from kvasir.core.ids import RequestId
from kvasir.node.work import Work

Entry = tuple[int, int, Work]  # the tick at which something is over, order of entry, whose


class Cohort:
    """The running sequences with one known token to compute and more to draw, in order of entry.

    Satisfies `policy.batch.DecodingView`. `named` members stand in the runner's batch.
    """

    def __init__(self, block_size: int) -> None:
        self.members: dict[RequestId, Work] = {}
        self.ticks = 0
        self.singles = 0  # members that want single steps
        self._size = block_size
        self._ends: list[Entry] = []
        self._covers: list[Entry] = []
        self._serial = 0
        self._unnamed: dict[RequestId, Work] = {}

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Work]:
        return iter(self.members.values())

    # --- what a policy may ask --------------------------------------------------------------------

    @property
    def count(self) -> int:
        return len(self.members)

    @property
    def output_left(self) -> int:
        """Iterations until the first member has drawn all that it may."""
        ends = self._ends
        while ends[0][2].ends_at != ends[0][0]:
            heappop(ends)
        return ends[0][0] - self.ticks

    @property
    def covered(self) -> int:
        """Iterations for which every member has blocks."""
        covers = self._covers
        while covers[0][2].covered_to != covers[0][0]:
            heappop(covers)
        return covers[0][0] - self.ticks

    def short(self, iterations: int) -> Sequence[Work]:
        """Members with blocks for fewer than `iterations`, settled, shortest first."""
        covers, end = self._covers, self.ticks + iterations
        found: dict[RequestId, Entry] = {}
        while covers and covers[0][0] < end:
            entry = heappop(covers)
            work = entry[2]
            if work.covered_to == entry[0]:
                self.settle(work)
                found[work.id] = entry
        for entry in found.values():
            heappush(covers, entry)
        return [entry[2] for entry in found.values()]

    # --- membership -------------------------------------------------------------------------------

    def add(self, work: Work, *, named: bool) -> None:
        """A sequence whose next token is the last known one. `named`: the runner carries it."""
        assert work.tick < 0 and work.known - work.computed == 1, work.id
        self.members[work.id] = work
        self.singles += work.single_step
        work.tick = self.ticks
        work.ends_at = self.ticks + work.output_left
        self._serial += 1
        heappush(self._ends, (work.ends_at, self._serial, work))
        self.cover(work)
        if not named:
            self._unnamed[work.id] = work

    def cover(self, work: Work) -> None:
        """A settled member's blocks have changed."""
        work.covered_to = self.ticks + len(work.blocks) * self._size - work.computed
        self._serial += 1
        heappush(self._covers, (work.covered_to, self._serial, work))

    def leave(self, work: Work) -> bool:
        """Out, with its counts up to date. Whether the runner carries it."""
        self.settle(work)
        del self.members[work.id]
        self.singles -= work.single_step
        work.tick = work.ends_at = work.covered_to = -1
        return self._unnamed.pop(work.id, None) is None

    def is_named(self, work: Work) -> bool:
        return work.tick >= 0 and work.id not in self._unnamed

    def to_name(self, grown: Sequence[Work]) -> list[Work]:
        """Members that the next step must name, settled: new ones, and those with new blocks."""
        if not grown and not self._unnamed:
            return []
        works = {**self._unnamed, **{work.id: work for work in grown}}
        self._unnamed.clear()
        for work in works.values():
            self.settle(work)
        return list(works.values())

    # --- time -------------------------------------------------------------------------------------

    def advance(self, iterations: int) -> None:
        """Every member drew `iterations` tokens."""
        self.ticks += iterations

    def settle(self, work: Work) -> None:
        behind = self.ticks - work.tick
        if behind and work.tick >= 0:
            work.tick = self.ticks
            work.computed += behind
            work.computed_here += behind
            work.known += behind
            work.out += behind

    def settle_all(self) -> None:
        for work in self.members.values():
            self.settle(work)

    def check(self) -> None:
        self.settle_all()
        assert self.singles == sum(work.single_step for work in self.members.values())
        for work in self.members.values():
            assert work.known - work.computed == 1, work.id
            assert work.ends_at == self.ticks + work.output_left, work.id
            assert work.covered_to == self.ticks + len(work.blocks) * self._size - work.computed
        assert self._unnamed.keys() <= self.members.keys()
        if self.members:
            assert self.output_left == min(w.output_left for w in self.members.values())
            assert self.covered == min(w.covered_to for w in self.members.values()) - self.ticks
