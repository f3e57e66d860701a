"""KV that leaves a prefill worker: which blocks of an attempt go when, as `Send` effects.

Knows blocks and what the peer lacks; must not know how bytes travel, nor who asked for what else.
"""

from __future__ import annotations

from kvasir.core.effects import Send
from kvasir.core.ids import StepId
from kvasir.node.blocks import Blocks
from kvasir.node.config import WorkerConfig
from kvasir.node.work import Work
from kvasir.policy.handover import streams


class Outbound:
    """Each block of an attempt that is wanted leaves once, in order; the last part closes it."""

    def __init__(self, blocks: Blocks, config: WorkerConfig) -> None:
        self._blocks, self._config = blocks, config

    def part(self, work: Work, computed: int, step: StepId, now: float) -> list[Send]:
        """Blocks that `step` completes, when it has computed `computed` tokens: they leave layer
        by layer while it runs. Nothing when nobody asked yet, or all is to leave at the end."""
        until, c = self._complete_after(work, computed), self._config
        first = max(work.sent, work.want or 0)
        if work.want is None or until <= first:
            return []
        if not streams(c.transfer, c.serial_tokens, work.dispatch.input_tokens):
            return []  # all of it leaves when prefill is over
        blocks = tuple(work.blocks[first:until])
        work.sent, work.outbound = until, True
        return [
            Send(
                work.id, work.attempt, work.target, first, blocks, self._blocks.bytes(len(blocks)),
                now + c.kv_wait_s + c.lease_s, step,
            )
        ]  # fmt: skip

    def rest(self, work: Work) -> Send:
        """All that is left; closes the transfer."""
        until = self._blocks.count(work.dispatch.input_tokens)
        first = max(work.sent, work.want or 0)
        blocks = tuple(work.blocks[first:until])
        work.sent, work.outbound = until, True
        return Send(
            work.id, work.attempt, work.target, first, blocks, self._blocks.bytes(len(blocks)),
            work.lease_until, None, True, work.prefill,
        )  # fmt: skip

    def _complete_after(self, work: Work, computed: int) -> int:
        """Blocks whose KV is whole when `computed` tokens are: the last one counts at the end."""
        if computed >= work.dispatch.input_tokens:
            return self._blocks.count(work.dispatch.input_tokens)
        return computed // self._blocks.size
