"""The admission policy's view of a conductor: counts, and predictions made when they are asked for.

Knows the conductor's picture of workers. Decides nothing and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvasir.node.placement import Placement, State
from kvasir.node.registry import Member

if TYPE_CHECKING:
    from kvasir.node.conductor import Conductor


class Admission:
    """`policy.admit.AdmitView` over the conductor, for one request."""

    __slots__ = ("_conductor", "_placement", "queue_max", "queued", "stage")

    def __init__(
        self, conductor: Conductor, placement: Placement, stage: Literal["arrival", "decode"]
    ) -> None:
        self._conductor = conductor
        self._placement = placement
        self.stage: Literal["arrival", "decode"] = stage
        self.queued = len(conductor.queue)
        self.queue_max = conductor.limits.queue_max

    @property
    def blocks_needed(self) -> int:
        size = self._conductor.deployment.block_size
        return -(-self._placement.request.total_tokens_max // size)

    @property
    def blocks_max(self) -> int:
        model = self._placement.request.model
        able = [m for m in self._conductor.members.values() if m.model == model]
        able = [m for m in able if m.roles != ("prefill",)] or able  # where it would end
        return max([m.blocks_total for m in able], default=0)

    @property
    def ttft_load(self) -> float:
        """Queue and prefill at the worker where they are over first, without a transfer."""
        return self._ttft_s() / self._slo("ttft_s")

    @property
    def tbt_load(self) -> float:
        p, decoders = self._placement, self._able("decode")
        if not decoders:
            return 0.0
        fastest = min(
            m.predict_iteration(m.decoding + 1, m.context_tokens + p.input_tokens)
            for m in decoders
        )
        return fastest / self._slo("tpot_s")

    @property
    def tbt_load_ahead(self) -> float:
        """Mean over decode workers when this prefill would end: sequences prefilled by then have
        come, those that decode for longer than the mean of finished ones have gone."""
        decoders = self._able("decode")
        if not decoders:
            return 0.0
        c, p = self._conductor, self._placement
        at, life_s = c.now + self._ttft_s(), c.decode_s_mean
        count, context = 1, p.input_tokens
        for other in c.placements.values():
            if other.state is State.PREFILL:
                here = other.prefilled_at <= at
            else:
                here = other.state is State.DECODE and (
                    life_s is None or at - other.prefilled_at < life_s
                )
            if here:
                count, context = count + 1, context + other.input_tokens
        each, tokens = -(-count // len(decoders)), context // len(decoders)
        mean_s = sum(m.predict_iteration(each, tokens) for m in decoders) / len(decoders)
        return mean_s / self._slo("tpot_s")

    def _ttft_s(self) -> float:
        p, size = self._placement, self._conductor.deployment.block_size
        hits = self._conductor.index.match(p.request.keys)
        times = [
            m.prefill_s + m.predict_prefill(p.input_tokens, hits.get(m.id, 0) * size)
            for m in self._able("prefill")
        ]
        return min(times, default=0.0)

    def _able(self, role: str) -> list[Member]:
        return self._conductor.able(self._placement, role)

    def _slo(self, name: Literal["ttft_s", "tpot_s"]) -> float:
        slo = self._placement.request.slo or self._conductor.deployment.slo
        return slo.ttft_s if name == "ttft_s" else slo.tpot_s
