"""The adapters that a runner holds: read when first asked for, kept while attempts use them.

Knows attempts, names and a limit; must not know what an adapter is, nor torch. At most `most` are
held; one that no attempt uses makes room, the longest unused first. Any thread may call.

    take --here--> in use --give_back by all--> idle --room is needed--> gone
      '--not here: load (slow: files are read)--'
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from kvasir.core.errors import ModelError
from kvasir.core.ids import RequestId
from kvasir.core.request import Adapter

Key = tuple[RequestId, int]  # an attempt
T = TypeVar("T")


class Adapters(Generic[T]):
    """`read` gives what a runner needs of an adapter; it raises ModelError."""

    def __init__(self, read: Callable[[Adapter], T], most: int) -> None:
        self.most = most
        self._read = read
        self._held: dict[str, T] = {}  # by digest, the longest unused first
        self._using: dict[Key, str] = {}
        self._lock = threading.Lock()  # guards the two above

    def take(self, key: Key, adapter: Adapter) -> bool:
        """For the attempt's use until `give_back`; False: it has to be loaded first."""
        with self._lock:
            return self._take(key, adapter.digest)

    def load(self, adapter: Adapter, key: Key | None = None) -> None:
        """Read it unless it is held, and take it for the attempt, if one is named.

        Raises ModelError: files that cannot be used, that are others than `adapter.digest` names,
        or no room. One thread at a time.
        """
        with self._lock:
            here = adapter.digest in self._held
            if not here:
                self._make_room()
        found = None if here else self._read(adapter)
        with self._lock:
            if found is not None:
                self._held[adapter.digest] = found
            if key is not None:
                self._take(key, adapter.digest)

    def of(self, key: Key) -> T | None:
        """What the attempt took."""
        with self._lock:
            digest = self._using.get(key)
            return self._held[digest] if digest is not None else None

    def give_back(self, key: Key) -> None:
        """The attempt is over. One that took nothing is no error."""
        with self._lock:
            digest = self._using.pop(key, None)
            if digest is not None:
                self._held[digest] = self._held.pop(digest)

    def _take(self, key: Key, digest: str) -> bool:
        if digest not in self._held:
            return False
        self._held[digest] = self._held.pop(digest)  # the most recently used is the last
        self._using[key] = digest
        return True

    def _make_room(self) -> None:
        used = set(self._using.values())
        while len(self._held) >= self.most:
            idle = next((digest for digest in self._held if digest not in used), None)
            if idle is None:
                what = f"{self.most} adapters are in use here, which is the limit"
                raise ModelError(what, next_step="try again, or raise adapters_max of the model")
            del self._held[idle]

    def check(self) -> None:
        """What is used is held, and no more than the limit."""
        with self._lock:
            assert set(self._using.values()) <= self._held.keys()
            assert len(self._held) <= self.most
