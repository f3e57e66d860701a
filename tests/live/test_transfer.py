"""KV transfer over real sockets and processes: bytes, damage, deaths, hostile peers, caps.

Run as a program, this file is the other process: commands come as JSON lines, events go as JSON
lines. Planes are seeded, so both sides know every byte.
"""

import contextlib
import hashlib
import json
import os
import queue
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvasir.core.messages import PrefillReport
from kvasir.transfer import (
    PLAIN,
    Receiver,
    ReceiveResult,
    Sender,
    Trailer,
    make_receiver,
    make_sender,
    open_media,
)
from kvasir.transfer.arena import Arena
from kvasir.transfer.base import Key
from kvasir.transfer.frames import (
    FRAME_BYTES_LIMIT,
    HEADER_BYTES,
    FrameKind,
    Header,
    Hello,
    PlaneAt,
    encode,
    message,
    pack,
    unpack,
)
from kvasir.transfer.inline import InlineOutlet
from kvasir.transfer.link import Summing
from kvasir.transfer.medium import Loaded
from kvasir.transfer.memory import Memory
from kvasir.transfer.receiver import StreamReceiver

LAYERS, BLOCKS, BLOCK_BYTES = 4, 80, 8192
FRAME_BYTES = 100_000  # not a multiple of a block
WAIT_S = 20.0
ARENA = Arena()
FAR_S = 60.0

Planes = list[list[np.ndarray]]


def planes_of(seed: int | None) -> Planes:
    """Random bytes, or zeros for None."""
    rng = np.random.default_rng(seed)
    shape = (BLOCKS, BLOCK_BYTES)

    def plane() -> np.ndarray:
        found = ARENA.take(BLOCKS * BLOCK_BYTES).reshape(shape)
        if seed is not None:
            found[:] = rng.integers(0, 256, shape, dtype=np.uint8)
        return found

    return [[plane(), plane()] for _ in range(LAYERS)]


def digest(planes: Planes, blocks: list[int]) -> str:
    found = hashlib.sha256()
    for layer in planes:
        for plane in layer:
            found.update(plane[blocks].tobytes())
    return found.hexdigest()


def far() -> float:
    return time.monotonic() + FAR_S


# --- the other process -----------------------------------------------------------------------


class Side:
    """One end of a transfer and what it has said so far."""

    def __init__(self, role: str, kind: str, seed: int | None, bind: str) -> None:
        self.planes = planes_of(seed)
        self.events: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.blocks: list[int] = []
        self.end: Sender | Receiver
        media = open_media(kind, self.planes, run_dir=bind, arena=ARENA)
        if role == "receiver":
            self.end = make_receiver(media, self.planes, on_received=self.on_received)
        else:
            self.end = make_sender(
                media, self.planes, on_over=self.on_over, frame_bytes_max=FRAME_BYTES
            )

    def on_over(self, request_id: str, attempt: int, ok: bool, reason: str) -> None:
        self.events.put((request_id, attempt, ok, reason))

    def on_received(self, result: ReceiveResult) -> None:
        tokens = result.trailer.tokens if result.trailer else ()
        worker = result.trailer.report.worker if result.trailer and result.trailer.report else ""
        self.events.put(
            (
                result.request_id, result.attempt, result.ok, result.reason, result.bytes,
                result.transport, list(tokens), worker, digest(self.planes, self.blocks),
            )
        )  # fmt: skip

    @property
    def address(self) -> str:
        return self.end.addresses[0]

    def event(self) -> list[Any]:
        return list(self.events.get(timeout=WAIT_S))

    def do(self, name: str, *arguments: Any) -> None:
        if name == "expect":
            self.blocks = list(arguments[3])
        if name == "push_all":
            request_id, attempt, first_block, blocks = arguments
            for layer in range(LAYERS):
                self.end.push(request_id, attempt, first_block, blocks, layer)
        elif name == "finish":
            report = PrefillReport("prefill-0", 0.1, 0.2, 3, 4)
            self.end.finish(*arguments[:2], Trailer(tuple(arguments[2]), report))
        else:
            getattr(self.end, name)(*arguments)


def other_process(role: str, kind: str, seed: str, bind: str) -> None:
    side = Side(role, kind, None if seed == "none" else int(seed), bind)
    address = side.end.addresses[0] if role == "receiver" else ""

    def report() -> None:
        while True:
            print(json.dumps(side.events.get()), flush=True)

    print(json.dumps([address]), flush=True)
    threading.Thread(target=report, daemon=True).start()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        side.do(name, *arguments)
        side.events.put(("done",))
    side.end.close()


