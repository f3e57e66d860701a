"""The conductor's orders of copies between caches: what is hot, what a session's next turn needs.

Counts and remembers prompts, asks `policy/copies.py` what is worth a copy, orders it of the target,
and keeps to the limits. An order that fails is forgotten: the blocks are computed where they are
wanted, as without it. Knows members, the index and the oracle; must not know how workers copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Final, NamedTuple

import msgspec

from kvasir.core.copies import Copied, Copy, Purpose
from kvasir.core.effects import AnyEffect, Note, Tell
from kvasir.core.events import CopyOrdered
from kvasir.core.ids import BlockKey, Epoch, RequestId, WorkerId
from kvasir.core.messages import Finished
from kvasir.core.request import Request
from kvasir.core.specs.copies import CopiesSpec
from kvasir.kv.heat import Heat
from kvasir.kv.recent import Recent
from kvasir.node.placement import Ground
from kvasir.node.registry import Member
from kvasir.policy import copies
from kvasir.policy.copies import Plan, Used, Way
from kvasir.policy.turns import Gaps, fetch_after_s, learned

Where = Callable[[Request], WorkerId]
UNHEARD_MAX: Final = 256


class Order(NamedTuple):
    """Under way since then: these leading blocks of a chain."""

    source: WorkerId
    target: WorkerId
    keys: tuple[BlockKey, ...]
    purpose: Purpose
    since: float


class Chain:
    """`policy.copies.CopyView` of one prompt's blocks."""

    __slots__ = ("_ground", "_now", "computing", "depths", "request", "spec", "stored",
                 "targets")  # fmt: skip

    def __init__(
        self, ground: Ground, spec: CopiesSpec, request: Request, orders: Mapping[str, Order],
        now: float, computing: WorkerId = "",
    ) -> None:  # fmt: skip
        self._ground, self._now = ground, now
        self.spec, self.request, self.computing = spec, request, computing
        self.depths: dict[WorkerId, int] = {}  # only these can lend or use as it is
        self.stored: Mapping[WorkerId, int] = {}
        if ground.prefixes.tiered:
            found = ground.prefixes.tiers(request.keys)
            self.depths = {w: hits.device for w, hits in found.items() if hits.device}
            self.stored = {w: sum(hits) for w, hits in found.items()}
        else:
            self.depths = ground.prefixes.match(request.keys)
        for order in orders.values():
            blocks = len(order.keys)  # the last key names all before it
            if blocks <= len(request.keys) and request.keys[blocks - 1] == order.keys[-1]:
                depth = self.depths.get(order.target, 0)
                self.depths[order.target] = max(depth, blocks)
        self.targets: Sequence[Member] = [
            m for m in ground.members.values()
            if m.model == request.model and "prefill" in m.roles and not m.draining
        ]  # fmt: skip

    def way(self, source: WorkerId, target: WorkerId, blocks: int) -> Way:
        oracle, nbytes = self._ground.oracle, self.bytes(target, blocks)
        arm = self._ground.spec.oracle
        now_s = oracle.estimate(source, target, nbytes, self._now, arm).seconds
        return Way(now_s, oracle.estimate(source, target, nbytes, self._now, "static").seconds)

    def bytes(self, target: WorkerId, blocks: int) -> int:
        """Of so many leading blocks, those that `target` lacks."""
        token_bytes = self._ground.members[target].hello.capacity.kv_token_bytes
        missing = max(0, blocks - self.depths.get(target, 0))
        return missing * self._ground.block_size * token_bytes

    def saved_s(self, target: WorkerId, blocks: int) -> float:
        size, own = self._ground.block_size, self.depths.get(target, 0)
        if blocks <= own:
            return 0.0
        return self._ground.members[target].predict_prefill(blocks * size, own * size)


class Session:
    """What is known of one besides its last prompt. `due`: the serial of its next prefetch."""

    __slots__ = ("answered_at", "due", "gaps")

    def __init__(self) -> None:
        self.gaps = Gaps()
        self.answered_at: float | None = None
        self.due = 0


