"""The wire format of a transfer and the copying under it: what is refused, what comes back."""

import itertools
import mmap
import random
import socket
import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError, TransferError, WireError
from kvasir.core.messages import PrefillReport
from kvasir.transfer import Shard, Trailer
from kvasir.transfer.arena import Arena, map_sealed
from kvasir.transfer.base import Key
from kvasir.transfer.frames import (
    FRAME_BYTES_LIMIT,
    GRANT_BYTES_MAX,
    HEADER_BYTES,
    HELLO_BYTES_MAX,
    IDS_BYTES_MAX,
    REASON_BYTES_MAX,
    TRAILER_BYTES_MAX,
    FrameKind,
    Header,
    checksum,
    checksum_of,
    decode,
    encode,
    message,
    pack,
    reason_payload,
    unpack,
)
from kvasir.transfer.memory import Limits, Memory, Run, runs, whole_run
from kvasir.transfer.pace import Pace
from kvasir.transfer.stream import FrameReader

DATA = Header(
    FrameKind.DATA, "req-7", 3, 9, 31, 1, Shard(2, 8, 16), 40, 5, 5 * 4096, 2**64 - 3
)

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
headers = st.builds(
    Header,
    kind=st.just(FrameKind.DATA),
    request_id=st.text(max_size=32),
    attempt=u32,
    serial=st.integers(0, 2**64 - 1),
    plane=u16,
    planes=u16,
    shard=st.builds(Shard, u16, u16, u16),
    first_block=u32,
    blocks=u32,
    payload_bytes=st.integers(0, FRAME_BYTES_LIMIT),
    checksum=st.integers(0, 2**64 - 1),
)

BIG = (FrameKind.DATA, FrameKind.CODED)


@given(headers)
def test_a_header_comes_back_equal(header: Header) -> None:
    packed = pack(header)
    assert len(packed) == HEADER_BYTES
    assert unpack(packed) == header


@pytest.mark.parametrize("at", range(HEADER_BYTES))
def test_any_flipped_bit_in_a_header_is_refused(at: int) -> None:
    packed = bytearray(pack(DATA))
    packed[at] ^= 1 << (at % 8)
    with pytest.raises(WireError):
        unpack(packed)


