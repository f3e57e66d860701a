"""What a world tells a worker of its tiers (`core.effects.Store` and `Restore` are asked of it)."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvasir.core.ids import BlockKey, RequestId
from kvasir.core.message import Message, Tier


class TierReady(Message, frozen=True):
    """A tier can be used, and holds `keys` in `slots` from an earlier life. It may take several of
    these to tell; `last` is the last one."""

    tier: Tier
    slots: tuple[int, ...] = ()
    keys: tuple[BlockKey, ...] = ()
    last: bool = True


class TierGone(Message, frozen=True):
    """A tier failed: a full, read-only or vanished disk, a store that does not answer. It comes
    back only if it is opened again."""

    tier: Tier
    reason: str


class Stored(Message, frozen=True):
    """A `Store` is over. The first `count` blocks are in their slots; what is in the others is not
    known."""

    id: int
    count: int
    bytes: int = 0
    seconds: float = 0.0


class Held(Message, frozen=True):
    """An `Ask` is over: the shared tier holds the first `count` of the keys. `seconds`: what asking
    took, its queue counted."""

    request_id: RequestId
    attempt: int
    tier: Tier
    count: int
    seconds: float = 0.0


class Moved(msgspec.Struct, frozen=True, gc=False):
    """What one tier gave, and how long that took, its queue not counted."""

    tier: Tier
    bytes: int
    seconds: float


class Restored(Message, frozen=True):
    """A `Restore` is over: the first `count` blocks came, nothing is written any more. `moved`: by
    shelf, as far as it came. `fault`: why no more of them; the block that was missing or `damaged`
    is the one after."""

    request_id: RequestId
    attempt: int
    count: int
    moved: tuple[Moved, ...] = ()
    fault: Literal["", "damaged", "late", "released", "gone"] = ""
