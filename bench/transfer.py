"""How fast KV moves between two processes, beside what this machine can do at all, in the same run.

    python -m bench.transfer [--kib 64,16384,262144] [--repeats 7] [--frame-kib 4096]

shm stands beside one numpy copy of the same bytes in one process; tcp beside plain `sendmsg` into
`recv_into` on a loopback socket between two processes, with no frames, checksums or blocks. All
take turns within each repeat, each in a process pair of its own. Prints a line each with the median
time and rate, its spread, the ratio of medians, and the CPU time of both processes together, which
other load on the machine moves far less than the rate. The last line is JSON.

64 KiB is one block of one layer, K and V; larger sizes are 16 layers. Where NIXL or Mooncake are
installed, ours over them and NIXL by itself, in its default form and without a progress thread
(`UCX_TLS` is read by UCX), take their turns too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kvasir.transfer import (
    PLAIN,
    ReceiveResult,
    Trailer,
    able,
    make_receiver,
    make_sender,
    open_media,
)
from kvasir.transfer.arena import Arena
from kvasir.transfer.frames import PlaneAt
from kvasir.transfer.onesided import Move, Welcome
from kvasir.transfer.sender import FRAME_BYTES_MAX

LAYERS, BLOCK_BYTES = 16, 32 * 1024  # 16 tokens x 8 heads x 128 x bf16
BLOCK_OF_LAYER = 2 * BLOCK_BYTES
WAIT_S = 60.0
RAW_CALL_BYTES = 1 << 20
FLOORS = {"shm": "numpy copy", "tcp": "raw socket"}

Planes = list[list[np.ndarray]]


class Size(NamedTuple):
    """What one round ships: the first `blocks` blocks of the first `layers` layers."""

    blocks: int
    layers: int

    @property
    def bytes(self) -> int:
        return self.blocks * self.layers * BLOCK_OF_LAYER


def size_of(kib: int) -> Size:
    nbytes = kib << 10
    if nbytes < LAYERS * BLOCK_OF_LAYER:
        return Size(max(1, nbytes // BLOCK_OF_LAYER), 1)
    return Size(nbytes // (LAYERS * BLOCK_OF_LAYER), LAYERS)


def planes_of(blocks: int, fill: int, arena: Arena | None = None) -> Planes:
    def plane() -> np.ndarray:
        count = blocks * BLOCK_BYTES
        found = np.empty(count, np.uint8) if arena is None else arena.take(count)
        found[:] = fill
        return found.reshape(blocks, BLOCK_BYTES)

    return [[plane(), plane()] for _ in range(LAYERS)]


# --- the decode process ----------------------------------------------------------------------


def decode_process(kind: str, blocks: int, run_dir: str) -> None:
    """One receiver of a kind, or a raw socket: a line in starts a round, a line out ends it."""
    planes = planes_of(blocks, 1)
    if kind == "raw":
        raw_receiver(planes)
        return
    results: queue.Queue[ReceiveResult] = queue.Queue()
    if kind.startswith("NIXL"):
        bare_nixl_receiver(planes)
        return
    kind, streams = streams_of(kind)
    media = open_media(kind, planes, run_dir=run_dir)
    receiver = make_receiver(media, planes, on_received=results.put, streams=streams)
    print(receiver.addresses[0], flush=True)
    for line in sys.stdin:
        attempt, count, layers, scattered = json.loads(line)
        ids = order(count, scattered, seed=2)
        receiver.expect("bench", attempt, 0, ids, layers, time.monotonic() + WAIT_S)
        print("ready", flush=True)
        result = results.get(timeout=WAIT_S)
        print(json.dumps([time.process_time(), result.ok, result.reason]), flush=True)
    receiver.close()


def streams_of(kind: str) -> tuple[str, int]:
    """`tcp:2` is tcp with two streams."""
    kind, _, streams = kind.partition(":")
    return kind, int(streams or 1)


def raw_receiver(planes: Planes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        sock, _ = server.accept()
        with sock:
            for line in sys.stdin:
                size = Size(*json.loads(line))
                print("ready", flush=True)
                for view in views(planes, size):
                    while view:
                        view = view[sock.recv_into(view[:RAW_CALL_BYTES]) :]
                sock.sendall(b"!")
                print(json.dumps([time.process_time(), True, ""]), flush=True)


def bare_nixl_receiver(planes: Planes) -> None:
    """Memory to write into, and nothing else."""
    from kvasir.transfer.nixl import NixlMover

    mover = NixlMover()  # nobody polls here
    mover.register([plane for layer in planes for plane in layer])
    card = Welcome(mover.card(), tuple(
        PlaneAt(plane.ctypes.data, *plane.shape) for layer in planes for plane in layer
    ))  # fmt: skip
    print(msgspec.json.encode(card).decode(), flush=True)
    for _ in sys.stdin:
        print("ready", flush=True)
        print(json.dumps([time.process_time(), True, ""]), flush=True)


def views(planes: Planes, size: Size) -> list[memoryview]:
    found = [plane for layer in planes[: size.layers] for plane in layer]
    return [plane[: size.blocks].reshape(-1).data for plane in found]


class Decode:
    def __init__(self, kind: str, blocks: int, run_dir: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.transfer", "--decode", kind, str(blocks), run_dir],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address = self.line()
        self._cpu_s = 0.0

    def line(self) -> str:
        assert self.process.stdout
        found = self.process.stdout.readline().strip()
        assert found, "the decode process ended"
        return found

    def cpu_s(self) -> float:
        """The end of a round: CPU seconds that it cost there."""
        cpu_s, ok, reason = json.loads(self.line())
        assert ok, reason
        cpu_s, self._cpu_s = cpu_s - self._cpu_s, cpu_s
        return float(cpu_s)

    def ready(self, *what: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        assert self.line() == "ready"

    def close(self) -> None:
        self.process.communicate(timeout=WAIT_S)


# --- rounds ----------------------------------------------------------------------------------


class Round(NamedTuple):
    """`cpu_s`: of both processes, all threads."""

    seconds: float
    cpu_s: float


class Watch:
    """Wall and CPU time of this process since it was made."""

    def __init__(self) -> None:
        self._cpu_s, self._start = time.process_time(), time.perf_counter()

    def read(self) -> Round:
        seconds = time.perf_counter() - self._start
        return Round(seconds, time.process_time() - self._cpu_s)


def order(blocks: int, scattered: bool, seed: int) -> list[int]:
    ids = np.random.default_rng(seed).permutation(blocks) if scattered else np.arange(blocks)
    return [int(i) for i in ids]


def numpy_copy(source: Planes, target: Planes, size: Size) -> Round:
    pairs = list(zip(views(source, size), views(target, size), strict=True))
    arrays = [(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs]
    watch = Watch()
    for here, there in arrays:
        np.copyto(there, here)
    return watch.read()


class Shipping:
    """One kind of transport between this process and a decode process."""

    def __init__(
        self, kind: str, source: Planes, arena: Arena, run_dir: str, frame_bytes: int
    ) -> None:
        self._decode = Decode(kind, len(source[0][0]), run_dir)
        self._over: queue.Queue[tuple[Any, ...]] = queue.Queue()
        kind, streams = streams_of(kind)
        self._sender = make_sender(
            open_media(kind, source, arena=arena), source, streams=streams,
            on_over=lambda *a: self._over.put(a), frame_bytes_max=frame_bytes,
        )  # fmt: skip
        self._attempt = 0

    def round(self, size: Size, scattered: bool = False) -> Round:
        self._attempt += 1
        ids = order(size.blocks, scattered, seed=1)
        self._decode.ready(self._attempt, *size, scattered)
        watch = Watch()
        deadline_s = time.monotonic() + WAIT_S
        self._sender.open("bench", self._attempt, self._decode.address, deadline_s)
        self._sender.push("bench", self._attempt, 0, ids, range(size.layers))
        self._sender.finish("bench", self._attempt, Trailer())
        ok, reason = self._over.get(timeout=WAIT_S)[2:]
        here = watch.read()
        assert ok, reason
        return here._replace(cpu_s=here.cpu_s + self._decode.cpu_s())

    def close(self) -> None:
        self._sender.close()
        self._decode.close()


class Raw:
    """The same bytes through a plain socket."""

    def __init__(self, source: Planes, run_dir: str) -> None:
        self._source = source
        self._decode = Decode("raw", len(source[0][0]), run_dir)
        self._sock = socket.create_connection(("127.0.0.1", int(self._decode.address)))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def round(self, size: Size) -> Round:
        self._decode.ready(*size)
        watch = Watch()
        for view in views(self._source, size):
            while view:
                view = view[self._sock.sendmsg([view[:RAW_CALL_BYTES]]) :]
        assert self._sock.recv(1)
        here = watch.read()
        return here._replace(cpu_s=here.cpu_s + self._decode.cpu_s())

    def close(self) -> None:
        self._sock.close()
        self._decode.close()


class BareNixl:
    """One NIXL write of everything, and polls until it is over. `kind`: default or tuned."""

    def __init__(self, kind: str, source: Planes, run_dir: str) -> None:
        from kvasir.transfer.nixl import NixlMover

        self._decode = Decode(kind, len(source[0][0]), run_dir)
        there = msgspec.json.decode(self._decode.address, type=Welcome)
        flat = [plane for layer in source for plane in layer]
        self._mover = NixlMover(progress=kind == "NIXL default")
        self._mover.register(flat)
        self._peer = self._mover.meet(there.card)
        self._places = list(zip(flat, there.planes, strict=True))

    def round(self, size: Size) -> Round:
        nbytes = size.blocks * BLOCK_BYTES
        moves = [
            Move(plane.ctypes.data, at.offset, nbytes)
            for plane, at in self._places[: 2 * size.layers]
        ]
        self._decode.ready()
        pause_s = 50e-6 if size.bytes > 1 << 20 else 0.0
        watch = Watch()
        over = self._mover.write(self._peer, moves)
        while not over():
            time.sleep(pause_s)
        here = watch.read()
        return here._replace(cpu_s=here.cpu_s + self._decode.cpu_s())

    def close(self) -> None:
        self._decode.close()


# --- the report ------------------------------------------------------------------------------


def measure(paths: dict[str, Callable[[Size], Round]], size: Size, repeats: int) -> Found:
    """All take turns, and the first turn is not counted."""
    found: Found = {name: [] for name in paths}
    for turn in range(repeats + 1):
        for name, run in paths.items():
            result = run(size)
            if turn:
                found[name].append(result)
    return found


Found = dict[str, list[Round]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kib", default="64,16384,262144", help="sizes, with commas between")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--frame-kib", type=int, default=FRAME_BYTES_MAX // 1024)
    parser.add_argument("--plain", action="store_true", help="shm and tcp alone, though others are "
                        "installed: NIXL and Mooncake keep cores busy also between their turns")
    parser.add_argument("--decode", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.decode:
        kind, blocks, run_dir = given.decode
        decode_process(kind, int(blocks), run_dir)
        return
    sizes = [size_of(int(kib)) for kib in given.kib.split(",")]
    blocks, arena = max(size.blocks for size in sizes), Arena()
    source, target = planes_of(blocks, 7, arena), planes_of(blocks, 1)
    with tempfile.TemporaryDirectory() as run_dir:
        shm = Shipping("shm", source, arena, run_dir, given.frame_kib << 10)
        tcp = Shipping("tcp", source, arena, run_dir, given.frame_kib << 10)
        two = Shipping("tcp:2", source, arena, run_dir, given.frame_kib << 10)
        raw = Raw(source, run_dir)
        paths: dict[str, Callable[[Size], Round]] = {
            "numpy copy": lambda size: numpy_copy(source, target, size),
            "shm": shm.round,
            "shm scattered": lambda size: shm.round(size, True),
            "raw socket": raw.round,
            "tcp": tcp.round,
            "tcp scattered": lambda size: tcp.round(size, True),
            "tcp 2 streams": two.round,
        }
        others: list[Shipping | BareNixl] = []
        installed = PLAIN if given.plain else able()
        for kind in set(installed) - set(PLAIN):
            others.append(Shipping(kind, source, arena, run_dir, given.frame_kib << 10))
            paths[kind] = others[-1].round
        for kind in ("NIXL default", "NIXL tuned") if "nixl" in installed else ():
            others.append(BareNixl(kind, source, run_dir))
            paths[kind] = others[-1].round
        figures = [report(measure(paths, size, given.repeats), size.bytes) for size in sizes]
        for end in (shm, tcp, two, raw, *others):
            end.close()
    print(json.dumps({
        "bench": "transfer", "repeats": given.repeats, "frame_bytes": given.frame_kib << 10,
        "sizes": figures, "load": os.getloadavg()[0], "cores": os.cpu_count(),
        "python": platform.python_version(),
    }))  # fmt: skip


def report(found: Found, nbytes: int) -> dict[str, Any]:
    """Prints one size; returns its figures."""
    print(f"--- {nbytes >> 10:,} KiB")
    seconds = {name: statistics.median(r.seconds for r in rounds) for name, rounds in found.items()}
    cpu = {name: statistics.median(r.cpu_s for r in rounds) for name, rounds in found.items()}
    ratios = {}
    for name, rounds in found.items():
        share, floor = "", FLOORS.get(name.split()[0])
        if floor:
            ratios[name] = seconds[floor] / seconds[name]
            share = f"  {ratios[name]:5.0%} of {floor}, {cpu[name] / cpu[floor]:.2f} x its CPU"
        rates = [nbytes / r.seconds / 1e9 for r in rounds]
        print(
            f"{name:14s} {seconds[name] * 1e3:8.3f} ms {nbytes / seconds[name] / 1e9:6.2f} GB/s "
            f"({min(rates):.2f}..{max(rates):.2f}) {cpu[name] * 1e3:7.2f} CPU ms{share}"
        )
    return {"bytes": nbytes, "seconds": seconds, "cpu_s": cpu, "ratio": ratios}


if __name__ == "__main__":
    main()