def resealed(packed: bytes, at: int, value: bytes) -> bytes:
    """A header with other bytes and a right checksum: a hostile peer, not a damaged wire."""
    body = packed[:at] + value + packed[at + len(value) : -4]
    return body + struct.pack("<I", xxhash.xxh32_intdigest(body))


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"HTTP", "not a frame"),
        (4, b"\x01", "version 1"),
        (5, b"\x63", "unknown frame kind 99"),
        (6, b"\xff\xff", "65535 bytes"),
        (38, struct.pack("<I", FRAME_BYTES_LIMIT + 1), "DATA frame of"),
        (50, b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_hostile_header_is_refused(at: int, value: bytes, said: str) -> None:
    with pytest.raises(WireError, match=said):
        unpack(resealed(pack(DATA), at, value))


def test_a_short_header_is_refused() -> None:
    with pytest.raises(WireError):
        unpack(pack(DATA)[:-1])


@pytest.mark.parametrize("kind", [k for k in FrameKind if k not in BIG])
def test_only_data_may_be_big(kind: FrameKind) -> None:
    most = max(TRAILER_BYTES_MAX, HELLO_BYTES_MAX, IDS_BYTES_MAX, GRANT_BYTES_MAX)
    with pytest.raises(WireError, match="frame of"):
        unpack(pack(Header(kind, payload_bytes=most + 1)))


def test_what_does_not_fit_cannot_be_packed() -> None:
    with pytest.raises(WireError, match="request id of 129 bytes"):
        pack(Header(FrameKind.BEGIN, "x" * 129))
    with pytest.raises(WireError, match="does not fit"):
        pack(Header(FrameKind.BEGIN, attempt=-1))
    with pytest.raises(WireError, match="TRAILER of"):
        message(FrameKind.TRAILER, Key("a", 1), 1, bytes(TRAILER_BYTES_MAX + 1))


def test_a_trailer_comes_back_equal_and_junk_is_refused() -> None:
    report = PrefillReport("prefill-0", 0.1, 0.2, 16, 100)
    trailer = Trailer((11, 12), report, 7, 2, 4096)
    assert decode(encode(trailer), Trailer) == trailer
    for junk in (b"", b"\xff" * 9, encode(report)[:-1], encode(Trailer())[:-1]):
        with pytest.raises(WireError, match="Trailer"):
            decode(junk, Trailer)


def test_reasons_are_cut_to_their_limit() -> None:
    assert len(reason_payload("ä" * REASON_BYTES_MAX)) == REASON_BYTES_MAX


@given(st.lists(st.binary(max_size=64)))
def test_a_checksum_does_not_depend_on_the_cut(parts: list[bytes]) -> None:
    assert checksum_of(parts) == checksum(b"".join(parts))


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(1, 300))
def test_a_stream_may_be_cut_anywhere(reasons: list[bytes], step: int) -> None:
    stream = b"".join(message(FrameKind.NACK, Key(f"r{i}", i), i, r) for i, r in enumerate(reasons))
    left = bytearray(stream)
    seen: list[tuple[int, bytes]] = []
    payload = bytearray()

    def recv_into(buffer: memoryview) -> int:
        if not left:
            raise BlockingIOError
        count = min(step, len(buffer), len(left))
        buffer[:count] = left[:count]
        del left[:count]
        return count

    def place(header: Header) -> memoryview | None:
        nonlocal payload
        payload = bytearray(header.payload_bytes)
        return memoryview(payload) if header.serial % 2 else None  # every other one is drained

    def arrived(header: Header) -> None:
        seen.append((header.serial, bytes(payload)))

    reader = FrameReader(recv_into, place, arrived)
    while left:  # as a selector calls it, for as long as there is something to read
        reader.turn(1 << 20)
    drained = [r if i % 2 else bytes(len(r)) for i, r in enumerate(reasons)]
    assert seen == list(enumerate(drained))


def test_the_end_of_a_stream_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        reader = FrameReader(ours.recv_into, lambda _: None, lambda _: None)
        with pytest.raises(ConnectionError):
            reader.turn(1)


# --- memory ----------------------------------------------------------------------------------


Planes = list[list[np.ndarray]]


def planes_of(blocks: int) -> Planes:
    rng = np.random.default_rng(5)
    return [
        [rng.integers(0, 255, (blocks, size), dtype=np.uint8) for size in sizes]
        for sizes in ((16, 24), (32,))  # planes may differ from layer to layer
    ]


limits = st.builds(Limits, *[st.integers(1, 3000)] * 3)
some_ids = st.lists(st.integers(0, 19), unique=True, min_size=1)


@given(some_ids, limits)
def test_pieces_cover_each_block_once_and_copy_it(ids: list[int], limits: Limits) -> None:
    source, target = planes_of(20), [[np.zeros_like(p) for p in layer] for layer in planes_of(20)]
    memory, other = Memory(source), Memory(target)
    for piece in memory.pieces(3, memory.ids(ids), range(2), limits):
        size = memory.size(piece.plane, piece.planes, len(piece.ids))
        assert size <= max(limits.frame, limits.first, memory.block_bytes(piece.plane))
        assert piece.planes == 1 or size <= limits.group
        assert list(piece.ids) == ids[piece.first_block - 3 :][: len(piece.ids)]
        data = np.empty(size, np.uint8)
        memory.gather(piece, data)
        assert memory.checksum(piece) == checksum(data.data) == checksum_of(memory.spans(piece))
        other.scatter(piece, data)
    assert_copied(source, target, ids, ids)