class Other:
    """A handle on the other process."""

    def __init__(self, role: str, kind: str, seed: int | None, bind: Path) -> None:
        given = [role, kind, "none" if seed is None else str(seed), str(bind)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._events: list[list[Any]] = []
        self.address: str = self.event()[0]

    def do(self, *command: Any) -> None:
        """Returns when the call returned there."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        while (event := self._read()) != ["done"]:
            self._events.append(event)

    def event(self) -> list[Any]:
        return self._events.pop(0) if self._events else self._read()

    def _read(self) -> list[Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the other process ended"
        found: list[Any] = json.loads(line)
        return found

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(WAIT_S)
        self.process.stdout.close()


@contextlib.contextmanager
def other(role: str, kind: str, seed: int | None, bind: Path) -> Iterator[Other]:
    found = Other(role, kind, seed, bind)
    try:
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def here(role: str, kind: str, seed: int | None, bind: Path) -> Iterator[Side]:
    side = Side(role, kind, seed, str(bind))
    try:
        yield side
    finally:
        side.end.close()


@pytest.fixture(autouse=True)
def no_defect_in_a_thread(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A transfer thread logs what it should never have raised, and goes on."""
    yield
    assert not [r for r in caplog.get_records("call") if r.message == "a transfer task failed"]


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")  # short: socket paths have a limit


# --- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
@pytest.mark.parametrize("kind", PLAIN)
def test_planes_arrive_equal(kind: str, scattered: bool, run_dir: Path) -> None:
    dice = random.Random(4)
    source, target = list(range(10, 50)), list(range(30, 70))
    if scattered:
        source, target = dice.sample(range(BLOCKS), 40), dice.sample(range(BLOCKS), 40)
    wanted = digest(planes_of(7), source)
    with other("receiver", kind, None, run_dir) as d, here("sender", kind, 7, run_dir) as p:
        for attempt in (1, 2):  # the second reuses the connection
            d.do("expect", "a", attempt, 5, target, LAYERS, far())
            p.end.open("a", attempt, d.address, far())
            p.do("push_all", "a", attempt, 5, source)
            p.do("finish", "a", attempt, [42, 43])
            assert p.events.get(timeout=WAIT_S) == ("a", attempt, True, "")
            assert d.event() == [
                "a", attempt, True, "", 40 * LAYERS * 2 * BLOCK_BYTES, kind, [42, 43],
                "prefill-0", wanted,
            ]  # fmt: skip
            source.reverse()
            wanted = digest(planes_of(7), source)


@pytest.mark.parametrize("kind", PLAIN)
def test_chunks_of_many_transfers_interleave(kind: str, run_dir: Path) -> None:
    """Chunked prefill: each chunk is pushed by layer when it is done, for two requests at once."""
    with other("sender", kind, 9, run_dir) as p, here("receiver", kind, None, run_dir) as d:
        address = d.address
        for name, first in (("a", 0), ("b", 40)):
            d.end.expect(name, 1, 0, range(first, first + 32), LAYERS, far())
            p.do("open", name, 1, address, far())
        for chunk in range(0, 32, 8):
            for name, first in (("a", 48), ("b", 4)):
                blocks = list(range(first + chunk, first + chunk + 8))
                p.do("push_all", name, 1, chunk, blocks)
        p.do("finish", "b", 1, [])
        p.do("finish", "a", 1, [])
        ended = {d.events.get(timeout=WAIT_S)[:4], d.events.get(timeout=WAIT_S)[:4]}
        assert ended == {("a", 1, True, ""), ("b", 1, True, "")}
        source = planes_of(9)
        assert digest(d.planes, list(range(32))) == digest(source, list(range(48, 80)))
        assert digest(d.planes, list(range(40, 72))) == digest(source, list(range(4, 36)))


# --- damage ----------------------------------------------------------------------------------


class Relay:
    """A TCP relay in front of a receiver that flips one bit at an offset of the forward stream."""

    def __init__(self, address: str, flip_at: int) -> None:
        self._target = int(address.rpartition(":")[2])
        self._flip_at = flip_at
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._forward)]
        self._threads[0].start()

    def _forward(self) -> None:
        inward, _ = self._server.accept()
        outward = socket.create_connection(("127.0.0.1", self._target))
        back = threading.Thread(target=self._copy, args=(outward, inward, None))
        back.start()
        self._copy(inward, outward, self._flip_at)
        back.join()
        inward.close()
        outward.close()

    def _copy(self, source: socket.socket, target: socket.socket, flip_at: int | None) -> None:
        seen = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if flip_at is not None and seen <= flip_at < seen + len(data):
                    data[flip_at - seen] ^= 1
                seen += len(data)
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self._server.close()


