"""A shared store, by the client that is served with: whole blocks come back, nothing else does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from kvasir.core.effects import NOWHERE
from kvasir.core.keys import trace_key
from kvasir.store.base import StoreError
from kvasir.store.cluster import ClusterShelves
from kvasir.store.redis import RedisStore
from tests.stores import FakeRedis

BYTES = 5000
COUNT = 3
KEYS = [trace_key(i) for i in range(COUNT)]
SLOTS = [NOWHERE] * COUNT
ROWS = np.random.default_rng(1).integers(0, 256, (COUNT, BYTES), np.uint8)


@pytest.fixture
def server() -> Iterator[FakeRedis]:
    server = FakeRedis()
    yield server
    server.stop()


def shelves(server: FakeRedis, fingerprint: str = "m", timeout_s: float = 0.3) -> ClusterShelves:
    connect = partial(RedisStore, server.url, 10.0)
    return ClusterShelves(connect, BYTES, fingerprint, timeout_s)


def read(s: ClusterShelves, keys: list[bytes]) -> np.ndarray:
    rows = np.zeros((len(keys), BYTES), np.uint8)
    good = s.read([NOWHERE] * len(keys), keys, rows)
    return rows[:good]


def test_what_one_stores_another_finds(server: FakeRedis) -> None:
    a, b = shelves(server), shelves(server)
    a.write(SLOTS, KEYS, ROWS)
    assert b.held(KEYS) == COUNT
    assert (read(b, KEYS) == ROWS).all() and len(read(b, KEYS)) == COUNT
    assert b.held([trace_key(9), *KEYS]) == 0
    assert b.held([KEYS[0], trace_key(9), KEYS[1]]) == 1
    assert len(read(b, [KEYS[0], trace_key(9), KEYS[1]])) == 1
    assert list(b.found()) == []


def test_another_model_or_layout_finds_nothing(server: FakeRedis) -> None:
    shelves(server).write(SLOTS, KEYS, ROWS)
    assert shelves(server, "other").held(KEYS) == 0
    connect = partial(RedisStore, server.url, 1.0)
    assert ClusterShelves(connect, BYTES + 1, "m", 1.0).held(KEYS) == 0


def test_every_byte_counts(server: FakeRedis) -> None:
    """Each byte of a value, its label too, changed in the store: that block is missing."""
    s = ClusterShelves(partial(RedisStore, server.url, 1.0), 300, "m", 1.0)
    s.write(SLOTS[:1], KEYS[:1], ROWS[:1, :300])
    name = s.name(KEYS[0]).encode()
    whole, rng = server.values[name], np.random.default_rng(0)
    row = np.zeros((1, 300), np.uint8)
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        server.values[name] = bytes(changed)
        assert s.read(SLOTS[:1], KEYS[:1], row) == 0, at
    server.values[name] = whole
    assert s.read(SLOTS[:1], KEYS[:1], row) == 1 and (row == ROWS[:1, :300]).all()


@pytest.mark.parametrize("mode", ["lies", "swaps", "cuts", "forgets"])
def test_what_is_not_whole_is_missing(server: FakeRedis, mode: str) -> None:
    s = shelves(server)
    s.write(SLOTS, KEYS, ROWS)
    server.mode = mode
    assert len(read(s, KEYS)) == 0
    server.mode = "ok"
    assert len(read(s, KEYS)) == COUNT


@pytest.mark.parametrize(
    ("mode", "said"), [("hangs", "did not answer within"), ("resets", "redis"), ("raves", "redis")]
)
@pytest.mark.parametrize("call", ["write", "read", "held"])
def test_a_store_that_cannot_be_talked_to_is_an_error(
    server: FakeRedis, mode: str, said: str, call: str
) -> None:
    s = shelves(server)
    s.write(SLOTS, KEYS, ROWS)
    server.mode = mode
    with pytest.raises(StoreError, match=said):
        {"write": lambda: s.write(SLOTS, KEYS, ROWS), "read": lambda: read(s, KEYS),
         "held": lambda: s.held(KEYS)}[call]()  # fmt: skip


def test_a_full_store_says_so_and_is_read(server: FakeRedis) -> None:
    s = shelves(server)
    s.write(SLOTS, KEYS, ROWS)
    server.mode = "full"
    with pytest.raises(StoreError, match="maxmemory"):
        s.write(SLOTS, KEYS, ROWS)
    assert len(read(s, KEYS)) == COUNT


def test_nobody_there(server: FakeRedis) -> None:
    server.stop()
    with pytest.raises(StoreError):
        shelves(server)


def test_a_call_that_hung_never_answers_a_later_one(server: FakeRedis) -> None:
    """What comes late belongs to nobody: the client is given up."""
    gate, asked = threading.Event(), threading.Event()

    class Slow(RedisStore):
        def get(self, names):  # type: ignore[no-untyped-def]
            asked.set()
            gate.wait(10)
            return super().get(names)

    s = ClusterShelves(lambda: Slow(server.url, 1.0), BYTES, "m", 0.1)
    s.write(SLOTS, KEYS, ROWS)
    with pytest.raises(StoreError, match="did not answer"):
        read(s, KEYS)
    assert asked.is_set()
    gate.set()
    for _ in range(2):
        with pytest.raises(StoreError, match="before"):
            s.held(KEYS)
    s.close()
