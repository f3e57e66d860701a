"""A worker's batch: who runs, who waits to, and the step that is under way.

Asks the batch policy, turns its answer into a `Step`, and counts what came of it. Knows counts and
blocks; must not know what a request's end, or the end of its prefill, means to others: that is the
worker around it (`Owner`).
"""

from __future__ import annotations

from itertools import repeat
from typing import Protocol

from kvasir.core.effects import AnyEffect, Cut, Note, Row, Step
from kvasir.core.events import Preempted, Recomputed
from kvasir.core.ids import RequestId, StepId
from kvasir.core.messages import EndReason, RowDone, StepDone
from kvasir.core.tiers import Held
from kvasir.node.blocks import Blocks
from kvasir.node.cohort import Cohort
from kvasir.node.config import WorkerConfig
from kvasir.node.outbound import Outbound
from kvasir.node.tiers import Tiers
from kvasir.node.window import Window
from kvasir.node.work import Stage, Work
from kvasir.policy import batch
from kvasir.policy.speculate import Drafting, draft_tokens

ITERATION_WEIGHT = 0.2  # of the newest sample in the mean iteration time


class Owner(Protocol):
    """What a batch asks of the worker that it is part of."""

    def emit(self, effect: AnyEffect) -> None: ...
    def prefilled(self, work: Work, *, ended: bool) -> None:
        """All of its input is computed."""

    def finish(self, work: Work, reason: EndReason) -> None:
        """It has drawn its last token."""

    def give_up(self, work: Work, reason: str) -> None:
        """It cannot go on here."""

    def bury(self, work: Work) -> None:
        """It is dead, and no step touches its blocks any more."""