@pytest.mark.parametrize("blocks", [list(range(8)), [5, 1, 9, 2]], ids=["direct", "staged"])
def test_a_bit_flipped_on_the_wire_is_refused(blocks: list[int], run_dir: Path) -> None:
    payload = 2 * HEADER_BYTES + 4711
    with here("receiver", "tcp", None, run_dir) as d, here("sender", "tcp", 7, run_dir) as p:
        relay = Relay(d.address, payload)
        d.do("expect", "a", 1, 0, blocks, LAYERS, far())
        p.end.open("a", 1, relay.address, far())
        p.do("push_all", "a", 1, 0, blocks)
        p.do("finish", "a", 1, [])
        over, received = p.event(), d.event()
        p.end.close()
        relay.close()
    assert over[:3] == ["a", 1, False] and received[:3] == ["a", 1, False]
    assert over[3] == received[3]
    assert over[3].startswith("checksum of layer 0 plane 0 blocks 0..")


def test_a_bit_flipped_in_a_header_ends_the_connection(run_dir: Path) -> None:
    """And the transfer with it, as nobody takes another connection here."""
    with here("receiver", "tcp", None, run_dir) as d, here("sender", "tcp", 7, run_dir) as p:
        relay = Relay(d.address, HEADER_BYTES + 33)
        d.do("expect", "a", 1, 0, [1, 2], LAYERS, far())
        p.end.open("a", 1, relay.address, far())
        p.do("push_all", "a", 1, 0, [1, 2])
        over, received = p.event(), d.event()
        p.end.close()
        relay.close()
    assert not over[2] and over[3].startswith("connection lost")
    assert not received[2] and "checksum of a frame header" in received[3]


class Cutter:
    """A TCP relay that cuts each connection after so many bytes forward, and takes the next one."""

    def __init__(self, address: str, cut_at: list[int]) -> None:
        self._target = int(address.rpartition(":")[2])
        self._cut_at = cut_at
        self.served = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.02)
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                inward, _ = self._server.accept()
                left = self._cut_at.pop(0) if self._cut_at else None
                self.served += 1
                with inward, socket.create_connection(("127.0.0.1", self._target)) as outward:
                    self._relay(inward, outward, left)

    def _relay(self, inward: socket.socket, outward: socket.socket, left: int | None) -> None:
        while not self._closing.is_set() and (left is None or left > 0):
            ready, _, _ = select.select([inward, outward], [], [], 0.02)
            for sock in ready:
                room = 1 << 16 if sock is outward or left is None else min(left, 1 << 16)
                data = sock.recv(room)
                if not data:
                    return
                (inward if sock is outward else outward).sendall(data)
                if sock is inward and left is not None:
                    left -= len(data)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._server.close()


@pytest.mark.parametrize("cut_at", [[100], [HEADER_BYTES + 5], [40_000, 700_000, 1_200_000]])
def test_a_broken_connection_is_gone_on_with(cut_at: list[int], run_dir: Path) -> None:
    """Frames that were there are not sent again."""
    blocks, breaks = list(range(BLOCKS)), len(cut_at)
    whole = BLOCKS * LAYERS * 2 * BLOCK_BYTES
    with here("receiver", "tcp", None, run_dir) as d, here("sender", "tcp", 7, run_dir) as p:
        relay = Cutter(d.address, cut_at)
        d.do("expect", "a", 1, 0, blocks, LAYERS, far())
        p.end.open("a", 1, relay.address, far())
        p.do("push_all", "a", 1, 0, blocks)
        p.do("finish", "a", 1, [42])
        over, received = p.event(), d.event()
        assert over == ["a", 1, True, ""]
        assert received[:5] == ["a", 1, True, "", whole]
        assert received[8] == digest(p.planes, blocks)
        assert relay.served == breaks + 1
        relay.close()


