"""The one base of all specs: frozen, and no unknown names."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def wrong(what: str, *path: str | int, near: str = "") -> PydanticCustomError:
    """What a validator of a whole spec raises about the value at `path` inside it."""
    return PydanticCustomError("spec", "{what}", {"what": what, "path": path, "near": near})
