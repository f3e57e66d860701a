"""KV that leaves a prefill worker: which blocks of an attempt go when, and in which form.

Knows blocks and what the peer lacks; must not know how bytes travel, nor who asked for what else.
"""

from __future__ import annotations

from typing import Final

from kvasir.core.codec import Sent
from kvasir.core.effects import Note, Send
from kvasir.core.ids import StepId
from kvasir.node.blocks import Blocks
from kvasir.node.coding import Coding, Key
from kvasir.node.config import WorkerConfig
from kvasir.node.work import Work
from kvasir.policy.handover import streams

AHEAD: Final = 2  # parts that are coded or on their way while another choice waits

Sends = list[Send | Note]


class Outbound:
    """Each block of an attempt that is wanted leaves once, in order; the last part closes it."""

    def __init__(self, blocks: Blocks, config: WorkerConfig) -> None:
        self._blocks, self._config = blocks, config
        self.coding = Coding(config, config.codec) if config.codec is not None else None

    def part(self, work: Work, computed: int, step: StepId, now: float) -> Sends:
        """Blocks that `step` completes, when it has computed `computed` tokens: they leave layer
        by layer while it runs. Nothing when nobody asked yet, or all is to leave at the end."""
        until, c = self._complete_after(work, computed), self._config
        first = max(work.sent, work.want or 0)
        if work.want is None or until <= first:
            return []
        if not streams(c.transfer, c.serial_tokens, work.dispatch.input_tokens):
            return []  # all of it leaves when prefill is over
        return self._sends(work, first, until, now + c.kv_wait_s + c.lease_s, now, step)

    def rest(self, work: Work, now: float) -> Sends:
        """All that is left; closes the transfer."""
        first, end = max(work.sent, work.want or 0), self._blocks.count(work.dispatch.input_tokens)
        return self._sends(work, first, end, work.lease_until, now, None, closes=True)

    def sent(self, event: Sent, work: Work | None) -> bool:
        """A part has left. Whether more of `work`, its attempt if that lives, may follow."""
        assert self.coding is not None, "only what names a codec is answered so"
        self.coding.sent(event)
        if work is None or work.want is None or self._going(work) >= AHEAD:
            return False
        return work.sent < self._blocks.count(work.dispatch.input_tokens)

    def over(self, key: Key) -> None:
        if self.coding is not None:
            self.coding.over(key)

    def _sends(
        self, work: Work, first: int, end: int, deadline: float, now: float, step: StepId | None,
        *, closes: bool = False,
    ) -> Sends:  # fmt: skip
        """Blocks [first, end). Where each chunk has a choice of its own, the first of them: the
        next ones go when these have left."""
        sends: Sends = []
        while first == end or self._going(work) < AHEAD or not self._chunk_blocks(work):
            until = min(end, first + (self._chunk_blocks(work) or end))
            sends += self._send(work, first, until, deadline, now, step, closes and until == end)
            if until == end:
                break
            first = until
        return sends

    def _send(
        self, work: Work, first: int, until: int, deadline: float, now: float,
        step: StepId | None, last: bool,
    ) -> Sends:  # fmt: skip
        blocks = tuple(work.blocks[first:until])
        nbytes, sends, form = self._blocks.bytes(len(blocks)), list[Send | Note](), ""
        if self.coding is not None and blocks:
            left = self._blocks.bytes(self._blocks.count(work.dispatch.input_tokens) - first)
            told = self.coding.choose(work, left, now)
            form = told.codec
            self.coding.leaves(work, first, form, nbytes)
            sends.append(Note(told))
        work.sent, work.outbound = until, True
        report = work.prefill if last else None
        sends.append(Send(work.id, work.attempt, work.target, first, blocks, nbytes, deadline,
                          step, last, report, form))  # fmt: skip
        return sends

    def _chunk_blocks(self, work: Work) -> int | None:
        """How many blocks go on one choice; None for all."""
        chunk = self.coding.chunk_bytes(work) if self.coding is not None else None
        return max(1, chunk // self._blocks.bytes(1)) if chunk is not None else None

    def _going(self, work: Work) -> int:
        parts = self.coding.going.get((work.id, work.attempt)) if self.coding is not None else None
        return len(parts) if parts else 0

    def _complete_after(self, work: Work, computed: int) -> int:
        """Blocks whose KV is whole when `computed` tokens are: the last one counts at the end."""
        if computed >= work.dispatch.input_tokens:
            return self._blocks.count(work.dispatch.input_tokens)
        return computed // self._blocks.size
