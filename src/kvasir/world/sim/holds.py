"""What simulated tiers hold: slots of a worker's own, or a store that all workers share.

Knows keys and sizes; must not know time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvasir.core.ids import BlockKey


class Found(NamedTuple):
    """What is there at the start."""

    slots: tuple[int, ...] = ()
    keys: tuple[BlockKey, ...] = ()


class Holds(Protocol):
    """`slots` and `keys` belong together, one by one."""

    def found(self) -> Found: ...
    def asked(self, keys: Sequence[BlockKey]) -> int:
        """How many of them are there, from the first on; not used by that."""

    def leading(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> int:
        """How many are read well, from the first on."""

    def blank(self, slots: Sequence[int]) -> None:
        """They are about to be written."""

    def put(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> None: ...
    def clear(self) -> None: ...


class SlotHolds:
    """A worker's own tier."""

    def __init__(self) -> None:
        self._kept: dict[int, BlockKey] = {}

    def found(self) -> Found:
        return Found(tuple(self._kept), tuple(self._kept.values()))

    def asked(self, keys: Sequence[BlockKey]) -> int:
        raise AssertionError("a worker knows what its own tiers hold")

    def leading(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> int:
        good = 0
        while good < len(keys) and self._kept.get(slots[good]) == keys[good]:
            good += 1
        return good

    def blank(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._kept.pop(slot, None)

    def put(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> None:
        self._kept.update(zip(slots, keys, strict=True))

    def clear(self) -> None:
        self._kept.clear()


class Name(NamedTuple):
    """Of a block in a store: KV of another model or size has other names."""

    model: str
    bytes: int
    key: BlockKey


class SharedStore:
    """At most `bytes_max`; the longest not put or read go first."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max, self._bytes = bytes_max, 0
        self._held: OrderedDict[Name, None] = OrderedDict()

    def leading(self, names: Sequence[Name]) -> int:
        good = 0
        while good < len(names) and names[good] in self._held:
            good += 1
        return good

    def use(self, names: Sequence[Name]) -> None:
        for name in names:
            self._bytes += 0 if name in self._held else name.bytes
            self._held[name] = None
            self._held.move_to_end(name)
        while self._bytes > self._bytes_max:
            name, _ = self._held.popitem(last=False)
            self._bytes -= name.bytes

    def clear(self) -> None:
        self._held.clear()
        self._bytes = 0


class SharedHolds:
    """One model's blocks in a store, which has no slots and tells nobody what it holds."""

    def __init__(self, store: SharedStore, model: str, block_bytes: int) -> None:
        self._store, self._model, self._block_bytes = store, model, block_bytes

    def found(self) -> Found:
        return Found()

    def asked(self, keys: Sequence[BlockKey]) -> int:
        return self._store.leading(self._names(keys))

    def leading(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> int:
        names = self._names(keys)
        good = self._store.leading(names)
        self._store.use(names[:good])
        return good

    def blank(self, slots: Sequence[int]) -> None: ...

    def put(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> None:
        self._store.use(self._names(keys))

    def clear(self) -> None:
        self._store.clear()

    def _names(self, keys: Sequence[BlockKey]) -> list[Name]:
        return [Name(self._model, self._block_bytes, key) for key in keys]
