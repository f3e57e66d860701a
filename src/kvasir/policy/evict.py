"""Which cached blocks go first when a worker needs room. Knows the order of release, no bytes."""

from __future__ import annotations

from itertools import islice
from typing import Final

from kvasir.core.ids import BlockId
from kvasir.kv.pool import EvictView, Victims


def lru(view: EvictView, count: int) -> list[BlockId]:
    """The blocks released longest ago. Chains release tail first, so tails go before heads."""
    return list(islice(view.in_order(), count))


EVICTS: Final[dict[str, Victims]] = {"lru": lru}
