"""One attempt as the worker that serves it sees it: counts, blocks and where it stands.

    prompt --tokens came--> queue --admitted--> run --prefill over--> hold --shipped--> gone
       |'-prefix of a peer--> prefix --came, or not--> queue
       |                             |           '-blocks of a tier--> tier --came, or not--> run
       |                             '-shared tier is asked--> ask --> queue
       |                                         |---last token----------------------> gone
       '-decode phase: room --blocks--> kv --received--> run

`gone` is not a state of its own: the attempt is dead, and its blocks are freed as soon as no step
and no transfer touches them (quarantine).
"""

from __future__ import annotations

from enum import IntEnum

from kvasir.core.ids import BlockId, BlockKey, StepId, WorkerId
from kvasir.core.messages import Dispatch, PrefillReport, Report, RowDone
from kvasir.policy import speculate


class Stage(IntEnum):
    PROMPT = 0  # dispatched; its tokens have not come yet
    QUEUE = 1  # may run, holds no blocks
    RUN = 2  # holds blocks, takes part in steps
    HOLD = 3  # prefilled; its KV is leased to the decode side
    ROOM = 4  # decode: waits for blocks
    KV = 5  # decode: waits for its KV
    PREFIX = 6  # waits for a peer's cached blocks
    TIER = 7  # admitted; waits for blocks of a tier
    ASK = 8  # waits to hear what a shared tier has, and holds no blocks


class Work:
    """Mutable; owned by one `node.worker.Worker`. Satisfies `policy.batch.WorkView`.

    `known` tokens exist, KV of `computed` of them stands in `blocks`. `out` is the output index of
    the next token. `keys` name the leading full blocks; the first `committed` of them are in the
    pool's cache.
    """

    __slots__ = (
        "accepted", "accepted_share", "blocks", "cached", "committed", "computed", "computed_here",
        "covered_to", "dead", "dispatch", "dispatched_at", "draft", "drafted", "drafted_at",
        "ends_at", "first_block", "first_step_s", "forms", "fresh", "has_prompt", "id", "in_step",
        "inbound", "keys", "known", "lease_until", "link_bytes_s", "lost", "out", "outbound",
        "preemptions", "prefill", "prefilled_at", "queue_s", "ready_at", "received", "recomputed",
        "released", "sent", "seq", "shared", "stage", "started_at", "table_fresh", "tabled",
        "target", "tick", "transfer", "want",
    )  # fmt: skip

    def __init__(self, dispatch: Dispatch, now: float, seq: int) -> None:
        self.dispatch = dispatch
        self.id = dispatch.request.id
        self.seq = seq  # order of arrival at this worker
        self.stage = Stage.PROMPT if dispatch.phase != "decode" else Stage.ROOM
        self.known = dispatch.input_tokens
        self.computed = 0
        self.out = dispatch.emitted
        self.blocks: list[BlockId] = []
        self.keys: list[BlockKey] = list(dispatch.request.keys)
        self.committed = 0
        self.cached = 0  # tokens that were there when prefill began
        self.computed_here = 0
        self.has_prompt = False
        self.fresh = True
        self.dead = False
        self.released = False  # the world was told to forget it
        self.received = False  # decode: its KV is here
        self.in_step: StepId | None = None  # a cohort's members are in the step that runs
        self.tick = -1  # of its cohort, when its counts were last brought up to date; -1: in none
        self.ends_at = self.covered_to = -1  # ticks at which its output and its blocks end
        self.inbound = False
        self.outbound = False
        self.tabled = 0  # leading blocks that the runner's table has
        self.table_fresh = True
        self.target: WorkerId = dispatch.target
        self.want: int | None = None  # first logical block that the target lacks
        self.sent = 0  # logical blocks up to here are on their way
        self.link_bytes_s = 0.0  # what the network should give on the way to the target; 0: unknown
        self.first_block = 0  # decode: first logical block to receive
        self.lease_until = float("inf")
        self.dispatched_at = now
        self.started_at: float | None = None
        self.prefilled_at: float | None = None
        self.ready_at = now
        self.queue_s = 0.0
        self.first_step_s = 0.0
        self.draft = 0  # tokens that it may guess in each iteration of the next step
        self.drafted = self.accepted = 0  # tokens that it guessed, and how many were right
        self.accepted_share = speculate.START  # of late
        self.drafted_at = 0  # output index when it guessed last
        self.preemptions = 0
        self.lost = 0  # tokens whose KV it had when it was preempted, until it goes on
        self.recomputed = 0
        self.shared: frozenset[BlockKey] | None = None  # what a shared tier has; None: not asked
        self.prefill: PrefillReport | None = None
        self.transfer: tuple[float, int, str] = (0.0, 0, "")
        self.forms = ""  # in which its KV came, where it was coded

    @property
    def attempt(self) -> int:
        return self.dispatch.attempt

    @property
    def phase(self) -> str:
        return self.dispatch.phase

    @property
    def single_step(self) -> bool:
        """While it runs, a step is one iteration."""
        return self.dispatch.request.sampling.single_step

    @property
    def blocks_held(self) -> int:
        return len(self.blocks)

    @property
    def output_left(self) -> int:
        """Tokens that may still be drawn here. A prefill worker draws one, or none."""
        if self.dispatch.phase == "prefill":
            return 0
        return self.dispatch.request.max_tokens - self.out

    @property
    def samples(self) -> bool:
        """Whether the last known position yields a token on this worker."""
        return self.dispatch.phase != "prefill" or self.dispatch.first_token == "prefill"

    @property
    def busy(self) -> bool:
        """Something still reads or writes its blocks."""
        return self.in_step is not None or self.inbound or self.outbound

    @property
    def guesses(self) -> bool:
        """Whether tokens may be guessed for it now: it decodes here, and has tokens left to draw
        after the next one."""
        decodes = self.known - self.computed == 1 and self.prefill is not None
        return decodes and self.output_left > 1

    def guessed(self, done: RowDone) -> None:
        """What came of the guesses of a step, which it was allowed to make."""
        self.drafted_at = self.out
        if done.drafted:
            self.drafted += done.drafted
            self.accepted += done.accepted
            self.accepted_share = speculate.share_accepted(
                self.accepted_share, done.drafted, done.accepted
            )

    def report(self, worker: WorkerId) -> Report:
        """How the attempt's time and bytes were spent, at its end on `worker`."""
        seconds, nbytes, transport = self.transfer
        return Report(
            prefill=self.prefill or PrefillReport(self.dispatch.source, 0.0, 0.0, 0, 0),
            decode_worker=worker, transfer_s=seconds, transfer_bytes=nbytes, transport=transport,
            decode_queue_s=self.queue_s if self.phase == "decode" else 0.0,
            first_step_s=self.first_step_s, preemptions=self.preemptions,
            recomputed_tokens=self.recomputed, codec=self.forms,
        )  # fmt: skip
