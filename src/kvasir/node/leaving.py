"""Workers that are let go: nothing new to them, what only they cache to others, then farewell.

    Leave --> draining, its blocks are copied one chain after another --> Drain(leave) --> Left
                 '--time is over: what still runs there goes on elsewhere--'

Everything is said again with each beat until the worker is gone, so no lost message matters. Knows
the conductor's orders; must not know how an attempt moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from kvasir.core.copies import Leave
from kvasir.core.effects import AnyEffect, Note, Tell
from kvasir.core.events import WorkerDraining
from kvasir.core.ids import Epoch, WorkerId
from kvasir.core.messages import Drain
from kvasir.core.request import Request
from kvasir.node.copies import Copies
from kvasir.node.registry import Member
from kvasir.policy.copies import rescue

SCANNED = 256  # chains that one input may look at


class Going:
    """One worker that is to go by `until`. `chains`: those that were not looked at yet."""

    __slots__ = ("chains", "scanned", "until")

    def __init__(self, until: float, chains: Iterator[Request]) -> None:
        self.until, self.chains = until, chains
        self.scanned = False


class Leaving:
    """`needed` says whether an attempt would be lost with a worker now; `move` ends all of those
    here, to go on elsewhere."""

    def __init__(
        self, copies: Copies, epoch: Epoch, emit: Callable[[AnyEffect], None],
        needed: Callable[[WorkerId], bool], move: Callable[[WorkerId], None],
    ) -> None:  # fmt: skip
        self.going: dict[WorkerId, Going] = {}
        self._copies, self._epoch, self._emit = copies, epoch, emit
        self._needed, self._move = needed, move

    def leave(self, event: Leave, member: Member, now: float) -> None:
        """Said again, it may only be sooner."""
        going, until = self.going.get(member.id), now + event.within_s
        if going is not None:
            going.until = min(going.until, until)
            return
        member.draining = True
        chains = self._copies.recent.latest_first() if self._copies.spec.leaving else []
        self.going[member.id] = Going(until, iter(chains))
        self._emit(Note(WorkerDraining(member.id, member.incarnation, event.within_s)))
        self.proceed(member.id, now)

    def gone(self, worker: WorkerId) -> None:
        self.going.pop(worker, None)

    def proceed(self, worker: WorkerId, now: float) -> None:
        """The next copy, or the farewell. Nothing for a worker that is to stay."""
        going = self.going.get(worker)
        if going is None:
            return
        if now >= going.until:
            going.scanned = True
            self._move(worker)
        elif not self._copies.from_(worker):
            self._next_copy(worker, going, now)
        busy = now < going.until and self._copies.from_(worker)
        over = going.scanned and not busy and not self._needed(worker)
        self._emit(Tell(worker, Drain(self._epoch, leave=over)))

    def _next_copy(self, worker: WorkerId, going: Going, now: float) -> None:
        """Of the most recent prompt first, if it comes in time."""
        left = SCANNED
        for request in islice(going.chains, SCANNED):
            left -= 1
            chain = self._copies.chain(request, now)
            plan = rescue(chain, worker)
            if plan is None:
                continue
            if now + chain.way(worker, plan.target, plan.blocks).seconds <= going.until:
                self._copies.order(chain, plan, "leaving", now)
                return
        going.scanned = left > 0
