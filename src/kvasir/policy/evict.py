"""Which cached block goes first when a worker needs room. Knows the order of release, no bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvasir.core.ids import BlockId
from kvasir.kv.pool import EvictView


def lru(view: EvictView) -> BlockId:
    """The block released longest ago. Chains release tail first, so tails go before heads."""
    return next(view.in_order())


EVICTS: Final[dict[str, Callable[[EvictView], BlockId]]] = {"lru": lru}