class Steps:
    """`running` take part in steps, oldest first; `waiting` hold no blocks, most urgent first. One
    `step` is in flight at most."""

    def __init__(
        self, blocks: Blocks, config: WorkerConfig, tiers: Tiers, owner: Owner
    ) -> None:
        self.running: list[Work] = []
        self.waiting: list[Work] = []
        self.cohort = Cohort(blocks.size)
        self.step: Step | None = None
        self.iteration_s: float | None = None  # mean of late; None: unknown
        self.outbound = Outbound(blocks, config)
        self._blocks, self._config, self._tiers, self._owner = blocks, config, tiers, owner
        self._decide = batch.BATCHES[config.batch]
        self._window = Window(self, blocks, config)
        self._now = 0.0
        self._started = 0.0
        self._next: StepId = 1
        self._cut_asked = False
        self._works: list[Work] = []  # of the step's rows
        self._joining: list[Work] = []  # began to decode while a step ran
        self._dying: list[Work] = []  # left the cohort while a step ran
        self._dropped: list[tuple[RequestId, int]] = []  # the runner carries them; they sit out

    # --- who is in the batch ----------------------------------------------------------------------

    def enqueue(self, work: Work) -> None:
        """It may run as soon as there is room: by band, then in order of arrival."""
        work.stage = Stage.QUEUE
        key = (work.dispatch.request.band, work.seq)
        at = len(self.waiting)
        while at and (self.waiting[at - 1].dispatch.request.band, self.waiting[at - 1].seq) > key:
            at -= 1
        self.waiting.insert(at, work)
        self.cut()

    def join(self, work: Work) -> None:
        """Its KV came from elsewhere, with its blocks: it decodes from the next step on."""
        work.stage = Stage.RUN
        self.running.append(work)
        if self.step is None:
            self.cohort.add(work, named=False)
        else:
            self._joining.append(work)
        self.cut()

    def leave(self, work: Work) -> None:
        """It died. A step that runs may touch its blocks until it is over (`Work.in_step`)."""
        if work.tick >= 0 and self.cohort.leave(work) and self.step is not None:
            work.in_step = self.step.id
            self._dying.append(work)
        for queue in (self.running, self.waiting):
            if work in queue:
                queue.remove(work)

    def cut(self) -> None:
        """Something can join: end a long run of decode steps after its current iteration."""
        if self.step is not None and self.step.steps > 1 and not self._cut_asked:
            self._cut_asked = True
            self._owner.emit(Cut(self.step.id))

    def ship_row(self, work: Work, now: float) -> None:
        """Somebody asked for its KV while a step computes it."""
        if work.in_step is not None and self.step is not None:
            row = self.step.rows[self._works.index(work)]
            self._ship(work, row.start + row.count, work.in_step, now)

    def _ship(self, work: Work, computed: int, step_id: StepId, now: float) -> None:
        for send in self.outbound.part(work, computed, step_id, now):
            self._owner.emit(send)

    # --- the next step ----------------------------------------------------------------------------

    def schedule(self, now: float) -> None:
        """Ask the policy for a batch and start it. Each pass that starts nothing preempts one, or
        sends one to wait for blocks of a tier."""
        self._now = now
        while self.step is None and (self.running or self.waiting):
            if self._config.speculate is not None:
                self._allow_guesses(self._config.speculate)
            plan = self._decide(self._window)
            chosen = self._chosen(plan)
            order = plan.order or range(len(plan.admitted))
            entering = [self.waiting[i] for i in order]
            if entering and self._tiers.states and self._load(entering):
                continue  # who of the others runs now is another question
            victims = [self.running[i] for i in plan.preempted]
            for work in victims:
                self._preempt(work)
            self._start(plan, chosen, entering)
            if not victims or any(work.dead for work in victims):
                return  # a dead one's blocks come free when its transfer is over, soon

    def _load(self, entering: list[Work]) -> bool:
        """Those that take blocks out of a tier first leave the queue, with blocks of their own."""
        running_s = self.iteration_s or 0.0 if self.running else 0.0
        behind = len(self.waiting) - 1
        loading = [w for w in entering if self._tiers.load(w, self._now, running_s, behind)]
        for work in loading:
            self.waiting.remove(work)
        return bool(loading)

    def _allow_guesses(self, rule: Drafting) -> None:
        """Who may guess draws more than one token an iteration, and so is not in the cohort."""
        running = len(self.running)
        for work in self.running:
            self.cohort.settle(work)
            work.draft = 0
            if work.guesses:
                since = work.out - work.drafted_at
                work.draft = draft_tokens(rule, running, work.accepted_share, since)
            if work.draft and work.tick >= 0:
                self._sit_out(work)

    def _chosen(self, plan: batch.Batch) -> list[tuple[Work, int]]:
        """Running sequences with their counts; none where the whole cohort runs on."""
        if plan.counts is None:
            return []
        for work, draft in zip(self.running, plan.drafts or repeat(0), strict=False):
            work.draft = draft
        return list(zip(self.running, plan.counts, strict=True))

    def _start(
        self, plan: batch.Batch, chosen: list[tuple[Work, int]], entering: list[Work]
    ) -> None:
        step_id, parts = self._next, list[tuple[Work, int]]()
        for work, count in chosen:
            if work.tick >= 0:
                if not count:
                    self._sit_out(work)
            elif count and self._blocks.grow(
                work, batch.reach(work, count, work.draft, plan.steps)
            ):
                parts.append((work, count))
        low, reserve = (plan.low, plan.reserve) if plan.counts is None else (plan.steps, plan.steps)
        grown = self._reserve(max(low, 1), max(reserve, 1)) if self.cohort else []
        named = self.cohort.to_name(grown)
        carried = len(self.cohort.members) - len(named)
        parts += [(work, 1) for work in named]
        for work, count in zip(entering, plan.admitted, strict=True):
            if self._enter(work):
                parts.append((work, min(count, work.known - work.computed)))
        if not parts and not carried:
            return
        steps = plan.steps
        if steps > 1 and self.cohort:
            steps = min(steps, self.cohort.covered)
        rows = tuple([self._row(work, count, step_id) for work, count in parts])
        self._next += 1
        self.step = Step(step_id, rows, steps, carried, tuple(self._dropped))
        self._dropped.clear()
        self._works = [work for work, _ in parts]
        self._started, self._cut_asked = self._now, False
        self._owner.emit(self.step)

    def _reserve(self, low: int, reserve: int) -> list[Work]:
        """Blocks for members of the cohort that run short of them; those that got some."""
        if self.cohort.covered >= low:
            return []
        grown = []
        for work in self.cohort.short(low):
            if self._blocks.grow(work, work.computed + min(reserve, work.output_left)):
                self.cohort.cover(work)
                grown.append(work)
            else:
                self._sit_out(work)
        return grown

    def _sit_out(self, work: Work) -> None:
        """A member of the cohort leaves it, and the runner's batch."""
        if self.cohort.leave(work):
            self._dropped.append((work.id, work.attempt))

    def _enter(self, work: Work) -> bool:
        """From the queue into the running set, with blocks for all known tokens. False when who
        entered before it evicted the head of its hits: it stays where it is."""
        hits = self._blocks.hits(work)
        if not self._blocks.fits(work, hits):
            return False
        self.waiting.remove(work)
        self._blocks.take(work, hits)
        work.computed = len(hits) * self._blocks.size
        if self._tiers.states:
            self._tiers.used(work, 0, len(hits), again=True)
        self._begin(work)
        return True

    def held(self, event: Held) -> None:
        """A shared tier said what it has: whoever asked is where it was in the queue."""
        work = self._tiers.held(event)
        if work is not None:
            self.enqueue(work)

    def loaded(self, work: Work, now: float) -> None:
        """What came out of a tier is in its blocks: it runs from the next step on."""
        self._now = now
        self._begin(work)
        self.cut()

    def _begin(self, work: Work) -> None:
        work.stage = Stage.RUN
        self._tiers.again(work)
        if work.started_at is None:
            work.started_at = self._now
            work.queue_s = self._now - work.dispatched_at
            work.cached = work.computed
        self.running.append(work)

    def _row(self, work: Work, count: int, step_id: StepId) -> Row:
        d = work.dispatch
        end = work.computed + count
        if d.phase == "prefill":
            self._ship(work, end, step_id, self._now)
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
            sample and d.phase != "prefill" and not work.draft, work.draft,
        )  # fmt: skip
        work.tabled, work.table_fresh = len(work.blocks), False
        return row

    def _preempt(self, work: Work) -> None:
        """Give its blocks up: it will be recomputed, or loaded as far as a tier has it. One that is
        being shipped is lost instead."""
        if work.outbound:
            self._owner.give_up(work, "preempted while its KV was shipped")
            return
        if work.tick >= 0:
            self._sit_out(work)
        self._owner.emit(Note(Preempted(self._config.worker, work.id, work.computed)))
        work.preemptions += 1
        if self._tiers.states:  # how much is made again is known when it goes on
            work.lost = work.computed
        else:
            self._owner.emit(Note(Recomputed(work.id, work.computed, "preempted")))
            work.recomputed += work.computed
        self.running.remove(work)
        self._blocks.free(work)
        work.shared = None
        work.computed, work.fresh, work.draft = 0, True, 0
        self.enqueue(work)

    # --- what came of it --------------------------------------------------------------------------

    def over(self, event: StepDone, now: float) -> None:
        """The step has ended; one that is not the running step is ignored."""
        step, works = self.step, self._works
        if step is None or step.id != event.step:
            return
        self._now, self.step, self._works = now, None, []
        self._measure(step, event.steps_done)
        self.cohort.advance(event.steps_done)
        for row, done, work in zip(step.rows, event.rows, works, strict=False):
            work.in_step = None
            if work.dead:
                self._owner.bury(work)
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
                self._owner.bury(work)
        for work in self._joining:
            if not work.dead:
                self.cohort.add(work, named=False)
        self._dying, self._joining = [], []

    def _measure(self, step: Step, steps_done: int) -> None:
        if steps_done and all(row.count == 1 for row in step.rows):
            sample = (self._now - self._started) / steps_done
            old = self.iteration_s
            self.iteration_s = (
                sample if old is None else old + ITERATION_WEIGHT * (sample - old)
            )
        elif steps_done and self._tiers.states:
            prompts = [(row.start, row.count) for row in step.rows if row.count > 1]
            others = step.carried + len(step.rows) - len(prompts)
            aside_s = self.iteration_s or 0.0 if others else 0.0
            self._tiers.stepped(prompts, self._now - self._started - aside_s)

    def _advance(self, work: Work, row: Row, done: RowDone, event: StepDone) -> None:
        added = row.count + max(done.sampled, 1) - 1
        work.computed += added
        work.computed_here += added
        work.known += done.sampled
        work.out += done.sampled
        if row.draft:
            work.guessed(done)
        work.keys.extend(done.keys)
        if work.committed < len(work.keys):
            self._blocks.commit(work)
        self._was_first(work, event)
        if work.prefill is None and work.computed >= work.dispatch.input_tokens:
            self._owner.prefilled(work, ended=bool(done.end))
        if done.end:
            self._owner.finish(work, done.end)
        elif row.stays:
            self.cohort.add(work, named=True)

    def _drew(self, work: Work, done: RowDone, event: StepDone) -> None:
        """What a member of the cohort has to tell beyond its tokens, which are counted."""
        self._was_first(work, event)
        work.keys.extend(done.keys)
        if work.committed < len(work.keys):
            self.cohort.settle(work)
            self._blocks.commit(work)
        if done.end:
            self.cohort.settle(work)
            self._owner.finish(work, done.end)

    def _was_first(self, work: Work, event: StepDone) -> None:
        if work.fresh and work.phase == "decode" and not work.preemptions:
            work.first_step_s = event.first_s
        work.fresh = False

    def check(self) -> None:
        """The cohort's counts, and that its members run. Who guesses is none of them."""
        self.cohort.check()
        assert all(work in self.running and not work.draft for work in self.cohort)
