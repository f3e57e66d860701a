"""`models[].speculate`: guessing tokens ahead. Knows values; must not know how they are used."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kvasir.core.specs.base import Spec, wrong


class SpeculateSpec(Spec):
    """Up to `tokens` guessed tokens are verified with each drawn one; the text stays the same.

    `kind: ngram` takes what followed the last `ngram_max` (down to `ngram_min`) tokens when they
    stood in prompt or output before; `draft` asks a smaller model, the HuggingFace folder `draft`,
    of the same vocabulary. No guesses while more than `rows_max` sequences run on a worker, nor for
    one whose guesses were wrong. `acceptance`: how likely each guess is right where no model runs,
    in the simulator and with engine fake; the live engine measures.
    """

    kind: Literal["ngram", "draft"] = "ngram"
    tokens: int = Field(default=6, ge=1, le=64)
    rows_max: int = Field(default=4, ge=1)
    ngram_min: int = Field(default=2, ge=1)
    ngram_max: int = Field(default=4, ge=1, le=16)
    draft: str | None = None
    acceptance: float = Field(default=0.6, ge=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> SpeculateSpec:
        if self.ngram_min > self.ngram_max:
            raise wrong("ngram_min is more than ngram_max", "ngram_min")
        if (self.kind == "draft") != (self.draft is not None):
            what = "needs" if self.kind == "draft" else "takes no"
            raise wrong(f"kind: {self.kind} {what} folder of a draft model", "draft")
        return self
