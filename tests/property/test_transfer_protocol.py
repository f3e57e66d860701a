"""The transfer contract under any interleaving, both ends in this process.

Every `on_over` poisons its source blocks and every `on_received` marks its target blocks, at once
and on the thread that calls. So a byte read after `on_over` arrives as poison, and a byte written
after `on_received` destroys a mark.
"""

import contextlib
import ctypes
import itertools
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvasir.core.errors import TransferError
from kvasir.transfer import PLAIN, Key, ReceiveResult, Shard, Trailer
from kvasir.transfer.arena import Arena
from kvasir.transfer.frames import (
    HEADER_BYTES,
    FrameKind,
    Header,
    Hello,
    PlaneAt,
    checksum,
    encode,
    message,
    pack,
    unpack,
)
from kvasir.transfer.medium import Medium
from kvasir.transfer.onesided import Flight, Move, OneSidedMedium
from kvasir.transfer.receiver import StreamReceiver
from kvasir.transfer.sender import StreamSender
from kvasir.transfer.shm import ShmMedium
from kvasir.transfer.tcp import TcpMedium

LAYERS, BLOCKS, BLOCK_BYTES = 3, 64, 48
DATA_MAX, POISON, MARK, UNTOUCHED = 200, 0xEE, 0xDD, 0xCC
WAIT_S = 20.0
ARENA = Arena()
FAR_S = 60.0

Planes = list[list[np.ndarray]]
FATES = ("good", "stop", "forget", "unexpected", "overdue", "unfinished", "too_few", "too_many")