class Copies:
    """All orders of one conductor. `where` says where a prompt would be prefilled; `wait_s`: how
    long an order may take before it is forgotten."""

    def __init__(
        self, ground: Ground, spec: CopiesSpec, epoch: Epoch, wait_s: float,
        emit: Callable[[AnyEffect], None], where: Where,
    ) -> None:  # fmt: skip
        self.orders: dict[RequestId, Order] = {}
        self.recent = Recent(spec.blocks_max, spec.sessions_max)
        self.spec = spec
        self.sessions: dict[str, Session] = {}  # the least recent first
        self._ground, self._epoch, self._wait_s = ground, epoch, wait_s
        self._emit, self._where = emit, where
        self._heat = Heat(spec.half_life_s, spec.blocks_max)
        self._everyone = Gaps()
        self._due: list[tuple[float, int, str]] = []
        self._unheard: dict[RequestId, Request] = {}  # ended, and their worker has yet to say so
        self._serial = 0
        self._free_at = 0.0  # when the bytes ordered so far will have kept to their rate

    # --- prompts ----------------------------------------------------------------------------------

    def arrived(self, request: Request, now: float) -> None:
        """A new prompt: what its session took to come, and no need to expect it any more."""
        session = self.sessions.get(request.session) if request.session is not None else None
        if session is None or session.answered_at is None:
            return
        gap_s, session.answered_at, session.due = now - session.answered_at, None, 0
        session.gaps = learned(session.gaps, gap_s)
        self._everyone = learned(self._everyone, gap_s)

    def placed(self, request: Request, worker: WorkerId, now: float) -> None:
        """It is to be prefilled there."""
        if self.spec.leaving or self.spec.next_turn:
            self.recent.keep(request)
        if not self.spec.hot or not request.keys:
            return
        used = [Used(*one) for one in self._heat.use(request.keys, now)]
        if used[0].uses >= self.spec.uses_per_copy and self.free(now):
            chain = self.chain(request, now, worker)
            plan = copies.spread(chain, used)
            if plan is not None:
                self.order(chain, plan, "hot", now)

    def ended(self, request: Request, finished: Finished | None, now: float) -> None:
        """A turn is over, and well. Where its gateway heard so before this node, the worker's own
        word (`finished`) is on its way."""
        if not (self.spec.leaving or self.spec.next_turn):
            return
        if finished is not None:
            self._answered(request, finished.answer, now)
            self.prepare(now)
            return
        self._unheard[request.id] = request
        while len(self._unheard) > UNHEARD_MAX:
            del self._unheard[next(iter(self._unheard))]

    def finished(self, event: Finished, now: float) -> None:
        """The word of a worker on a request that is over. News of its cache follow; then the next
        turn can be prepared."""
        request = self._unheard.pop(event.request_id, None)
        if request is not None:
            self._answered(request, event.answer, now)

    def _answered(self, request: Request, answer: tuple[BlockKey, ...], now: float) -> None:
        """`answer` names the blocks that its tokens filled."""
        self.recent.keep(request, answer)
        name = request.session
        if not self.spec.next_turn or name is None:
            return
        session = self.sessions.pop(name, None) or Session()
        self.sessions[name] = session
        while len(self.sessions) > self.spec.sessions_max:
            del self.sessions[next(iter(self.sessions))]
        self._serial += 1
        session.answered_at, session.due = now, self._serial
        at = now + fetch_after_s(session.gaps, self._everyone)
        heappush(self._due, (at, self._serial, name))

    def prepare(self, now: float) -> None:
        """Bring what sessions will ask for soon. What finds no room among the orders waits."""
        while self._due and self._due[0][0] <= now and self.free(now):
            _, serial, name = heappop(self._due)
            session, last = self.sessions.get(name), self.recent.of(name)
            if session is not None and session.due == serial and last is not None:
                self._prepare(last, now)

    def _prepare(self, last: Request, now: float) -> None:
        tokens = len(last.keys) * self._ground.block_size + 1
        following = msgspec.structs.replace(last, prompt_tokens=tokens)
        chain = self.chain(following, now)
        target = self._where(following) if chain.depths or chain.stored else ""
        plan = copies.bring(chain, target) if target else None
        if plan is not None:
            self.order(chain, plan, "next_turn", now)

    # --- orders -----------------------------------------------------------------------------------

    def chain(self, request: Request, now: float, computing: WorkerId = "") -> Chain:
        return Chain(self._ground, self.spec, request, self.orders, now, computing)

    def free(self, now: float) -> bool:
        """Whether the limits allow one more order."""
        return len(self.orders) < self.spec.at_once and now >= self._free_at

    def order(self, chain: Chain, plan: Plan, purpose: Purpose, now: float) -> None:
        self._serial += 1
        name = f"copy/{self._epoch}.{self._serial}"
        keys, request = chain.request.keys[: plan.blocks], chain.request
        nbytes = chain.bytes(plan.target, plan.blocks)
        self.orders[name] = Order(plan.source, plan.target, keys, purpose, now)
        if plan.source != plan.target:  # out of its tiers no bytes travel
            self._free_at = max(self._free_at, now) + nbytes / self.spec.bytes_per_s
            self._ground.oracle.begin(name, plan.source, plan.target, nbytes, now)
        self._emit(Tell(
            plan.target, Copy(self._epoch, name, plan.source, keys, purpose, request.tenant)
        ))  # fmt: skip
        self._emit(Note(CopyOrdered(name, plan.source, plan.target, purpose, plan.blocks,
                                    plan.why)))  # fmt: skip

    def copied(self, event: Copied, now: float) -> None:
        """An order is over, well or not. Of a worker that tells no news this is some."""
        order = self.orders.get(event.name)
        if order is not None and event.blocks:
            self._ground.prefixes.expect(event.worker, order.keys, now)
        self._over(event.name)
        if event.blocks and event.source != event.worker:
            self._ground.oracle.report(event.source, event.worker, event.bytes, event.seconds)

    def expire(self, now: float) -> None:
        """Forget orders whose end was not told."""
        for name, order in list(self.orders.items()):
            if now - order.since > self._wait_s:
                self._over(name)

    def gone(self, worker: WorkerId) -> None:
        """A worker is not there any more."""
        for name, order in list(self.orders.items()):
            if worker in (order.source, order.target):
                self._over(name)

    def from_(self, worker: WorkerId) -> bool:
        """Whether anybody copies from it now."""
        return any(order.source == worker for order in self.orders.values())

    def _over(self, name: RequestId) -> None:
        if self.orders.pop(name, None) is not None:
            self._ground.oracle.end(name)

    def check(self) -> None:
        assert len(self.orders) <= self.spec.at_once + len(self._ground.members)
        assert len(self.sessions) <= self.spec.sessions_max
        for order in self.orders.values():
            assert order.source in self._ground.members and order.target in self._ground.members
        self.recent.check()
