"""What arrives: a trace, or a seeded generator. `serve` ignores it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvasir.core.specs.base import Spec


class LengthSpec(Spec):
    """Token lengths with this mean in [min, max].

    `lognormal` has its mean before it is clipped; sigma 0 is a constant. `zipf` gives n a weight of
    n ** -a, with a >= 0 such that the mean is as asked. `fixed` is the mean itself.
    """

    kind: Literal["lognormal", "zipf", "fixed"] = "lognormal"
    mean: float = Field(gt=0)
    sigma: float = Field(default=1.0, ge=0)
    min: int = Field(default=1, gt=0)
    max: int = Field(default=131072, gt=0)


class WorkloadSpec(Spec):
    """`trace` wins over the generator. Rates are requests per second, times seconds.

    Gaps of `gamma` have the shape `burstiness` (1 is Poisson, less is burstier, as in `vllm bench
    serve`). `on_off` is Poisson in stretches of mean `on_s`, silent in between for mean `off_s`;
    `rate` is over all. With `turns` > 1 requests come in sessions of that many turns on average,
    `think_s` apart on average; each turn's prompt is all before it and new tokens as `input` says,
    and a session ends before a prompt exceeds `context_max`. With `adapters` each request, or
    session, is under one of so many LoRA adapters, all as likely; they share no prefix.

    `name_answers`: simulated workers have the blocks of answers in their caches too, as live ones
    do, where the session's next turn tells how they are named.
    """

    trace: str | None = None
    kind: Literal["poisson", "constant", "gamma", "on_off"] = "poisson"
    rate: float = Field(default=4.0, gt=0)
    requests: int = Field(default=1000, gt=0)
    input: LengthSpec = LengthSpec(mean=1266, sigma=1.0, min=32, max=3000)
    output: LengthSpec = LengthSpec(mean=200, sigma=0.8, min=4, max=1000)
    burstiness: float = Field(default=1.0, gt=0)
    on_s: float = Field(default=10.0, gt=0)
    off_s: float = Field(default=10.0, gt=0)
    turns: float = Field(default=1.0, ge=1)
    think_s: float = Field(default=10.0, gt=0)
    context_max: int = Field(default=131072, gt=0)
    prefix_share: float = Field(default=0.0, ge=0, le=1)
    prefix_groups: int = Field(default=8, gt=0)
    prefix_tokens: int = Field(default=1024, ge=0)
    adapters: int = Field(default=0, ge=0)
    name_answers: bool = False
    time_scale: float = Field(default=1.0, gt=0)
    limit: int | None = Field(default=None, gt=0)
