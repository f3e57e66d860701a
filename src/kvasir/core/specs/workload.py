"""What arrives: a trace, or a seeded generator. `serve` ignores it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvasir.core.specs.base import Spec


class LengthSpec(Spec):
    """Token lengths: lognormal with this mean, clipped to [min, max]; sigma 0 is a constant."""

    mean: float = Field(gt=0)
    sigma: float = Field(default=1.0, ge=0)
    min: int = Field(default=1, gt=0)
    max: int = Field(default=131072, gt=0)


class WorkloadSpec(Spec):
    """`trace` wins over the generator. Rates are requests per second, times seconds."""

    trace: str | None = None
    kind: Literal["poisson", "constant"] = "poisson"
    rate: float = Field(default=4.0, gt=0)
    requests: int = Field(default=1000, gt=0)
    input: LengthSpec = LengthSpec(mean=1266, sigma=1.0, min=32, max=3000)
    output: LengthSpec = LengthSpec(mean=200, sigma=0.8, min=4, max=1000)
    prefix_share: float = Field(default=0.0, ge=0, le=1)
    prefix_groups: int = Field(default=8, gt=0)
    prefix_tokens: int = Field(default=1024, ge=0)
    time_scale: float = Field(default=1.0, gt=0)
    limit: int | None = Field(default=None, gt=0)