@pytest.fixture(autouse=True)
def no_defect_in_a_thread(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A transfer thread logs what it should never have raised, and goes on."""
    yield
    assert not [r for r in caplog.get_records("call") if r.message == "a transfer task failed"]


def planes_of(fill: int | None, block_bytes: int = BLOCK_BYTES) -> Planes:
    rng = np.random.default_rng(11)
    shape = (BLOCKS, block_bytes)

    def plane() -> np.ndarray:
        found = ARENA.take(BLOCKS * block_bytes).reshape(shape)
        found[:] = rng.integers(0, DATA_MAX, shape, dtype=np.uint8) if fill is None else fill
        return found

    return [[plane(), plane()] for _ in range(LAYERS)]


class LateMover:
    """A mover inside one process whose bytes move when a flight is asked for the third time."""

    kind = "nixl"

    def register(self, planes: list[np.ndarray]) -> None:
        assert all(plane.flags.c_contiguous for plane in planes)

    def card(self) -> bytes:
        return b"here"

    def meet(self, card: bytes) -> str:
        return card.decode()

    def write(self, peer: str, moves: list[Move]) -> Flight:
        asked = itertools.count(1)

        def over() -> bool:
            if next(asked) < 3:
                return False
            for move in moves:
                ctypes.memmove(move.there, move.here, move.size)
            return True

        assert peer == "here"
        return over


def media_of(kind: str, planes: Planes, folder: str = "") -> list[Medium]:
    """`inline`: shm whose planes stand in no arena."""
    if kind == "one_sided":
        return [OneSidedMedium(LateMover(), [plane for layer in planes for plane in layer])]
    if kind == "tcp":
        return [TcpMedium()]
    return [ShmMedium(folder, ARENA if kind == "shm" else None)]


def paint(planes: Planes, blocks: list[int], value: int) -> None:
    for layer in planes:
        for plane in layer:
            plane[blocks] = value


def every(planes: Planes, blocks: list[int]) -> np.ndarray:
    return np.concatenate([plane[blocks].reshape(-1) for layer in planes for plane in layer])


@dataclass
class Ends:
    """What both ends said, and a way to wait for more."""

    over: list[tuple[str, int, bool, str]] = field(default_factory=list)
    received: list[ReceiveResult] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def on_over(self, request_id: str, attempt: int, ok: bool, reason: str) -> None:
        with self.changed:
            self.over.append((request_id, attempt, ok, reason))
            self.changed.notify_all()

    def on_received(self, result: ReceiveResult) -> None:
        with self.changed:
            self.received.append(result)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S), (self.over, self.received)


@contextmanager
def pair(
    kind: str, source: Planes, target: Planes, ends: Ends, frame_bytes_max: int = 100
) -> Iterator[tuple[StreamSender, StreamReceiver]]:
    with tempfile.TemporaryDirectory() as folder:
        receiver = StreamReceiver(
            target, media_of(kind, target, folder), on_received=ends.on_received
        )
        media = media_of(kind, source)
        sender = StreamSender(source, media, on_over=ends.on_over, frame_bytes_max=frame_bytes_max)
        try:
            yield sender, receiver
        finally:
            sender.close()
            receiver.close()


# --- any interleaving ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One transfer: which blocks on either side, in which pushes, and how it is meant to end."""

    blocks_count: int
    scattered: bool
    first_block: int
    split: str
    fate: str


plans = st.lists(
    st.builds(
        Plan,
        blocks_count=st.integers(0, 8),
        scattered=st.booleans(),
        first_block=st.integers(0, 1000),
        split=st.sampled_from(["at once", "by layer", "by block"]),
        fate=st.sampled_from(FATES) | st.just("good"),
    ),
    min_size=1,
    max_size=6,
)


@dataclass
class Case:
    key: Key
    plan: Plan
    source: list[int]
    target: list[int]
    wanted: np.ndarray


def cases_of(found: list[Plan], source: Planes, dice: random.Random) -> list[Case]:
    """Disjoint blocks for each plan, in runs or scattered."""
    cases = []
    for number, plan in enumerate(found):
        blocks = list(range(number * 8, number * 8 + plan.blocks_count))
        here, there = list(blocks), list(blocks)
        if plan.scattered:
            dice.shuffle(here)
            dice.shuffle(there)
        key = Key(f"r{number}", number)
        cases.append(Case(key, plan, here, there, every(source, here)))
    return cases


def pushes(plan: Plan, source: list[int]) -> list[tuple[int, list[int], range | int]]:
    layers = range(LAYERS - 1 if plan.fate == "too_few" else LAYERS)
    if plan.split == "by layer":
        return [(plan.first_block, source, layer) for layer in layers]
    if plan.split == "by block":
        return [(plan.first_block + i, [b], layers) for i, b in enumerate(source)]
    return [(plan.first_block, source, layers)]


def steps_of(
    case: Case, sender: StreamSender, receiver: StreamReceiver, dice: random.Random
) -> list[Callable[[], None]]:
    """The calls of one transfer, in an order that the contract allows."""
    plan, key = case.plan, case.key
    far = time.monotonic() + FAR_S
    near = time.monotonic() + 0.005
    expect_by = near if plan.fate == "overdue" else far
    steps: list[Callable[[], None]] = []
    if plan.fate != "unexpected":
        layers = LAYERS - 1 if plan.fate == "too_many" else LAYERS
        first = plan.first_block
        steps.append(lambda: receiver.expect(*key, first, case.target, layers, expect_by))
    steps.append(lambda: sender.open(*key, receiver.addresses[0], far))
    for push in pushes(plan, case.source):
        steps.append(lambda push=push: sender.push(*key, *push))
    if plan.fate not in {"unfinished", "overdue"}:
        steps.append(lambda: sender.finish(*key, Trailer((1, 2))))
    if plan.fate == "stop":
        steps.insert(dice.randint(2, len(steps)), lambda: sender.stop(*key))
    if plan.fate == "forget":
        steps.insert(dice.randint(1, len(steps)), lambda: receiver.forget(*key))
    return steps


class Watched(Ends):
    """Poisons and marks; keeps what stood in the target when a transfer ended."""

    def __init__(self, source: Planes, target: Planes) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.by_key: dict[Key, Case] = {}
        self.landed: dict[Key, np.ndarray] = {}

    def on_over(self, request_id: str, attempt: int, ok: bool, reason: str) -> None:
        paint(self.source, self.by_key[Key(request_id, attempt)].source, POISON)
        super().on_over(request_id, attempt, ok, reason)

    def on_received(self, result: ReceiveResult) -> None:
        case = self.by_key[Key(result.request_id, result.attempt)]
        self.landed[case.key] = every(self.target, case.target)
        paint(self.target, case.target, MARK)
        super().on_received(result)


@pytest.mark.parametrize("kind", (*PLAIN, "inline"))
@given(found=plans, seed=st.integers(0, 2**32))
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
def test_any_interleaving(kind: str, found: list[Plan], seed: int) -> None:
    interleave(kind, found, seed)


@given(found=plans, seed=st.integers(0, 2**32))
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_any_interleaving_where_the_sender_writes(found: list[Plan], seed: int) -> None:
    """A write that is under way cannot be stopped: its blocks wait for it on both sides."""
    interleave("one_sided", found, seed)


class HeldMover(LateMover):
    """Its flights are over when `land` is set."""

    def __init__(self) -> None:
        self.away, self.land = threading.Event(), threading.Event()

    def write(self, peer: str, moves: list[Move]) -> Flight:
        self.away.set()
        return self.land.is_set


@pytest.mark.parametrize("given_up_by", ["sender", "receiver"])
def test_blocks_wait_for_a_write_that_is_under_way(given_up_by: str) -> None:
    source, target, mover = planes_of(None), planes_of(UNTOUCHED), HeldMover()
    landed: list[tuple[str, bool]] = []
    ends = Ends()

    def on_over(*what: Any) -> None:
        landed.append(("sender", mover.land.is_set()))
        ends.on_over(*what)

    def on_received(result: ReceiveResult) -> None:
        landed.append(("receiver", mover.land.is_set()))
        ends.on_received(result)

    flat = [[plane for layer in planes for plane in layer] for planes in (source, target)]
    receiver = StreamReceiver(
        target, [OneSidedMedium(LateMover(), flat[1])], on_received=on_received
    )
    sender = StreamSender(source, [OneSidedMedium(mover, flat[0])], on_over=on_over)
    receiver.expect("a", 1, 0, [1], LAYERS, time.monotonic() + FAR_S)
    sender.open("a", 1, receiver.addresses[0], time.monotonic() + FAR_S)
    sender.push("a", 1, 0, [1], 0)
    assert mover.away.wait(WAIT_S)
    if given_up_by == "sender":
        sender.stop("a", 1)
    else:
        receiver.forget("a", 1)
    for _ in range(20):  # rounds of both threads, in which nobody may end
        sender.check()
        receiver.check()
    mover.land.set()
    ends.wait(lambda: bool(ends.over and ends.received))
    sender.close()
    receiver.close()
    assert sorted(landed) == [("receiver", True), ("sender", True)]
    assert not ends.over[0][2] and not ends.received[0].ok


def interleave(kind: str, found: list[Plan], seed: int) -> None:
    dice = random.Random(seed)
    source, target = planes_of(None), planes_of(UNTOUCHED)
    cases = cases_of(found, source, dice)
    ends = Watched(source, target)
    ends.by_key = {case.key: case for case in cases}
    with pair(kind, source, target, ends) as (sender, receiver):
        queues = [steps_of(case, sender, receiver, dice) for case in cases]
        if kind == "tcp":  # where a connection may break while both ends live
            queues.append([partial(break_connections, sender)] * dice.randint(0, 3))
        while any(queues):
            dice.choice([queue for queue in queues if queue]).pop(0)()
        ends.wait(lambda: settled(ends, cases))
        sender.check()
        receiver.check()
    assert sender._queue_bytes == 0, "something still weighs in the queue"
    judge(ends, cases, target)


def break_connections(sender: StreamSender) -> None:
    for link in list(sender._links.values()):
        with contextlib.suppress(OSError):  # not connected yet, or closed by its thread
            link.sock.shutdown(socket.SHUT_RDWR)


def ends_alone(case: Case) -> bool:
    """Whether the sender ends without `close`: a receiver that gave up shows by data only."""
    return case.plan.fate != "unfinished" and (case.plan.fate != "overdue" or bool(case.source))


def settled(ends: Ends, cases: list[Case]) -> bool:
    over = {Key(request_id, attempt) for request_id, attempt, _, _ in ends.over}
    return all(case.key in over for case in cases if ends_alone(case))


def judge(ends: Watched, cases: list[Case], target: Planes) -> None:
    over = {Key(r, a): (ok, reason) for r, a, ok, reason in ends.over}
    received = {Key(r.request_id, r.attempt): r for r in ends.received}
    assert Counter(Key(r, a) for r, a, _, _ in ends.over) == Counter(c.key for c in cases)
    expected = [c for c in cases if c.plan.fate != "unexpected"]
    assert Counter(received.keys()) == Counter(c.key for c in expected)
    assert len(ends.received) == len(expected)
    for case in cases:
        ok, reason = over[case.key]
        if case in expected:
            if reason != "closed":  # a peer that maps the source may read it a little longer
                assert not (ends.landed[case.key] == POISON).any(), "read after on_over"
                assert "checksum" not in received[case.key].reason
            judge_received(case, received[case.key], ends.landed[case.key])
            assert received[case.key].ok or not ok
            assert (every(target, case.target) == MARK).all(), "written after on_received"
        else:
            assert not ok and reason == "nobody expects it here"
            assert (every(target, case.target) == UNTOUCHED).all(), "written without expect"
        if case.plan.fate == "good":
            assert ok, reason


def judge_received(case: Case, result: ReceiveResult, landed: np.ndarray) -> None:
    if result.ok:
        assert (landed == case.wanted).all()
        assert result.bytes == case.wanted.size
        assert result.trailer == Trailer(
            (1, 2),
            None,
            len(case.source),
            LAYERS if case.source else 0,
            case.wanted.size,
        )
    complete = case.plan.fate in {"good", "stop", "forget"} or (
        not case.source and case.plan.fate in {"too_few", "too_many"}
    )
    assert complete or not result.ok


# --- one frame, half way ---------------------------------------------------------------------


def read_all(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += sock.recv(count - len(data)) or b"\0" * count
    return bytes(data)


@pytest.mark.parametrize("overdue", [False, True])
def test_a_stop_in_mid_frame_keeps_the_stream_whole_and_reads_no_more(overdue: bool) -> None:
    """The peer reads nothing until on_over came and the source is poisoned."""
    source, ends = planes_of(None, block_bytes=1 << 17), Ends()
    before = every(source, list(range(BLOCKS)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sender = StreamSender(
            source, [TcpMedium()], on_over=ends.on_over, frame_bytes_max=BLOCKS << 17
        )
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        sender.open("a", 1, address, time.monotonic() + (0.2 if overdue else FAR_S))
        peer, _ = server.accept()
        with peer:
            sender.push("a", 1, 0, range(BLOCKS), range(LAYERS))
            peer.recv(1, socket.MSG_PEEK)
            while sender.timeline("a", 1).first_frame_s is None:
                sender.check()  # waits for a round of the thread
            if not overdue:
                sender.stop("a", 1)
            ends.wait(lambda: len(ends.over) == 1)
            paint(source, list(range(BLOCKS)), POISON)
            sender.push("a", 1, 0, range(BLOCKS), range(LAYERS))
            sender.finish("a", 1, Trailer())
            kinds = [(header.kind, payload) for header, payload in frames_from(peer)]
        sender.close()
    assert ends.over == [("a", 1, False, "deadline" if overdue else "stopped")]
    assert [kind for kind, _ in kinds] == [FrameKind.BEGIN, FrameKind.DATA, FrameKind.ABORT]
    whole = np.frombuffer(kinds[1][1], np.uint8)
    assert (whole == before[: whole.size]).all()


def frames_from(peer: socket.socket) -> Iterator[tuple[Header, bytes]]:
    """Frames up to the first abort, checksums verified."""
    kind = FrameKind.BEGIN
    while kind is not FrameKind.ABORT:
        header = unpack(read_all(peer, HEADER_BYTES))
        payload = read_all(peer, header.payload_bytes)
        assert checksum(payload) == header.checksum or header.kind is FrameKind.BEGIN
        kind = header.kind
        yield header, payload


@pytest.mark.parametrize("scattered", [False, True])
def test_a_forget_in_mid_frame_writes_no_more(scattered: bool) -> None:
    target, ends = planes_of(UNTOUCHED), Ends()
    blocks = [9, 3, 5, 4] if scattered else [3, 4, 5, 6]
    receiver = StreamReceiver(target, [TcpMedium()], on_received=ends.on_received)
    receiver.expect("a", 1, 0, blocks, LAYERS, time.monotonic() + FAR_S)
    receiver.expect("b", 1, 0, [], LAYERS, time.monotonic() + FAR_S)
    port = int(receiver.addresses[0].rpartition(":")[2])
    payload = bytes(4 * BLOCK_BYTES)
    header = Header(
        FrameKind.DATA, "a", 1, 1, 0, 1,
        blocks=4, payload_bytes=len(payload), checksum=checksum(payload),
    )  # fmt: skip
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(pack(header) + payload[:60])
        if not scattered:
            while target[0][0][4][0] == UNTOUCHED:
                receiver.check()
        receiver.forget("a", 1)
        ends.wait(lambda: len(ends.received) == 1)
        paint(target, blocks, MARK)
        peer.sendall(payload[60:])
        trailer = encode(Trailer())
        peer.sendall(message(FrameKind.BEGIN, Key("b", 1), 2))
        peer.sendall(message(FrameKind.TRAILER, Key("b", 1), 2, trailer))
        ends.wait(lambda: len(ends.received) == 2)
    receiver.close()
    assert [(r.request_id, r.ok, r.reason) for r in ends.received] == [
        ("a", False, "released"), ("b", True, "")
    ]  # fmt: skip
    assert (every(target, blocks) == MARK).all()


@pytest.mark.parametrize("kind", PLAIN)
def test_data_for_nobody_is_refused_at_once(kind: str) -> None:
    source, target, ends = planes_of(None), planes_of(UNTOUCHED), Ends()
    with pair(kind, source, target, ends) as (sender, receiver):
        sender.open("a", 1, receiver.addresses[0], time.monotonic() + FAR_S)
        sender.push("a", 1, 0, [1], 0)
        ends.wait(lambda: bool(ends.over))
    assert ends.over == [("a", 1, False, "nobody expects it here")]


@pytest.mark.parametrize("claimed", [Trailer((), None, 2, LAYERS, 2 * BLOCK_BYTES), Trailer()])
def test_a_trailer_that_lies_is_not_believed(claimed: Trailer) -> None:
    """One plane of six came, and the trailer says that this was all."""
    target, ends = planes_of(UNTOUCHED), Ends()
    receiver = StreamReceiver(target, [TcpMedium()], on_received=ends.on_received)
    receiver.expect("a", 1, 0, [3, 4], LAYERS, time.monotonic() + FAR_S)
    payload = bytes(2 * BLOCK_BYTES)
    header = Header(
        FrameKind.DATA, "a", 1, 1, 0, 1,
        blocks=2, payload_bytes=len(payload), checksum=checksum(payload),
    )  # fmt: skip
    port = int(receiver.addresses[0].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(pack(header) + payload)
        peer.sendall(message(FrameKind.TRAILER, Key("a", 1), 1, encode(claimed)))
        ends.wait(lambda: bool(ends.received))
    receiver.close()
    assert [(r.ok, r.reason) for r in ends.received] == [(False, "10 blocks of a plane never came")]


@pytest.mark.parametrize("sums", [(), (("a", 2),), (("b", 1),)], ids=["none", "late", "other's"])
def test_placed_blocks_without_their_sum_never_came(
    sums: tuple[tuple[str, int], ...]
) -> None:
    """A sum is of the frame right before it, by name; another frame in between leaves none."""
    arena, target, ends = Arena(1 << 20), planes_of(UNTOUCHED), Ends()
    folder = tempfile.TemporaryDirectory(prefix="kv-")
    receiver = StreamReceiver(target, [ShmMedium(folder.name)], on_received=ends.on_received)
    receiver.expect("a", 1, 0, [3], LAYERS, time.monotonic() + FAR_S)
    places = tuple(PlaneAt(0, BLOCKS, BLOCK_BYTES) for _ in range(2 * LAYERS))
    hello = message(FrameKind.HELLO, Key("", 0), 0, encode(Hello(arena.size, places)))
    ids = np.array([5], "<u4").tobytes()
    placed = [
        pack(Header(FrameKind.PLACED, "a", 1, 1, plane, 1, blocks=1, payload_bytes=4)) + ids
        for plane in range(2)
    ]
    right = checksum(bytes(BLOCK_BYTES))
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(receiver.addresses[0].removeprefix("shm://"))
        socket.send_fds(peer, [hello], [arena.fd])
        peer.sendall(b"".join(placed))
        for name, serial in sums:
            peer.sendall(pack(Header(FrameKind.SUM, name, 1, serial, checksum=right)))
        peer.sendall(message(FrameKind.TRAILER, Key("a", 1), 1, encode(Trailer())))
        ends.wait(lambda: bool(ends.received))
    receiver.close()
    arena.close()
    folder.cleanup()
    (received,) = ends.received
    assert not received.ok and received.bytes == 0
    assert ("another transfer" if sums else f"{2 * LAYERS} blocks") in received.reason


# --- ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_close_ends_everything_once_and_nothing_starts_after(kind: str) -> None:
    source, target, ends = planes_of(None), planes_of(UNTOUCHED), Ends()
    with pair(kind, source, target, ends) as (sender, receiver):
        receiver.expect("a", 1, 0, [1], LAYERS, time.monotonic() + FAR_S)
        sender.open("b", 1, receiver.addresses[0], time.monotonic() + FAR_S)
        sender.close()
        receiver.close()
        assert ends.over == [("b", 1, False, "closed")]
        assert [(r.request_id, r.reason) for r in ends.received] == [("a", "closed")]
        with pytest.raises(TransferError, match="closed"):
            sender.open("c", 1, receiver.addresses[0], 0.0)
        with pytest.raises(TransferError, match="closed"):
            receiver.expect("c", 1, 0, [1], LAYERS, 0.0)
        sender.push("c", 1, 0, [1], 0)
        sender.finish("c", 1, Trailer())
        sender.stop("c", 1)
        receiver.forget("c", 1)
    assert len(ends.over) == len(ends.received) == 1


@pytest.mark.parametrize("kind", PLAIN)
def test_a_full_queue_fails_the_transfer_and_never_waits(kind: str) -> None:
    source, target, ends = planes_of(None), planes_of(UNTOUCHED), Ends()
    with tempfile.TemporaryDirectory() as folder:
        media = media_of(kind, source, folder)
        receiver = StreamReceiver(target, media, on_received=ends.on_received)
        sender = StreamSender(
            source, media, on_over=ends.on_over, queue_bytes_max=4096, bytes_per_s_max=1.0
        )
        deadline = time.monotonic() + FAR_S
        receiver.expect("a", 1, 0, list(range(BLOCKS)), LAYERS, deadline)
        sender.open("a", 1, receiver.addresses[0], deadline)
        for at in range(100):
            sender.push("a", 1, at, [0], range(LAYERS))
        ends.wait(lambda: len(ends.over) == 1)
        sender.check()
        sender.close()
        receiver.close()
    assert ends.over == [("a", 1, False, "queue full")]


@pytest.mark.parametrize("kind", PLAIN)
def test_a_callback_that_raises_harms_nobody(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    class Raising(Ends):
        def on_over(self, request_id: str, attempt: int, ok: bool, reason: str) -> None:
            super().on_over(request_id, attempt, ok, reason)
            raise RuntimeError("boom")

        def on_received(self, result: ReceiveResult) -> None:
            super().on_received(result)
            raise RuntimeError("boom")

    source, target, ends = planes_of(None), planes_of(UNTOUCHED), Raising()
    with pair(kind, source, target, ends) as (sender, receiver):
        for attempt in range(3):
            receiver.expect("a", attempt, 0, [1], LAYERS, time.monotonic() + FAR_S)
            sender.open("a", attempt, receiver.addresses[0], time.monotonic() + FAR_S)
            sender.push("a", attempt, 0, [1], range(LAYERS))
            sender.finish("a", attempt, Trailer())
        ends.wait(lambda: len(ends.over) == len(ends.received) == 3)
    assert all(ok for _, _, ok, _ in ends.over)
    assert "boom" in caplog.text


@pytest.mark.parametrize("kind", PLAIN)
def test_shards_must_agree(kind: str) -> None:
    source, target, ends = planes_of(None), planes_of(UNTOUCHED), Ends()
    with pair(kind, source, target, ends) as (_, receiver):
        media = media_of(kind, source)
        other = StreamSender(source, media, on_over=ends.on_over, shard=Shard(1, 8, 16))
        receiver.expect("a", 1, 0, [1], LAYERS, time.monotonic() + FAR_S)
        other.open("a", 1, receiver.addresses[0], time.monotonic() + FAR_S)
        other.push("a", 1, 0, [1], range(LAYERS))
        ends.wait(lambda: bool(ends.over and ends.received))
        other.close()
    assert "Shard(rank=1" in ends.received[0].reason
    assert ends.over[0][3] == ends.received[0].reason
    assert (every(target, [1]) == UNTOUCHED).all()


@pytest.mark.parametrize("address", ["", "tcp://", "tcp://127.0.0.1", "shm://nowhere", "tcp://x:y"])
@pytest.mark.parametrize("kind", PLAIN)
def test_an_address_that_leads_nowhere_ends_the_transfer(kind: str, address: str) -> None:
    ends = Ends()
    media = media_of(kind, planes_of(None))
    sender = StreamSender(planes_of(None), media, on_over=ends.on_over)
    sender.open("a", 1, address, time.monotonic() + FAR_S)
    ends.wait(lambda: len(ends.over) == 1)
    sender.close()
    assert not ends.over[0][2] and ends.over[0][3].startswith("cannot connect")
