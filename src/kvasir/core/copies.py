"""Cached blocks that go to another worker before a request needs them, and workers that leave.

    anybody   --Leave--> conductor --Drain--> worker --Left--> conductor
    conductor --Copy--> target --KvWant(keys)--> source; target --Copied--> conductor

A copy is a transfer between two caches that nobody waits for: what goes wrong costs nothing but a
hit. Knows no policy.
"""

from __future__ import annotations

from typing import Literal

from kvasir.core.ids import BlockKey, Epoch, Incarnation, RequestId, TenantId, WorkerId
from kvasir.core.message import Message

# Why blocks are copied: many prompts begin with them, a session's next turn will, their only
# holder leaves.
Purpose = Literal["hot", "next_turn", "leaving"]


class Copy(Message, frozen=True):
    """To the target: take blocks `keys`, a chain from its first block on, out of `source`'s cache,
    as far as they are not in your own; out of your own tiers, if you are the source. `name` is that
    of the transfer; the same again says nothing. `tenant`: whose share they count for."""

    epoch: Epoch
    name: RequestId
    source: WorkerId
    keys: tuple[BlockKey, ...]
    purpose: Purpose
    tenant: TenantId  # without a default: one that is decoded is another string than the default


class Copied(Message, frozen=True):
    """The order `name` is over: `blocks` came, or none and a `reason`."""

    worker: WorkerId
    incarnation: Incarnation
    name: RequestId
    source: WorkerId
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    transport: str = ""
    reason: str = ""


class Leave(Message, frozen=True):
    """To the conductor: let `worker` go. What it serves may end, and what only it has cached may be
    copied, for `within_s` seconds; what then still runs goes on elsewhere."""

    worker: WorkerId
    within_s: float


class Left(Message, frozen=True):
    """A worker's last word: it holds nothing for anybody, and is gone on purpose."""

    worker: WorkerId
    incarnation: Incarnation
