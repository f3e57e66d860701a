"""Service level objectives: what makes a request good (DESIGN: jointly TTFT and TPOT)."""

from __future__ import annotations

from pydantic import Field

from kvasir.core.specs.base import Spec


class SloSpec(Spec):
    """Seconds. TPOT is the mean time per output token after the first (`vllm bench serve`)."""

    ttft_s: float = Field(default=5.0, gt=0)
    tpot_s: float = Field(default=0.05, gt=0)
    itl_p99_s: float | None = Field(default=None, gt=0)
