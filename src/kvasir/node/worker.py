"""The worker node: serves prefill, decode, or both, out of one block pool.

Knows counts, blocks and deadlines. Must not know token ids (the runner has them), how KV travels,
or which world it is in. The pool here is the truth; the conductor's picture of it is a guess.

One step is in flight at most. Blocks that a step or a transfer touches are never freed: a dead
attempt waits in quarantine until both are over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import msgspec

from kvasir.core.caches import Keep
from kvasir.core.codec import Coded, Sent
from kvasir.core.copies import Copy, Left
from kvasir.core.effects import AnyEffect, Fetch, Note, Quit, Release, Tell, Timer
from kvasir.core.events import Prefilled, Shipped, Speculated, TransferFailed
from kvasir.core.ids import NodeId, RequestId
from kvasir.core.message import Message
from kvasir.core.messages import (
    Abort,
    Accepted,
    Active,
    Alarm,
    AnyMessage,
    Dispatch,
    Done,
    Drain,
    EndReason,
    Finished,
    Hello,
    KvGone,
    KvResync,
    KvWant,
    Load,
    PrefillDone,
    PrefillReport,
    Prompt,
    Received,
    Refused,
    SendOver,
    Start,
    StepDone,
    TransferReport,
    Welcome,
)  # fmt: skip
from kvasir.core.tiers import Held, Restored, Stored, TierGone, TierReady
from kvasir.kv.pool import BlockPool
from kvasir.node.blocks import Blocks
from kvasir.node.config import WorkerConfig
from kvasir.node.pins import Pins
from kvasir.node.prefixes import Prefixes
from kvasir.node.replicas import Replicas
from kvasir.node.steps import Steps
from kvasir.node.tiers import Tiers
from kvasir.node.work import Stage, Work
from kvasir.policy.handover import pulls

BEAT = "beat"


class Worker:
    """State machine of one incarnation of one worker."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.blocks = Blocks(
            config.capacity, config.evict, config.worker, config.incarnation,
            tells=config.kv_events, weights=dict(config.weights),
        )  # fmt: skip
        self.prefixes = Prefixes(self.blocks, config)
        self.pins = Pins(self.blocks, config)
        self.works: dict[RequestId, Work] = {}
        self.quarantine: dict[tuple[RequestId, int], Work] = {}
        self.room: list[Work] = []
        self.tiers = Tiers(self.blocks, config, self.emit)
        self.replicas = Replicas(self.blocks, config, self.tiers, self.emit)
        self.steps = Steps(self.blocks, config, self.tiers, self)
        self.epoch = 0
        self.draining = False
        self.over = False  # it left
        self.pool: BlockPool = self.blocks.pool
        self._seq = 0
        self._early: dict[tuple[RequestId, int], tuple[float, Prompt]] = {}  # before their dispatch
        self._early_wants: dict[tuple[RequestId, int], tuple[float, KvWant]] = {}
        self._now = 0.0
        self._out: list[AnyEffect] = []
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Start: self._on_start, Welcome: self._on_welcome, Alarm: self._on_alarm,
            Dispatch: self._on_dispatch, Prompt: self._on_prompt, Abort: self._on_abort,
            Drain: self._on_drain, KvResync: self._on_resync, KvWant: self._on_want,
            KvGone: self._on_gone, StepDone: self._on_step_done, Received: self._on_received,
            SendOver: self._on_send_over, Sent: self._on_sent, Restored: self._on_restored,
            Stored: self.tiers.stored, TierReady: self.tiers.ready, Held: self.steps.held,
            TierGone: lambda event: self.tiers.gone(event, self._now), Keep: self._on_keep,
            Copy: self._on_copy,
        }  # fmt: skip

    def handle(self, now: float, event: AnyMessage) -> list[AnyEffect]:
        self._now, self._out = now, []
        if self.over:
            return self._out
        self._handlers[type(event)](event)
        if self.pins.held:
            for queue in (self.room, self.steps.waiting):
                self._out += self.pins.yield_to(queue[0]) if queue else ()
        if self.room:
            self._fill_room()
        if self.steps.step is None:
            self.steps.schedule(now)
        if self.tiers.states:
            self.tiers.write()
        if self.replicas.unused and self.pool.removed:
            self.replicas.evicted(self.pool.removed)
        if self.tiers.states or self.pool.added or self.pool.removed:
            self._tell(self.config.conductor, *self.blocks.news())
        return self._out

    # --- conductor --------------------------------------------------------------------------------

    def _on_start(self, event: Start) -> None:
        self._hello()
        self._out.append(Timer(BEAT, self._now + self.config.beat_s))

    def _hello(self) -> None:
        c = self.config
        self._tell(
            c.conductor,
            Hello(
                worker=c.worker, incarnation=c.incarnation, roles=c.roles, model=c.model,
                fingerprint=c.fingerprint, capacity=c.capacity, location=c.location, pool=c.pool,
                kv_events=c.kv_events,
            ),
        )  # fmt: skip

    def _on_welcome(self, event: Welcome) -> None:
        if self._stale(event.epoch):
            return
        if event.again:
            self._hello()
            self._tell(self.config.conductor, *self.blocks.everything())

    def _on_resync(self, event: KvResync) -> None:
        if not self._stale(event.epoch):
            self._tell(self.config.conductor, *self.blocks.everything())

    def _on_drain(self, event: Drain) -> None:
        if self._stale(event.epoch):
            return
        self.draining = True
        if event.leave and not self.busy:
            self._tell(self.config.conductor, Left(self.config.worker, self.config.incarnation))
            self._out.append(Quit())
            self.over = True

    @property
    def busy(self) -> bool:
        """Whether anybody counts on what this worker holds, or anything touches it."""
        writes = any(state.writing for state in self.tiers.states.values())
        return bool(self.works or self.quarantine or self.prefixes.lent or self.replicas.busy
                    or writes)  # fmt: skip

    def _on_copy(self, event: Copy) -> None:
        if self._stale(event.epoch):
            return
        waits = self.room or self.steps.waiting
        reason = "draining" if self.draining else "requests wait for blocks" if waits else ""
        self.replicas.order(event, self._now, reason)

    def _on_keep(self, event: Keep) -> None:
        if not self._stale(event.epoch):
            self._out += self.pins.keep(event, self._now)

    def _on_alarm(self, event: Alarm) -> None:
        if event.name != BEAT:
            return self.tiers.alarm(event.name)
        self.pins.expire(self._now)
        self.replicas.expire(self._now)
        self._expire()
        self._tell(self.config.conductor, self.load())
        self._out.append(Timer(BEAT, self._now + self.config.beat_s))

    def load(self) -> Load:
        """The beat: what this worker knows of itself."""
        self.steps.cohort.settle_all()
        return Load(
            worker=self.config.worker,
            incarnation=self.config.incarnation,
            waiting=len(self.steps.waiting) + len(self.room) + self.tiers.waiting,
            running=len(self.steps.running),
            kv_blocks_free=self.pool.available,
            iteration_s=self.steps.iteration_s,
            active=tuple(Active(w.id, w.attempt, w.computed) for w in self.works.values()),
            leases=sum(w.stage is Stage.HOLD for w in self.works.values())
            + len(self.prefixes.lent),
            quarantined=len(self.quarantine),
            pins=tuple(self.pins.held),
            pinned=self.pins.blocks_count,
        )

    def _stale(self, epoch: int) -> bool:
        """True for a message of an older conductor; remembers the newest epoch."""
        if epoch < self.epoch:
            return True
        self.epoch = epoch
        return False

    def _on_dispatch(self, event: Dispatch) -> None:
        if self._stale(event.epoch):
            return
        request_id = event.request.id
        old = self.works.get(request_id)
        if old is not None and old.attempt >= event.attempt:
            return  # a duplicate, or late
        if old is not None:
            self._kill(old)
        reason = self._refusal(event)
        if reason:
            self._refuse(request_id, event.attempt, reason)
            self._early.pop((request_id, event.attempt), None)
            self._out.append(Release(request_id, event.attempt))
            return
        self._seq += 1
        work = self.works[request_id] = Work(event, self._now, self._seq)
        self._tell(
            self.config.conductor, Accepted(self.config.worker, request_id, event.attempt)
        )
        if work.stage is Stage.ROOM:
            self.room.append(work)
        _, prompt = self._early.pop((request_id, event.attempt), (0.0, None))
        if prompt is not None:
            self._got_prompt(work, prompt)
        _, want = self._early_wants.pop((request_id, event.attempt), (0.0, None))
        if want is not None:
            self._on_want(want)

    def _refusal(self, event: Dispatch) -> str:
        if self.draining:
            return "draining"
        if self.blocks.count(event.input_tokens + 1) > self.config.capacity.kv_blocks:
            return "larger than this worker's KV memory"
        if len(self.steps.waiting) + len(self.room) >= self.config.waiting_max:
            return "queue full"
        return ""

    def _on_abort(self, event: Abort) -> None:
        if self._stale(event.epoch):
            return
        work = self.works.get(event.request_id)
        if work is not None and work.attempt <= event.attempt:
            self._kill(work)
        elif self._early.pop((event.request_id, event.attempt), None) is not None:
            self._out.append(Release(event.request_id, event.attempt))

    # --- prompt and KV coming in ------------------------------------------------------------------

    def _on_prompt(self, event: Prompt) -> None:
        work = self.works.get(event.request_id)
        if work is not None and work.attempt == event.attempt:
            self._got_prompt(work, event)
        elif (work is None or work.attempt < event.attempt) and (
            len(self._early) < self.config.waiting_max
        ):
            self._early[event.request_id, event.attempt] = (self._now, event)
        else:
            self._out.append(Release(event.request_id, event.attempt))

    def _got_prompt(self, work: Work, prompt: Prompt) -> None:
        if work.has_prompt:
            return
        if prompt.fault:
            self.give_up(work, prompt.fault, status=503)
            return
        work.has_prompt = True
        if work.stage is Stage.PROMPT:
            asked = self.prefixes.ask(work, self._now)
            self._out += asked
            if asked:
                work.stage = Stage.PREFIX
            else:
                self.steps.enqueue(work)
        elif work.received:
            self.steps.join(work)

    def _fill_room(self) -> None:
        """Give blocks to decode attempts in order of arrival, and ask for their KV."""
        while self.room:
            work = self.room[0]
            hits = self.blocks.hits(work)
            needed = self.blocks.count(work.known)
            headroom = len(self.steps.running)  # a block for each running sequence to grow into
            if self.pool.missing_for(hits, needed) + headroom > 0 and self.pool.held:
                return
            if self.config.transfer == "pull":  # blocks of sequences that do not run yet
                taken = sum(len(w.blocks) for w in self.works.values() if w.stage is Stage.KV)
                if not pulls(taken, self.config.capacity.kv_blocks):
                    return
            self.room.pop(0)
            self.blocks.take(work, hits)
            work.stage, work.inbound, work.first_block = Stage.KV, True, len(hits)
            inbound = tuple(work.blocks[len(hits) :])
            deadline = self._now + self.config.kv_wait_s
            self._out.append(
                Fetch(
                    work.id, work.attempt, work.dispatch.source, len(hits), inbound,
                    self.blocks.bytes(len(inbound)), deadline, tuple(work.blocks),
                )
            )  # fmt: skip
            work.tabled, work.table_fresh = len(work.blocks), False
            self._tell(
                work.dispatch.source,
                KvWant(
                    work.id, work.attempt, self.config.worker, len(hits),
                    link_bytes_s=work.dispatch.link_bytes_s,
                ),
            )  # fmt: skip

    def _on_received(self, event: Received) -> None:
        if self.replicas.received(event):
            return
        fetched = self.prefixes.wanted.get((event.request_id, event.attempt))
        if fetched is not None:
            self._out += self.prefixes.received(event)
            if fetched.dead:
                self.bury(fetched)
            else:
                self.steps.enqueue(fetched)
            return
        work = self._find(event.request_id, event.attempt)
        if work is None or not work.inbound:
            return
        work.inbound = False
        if work.dead:
            self.bury(work)
        elif event.by_sender:
            return  # the conductor's word on this attempt comes, or `kv_wait_s` ends
        elif not event.ok:
            self._note(TransferFailed(work.id, self.config.worker, event.reason))
            self.give_up(work, event.reason)
        else:
            self._kv_here(work, event)

    def _kv_here(self, work: Work, event: Received) -> None:
        d = work.dispatch
        work.received, work.ready_at = True, self._now
        work.transfer = (event.seconds, event.bytes, event.transport)
        work.prefill = event.report or PrefillReport(d.source, 0.0, 0.0, 0, 0)
        work.computed = d.input_tokens
        if d.first_token == "prefill":
            work.known, work.out = work.known + 1, work.out + 1
        else:
            work.computed -= 1
        self.blocks.commit(work)
        c, coded = self.config, event.coded or Coded("", event.bytes)
        measured, work.forms = (event.seconds, event.transport), coded.forms
        wire = coded.wire_bytes
        report = TransferReport(work.id, work.attempt, d.source, c.worker, wire, *measured)
        self._tell(c.conductor, report)
        shipped = Shipped(work.id, d.source, c.worker, event.bytes, *measured)
        if coded.forms:
            shipped = msgspec.structs.replace(shipped, codec=coded.forms, wire_bytes=wire)
        self._note(shipped)
        if work.has_prompt:
            self.steps.join(work)

    def _on_restored(self, event: Restored) -> None:
        work = self.tiers.restored(event)
        if self.replicas.restored(work, event):
            return
        if work is not None and work.dead:
            self.bury(work)
        elif work is not None:
            self.steps.loaded(work, self._now)

    def _on_gone(self, event: KvGone) -> None:
        if self.replicas.gone(event):
            return
        wanted = self.prefixes.wanted.get((event.request_id, event.attempt))
        if wanted is not None:
            self._out += self.prefixes.cancel(wanted)
            return
        work = self.works.get(event.request_id)
        if work is not None and work.attempt == event.attempt and work.stage is Stage.KV:
            self.give_up(work, event.reason)

    # --- KV going out -----------------------------------------------------------------------------

    def _on_want(self, event: KvWant) -> None:
        if event.keys:
            self._out += self.prefixes.lend(event, self._now)
            return
        work = self.works.get(event.request_id)
        if work is None or work.attempt < event.attempt:  # it may have overtaken the dispatch
            key = (event.request_id, event.attempt)
            if len(self._early_wants) < self.config.waiting_max and key not in self.quarantine:
                self._early_wants[key] = (self._now, event)
                return
        if work is None or work.attempt != event.attempt or work.phase != "prefill":
            self._tell(event.target, KvGone(event.request_id, event.attempt, "kv gone"))
            return
        work.want, work.target = event.first_block, event.target
        work.link_bytes_s = event.link_bytes_s
        if work.stage is Stage.HOLD:
            self._out += self.steps.outbound.rest(work, self._now)
        else:
            self.steps.ship_row(work, self._now)

    def _on_sent(self, event: Sent) -> None:
        work = self.works.get(event.request_id)
        if work is not None and work.attempt != event.attempt:
            work = None
        if not self.steps.outbound.sent(event, work) or work is None:
            return
        if work.stage is Stage.HOLD:
            self._out += self.steps.outbound.rest(work, self._now)
        else:
            self.steps.ship_row(work, self._now)

    def _on_send_over(self, event: SendOver) -> None:
        self.steps.outbound.over((event.request_id, event.attempt))
        returned = self.prefixes.returned(event)
        if returned:
            self._out += returned
            if self.steps.waiting:
                self.steps.cut()
            return
        work = self._find(event.request_id, event.attempt)
        if work is None or not work.outbound:
            return
        work.outbound = False
        if work.dead:
            self.bury(work)
        elif event.ok:
            self._kill(work)
        else:
            self.give_up(work, "transfer failed")

    def _on_step_done(self, event: StepDone) -> None:
        self.steps.over(event, self._now)

    # --- what its batch asks (node.steps.Owner) ---------------------------------------------------

    def emit(self, effect: AnyEffect) -> None:
        self._out.append(effect)

    def prefilled(self, work: Work, *, ended: bool) -> None:
        started = work.started_at if work.started_at is not None else self._now
        report = work.prefill = PrefillReport(
            self.config.worker, work.queue_s, self._now - started, work.cached, work.computed_here
        )
        self._note(
            Prefilled(
                report.worker, work.id, report.queue_s, report.prefill_s, report.cached_tokens,
                report.computed_tokens,
            )
        )  # fmt: skip
        self._out += self.pins.pin(work, self._now)
        if ended:
            return
        c = self.config
        self._tell(c.conductor, PrefillDone(c.worker, work.id, work.attempt, report))
        if work.phase == "prefill":
            self.steps.running.remove(work)
            work.stage = Stage.HOLD
            work.lease_until = self._now + c.lease_s
            if work.want is not None:
                self._out += self.steps.outbound.rest(work, self._now)

    def finish(self, work: Work, reason: EndReason) -> None:
        report = work.report(self.config.worker)
        gateway, c = work.dispatch.request.gateway, self.config
        self._tell(gateway, Done(work.id, work.attempt, reason, work.out, report))
        answer = tuple(work.keys[len(work.dispatch.request.keys) : work.committed])
        finished = Finished(c.worker, work.id, work.attempt, reason, work.out, report,
                            answer if c.tells_answers else ())  # fmt: skip
        self._tell(c.conductor, finished)
        self._kill(work)

    # --- the end of an attempt --------------------------------------------------------------------

    def give_up(self, work: Work, reason: str, status: int = 0) -> None:
        self._refuse(work.id, work.attempt, reason, status)
        self._kill(work)

    def _refuse(self, request_id: RequestId, attempt: int, reason: str, status: int = 0) -> None:
        c = self.config
        self._tell(c.conductor, Refused(c.worker, request_id, attempt, reason, status))

    def _kill(self, work: Work) -> None:
        """The attempt is over here. Its blocks are free now, or when nothing touches them."""
        assert not work.dead
        work.dead = True
        if work.drafted:
            self._note(Speculated(self.config.worker, work.id, work.drafted, work.accepted))
        self.steps.leave(work)
        if self.works.get(work.id) is work:
            del self.works[work.id]
        if work in self.room:
            self.room.remove(work)
        self.quarantine[work.id, work.attempt] = work
        self._out += self.prefixes.cancel(work)
        if work.in_step is not None:
            self.steps.cut()
        self.bury(work)

    def bury(self, work: Work) -> None:
        if work.in_step is not None:
            return
        if not work.released:
            work.released = True
            self._out.append(Release(work.id, work.attempt))
        if work.busy:
            return
        del self.quarantine[work.id, work.attempt]
        self.blocks.free(work)
        if self.steps.waiting:
            self.steps.cut()

    def _find(self, request_id: RequestId, attempt: int) -> Work | None:
        work = self.works.get(request_id)
        if work is not None and work.attempt == attempt:
            return work
        return self.quarantine.get((request_id, attempt))

    def _expire(self) -> None:
        """Nothing waits for ever: prompts, KV and leases have their limits."""
        c, now = self.config, self._now
        for work in list(self.works.values()):
            waited = now - work.dispatched_at
            if not work.has_prompt and waited > c.prompt_wait_s:
                self.give_up(work, "its prompt did not come")
            elif work.stage in (Stage.ROOM, Stage.KV) and waited > c.kv_wait_s:
                self.give_up(work, "its KV did not come")
            elif work.stage is Stage.PREFIX and waited > c.kv_wait_s:
                self._out += self.prefixes.cancel(work)
            elif work.stage is Stage.HOLD and now > work.lease_until:
                self.give_up(work, "its lease ended")
        for key, (since, _) in list(self._early.items()):
            if now - since > c.prompt_wait_s:
                del self._early[key]
                self._out.append(Release(*key))
        for key, (since, want) in list(self._early_wants.items()):
            if now - since > c.beat_s:
                del self._early_wants[key]
                self._tell(want.target, KvGone(*key, "kv gone"))

    # --- telling ----------------------------------------------------------------------------------

    def _tell(self, to: NodeId, *messages: Message) -> None:
        for message in messages:
            self._out.append(Tell(to, cast(AnyMessage, message)))

    def _note(self, event: Any) -> None:
        self._out.append(Note(event))

    def check(self) -> None:
        """Block counts, stages and queues agree."""
        self.pool.check()
        self.steps.check()
        self.tiers.check()
        self.pins.check()
        self.replicas.check()
        owners = [*self.works.values(), *self.quarantine.values()]
        pinned = (held.blocks for held in self.pins.held.values())
        copies = self.replicas.held()
        held = (*(work.blocks for work in owners), *self.prefixes.lent.values(), *pinned, *copies)
        refs = Counter(block for blocks in held for block in blocks)
        assert len(refs) == self.pool.held, (len(refs), self.pool.held)
        assert all(self.pool.refs(b) == n for b, n in refs.items())
        for work in self.works.values():
            assert not work.dead
            assert (work in self.steps.running) == (work.stage is Stage.RUN), work.id
            assert (work in self.steps.waiting) == (work.stage is Stage.QUEUE), work.id
            assert (work in self.room) == (work.stage is Stage.ROOM), work.id
            assert work.blocks or work.stage in (Stage.PROMPT, Stage.QUEUE, Stage.ROOM, Stage.ASK)
        assert all(w.dead and w.busy for w in self.quarantine.values())
