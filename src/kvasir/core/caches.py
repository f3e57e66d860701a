"""Prefixes that are kept for a time: what a gateway wishes, a conductor orders, a worker tells.

    gateway   --Submit(marks), Retain--> conductor --Dispatch(pins), Keep--> worker
    gateway  <--CacheState-------------- conductor <--Kept, Load(pins)------ worker

A cache is a name for the leading full blocks of a prompt. Knows names and counts, no tokens.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvasir.core.ids import CacheId, Epoch, Incarnation, NodeId, TenantId, WorkerId
from kvasir.core.message import Message

# new: no worker has it yet; lost: the one that had it is gone, and the next use makes it again;
# refused and ended: there is no such cache (any more)
State = Literal["new", "ready", "lost", "refused", "ended"]


class Mark(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A wish: keep the first `blocks` blocks of this prompt for `ttl_s` from now, as `cache`; one
    that exists is kept for that long again. `must`: the request is for the cache's sake, so it is
    declined where the cache is."""

    cache: CacheId
    blocks: int
    ttl_s: float
    must: bool = False


class Pin(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """An order to the worker that prefills: keep the first `blocks` blocks for `ttl_s`."""

    cache: CacheId
    blocks: int
    ttl_s: float


class Retain(Message, frozen=True):
    """A tenant changes how long its cache is kept, from now on; 0 ends it. Answered by a
    `CacheState`, and said again until then."""

    gateway: NodeId
    tenant: TenantId
    cache: CacheId
    ttl_s: float


class CacheState(Message, frozen=True):
    """What became of a cache; `left_s` until it ends. `status`: HTTP's, of a refusal."""

    cache: CacheId
    state: State
    left_s: float = 0.0
    status: int = 0
    reason: str = ""


class Keep(Message, frozen=True):
    """Keep a cache that you have for `ttl_s` from now; 0 lets it go."""

    epoch: Epoch
    cache: CacheId
    ttl_s: float


class Kept(Message, frozen=True):
    """`blocks` blocks of a cache are pinned here; 0: none (any more), and why."""

    worker: WorkerId
    incarnation: Incarnation
    cache: CacheId
    blocks: int
    reason: str = ""