@given(some_ids, limits, st.randoms(use_true_random=False))
def test_a_copy_from_other_memory_is_what_its_checksum_says(
    ids: list[int], limits: Limits, dice: random.Random
) -> None:
    source, target = planes_of(20), [[np.zeros_like(p) for p in layer] for layer in planes_of(20)]
    memory, other = Memory(source), Memory(target)
    there = dice.sample(range(20), len(ids)) if dice.random() < 0.5 else ids
    for piece in memory.pieces(0, memory.ids(ids), range(2), limits):
        at = there[piece.first_block : piece.first_block + len(piece.ids)]
        landed = piece._replace(ids=other.ids(at))
        assert other.copy_from(memory, piece.ids, landed) == memory.checksum(piece)
        assert other.checksum(landed) == memory.checksum(piece)
    assert_copied(source, target, ids, there)


def assert_copied(source: Planes, target: Planes, ids: list[int], there: list[int]) -> None:
    for layer, copied in zip(source, target, strict=True):
        for plane, copy in zip(layer, copied, strict=True):
            assert (plane[ids] == copy[there]).all()
            assert not np.delete(copy, there, axis=0).any()


def test_an_arena_hands_out_zeroed_memory_and_says_where_it_stands() -> None:
    arena = Arena(3 * mmap.PAGESIZE)
    first, second = arena.take(10), arena.take(mmap.PAGESIZE)
    assert not first.any() and not second.any()
    assert (arena.offset_of(first), arena.offset_of(second[5:])) == (0, mmap.PAGESIZE + 5)
    assert arena.offset_of(np.zeros(4, np.uint8)) is None
    second[:] = 7
    seen = map_sealed(arena.fd, arena.size)
    assert not seen[:10].any() and (seen[mmap.PAGESIZE :][: mmap.PAGESIZE] == 7).all()
    assert not seen.flags.writeable
    with pytest.raises(TransferError, match="that are left"):
        arena.take(mmap.PAGESIZE + 1)
    arena.close()


def test_planes_have_names() -> None:
    memory = Memory(planes_of(2))
    places = [memory.place_of(plane) for plane in range(3)]
    assert places == ["layer 0 plane 0", "layer 0 plane 1", "layer 1 plane 0"]


@given(st.lists(st.integers(0, 50)))
def test_runs_are_the_ids_again(ids: list[int]) -> None:
    array = np.asarray(ids, np.int64)
    found = runs(array)
    assert [i for run in found for i in range(run.first, run.end)] == ids
    assert all(a.end != b.first for a, b in itertools.pairwise(found))
    assert whole_run(array) == (found[0] if len(found) == 1 else None)


def test_runs_of_a_table() -> None:
    assert runs(np.array([4, 5, 6, 9, 8])) == [Run(4, 7), Run(9, 10), Run(8, 9)]


def test_memory_refuses_what_is_not_cache_memory() -> None:
    good = np.zeros((4, 8), np.uint8)
    for bad in (good.astype(np.float32), good.reshape(-1), good[:, ::2]):
        with pytest.raises(ConfigError, match="not cache memory"):
            Memory([[good, bad]])
    with pytest.raises(ConfigError, match="different numbers of blocks"):
        Memory([[good], [np.zeros((5, 8), np.uint8)]])
    with pytest.raises(AssertionError, match="no such block"):
        Memory([[good]]).ids([4])


# --- pace ------------------------------------------------------------------------------------


def test_frames_leave_at_the_cap_whatever_their_size() -> None:
    pace, now = Pace(1000.0), 0.0
    for count in (10, 1, 7, 10, 10, 5) * 50:
        now = pace.wait_until_s(now) or now
        pace.spend(now, count)
    assert now == pytest.approx(43 * 50 / 1000, abs=0.02)
    assert pace.slice_bytes() == 10


def test_time_not_used_is_not_saved_up() -> None:
    pace = Pace(1000.0)
    pace.spend(100.0, 100)
    assert pace.wait_until_s(100.0) == pytest.approx(100.09)
    pace.spend(200.0, 100)
    assert pace.wait_until_s(200.0) == pytest.approx(200.09)


def test_no_cap_no_wait() -> None:
    pace = Pace(None)
    pace.spend(0.0, 10**12)
    assert pace.wait_until_s(0.0) is None
    assert pace.slice_bytes() > 1 << 40
