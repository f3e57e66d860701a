"""What may be kept, and what gives way: limits of a tenant and of a worker's pool.

Knows counts and ends; nothing of prefixes, workers or requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvasir.core.ids import CacheId
from kvasir.policy.admit import ADMITTED, Verdict


class Asked(NamedTuple):
    """A tenant wants one more cache, of `blocks_new` blocks that none of its others has."""

    caches: int
    caches_max: int
    blocks: int
    blocks_new: int
    blocks_max: int


def may_keep(asked: Asked) -> Verdict:
    """By the tenant's own limits alone, so that it learns nothing of others by asking."""
    if asked.caches >= asked.caches_max:
        return Verdict(429, f"{asked.caches} caches are kept already, which is the limit")
    if asked.blocks + asked.blocks_new > asked.blocks_max:
        return Verdict(
            429,
            f"it needs {asked.blocks_new} KV blocks more, and {asked.blocks} of at most "
            f"{asked.blocks_max} are kept already",
        )
    return ADMITTED


def has_room(pinned: int, more: int, blocks_total: int, share_max: float) -> bool:
    """Whether a worker may keep `more` blocks besides the `pinned` ones: the others serve."""
    return pinned + more <= int(blocks_total * share_max)


def gives_way(ends: Iterable[tuple[float, CacheId]]) -> CacheId:
    """Of the caches in the way of an attempt that could else never run here: the one that would be
    over first."""
    return min(ends)[1]
