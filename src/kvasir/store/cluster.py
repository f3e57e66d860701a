"""Blocks in a store that all workers of a cluster share, found by name.

A name is the block's key behind a digest of model, layout and format, so a worker of another model
finds nothing. A value is a label (what it is, key, checksum) and the block's bytes. The store may
lose, evict or change what it likes: what is not whole is missing.

A client may hang where it should not (a store that was stopped, a network that swallows), so its
calls are made on a thread of its own, and one that takes too long is given up with the client.
Knows names and bytes; must not know how a store is spoken to.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np

from kvasir.core.ids import BlockKey
from kvasir.core.keys import KEY_BYTES
from kvasir.store.base import Found, StoreError, checksum

if TYPE_CHECKING:
    from kvasir.store.base import Rows

T = TypeVar("T")
MAGIC: Final = b"kvasir-1"
LABEL: Final = struct.Struct(f"<8s{KEY_BYTES}sQ")
SPACE_BYTES: Final = 12
OPEN_S: Final = 15.0  # a client may take so long to begin: memory that it lends is made ready,
CLOSE_S: Final = 1.0  # and so long to end


class Client(Protocol):
    """A connection to a store of named values. Raises StoreError when the store is of no use; what
    is not there is no error. `close` is called on the thread of the other calls."""

    def put(self, names: Sequence[str], values: Sequence[bytes]) -> None: ...

    def get(self, names: Sequence[str]) -> Sequence[bytes | memoryview | None]:
        """Values in the order of their names; valid until the next call."""

    def held(self, names: Sequence[str]) -> Sequence[bool]: ...

    def close(self) -> None: ...


Connect = Callable[[], Client]


class ClusterShelves:
    """`store.base.Shelves` in a shared store. It has no slots: those that are given say nothing.

    `fingerprint` names model and layout. Raises StoreError when the store does not answer within
    `timeout_s`.
    """

    def __init__(
        self, connect: Connect, block_bytes: int, fingerprint: str, timeout_s: float
    ) -> None:
        text = f"{MAGIC.decode()}/{fingerprint}/{block_bytes}"
        self._space = blake2b(text.encode(), digest_size=SPACE_BYTES).hexdigest()
        self._block_bytes = block_bytes
        self._calls = Calls(timeout_s)
        try:
            self._client = self._calls.do(connect, OPEN_S)
        except BaseException:
            self._calls.close(None)
            raise

    def name(self, key: BlockKey) -> str:
        return f"kv:{self._space}:{key.hex()}"

    def write(self, slots: Sequence[int], keys: Sequence[BlockKey], rows: Rows) -> None:
        names = [self.name(key) for key in keys]
        values = [
            LABEL.pack(MAGIC, key, checksum(row, key)) + row.tobytes()
            for key, row in zip(keys, rows, strict=True)
        ]
        self._calls.do(lambda: self._client.put(names, values))

    def read(self, slots: Sequence[int], keys: Sequence[BlockKey], rows: Rows) -> int:
        names = [self.name(key) for key in keys]
        values = self._calls.do(lambda: self._client.get(names))
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            if value is None or len(value) != LABEL.size + self._block_bytes:
                return i
            rows[i] = np.frombuffer(value, dtype=np.uint8, offset=LABEL.size)
            if bytes(value[: LABEL.size]) != LABEL.pack(MAGIC, key, checksum(rows[i], key)):
                return i
        return len(keys)

    def held(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, it has. Raises StoreError."""
        names = [self.name(key) for key in keys]
        there = list(self._calls.do(lambda: self._client.held(names)))
        return there.index(False) if False in there else len(there)

    def found(self) -> Iterator[Found]:
        return iter(())

    def close(self) -> None:
        self._calls.close(self._client.close)


class Calls:
    """One call after another on a thread that is left behind when one does not return in time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._asked: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._lost = False
        self._thread = threading.Thread(target=self._run, name="store-client", daemon=True)
        self._thread.start()

    def do(self, call: Callable[[], T], at_least_s: float = 0.0) -> T:
        """What it returns or raises. Raises StoreError when that takes too long, and ever after."""
        if self._lost:
            raise StoreError("the store did not answer before")
        self._asked.put(call)
        try:
            wait_s = max(self._timeout_s, at_least_s)
            value, error = self._answers.get(timeout=wait_s)
        except queue.Empty:
            self._lost = True
            raise StoreError(f"the store did not answer within {wait_s:g} s") from None
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def close(self, last: Callable[[], None] | None) -> None:
        if last is not None:
            self._asked.put(last)
        self._asked.put(None)
        self._thread.join(timeout=CLOSE_S)

    def _run(self) -> None:
        while (call := self._asked.get()) is not None:
            try:
                self._answers.put((call(), None))
            except BaseException as error:
                self._answers.put((None, error))
