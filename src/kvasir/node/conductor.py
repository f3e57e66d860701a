"""The conductor node: decides for each request whether, where and in which parts it runs.

Knows ids, lengths, keys, and what workers said. Must not know text or tokens, and does nothing
itself: it dispatches. What it holds of a worker is a guess that beats and answers correct.

There is one way back from anything that goes wrong: the attempt is lost (`_lose`), workers forget
it, and the gateway submits the next one with what it has emitted so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from kvasir.core.caches import Kept, Pin, Retain
from kvasir.core.copies import Copied, Leave, Left
from kvasir.core.effects import AnyEffect, Note, Tell, Timer
from kvasir.core.events import (
    PrefixUsed,
    Queued,
    Rejected,
    Retried,
    Routed,
    WorkerJoined,
    WorkerLeft,
)  # fmt: skip
from kvasir.core.ids import NodeId, RequestId, WorkerId
from kvasir.core.message import Message
from kvasir.core.messages import (
    Abort,
    Accepted,
    Alarm,
    AnyMessage,
    Declined,
    Dispatch,
    Done,
    Ended,
    Finished,
    GatewayBeat,
    Hello,
    KvEvents,
    KvResync,
    Load,
    Lost,
    NetReading,
    Placed,
    PrefillDone,
    PrefillReport,
    Refused,
    Start,
    Submit,
    TransferReport,
    Welcome,
    WorkerGone,
)  # fmt: skip
from kvasir.core.request import Request
from kvasir.core.specs import Deployment
from kvasir.cost.step import StepModel
from kvasir.kv.guess import Guess
from kvasir.kv.prefix import PrefixIndex
from kvasir.net.oracle import Oracle
from kvasir.net.topology import Topology
from kvasir.node.admission import Admission
from kvasir.node.caches import Caches
from kvasir.node.copies import Copies
from kvasir.node.leaving import Leaving
from kvasir.node.placement import Ground, Placement, RouteWindow, State
from kvasir.node.registry import Hold, Member
from kvasir.policy.admit import ADMITS
from kvasir.policy.route import ROUTES, Choice, RouteMemory
from kvasir.policy.route.stay import stays

BEAT = "beat"
DECODE_WEIGHT = 0.05  # of the newest request in the mean time of a decode


class Lead(NamedTuple):
    """Where an attempt begins. `stays`: it ends there too, as shipping its KV would not pay."""

    choice: Choice
    memory: RouteMemory
    stays: bool = False


class Conductor:
    """State machine of one conductor term (`epoch`). `models`: how long steps take, by pool."""

    def __init__(
        self, deployment: Deployment, models: Mapping[str, StepModel], epoch: int = 1
    ) -> None:
        self.deployment = deployment
        self.epoch = epoch
        self.limits = deployment.limits
        self.spec = deployment.policy.route
        self.members: dict[WorkerId, Member] = {}
        self.placements: dict[RequestId, Placement] = {}
        self.queue: list[Placement] = []
        self.choosing: list[Placement] = []
        self.index = PrefixIndex(deployment.limits.index_blocks_max)
        self.oracle = Oracle(Topology(deployment.topology))
        self.gateways: dict[NodeId, float] = {}
        self.route = ROUTES[self.spec.name]
        self._admit = ADMITS[deployment.policy.admit]
        self._memory = RouteMemory()
        self._ground = Ground(
            self.spec, deployment.block_size, deployment.seed, self.members, self.index, self.oracle
        )
        self.decode_s_mean: float | None = None  # of finished requests: from prefilled to over
        self._costs = models
        self._codes = deployment.transport.codec.kind != "off"
        self._now = 0.0
        self._out: list[AnyEffect] = []
        self.caches = Caches(deployment, epoch, self._emit)
        wait_s = self.limits.kv_wait_s + self.limits.grace_s
        self.copies = Copies(
            self._ground, deployment.policy.copies, epoch, wait_s, self._emit, self._where
        )
        self.leaving = Leaving(self.copies, epoch, self._emit, self._needed, self._move)
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Start: self._on_start, Alarm: self._on_alarm, Hello: self._on_hello,
            Load: self._on_load, KvEvents: self._on_kv_events, Submit: self._on_submit,
            Accepted: self._on_accepted, Refused: self._on_refused,
            PrefillDone: self._on_prefill_done, TransferReport: self._on_transfer_report,
            Finished: self._on_finished, Ended: self._on_ended, GatewayBeat: self._on_gateway_beat,
            WorkerGone: self._on_worker_gone, NetReading: self._on_net_reading,
            Kept: self._on_kept, Retain: lambda event: self.caches.retain(event, self._now),
            Copied: self._on_copied, Leave: self._on_leave, Left: self._on_left,
        }  # fmt: skip

    @property
    def now(self) -> float:
        return self._now

    def handle(self, now: float, event: AnyMessage) -> list[AnyEffect]:
        self._now, self._out = now, []
        self._handlers[type(event)](event)
        if self.choosing or self.queue:
            self._pump()
        return self._out

    # --- membership -------------------------------------------------------------------------------

    def _on_start(self, event: Start) -> None:
        self._out.append(Timer(BEAT, self._now + self.limits.beat_s))

    def _on_hello(self, event: Hello) -> None:
        known = self.members.get(event.worker)
        if known is not None and known.incarnation >= event.incarnation:
            self._tell(event.worker, Welcome(self.epoch))
            return
        if event.pool not in self._costs:
            return  # not of this deployment
        if known is not None:
            self._remove(known, "restarted")
        other = self._of_other_weights(event)
        if other is not None:
            reason = f"its weights of {event.model} are not those of {other.id}"
            self._note(WorkerLeft(event.worker, event.incarnation, reason))
            return
        self.members[event.worker] = Member(event, self._costs[event.pool], self._now)
        guess = None
        if not event.kv_events:
            guess = Guess(event.capacity.kv_blocks, self.limits.guess_ttl_s)
        self.index.join(event.worker, event.incarnation, guess)
        self.oracle.add_worker(event.worker, event.location)
        self._tell(event.worker, Welcome(self.epoch))
        self._note(WorkerJoined(event.worker, event.incarnation, event.roles))

    def _of_other_weights(self, hello: Hello) -> Member | None:
        """A member that computes other KV for the same keys: they name the model, its dtype and
        adapter, and only workers know the weights. It stays out until all such are gone."""
        for m in self.members.values():
            if m.model == hello.model and m.hello.fingerprint != hello.fingerprint:
                return m
        return None

    def _on_load(self, event: Load) -> None:
        member = self.members.get(event.worker)
        if member is None or member.incarnation < event.incarnation:
            self._tell(event.worker, Welcome(self.epoch, again=True))
            return
        if member.incarnation > event.incarnation:
            return  # a past life
        member.load, member.heard_at = event, self._now
        self.caches.beat(member, event, self._now)
        self.leaving.proceed(member.id, self._now)
        if member.resync_asked:
            self._tell(member.id, KvResync(self.epoch))
        self._reconcile(member, event)

    def _reconcile(self, member: Member, load: Load) -> None:
        """What the worker serves against what it should: messages may have been lost."""
        active = {a.request_id: a.attempt for a in load.active}
        for request_id, attempt in active.items():
            placement = self.placements.get(request_id)
            wanted = placement is not None and (
                placement.attempt == attempt and placement.needs(member.id)
            )
            if not wanted and (placement is None or placement.attempt >= attempt):
                self._tell(member.id, Abort(self.epoch, request_id, attempt, "not wanted"))
        grace = self.limits.grace_s
        for request_id, hold in list(member.holds.items()):
            if active.get(request_id) != hold.attempt and self._now - hold.since > grace:
                placement = self.placements.get(request_id)
                if placement is not None and placement.needs(member.id):
                    self._lose(placement, f"{member.id} does not know it")

    def _on_kept(self, event: Kept) -> None:
        member = self.members.get(event.worker)
        if member is not None and member.incarnation == event.incarnation:
            self.caches.kept(event, self._now)

    def _on_worker_gone(self, event: WorkerGone) -> None:
        member = self.members.get(event.worker)
        if member is not None and member.incarnation <= event.incarnation:
            self._remove(member, event.reason)

    def _on_leave(self, event: Leave) -> None:
        member = self.members.get(event.worker)
        if member is not None:
            self.leaving.leave(event, member, self._now)

    def _on_left(self, event: Left) -> None:
        member = self.members.get(event.worker)
        if member is not None and member.incarnation <= event.incarnation:
            self._remove(member, "left")

    def _on_copied(self, event: Copied) -> None:
        self.copies.copied(event, self._now)
        self.copies.prepare(self._now)
        self.leaving.proceed(event.source, self._now)

    def _needed(self, worker: WorkerId) -> bool:
        """Whether an attempt would be lost with it."""
        return any(p.needs(worker) for p in self.placements.values())

    def _move(self, worker: WorkerId) -> None:
        """What still runs there goes on elsewhere."""
        for placement in list(self.placements.values()):
            if placement.needs(worker):
                self._lose(placement, f"{worker} leaves")

    def _remove(self, member: Member, reason: str) -> None:
        """Nothing of this incarnation survives: not in the index, the oracle or a hold."""
        del self.members[member.id]
        self.index.leave(member.id)
        self.caches.gone(member.id, self._now)
        self.copies.gone(member.id)
        self.leaving.gone(member.id)
        for placement in list(self.placements.values()):
            if placement.needs(member.id):
                self._lose(placement, f"{member.id} {reason}", died=True)
        self.oracle.remove_worker(member.id)
        self._note(WorkerLeft(member.id, member.incarnation, reason))

    def _on_kv_events(self, event: KvEvents) -> None:
        member = self.members.get(event.worker)
        if member is None or member.incarnation != event.incarnation:
            return
        whole = self.index.apply(
            event.worker, event.incarnation, event.seq, event.added, event.removed,
            tier=event.tier, reset=event.reset,
        )  # fmt: skip
        if not whole and not member.resync_asked:
            member.resync_asked = True
            self._tell(member.id, KvResync(self.epoch))
        elif event.reset and whole:
            member.resync_asked = False
        self.copies.prepare(self._now)

    def _on_net_reading(self, event: NetReading) -> None:
        self.oracle.reading(event)

    def _on_alarm(self, event: Alarm) -> None:
        assert event.name == BEAT, event.name
        now, limits = self._now, self.limits
        for member in list(self.members.values()):
            if now - member.heard_at > limits.dead_after_s:
                self._remove(member, "not heard of")
        for gateway, heard_at in list(self.gateways.items()):
            if now - heard_at > limits.dead_after_s + limits.grace_s:
                del self.gateways[gateway]
                for placement in list(self.placements.values()):
                    if placement.request.gateway == gateway:
                        self._drop(placement, "its gateway is gone")
        for placement in [p for p in self.queue if now - p.queued_at > limits.queue_wait_s]:
            self._decline(placement, 503, f"no worker had room within {limits.queue_wait_s:g} s")
        self.index.expire(now)
        self.caches.expire(self.members, now)
        self.copies.expire(now)
        self.copies.prepare(now)
        self._out.append(Timer(BEAT, now + limits.beat_s))

    # --- requests ---------------------------------------------------------------------------------

    def _on_submit(self, event: Submit) -> None:
        self.gateways[event.request.gateway] = self._now
        old = self.placements.get(event.request.id)
        if old is not None and old.attempt >= event.attempt:
            return
        if old is not None:
            self._drop(old, "superseded")
        placement = Placement(event, self._now)
        verdict = self._admit(Admission(self, placement, "arrival"))
        if verdict.status and event.attempt == 1:
            self._refuse(placement, verdict.status, verdict.reason, verdict.retry_after_s)
            return
        verdict = self.caches.mark(event, self.members.values(), self._now)
        if verdict.status:
            self.caches.over(placement.id, event.marks, self._now)
            self._refuse(placement, verdict.status, verdict.reason, verdict.retry_after_s)
            return
        self.placements[placement.id] = placement
        if event.attempt == 1:
            self.copies.arrived(event.request, self._now)
        band = placement.request.band
        at = len(self.queue)
        while at and self.queue[at - 1].request.band > band:
            at -= 1
        self.queue.insert(at, placement)
        self._pump()
        if placement.state is State.QUEUED:
            self._note(Queued(placement.id, len(self.queue)))

    def _pump(self) -> None:
        """Place what waits, in order; the first that finds no room stops the rest."""
        while self.choosing and self._choose_decode(self.choosing[0]):
            self.choosing.pop(0)
        while self.queue and self._place(self.queue[0]):
            self.queue.pop(0)

    def _place(self, p: Placement) -> bool:
        """Decide where an attempt runs and dispatch it. False: no room now."""
        self._match(p)
        if any(mark.must for mark in p.marks):
            return self._place_cache(p)
        decoders = self._with_room(p, self.able(p, "decode"))
        lead = self._lead(p, decoders)
        if lead is None:
            return self._place_without_a_role(p)
        choice, memory = lead.choice, lead.memory
        if lead.stays:
            return self._run_whole(p, self.members[choice.worker], choice.why)
        p.fetch_from, p.fetch_blocks = choice.fetch_from, choice.fetch_blocks
        if self.index.tiered:  # a peer lends what its device has
            p.fetch_blocks = min(p.fetch_blocks, p.resident.get(p.fetch_from, 0))
        prefiller = self.members[choice.worker]
        if choice.decode not in ("", choice.worker):  # the policy named both
            self._memory = memory
            return self._dispatch_pair(p, prefiller, choice, choice.why)
        if choice.decode or prefiller.mixed:  # what a mixed worker prefills it keeps
            self._memory = memory
            fits = bool(self._with_room(p, (prefiller,)))
            return fits and self._run_whole(p, prefiller, choice.why)
        if self.spec.decode_choice == "prefill_end":
            self._memory = memory
            self._dispatch_prefill(p, prefiller, "", choice.why)
            return True
        decoders = [m for m in decoders if not m.mixed] or decoders
        if not decoders:
            return False
        window = self._window(p, "decode", decoders, prefiller)
        target, self._memory = self.route(window, memory)
        target = target._replace(decode=target.worker)
        return self._dispatch_pair(p, prefiller, target, f"{choice.why}; {target.why}")

    def _lead(self, p: Placement, decoders: list[Member]) -> Lead | None:
        """Where an attempt begins. None: workers of one role are missing."""
        stay = stays(self._window(p, "decode", decoders)) if decoders else None
        if stay is not None:
            return Lead(stay, self._memory, True)
        prefillers = self.able(p, "prefill")
        if not prefillers or not (decoders or self.able(p, "decode")):
            return None
        window = self._window(p, "prefill", prefillers, decoders=decoders)
        return Lead(*self.route(window, self._memory))

    def _where(self, request: Request) -> WorkerId:
        """Where a prompt would be prefilled if it came now; "" where nobody could."""
        p = Placement(Submit(request), self._now)
        self._match(p)
        lead = self._lead(p, self._with_room(p, self.able(p, "decode")))
        return lead.choice.worker if lead is not None else ""

    def _match(self, p: Placement) -> None:
        """What each worker has of the prompt: at any tier, and where it can be used as it is."""
        p.hits = p.resident = self.index.match(p.request.keys)
        if self.index.tiered:
            tiers = self.index.tiers(p.request.keys)
            p.resident = {worker: hits.device for worker, hits in tiers.items()}

    def _place_cache(self, p: Placement) -> bool:
        """A prompt that is computed to be kept stays where that is done: nothing is shipped."""
        able = self.able(p, "prefill") or self._could_hold(p, p.input_tokens)
        if not able:
            return False
        able = self.caches.with_room(p.marks, able) or able
        choice, self._memory = self.route(self._window(p, "prefill", able), self._memory)
        return self._run_whole(p, self.members[choice.worker], choice.why)

    def _place_without_a_role(self, p: Placement) -> bool:
        """All prefill or all decode workers are gone: any worker of the model runs both phases."""
        anyone = self._could_hold(p, p.request.total_tokens_max)
        anyone = self._with_room(p, anyone)
        if not anyone:
            return False
        choice, self._memory = self.route(self._window(p, "prefill", anyone), self._memory)
        return self._run_whole(p, self.members[choice.worker], choice.why)

    def _choose_decode(self, p: Placement) -> bool:
        """The decode worker of a prefilled attempt (`decode_choice: prefill_end`)."""
        decoders = self._with_room(p, self.able(p, "decode"))
        source = self.members.get(p.prefill)
        if not decoders or source is None:
            return False
        self._match(p)
        window = self._window(p, "decode", decoders, source)
        choice, self._memory = self.route(window, self._memory)
        p.transfer_s = choice.estimate_s
        p.decode = choice.worker
        self._dispatch_decode(p, self.members[choice.worker])
        self._tell_placed(p, choice.why)
        return True

    def _window(
        self, p: Placement, stage: Any, candidates: list[Member], source: Member | None = None,
        decoders: Sequence[Member] = (),
    ) -> RouteWindow:  # fmt: skip
        return RouteWindow(self._ground, p, stage, candidates, self._now, source=source,
                           decoders=decoders)  # fmt: skip

    def able(self, p: Placement, role: str) -> list[Member]:
        """Workers of a role that could hold the request's part there, if they were empty."""
        part = p.input_tokens + 1 if role == "prefill" else p.request.total_tokens_max
        return [m for m in self._could_hold(p, part) if role in m.roles]

    def _could_hold(self, p: Placement, tokens: int) -> list[Member]:
        """Those that serve the model and could hold `tokens` of the request when empty; all of it
        where both phases run."""
        model, size = p.request.model, self.deployment.block_size
        whole, part = -(-p.request.total_tokens_max // size), -(-tokens // size)
        return [
            m
            for m in self.members.values()
            if m.model == model
            and not m.draining
            and (whole if m.mixed else part) <= m.blocks_total
        ]

    def _with_room(self, p: Placement, members: Iterable[Member]) -> list[Member]:
        """NetKV's feasibility: free KV, less what is reserved, holds the request and a reserve. A
        pool that is smaller than the request at its longest never does."""
        most = -(-p.request.total_tokens_max // self.deployment.block_size)
        blocks, hits = self._blocks(p), p.resident
        return [
            m
            for m in members
            if most <= m.blocks_total
            and (
                not m.holds
                or m.blocks_reserved + self.caches.pinned(m.id) + blocks - hits.get(m.id, 0)
                <= m.blocks_total
            )
        ]

    def _blocks(self, p: Placement) -> int:
        """What a request is expected to need where nothing of it is cached."""
        left = p.request.max_tokens - p.emitted
        reserve = min(left, self.spec.output_reserve_tokens)
        return -(-(p.input_tokens + reserve) // self.deployment.block_size)

    # --- dispatching ------------------------------------------------------------------------------

    def _run_whole(self, p: Placement, m: Member, why: str) -> bool:
        p.path, p.decode = "aggregated", m.id
        p.prefill, p.shipped = m.id, True
        self._placed(p)
        self._hold(p, m, self._blocks(p) - p.resident.get(m.id, 0), prefills=True, decodes=True)
        self._dispatch(p, m, "both")
        self._tell_placed(p, why)
        return True

    def _dispatch_pair(self, p: Placement, m: Member, target: Choice, why: str) -> bool:
        p.transfer_s = target.estimate_s
        self._dispatch_prefill(p, m, target.decode, why)
        self._dispatch_decode(p, self.members[target.decode])
        return True

    def _dispatch_prefill(self, p: Placement, m: Member, decode: WorkerId, why: str) -> None:
        p.prefill, p.decode = m.id, decode
        self._placed(p)
        size = self.deployment.block_size
        blocks = -(-p.input_tokens // size) - p.resident.get(m.id, 0)
        self._hold(p, m, blocks, prefills=True)
        self._dispatch(p, m, "prefill")
        self._tell_placed(p, why)

    def _dispatch_decode(self, p: Placement, m: Member) -> None:
        if p.state is State.CHOOSING:
            p.state = State.DECODE
        self._hold(p, m, self._blocks(p) - p.resident.get(m.id, 0), decodes=True)
        nbytes = self._window(p, "decode", [m]).transfer_bytes(m.id)
        if self._codes and nbytes:  # asked before this transfer counts as one of those in flight
            arm = self.spec.oracle
            estimate = self.oracle.estimate(p.prefill, m.id, nbytes, self._now, arm)
            p.link_bytes_s = nbytes / estimate.seconds
        self.oracle.begin(p.transfer_id, p.prefill, m.id, nbytes, self._now)
        self._dispatch(p, m, "decode")

    def _hold(
        self, p: Placement, m: Member, blocks: int, *, prefills: bool = False, decodes: bool = False
    ) -> None:
        """Reserve what the attempt will cost `m`."""
        hold = Hold(p.attempt, blocks, since=self._now)
        if prefills:
            p.prefill_hit = p.hits.get(m.id, 0)
            cached = max(p.prefill_hit, p.fetch_blocks) * self.deployment.block_size
            self._begin_fetch(p, m)
            hold.prefill_s = m.predict_prefill(p.input_tokens, cached)
            hold.prefill_tokens = max(p.input_tokens - cached, 1)
            p.prefilled_at = self._now + m.prefill_s + hold.prefill_s
        if decodes:
            hold.context_tokens = p.input_tokens
        m.hold(p.id, hold)
        self.index.expect(m.id, p.request.keys, self._now)

    def _begin_fetch(self, p: Placement, m: Member) -> None:
        blocks = p.fetch_blocks - p.prefill_hit
        if p.fetch_from and blocks > 0:
            nbytes = blocks * self.deployment.block_size * m.hello.capacity.kv_token_bytes
            self.oracle.begin(p.fetch_id, p.fetch_from, m.id, nbytes, self._now)

    def _placed(self, p: Placement) -> None:
        p.state, p.placed_at = State.PREFILL, self._now
        self.copies.placed(p.request, p.prefill, self._now)

    def _dispatch(self, p: Placement, m: Member, phase: Any) -> None:
        self._tell(
            m.id,
            Dispatch(
                self.epoch, p.request, p.attempt, p.emitted, phase, self.deployment.first_token,
                source=p.prefill if phase == "decode" else "",
                target=p.decode if phase == "prefill" else "",
                prefix_from="" if phase == "decode" else p.fetch_from,
                prefix_blocks=0 if phase == "decode" else p.fetch_blocks,
                pins=() if phase == "decode" else self._pins(p, m),
                link_bytes_s=p.link_bytes_s if phase == "decode" else 0.0,
            ),
        )  # fmt: skip

    def _pins(self, p: Placement, m: Member) -> tuple[Pin, ...]:
        return self.caches.pins(p.request.keys, m.id, self._now)

    def _tell_placed(self, p: Placement, why: str) -> None:
        kept = self.caches.kept_tokens(p.request.tenant, p.request.keys)
        placed = Placed(p.id, p.attempt, p.path, p.prefill, p.decode, why, kept)
        self._tell(p.request.gateway, placed)
        self._note(
            Routed(
                p.id, p.attempt, p.path, p.prefill, p.decode, why, p.prefill_hit,
                p.resident.get(p.decode, 0), p.transfer_s,
            )
        )  # fmt: skip

    # --- progress ---------------------------------------------------------------------------------

    def _current(self, request_id: RequestId, attempt: int) -> Placement | None:
        placement = self.placements.get(request_id)
        return placement if placement is not None and placement.attempt == attempt else None

    def _on_accepted(self, event: Accepted) -> None:
        member = self.members.get(event.worker)
        hold = member.holds.get(event.request_id) if member is not None else None
        if hold is not None and hold.attempt == event.attempt:
            hold.since = self._now

    def _on_refused(self, event: Refused) -> None:
        member = self.members.get(event.worker)
        if member is not None and event.reason == "draining":
            member.draining = True
        placement = self._current(event.request_id, event.attempt)
        if placement is None or not placement.needs(event.worker):
            return
        reason = f"{event.worker}: {event.reason}"
        if event.status:
            self._decline(placement, event.status, reason)
        else:
            self._lose(placement, reason)

    def _on_prefill_done(self, event: PrefillDone) -> None:
        member = self.members.get(event.worker)
        if member is not None:
            member.prefilled(event.request_id, event.attempt)
        p = self._current(event.request_id, event.attempt)
        if p is None or p.state is not State.PREFILL or p.prefill != event.worker:
            return
        p.prefilled_at = self._now
        self.oracle.end(p.fetch_id)
        self._note_prefix(p, event.report)
        verdict = self._admit(Admission(self, p, "decode"))
        if verdict.status and p.attempt == 1:
            self._drop(p, verdict.reason)
            self._refuse(p, verdict.status, verdict.reason, verdict.retry_after_s)
        elif p.decode:
            p.state = State.DECODE
        else:
            p.state = State.CHOOSING
            self.choosing.append(p)

    def _note_prefix(self, p: Placement, report: PrefillReport) -> None:
        size, most = self.deployment.block_size, max(p.hits.values(), default=0)
        attainable = min(most, (p.input_tokens - 1) // size) * size  # the last token is computed
        cached = report.cached_tokens
        self._note(PrefixUsed(report.worker, p.id, p.input_tokens, cached, attainable))

    def _on_transfer_report(self, event: TransferReport) -> None:
        self.oracle.report(event.source, event.target, event.bytes, event.seconds)
        p = self._current(event.request_id, event.attempt)
        if p is None or p.decode != event.target:
            return
        p.shipped = True
        self.oracle.end(p.transfer_id)
        member = self.members.get(p.prefill)
        if member is not None:
            member.drop(p.id)

    def _on_finished(self, event: Finished) -> None:
        p = self._current(event.request_id, event.attempt)
        if p is None:
            self.copies.finished(event, self._now)
        if p is None or p.state is State.FINISHED:
            return
        for worker in p.workers():
            if worker != event.worker and p.needs(worker):
                self._tell(worker, Abort(self.epoch, p.id, p.attempt, "finished"))
        self._free(p)
        if p.state is State.PREFILL:  # it ended with its first token
            self._note_prefix(p, event.report.prefill)
        if p.state is State.DECODE:
            decode_s = self._now - p.prefilled_at
            old = self.decode_s_mean
            self.decode_s_mean = (
                decode_s if old is None else old + DECODE_WEIGHT * (decode_s - old)
            )
        p.state, p.finished, p.placed_at = State.FINISHED, event, self._now

    def _on_ended(self, event: Ended) -> None:
        placement = self.placements.get(event.request_id)
        if placement is None:
            return
        self._drop(placement, event.reason)
        if event.reason in ("stop", "length"):
            self.copies.ended(placement.request, placement.finished, self._now)

    def _on_gateway_beat(self, event: GatewayBeat) -> None:
        """What a gateway waits for against what is known here: messages may have been lost."""
        self.gateways[event.gateway] = self._now
        active = {a.request_id: a.attempt for a in event.active}
        for request_id, attempt in active.items():
            placement = self.placements.get(request_id)
            if placement is None or placement.attempt < attempt:
                self._tell(event.gateway, Lost(request_id, attempt, "not known"))
            elif placement.finished is not None:
                self._tell_done(placement, placement.finished)
        patience = 2 * self.limits.grace_s
        for placement in list(self.placements.values()):
            gone = placement.request.gateway == event.gateway and placement.id not in active
            if gone and self._now - placement.queued_at > patience:
                self._drop(placement, "the gateway does not wait for it")

    def _tell_done(self, p: Placement, finished: Finished) -> None:
        if self._now - p.placed_at > self.limits.grace_s:
            f = finished
            self._tell(
                p.request.gateway, Done(p.id, p.attempt, f.reason, f.output_tokens, f.report)
            )

    # --- the end of an attempt --------------------------------------------------------------------

    def _lose(self, p: Placement, reason: str, *, died: bool = False) -> None:
        self._drop(p, reason)
        self._tell(p.request.gateway, Lost(p.id, p.attempt, reason, died))
        self._note(Retried(p.id, p.attempt, reason))

    def _decline(self, p: Placement, status: int, reason: str) -> None:
        self._drop(p, reason)
        self._refuse(p, status, reason, None)

    def _refuse(self, p: Placement, status: int, reason: str, retry_after_s: float | None) -> None:
        self._tell(p.request.gateway, Declined(p.id, p.attempt, status, reason, retry_after_s))
        self._note(Rejected(p.id, status, reason))

    def _drop(self, p: Placement, reason: str) -> None:
        """Forget an attempt here and, unless it is over there, at its workers."""
        self.caches.over(p.id, p.marks, self._now)
        if p.state not in (State.QUEUED, State.FINISHED):
            for worker in p.workers():
                if p.needs(worker) and worker in self.members:
                    self._tell(worker, Abort(self.epoch, p.id, p.attempt, reason))
        self._free(p)
        for waiting in (self.queue, self.choosing):
            if p in waiting:
                waiting.remove(p)
        del self.placements[p.id]

    def _free(self, p: Placement) -> None:
        self.oracle.end(p.transfer_id)
        self.oracle.end(p.fetch_id)
        for worker in p.workers():
            member = self.members.get(worker)
            if member is not None:
                member.drop(p.id)
        if p in self.choosing:
            self.choosing.remove(p)

    def _emit(self, effect: AnyEffect) -> None:
        self._out.append(effect)

    def _tell(self, to: NodeId, message: Message) -> None:
        self._out.append(Tell(to, cast(AnyMessage, message)))

    def _note(self, event: Any) -> None:
        self._out.append(Note(event))

    def check(self) -> None:
        """Holds belong to placements, queues to their states, counters to what they count."""
        for member in self.members.values():
            member.check()
            for request_id, hold in member.holds.items():
                placement = self.placements.get(request_id)
                assert placement is not None and placement.attempt == hold.attempt, request_id
                assert member.id in placement.workers()
        for p in self.placements.values():
            assert (p in self.queue) == (p.state is State.QUEUED), p.id
            assert (p in self.choosing) == (p.state is State.CHOOSING), p.id
        self.oracle.check()
        self.index.check()
        self.caches.check()
        self.copies.check()
