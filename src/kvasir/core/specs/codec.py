"""The codec of a deployment's KV transfers: what may be lost on the way, for fewer bytes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvasir.core.specs.base import Spec

CodecKind = Literal["off", "lossless", "int8", "cachegen"]


class CodecSpec(Spec):
    """`kind`: the form that may lose most; every form that loses no more may be used too, and none
    is where the bytes as they are come sooner. `off`: none. `lossless` changes nothing; `int8` and
    `cachegen` up to `level_max` (1 loses least) do change answers: docs/codec.md says how much."""

    kind: CodecKind = "off"
    level_max: int = Field(default=2, ge=1, le=5)