def test_an_ack_that_was_lost_is_said_again(run_dir: Path) -> None:
    """The receiver has it all; the connection breaks before the sender hears of it."""
    with here("receiver", "tcp", None, run_dir) as d:
        d.do("expect", "a", 1, 0, [], LAYERS, far())
        key, port = Key("a", 1), int(d.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(message(FrameKind.BEGIN, key, 5))
            peer.sendall(message(FrameKind.TRAILER, key, 5, encode(Trailer())))
            assert d.event()[2]
        for serial, kind in ((5, FrameKind.ACK), (6, FrameKind.NACK)):
            with socket.create_connection(("127.0.0.1", port)) as peer:
                peer.sendall(message(FrameKind.RESUME, key, serial))
                assert unpack(peer.recv(HEADER_BYTES, socket.MSG_WAITALL)).kind is kind


@pytest.mark.parametrize("kind", PLAIN)
def test_a_wrong_checksum_fails_one_transfer_only(
    kind: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_load, flawed = Summing.frame, InlineOutlet.load, [True]

    def frame(self: Summing, memory: Memory) -> bytes:
        header = unpack(real(self, memory))
        return pack(msgspec.structs.replace(header, checksum=header.checksum ^ flawed[0]))

    def load(self: InlineOutlet, *args: Any) -> Loaded:
        loaded = real_load(self, *args)
        return loaded._replace(checksum=(loaded.checksum or 0) ^ flawed[0])

    monkeypatch.setattr(Summing, "frame", frame)
    monkeypatch.setattr(InlineOutlet, "load", load)
    with here("receiver", kind, None, run_dir) as d, here("sender", kind, 7, run_dir) as p:
        for name, ok in (("a", False), ("b", False), ("c", True)):
            flawed[0] = not ok
            d.do("expect", name, 1, 0, [3, 1], LAYERS, far())
            p.end.open(name, 1, d.address, far())
            p.end.push(name, 1, 0, [4, 5], range(LAYERS))
            p.end.finish(name, 1, Trailer())
            over, received = p.event(), d.event()
            assert over[:3] == [name, 1, ok] and received[:3] == [name, 1, ok]
            assert ok or (over[3].startswith("checksum of layer 0") and received[3] == over[3])


# --- deaths and deadlines --------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_a_killed_receiver_ends_the_send(kind: str, run_dir: Path) -> None:
    with here("sender", kind, 7, run_dir) as p:
        with other("receiver", kind, None, run_dir) as d:
            d.do("expect", "a", 1, 0, [1], LAYERS, far())
            p.end.open("a", 1, d.address, far())
            p.end.push("a", 1, 0, [1], 0)
            wait_until(lambda: p.end.timeline("a", 1).first_frame_s is not None)
            d.kill()
            over = p.events.get(timeout=WAIT_S)
            assert over[:3] == ("a", 1, False) and over[3].startswith("connection lost")
            p.end.open("b", 1, d.address, far())
            over = p.events.get(timeout=WAIT_S)
            assert over[:3] == ("b", 1, False)
        with other("receiver", kind, None, run_dir) as d:  # sweeps what the dead one left
            assert len(list(run_dir.iterdir())) == (1 if kind == "shm" else 0)
            d.do("expect", "c", 1, 0, [1], LAYERS, far())
            p.end.open("c", 1, d.address, far())
            p.end.push("c", 1, 0, [1], range(LAYERS))
            p.end.finish("c", 1, Trailer())
            assert p.events.get(timeout=WAIT_S) == ("c", 1, True, "")
    assert not list(run_dir.iterdir())


@pytest.mark.parametrize("kind", PLAIN)
def test_a_killed_sender_ends_the_receive(kind: str, run_dir: Path) -> None:
    with here("receiver", kind, None, run_dir) as d:
        with other("sender", kind, 7, run_dir) as p:
            d.end.expect("a", 1, 0, [1], LAYERS, far())
            d.end.expect("b", 1, 0, [2], LAYERS, far())
            p.do("open", "a", 1, d.address, far())
            p.do("push", "a", 1, 0, [1], 0)
            wait_until(lambda: bool(d.planes[0][1][1].any()))
            p.kill()
            received = d.events.get(timeout=WAIT_S)
            assert received[:3] == ("a", 1, False) and received[3].startswith("connection lost")
        with other("sender", kind, 7, run_dir) as p:  # the other transfer may still come
            p.do("open", "b", 1, d.address, far())
            p.do("push_all", "b", 1, 0, [1])
            p.do("finish", "b", 1, [])
            assert d.events.get(timeout=WAIT_S)[:4] == ("b", 1, True, "")


@pytest.mark.parametrize("kind", PLAIN)
def test_deadlines_are_kept_on_both_sides(kind: str, run_dir: Path) -> None:
    with here("receiver", kind, None, run_dir) as d, here("sender", kind, 7, run_dir) as p:
        start = time.monotonic()
        d.end.expect("nobody", 1, 0, [1], LAYERS, start + 0.05)
        assert d.events.get(timeout=WAIT_S)[:4] == ("nobody", 1, False, "deadline")
        assert time.monotonic() >= start + 0.05
        start = time.monotonic()
        d.end.expect("a", 1, 0, [1], LAYERS, far())
        p.end.open("a", 1, d.address, start + 0.05)
        p.end.push("a", 1, 0, [1], 0)
        assert p.events.get(timeout=WAIT_S) == ("a", 1, False, "deadline")
        assert time.monotonic() >= start + 0.05
        told = d.events.get(timeout=WAIT_S)
        assert told[:4] == ("a", 1, False, "given up by the sender: deadline")


def test_a_deadline_holds_while_the_peer_is_silent(run_dir: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1) as silent,
        here("sender", "tcp", 7, run_dir) as p,
    ):
        p.end.open("a", 1, f"tcp://127.0.0.1:{silent.getsockname()[1]}", time.monotonic() + 0.1)
        p.do("push_all", "a", 1, 0, list(range(BLOCKS)))
        p.do("finish", "a", 1, [])
        assert p.events.get(timeout=WAIT_S) == ("a", 1, False, "deadline")


# --- hostile peers ---------------------------------------------------------------------------


def hostile_streams() -> list[bytes]:
    noise = random.Random(3).randbytes(5000)
    data = Header(FrameKind.DATA, "a", 1, 1, blocks=1, payload_bytes=BLOCK_BYTES)
    placed = Header(FrameKind.PLACED, "b", 1, 1, planes=1, blocks=1, payload_bytes=4)
    big = bytearray(pack(Header(FrameKind.DATA, payload_bytes=FRAME_BYTES_LIMIT)))
    return [
        noise,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
        pack(data)[:-1],  # ends in mid header
        pack(data) + b"x",  # ends in mid payload
        pack(placed) + bytes(4),  # in memory that was never offered
        bytes(big) + noise,  # the largest payload for nobody
        message(FrameKind.ACK, Key("a", 1), 1),
        message(FrameKind.HELLO, Key("", 0), 0, encode(Hello(4096, ()))),  # without memory
        message(FrameKind.HELLO, Key("", 0), 0, b"\xc1"),
        message(FrameKind.TRAILER, Key("b", 1), 1, b"\xc1"),
    ]


def connect(address: str) -> socket.socket:
    if address.startswith("shm://"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.removeprefix("shm://"))
        return sock
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))


