"""The contract of a tier's memory, and the checksum that every block in it carries.

What was not written whole, or is not what a key names, is missing: `read` says so and never gives
it. A tier that cannot go on raises StoreError, once and for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import xxhash

from kvasir.core.errors import KvasirError
from kvasir.core.ids import BlockKey

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.uint8]


class StoreError(KvasirError):
    """A tier is of no use any more; what it holds is computed again."""

    status = 503
    kind = "store_error"


class Found(NamedTuple):
    """A block of an earlier life."""

    slot: int
    key: BlockKey


class Shelves(Protocol):
    """Slots of one size. One thread owns it."""

    def write(self, slots: Sequence[int], keys: Sequence[BlockKey], rows: Rows) -> None:
        """`rows`: uint8 [len(slots), block bytes], C-contiguous. Raises StoreError."""

    def read(self, slots: Sequence[int], keys: Sequence[BlockKey], rows: Rows) -> int:
        """Fill `rows` from slots that hold what `keys` name, with the bytes that were written.
        Returns how many leading ones did. Raises StoreError."""

    def found(self) -> Iterator[Found]:
        """What slots are said to hold at the start; `read` finds out whether they do."""

    def close(self) -> None: ...


def checksum(row: Rows, key: BlockKey) -> int:
    """xxh3_64 of one block's bytes and its key: of the right bytes under the wrong name, too."""
    state = xxhash.xxh3_64(key)
    state.update(row.data)
    return int(state.intdigest())
