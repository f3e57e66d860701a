"""The worker node: serves prefill, decode, or both, out of one block pool.

Knows counts, blocks and deadlines. Must not know token ids (the runner has them), how KV travels,
or which world it is in. The pool here is the truth; the conductor's picture of it is a guess.

One step is in flight at most. Blocks that a step or a transfer touches are never freed: a dead
attempt waits in quarantine until both are over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from kvasir.core.effects import (
    AnyEffect,
    Cut,
    Fetch,
    Note,
    Release,
    Row,
    Send,
    Step,
    Tell,
    Timer,
)  # fmt: skip
from kvasir.core.events import Preempted, Prefilled, Recomputed, Shipped, TransferFailed
from kvasir.core.ids import NodeId, RequestId, StepId
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
    Message,
    PrefillDone,
    PrefillReport,
    Prompt,
    Received,
    Refused,
    Report,
    RowDone,
    SendOver,
    Start,
    StepDone,
    TransferReport,
    Welcome,
)  # fmt: skip
from kvasir.kv.pool import BlockPool
from kvasir.node.blocks import Blocks
from kvasir.node.cohort import Cohort
from kvasir.node.config import WorkerConfig
from kvasir.node.prefixes import Prefixes
from kvasir.node.window import Window
from kvasir.node.work import Stage, Work
from kvasir.policy import batch
from kvasir.policy.handover import pulls, streams

BEAT = "beat"
ITERATION_WEIGHT = 0.2  # of the newest sample in the mean iteration time


class Worker:
    """State machine of one incarnation of one worker."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.blocks = Blocks(
            config.capacity, config.evict, config.worker, config.incarnation,
            tells=config.kv_events,
        )  # fmt: skip
        self.prefixes = Prefixes(self.blocks, config)
        self.works: dict[RequestId, Work] = {}
        self.quarantine: dict[tuple[RequestId, int], Work] = {}
        self.running: list[Work] = []
        self.cohort = Cohort(config.capacity.block_size)
        self.waiting: list[Work] = []
        self.room: list[Work] = []
        self.step: Step | None = None
        self.epoch = 0
        self.draining = False
        self.iteration_s: float | None = None
        self.pool: BlockPool = self.blocks.pool
        self._decide = batch.BATCHES[config.batch]
        self._step_works: list[Work] = []  # of the step's rows
        self._joining: list[Work] = []  # began to decode while a step ran
        self._dying: list[Work] = []  # left the cohort while a step ran
        self._dropped: list[tuple[RequestId, int]] = []  # the runner carries them; they sit out
        self._step_started = 0.0
        self._step_next: StepId = 1
        self._cut_asked = False
        self._seq = 0
        self._early: dict[tuple[RequestId, int], float] = {}  # prompts before their dispatch
        self._early_wants: dict[tuple[RequestId, int], tuple[float, KvWant]] = {}
        self._now = 0.0
        self._out: list[AnyEffect] = []
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Start: self._on_start, Welcome: self._on_welcome, Alarm: self._on_alarm,
            Dispatch: self._on_dispatch, Prompt: self._on_prompt, Abort: self._on_abort,
            Drain: self._on_drain, KvResync: self._on_resync, KvWant: self._on_want,
            KvGone: self._on_gone, StepDone: self._on_step_done, Received: self._on_received,
            SendOver: self._on_send_over,
        }  # fmt: skip

    def handle(self, now: float, event: AnyMessage) -> list[AnyEffect]:
        self._now, self._out = now, []
        self._handlers[type(event)](event)
        if self.room:
            self._fill_room()
        if self.step is None:
            self._schedule()
        if self.pool.added or self.pool.removed:
            news = self.blocks.news()
            if news is not None:
                self._tell(self.config.conductor, news)
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
            self._tell(self.config.conductor, self.blocks.everything())

    def _on_resync(self, event: KvResync) -> None:
        if not self._stale(event.epoch):
            self._tell(self.config.conductor, self.blocks.everything())

    def _on_drain(self, event: Drain) -> None:
        if not self._stale(event.epoch):
            self.draining = True

    def _on_alarm(self, event: Alarm) -> None:
        assert event.name == BEAT, event.name
        self._expire()
        self._tell(self.config.conductor, self.load())
        self._out.append(Timer(BEAT, self._now + self.config.beat_s))

    def load(self) -> Load:
        """The beat: what this worker knows of itself."""
        self.cohort.settle_all()
        return Load(
            worker=self.config.worker,
            incarnation=self.config.incarnation,
            waiting=len(self.waiting) + len(self.room),
            running=len(self.running),
            kv_blocks_free=self.pool.available,
            iteration_s=self.iteration_s,
            active=tuple(Active(w.id, w.attempt, w.computed) for w in self.works.values()),
            leases=sum(w.stage is Stage.HOLD for w in self.works.values())
            + len(self.prefixes.lent),
            quarantined=len(self.quarantine),
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
        if self._early.pop((request_id, event.attempt), None) is not None:
            self._got_prompt(work)
        _, want = self._early_wants.pop((request_id, event.attempt), (0.0, None))
        if want is not None:
            self._on_want(want)

    def _refusal(self, event: Dispatch) -> str:
        if self.draining:
            return "draining"
        if self.blocks.count(event.input_tokens + 1) > self.config.capacity.kv_blocks:
            return "larger than this worker's KV memory"
        if len(self.waiting) + len(self.room) >= self.config.waiting_max:
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
            self._got_prompt(work)
        elif (work is None or work.attempt < event.attempt) and (
            len(self._early) < self.config.waiting_max
        ):
            self._early[event.request_id, event.attempt] = self._now
        else:
            self._out.append(Release(event.request_id, event.attempt))

    def _got_prompt(self, work: Work) -> None:
        if work.has_prompt:
            return
        work.has_prompt = True
        if work.stage is Stage.PROMPT:
            asked = self.prefixes.ask(work, self._now)
            self._out += asked
            if asked:
                work.stage = Stage.PREFIX
            else:
                self._enqueue(work)
        elif work.received:
            self._join(work)

    def _enqueue(self, work: Work) -> None:
        work.stage = Stage.QUEUE
        key = (work.dispatch.request.band, work.seq)
        at = len(self.waiting)
        while at and (self.waiting[at - 1].dispatch.request.band, self.waiting[at - 1].seq) > key:
            at -= 1
        self.waiting.insert(at, work)
        self._cut()

    def _fill_room(self) -> None:
        """Give blocks to decode attempts in order of arrival, and ask for their KV."""
        while self.room:
            work = self.room[0]
            hits = self.blocks.hits(work)
            needed = self.blocks.count(work.known)
            headroom = len(self.running)  # a block for each running sequence to grow into
            if self.pool.missing_for(hits, needed) + headroom > 0 and self.pool.held:
                return
            if self.config.transfer == "pull" and not pulls(
                self._inbound_blocks(), self.config.capacity.kv_blocks
            ):
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
                KvWant(work.id, work.attempt, self.config.worker, len(hits)),
            )

    def _inbound_blocks(self) -> int:
        """Blocks of sequences that were taken and do not run yet."""
        return sum(len(w.blocks) for w in self.works.values() if w.stage is Stage.KV)

    def _on_received(self, event: Received) -> None:
        fetched = self.prefixes.received(event)
        if fetched is not None:
            self._prefix_over(fetched, event)
            return
        work = self._find(event.request_id, event.attempt)
        if work is None or not work.inbound:
            return
        work.inbound = False
        if work.dead:
            self._bury(work)
        elif event.by_sender:
            return  # the conductor's word on this attempt comes, or `kv_wait_s` ends
        elif not event.ok:
            self._note(TransferFailed(work.id, self.config.worker, event.reason))
            self._give_up(work, event.reason)
        else:
            self._kv_here(work, event)

    def _prefix_over(self, work: Work, event: Received) -> None:
        """On with the prefill, with what came or without."""
        c, source = self.config, work.dispatch.prefix_from
        self._out.append(Release(event.request_id, event.attempt))
        if event.ok:
            measured = (event.bytes, event.seconds, event.transport)
            report = TransferReport(event.request_id, event.attempt, source, c.worker, *measured)
            self._tell(c.conductor, report)
            self._note(Shipped(event.request_id, source, c.worker, *measured))
        else:
            self._note(TransferFailed(event.request_id, c.worker, event.reason))
        if work.dead:
            self._bury(work)
        else:
            self._enqueue(work)

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
        c = self.config
        self._tell(
            c.conductor,
            TransferReport(
                work.id, work.attempt, d.source, c.worker, event.bytes, event.seconds,
                event.transport,
            ),
        )  # fmt: skip
        self._note(
            Shipped(work.id, d.source, c.worker, event.bytes, event.seconds, event.transport)
        )
        if work.has_prompt:
            self._join(work)

    def _join(self, work: Work) -> None:
        work.stage = Stage.RUN
        self.running.append(work)
        if self.step is None:
            self.cohort.add(work, named=False)
        else:
            self._joining.append(work)
        self._cut()

    def _on_gone(self, event: KvGone) -> None:
        wanted = self.prefixes.wanted.get((event.request_id, event.attempt))
        if wanted is not None:
            self._out += self.prefixes.cancel(wanted)
            return
        work = self.works.get(event.request_id)
        if work is not None and work.attempt == event.attempt and work.stage is Stage.KV:
            self._give_up(work, event.reason)

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
        if work.stage is Stage.HOLD:
            self._ship_rest(work)
        elif work.in_step is not None and self.step is not None:
            row = self.step.rows[self._step_works.index(work)]
            self._ship_part(work, self._complete_after(work, row.start + row.count), work.in_step)

    def _complete_after(self, work: Work, computed: int) -> int:
        """Blocks whose KV is whole when `computed` tokens are: the last one counts at the end."""
        if computed >= work.dispatch.input_tokens:
            return self.blocks.count(work.dispatch.input_tokens)
        return computed // self.blocks.size

    def _ship_part(self, work: Work, until: int, step: StepId) -> None:
        """Blocks that `step` completes leave layer by layer while it computes."""
        first = max(work.sent, work.want or 0)
        c = self.config
        if work.want is None or until <= first:
            return
        if not streams(c.transfer, c.serial_tokens, work.dispatch.input_tokens):
            return  # all of it leaves when prefill is over
        blocks = tuple(work.blocks[first:until])
        work.sent, work.outbound = until, True
        self._out.append(
            Send(
                work.id, work.attempt, work.target, first, blocks, self.blocks.bytes(len(blocks)),
                self._now + self.config.kv_wait_s + self.config.lease_s, step,
            )
        )  # fmt: skip

    def _ship_rest(self, work: Work) -> None:
        until = self.blocks.count(work.dispatch.input_tokens)
        first = max(work.sent, work.want or 0)
        blocks = tuple(work.blocks[first:until])
        work.sent, work.outbound = until, True
        self._out.append(
            Send(
                work.id, work.attempt, work.target, first, blocks, self.blocks.bytes(len(blocks)),
                work.lease_until, None, True, work.prefill,
            )
        )  # fmt: skip

    def _on_send_over(self, event: SendOver) -> None:
        returned = self.prefixes.returned(event)
        if returned:
            self._out += returned
            if self.waiting:
                self._cut()
            return
        work = self._find(event.request_id, event.attempt)
        if work is None or not work.outbound:
            return
        work.outbound = False
        if work.dead:
            self._bury(work)
        elif event.ok:
            self._kill(work)
        else:
            self._give_up(work, "transfer failed")

    # --- steps ------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Ask the policy for a batch and start it. Each pass that starts nothing preempts one."""
        while self.running or self.waiting:
            plan = self._decide(Window(self))
            counts = plan.counts
            chosen = list(zip(self.running, counts, strict=True)) if counts is not None else []
            order = plan.order or range(len(plan.admitted))
            entering = [self.waiting[i] for i in order]
            victims = [self.running[i] for i in plan.preempted]
            for work in victims:
                self._preempt(work)
            self._start_step(plan, chosen, entering)
            if self.step is not None or not victims or any(work.dead for work in victims):
                return  # a dead one's blocks come free when its transfer is over, soon

    def _start_step(
        self, plan: batch.Batch, chosen: list[tuple[Work, int]], entering: list[Work]
    ) -> None:
        step_id, parts = self._step_next, list[tuple[Work, int]]()
        for work, count in chosen:
            if work.tick >= 0:
                if not count:
                    self._sit_out(work)
            elif count and self.blocks.grow(work, work.computed + count + plan.steps - 1):
                parts.append((work, count))
        low, reserve = (plan.low, plan.reserve) if plan.counts is None else (plan.steps, plan.steps)
        grown = self._reserve(max(low, 1), max(reserve, 1)) if self.cohort else []
        named = self.cohort.to_name(grown)
        carried = len(self.cohort.members) - len(named)
        parts += [(work, 1) for work in named]
        for work in entering:
            self.waiting.remove(work)
        for work, count in zip(entering, plan.admitted, strict=True):
            self._enter(work)
            parts.append((work, min(count, work.known - work.computed)))
        if not parts and not carried:
            return
        steps = plan.steps
        if steps > 1 and self.cohort:
            steps = min(steps, self.cohort.covered)
        rows = tuple([self._row(work, count, step_id) for work, count in parts])
        self._step_next += 1
        self.step = Step(step_id, rows, steps, carried, tuple(self._dropped))
        self._dropped.clear()
        self._step_works = [work for work, _ in parts]
        self._step_started, self._cut_asked = self._now, False
        self._out.append(self.step)

    def _reserve(self, low: int, reserve: int) -> list[Work]:
        """Blocks for members of the cohort that run short of them; those that got some."""
        if self.cohort.covered >= low:
            return []
        grown = []
        for work in self.cohort.short(low):
            if self.blocks.grow(work, work.computed + min(reserve, work.output_left)):
                self.cohort.cover(work)
                grown.append(work)
            else:
                self._sit_out(work)
        return grown

    def _sit_out(self, work: Work) -> None:
        """A member of the cohort leaves it, and the runner's batch."""
        if self.cohort.leave(work):
            self._dropped.append((work.id, work.attempt))

    def _enter(self, work: Work) -> None:
        """From the queue into the running set, with blocks for all known tokens."""
        hits = self.blocks.hits(work)
        self.blocks.take(work, hits)
        work.computed = len(hits) * self.blocks.size
        work.stage = Stage.RUN
        if work.started_at is None:
            work.started_at = self._now
            work.queue_s = self._now - work.dispatched_at
            work.cached = work.computed
        self.running.append(work)

    def _row(self, work: Work, count: int, step_id: StepId) -> Row:
        d = work.dispatch
        end = work.computed + count
        if d.phase == "prefill":
            self._ship_part(work, self._complete_after(work, end), step_id)
        if work.started_at is None:
            work.started_at = self._now
            work.queue_s = self._now - work.ready_at
        if work.tick < 0:
            work.in_step = step_id
        sample = end == work.known and work.samples
        row = Row(
            work.id, work.attempt, work.computed, count, tuple(work.blocks[work.tabled :]),
            work.table_fresh, sample, work.out if sample else -1, d.request.max_tokens,
            d.request.gateway, d.request.sampling if sample else None,
            sample and d.phase != "prefill",
        )  # fmt: skip
        work.tabled, work.table_fresh = len(work.blocks), False
        return row

    def _preempt(self, work: Work) -> None:
        """Give its blocks up; it will be recomputed. One that is being shipped is lost instead."""
        if work.outbound:
            self._give_up(work, "preempted while its KV was shipped")
            return
        if work.tick >= 0:
            self._sit_out(work)
        self._note(Preempted(self.config.worker, work.id, work.computed))
        self._note(Recomputed(work.id, work.computed, "preempted"))
        work.preemptions += 1
        work.recomputed += work.computed
        self.running.remove(work)
        self.blocks.free(work)
        work.computed, work.fresh = 0, True
        self._enqueue(work)

    def _on_step_done(self, event: StepDone) -> None:
        step, works = self.step, self._step_works
        if step is None or step.id != event.step:
            return
        self.step, self._step_works = None, []
        self._measure(step, event.steps_done)
        self.cohort.advance(event.steps_done)
        for row, done, work in zip(step.rows, event.rows, works, strict=False):
            work.in_step = None
            if work.dead:
                self._bury(work)
            elif work.tick >= 0:
                self._drew(work, done, event)
            else:
                self._advance(work, row, done, event)
        for done in event.rows[len(step.rows) :]:
            member = self.cohort.members.get(done.request_id)
            if member is not None and member.attempt == done.attempt:
                self._drew(member, done, event)
        self._after_step()

    def _after_step(self) -> None:
        """Who left or came while it ran."""
        for work in self._dying:
            if work.in_step is not None:
                work.in_step = None
                self._bury(work)
        for work in self._joining:
            if not work.dead:
                self.cohort.add(work, named=False)
        self._dying, self._joining = [], []

    def _measure(self, step: Step, steps_done: int) -> None:
        if steps_done and all(row.count == 1 for row in step.rows):
            sample = (self._now - self._step_started) / steps_done
            old = self.iteration_s
            self.iteration_s = (
                sample if old is None else old + ITERATION_WEIGHT * (sample - old)
            )

    def _advance(self, work: Work, row: Row, done: RowDone, event: StepDone) -> None:
        added = row.count + event.steps_done - 1
        work.computed += added
        work.computed_here += added
        work.known += done.sampled
        work.out += done.sampled
        work.keys.extend(done.keys)
        if work.committed < len(work.keys):
            self.blocks.commit(work)
        self._was_first(work, event)
        if work.prefill is None and work.computed >= work.dispatch.input_tokens:
            self._prefilled(work, ended=bool(done.end))
        if done.end:
            self._finish(work, done.end)
        elif row.stays:
            self.cohort.add(work, named=True)

    def _drew(self, work: Work, done: RowDone, event: StepDone) -> None:
        """What a member of the cohort has to tell beyond its tokens, which are counted."""
        self._was_first(work, event)
        work.keys.extend(done.keys)
        if work.committed < len(work.keys):
            self.cohort.settle(work)
            self.blocks.commit(work)
        if done.end:
            self.cohort.settle(work)
            self._finish(work, done.end)

    def _was_first(self, work: Work, event: StepDone) -> None:
        if work.fresh and work.phase == "decode" and not work.preemptions:
            work.first_step_s = event.first_s
        work.fresh = False

    def _prefilled(self, work: Work, *, ended: bool) -> None:
        started = work.started_at if work.started_at is not None else self._now
        work.prefill = PrefillReport(
            self.config.worker, work.queue_s, self._now - started, work.cached, work.computed_here
        )
        report = work.prefill
        self._note(
            Prefilled(
                report.worker, work.id, report.queue_s, report.prefill_s, report.cached_tokens,
                report.computed_tokens,
            )
        )  # fmt: skip
        if ended:
            return
        c = self.config
        self._tell(c.conductor, PrefillDone(c.worker, work.id, work.attempt, report))
        if work.phase == "prefill":
            self.running.remove(work)
            work.stage = Stage.HOLD
            work.lease_until = self._now + c.lease_s
            if work.want is not None:
                self._ship_rest(work)

    def _finish(self, work: Work, reason: EndReason) -> None:
        report = self._report(work)
        gateway, c = work.dispatch.request.gateway, self.config
        self._tell(gateway, Done(work.id, work.attempt, reason, work.out, report))
        self._tell(
            c.conductor, Finished(c.worker, work.id, work.attempt, reason, work.out, report)
        )
        self._kill(work)

    def _report(self, work: Work) -> Report:
        seconds, nbytes, transport = work.transfer
        decode = work.phase == "decode"
        prefill = work.prefill or PrefillReport(work.dispatch.source, 0.0, 0.0, 0, 0)
        return Report(
            prefill=prefill, decode_worker=self.config.worker, transfer_s=seconds,
            transfer_bytes=nbytes, transport=transport,
            decode_queue_s=work.queue_s if decode else 0.0, first_step_s=work.first_step_s,
            preemptions=work.preemptions, recomputed_tokens=work.recomputed,
        )  # fmt: skip

    def _cut(self) -> None:
        """Something can join: end a long run of decode steps after its current iteration."""
        if self.step is not None and self.step.steps > 1 and not self._cut_asked:
            self._cut_asked = True
            self._out.append(Cut(self.step.id))

    # --- the end of an attempt --------------------------------------------------------------------

    def _give_up(self, work: Work, reason: str) -> None:
        self._refuse(work.id, work.attempt, reason)
        self._kill(work)

    def _refuse(self, request_id: RequestId, attempt: int, reason: str) -> None:
        c = self.config
        self._tell(c.conductor, Refused(c.worker, request_id, attempt, reason))

    def _kill(self, work: Work) -> None:
        """The attempt is over here. Its blocks are free now, or when nothing touches them."""
        assert not work.dead
        work.dead = True
        if work.tick >= 0 and self.cohort.leave(work) and self.step is not None:
            work.in_step = self.step.id
            self._dying.append(work)
        if self.works.get(work.id) is work:
            del self.works[work.id]
        for queue in (self.running, self.waiting, self.room):
            if work in queue:
                queue.remove(work)
        self.quarantine[work.id, work.attempt] = work
        self._out += self.prefixes.cancel(work)
        if work.in_step is not None:
            self._cut()
        self._bury(work)

    def _bury(self, work: Work) -> None:
        if work.in_step is not None:
            return
        if not work.released:
            work.released = True
            self._out.append(Release(work.id, work.attempt))
        if work.busy:
            return
        del self.quarantine[work.id, work.attempt]
        self.blocks.free(work)
        if self.waiting:
            self._cut()

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
                self._give_up(work, "its prompt did not come")
            elif work.stage in (Stage.ROOM, Stage.KV) and waited > c.kv_wait_s:
                self._give_up(work, "its KV did not come")
            elif work.stage is Stage.PREFIX and waited > c.kv_wait_s:
                self._out += self.prefixes.cancel(work)
            elif work.stage is Stage.HOLD and now > work.lease_until:
                self._give_up(work, "its lease ended")
        for key, since in list(self._early.items()):
            if now - since > c.prompt_wait_s:
                del self._early[key]
                self._out.append(Release(*key))
        for key, (since, want) in list(self._early_wants.items()):
            if now - since > c.beat_s:
                del self._early_wants[key]
                self._tell(want.target, KvGone(*key, "kv gone"))

    # --- telling ----------------------------------------------------------------------------------

    def _tell(self, to: NodeId, message: Message) -> None:
        self._out.append(Tell(to, cast(AnyMessage, message)))

    def _note(self, event: Any) -> None:
        self._out.append(Note(event))

    def check(self) -> None:
        """Block counts, stages and queues agree."""
        self.pool.check()
        self.cohort.check()
        assert all(work in self.running for work in self.cohort)
        owners = [*self.works.values(), *self.quarantine.values()]
        refs: dict[int, int] = {}
        for blocks in (*(work.blocks for work in owners), *self.prefixes.lent.values()):
            for block in blocks:
                refs[block] = refs.get(block, 0) + 1
        assert len(refs) == self.pool.held, (len(refs), self.pool.held)
        assert all(self.pool.refs(b) == n for b, n in refs.items())
        for work in self.works.values():
            assert not work.dead
            assert (work in self.running) == (work.stage is Stage.RUN), work.id
            assert (work in self.waiting) == (work.stage is Stage.QUEUE), work.id
            assert (work in self.room) == (work.stage is Stage.ROOM), work.id
            assert work.blocks or work.stage in (Stage.PROMPT, Stage.QUEUE, Stage.ROOM)
        assert all(w.dead and w.busy for w in self.quarantine.values())