@pytest.mark.parametrize("kind", PLAIN)
def test_garbage_is_survived(kind: str, run_dir: Path) -> None:
    with here("receiver", kind, None, run_dir) as d, here("sender", kind, 7, run_dir) as p:
        for number, stream in enumerate(hostile_streams()):
            with connect(d.address) as peer, contextlib.suppress(OSError):
                peer.sendall(stream)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
            name = f"good-{number}"
            d.end.expect(name, 1, 0, [7, 3], LAYERS, far())
            p.end.open(name, 1, d.address, far())
            p.do("push_all", name, 1, 0, [1, 2])
            p.do("finish", name, 1, [])
            assert d.events.get(timeout=WAIT_S)[:4] == (name, 1, True, "")
            assert p.events.get(timeout=WAIT_S) == (name, 1, True, "")
        assert isinstance(d.end, StreamReceiver)
        d.end.check()


def test_memory_that_could_shrink_or_lies_about_its_planes_is_refused(run_dir: Path) -> None:
    sound, loose = Arena(1 << 16), os.memfd_create("loose")
    os.ftruncate(loose, 1 << 16)
    with here("receiver", "shm", None, run_dir) as d:
        for fd, size, plane in (
            (loose, 1 << 16, PlaneAt(0, 2, 8192)),  # not sealed
            (sound.fd, 1 << 17, PlaneAt(0, 2, 8192)),
            (sound.fd, 1 << 40, PlaneAt(0, 2, 8192)),
            (sound.fd, 1 << 16, PlaneAt(0, 9, 8192)),
            (sound.fd, 1 << 16, PlaneAt(-8192, 2, 8192)),
            (sound.fd, 1 << 16, PlaneAt(8192, 2, 1 << 40)),
        ):
            with connect(d.address) as peer:
                hello = message(FrameKind.HELLO, Key("", 0), 0, encode(Hello(size, (plane,))))
                socket.send_fds(peer, [hello], [fd])
                assert peer.recv(1) == b""  # the receiver hung up
    os.close(loose)
    sound.close()


@pytest.mark.parametrize(
    ("planes", "ids"),
    [
        ((PlaneAt(0, 2, BLOCK_BYTES),), (2,)),  # no such block
        ((PlaneAt(0, 2, BLOCK_BYTES),), (0, 1)),  # two for one
        ((PlaneAt(0, 4, BLOCK_BYTES // 2),), (0,)),  # of another size
    ],
)
def test_blocks_placed_where_there_are_none_are_refused(
    planes: tuple[PlaneAt, ...], ids: tuple[int, ...], run_dir: Path
) -> None:
    arena = Arena(2 * BLOCK_BYTES)
    payload = np.array(ids, "<u4").tobytes()
    placed = Header(FrameKind.PLACED, "a", 1, 1, planes=1, blocks=1, payload_bytes=len(payload))
    with here("receiver", "shm", None, run_dir) as d, connect(d.address) as peer:
        d.end.expect("a", 1, 0, [1], LAYERS, far())
        hello = message(FrameKind.HELLO, Key("", 0), 0, encode(Hello(arena.size, planes)))
        socket.send_fds(peer, [hello], [arena.fd])
        peer.sendall(pack(placed) + payload)
        assert not d.event()[2]
        assert not d.planes[0][0].any()
    arena.close()


# --- the cap, and what stays behind ----------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_under_a_cap_the_first_frame_leaves_before_the_last_layer_is_there(
    kind: str, run_dir: Path
) -> None:
    cap, blocks = 20e6, list(range(30))
    never = threading.Event()
    with other("receiver", kind, None, run_dir) as d:
        side = Side("sender", kind, 7, "")
        side.end.close()
        media = open_media(kind, side.planes, arena=ARENA)
        sender = make_sender(media, side.planes, on_over=side.on_over, bytes_per_s_max=cap)
        d.do("expect", "a", 1, 0, blocks, LAYERS, far())
        start = time.monotonic()
        sender.open("a", 1, d.address, far())
        last_push_s = start
        for layer in range(LAYERS):
            never.wait(0.03)  # the layer is being computed
            last_push_s = time.monotonic()
            sender.push("a", 1, 0, blocks, layer)
        sender.finish("a", 1, Trailer())
        assert side.events.get(timeout=WAIT_S) == ("a", 1, True, "")
        took_s = time.monotonic() - start
        found = sender.timeline("a", 1)
        assert found and found.first_frame_s and found.last_frame_s and found.over_s
        sender.close()
        assert d.event()[2]
    assert start < found.first_frame_s < last_push_s < found.last_frame_s <= found.over_s
    assert found.bytes == 30 * BLOCK_BYTES * 2 * LAYERS
    assert took_s > 0.9 * found.bytes / cap


@pytest.mark.parametrize("kind", PLAIN)
def test_close_leaves_no_descriptor_no_thread_no_file(kind: str, run_dir: Path) -> None:
    descriptors, threads = open_descriptors(), threading.active_count()
    with here("receiver", kind, None, run_dir) as d, here("sender", kind, 7, run_dir) as p:
        d.end.expect("a", 1, 0, [1], LAYERS, far())
        p.end.open("a", 1, d.address, far())
        p.do("push_all", "a", 1, 0, [2])
        p.do("finish", "a", 1, [])
        assert p.events.get(timeout=WAIT_S)[2]
        assert open_descriptors() > descriptors
    assert open_descriptors() == descriptors
    assert threading.active_count() == threads
    assert not list(run_dir.iterdir())


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_until(condition: Any) -> None:
    pause, end = threading.Event(), time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.002)


if __name__ == "__main__":
    other_process(*sys.argv[1:])
