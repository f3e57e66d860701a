"""How fast KV moves between two processes, beside what this machine can do at all, in the same run.

    python -m bench.transfer [--mib 64] [--repeats 7] [--frame-kib 1024]

shm stands beside one numpy copy of the same bytes, tcp beside plain `sendmsg` into `recv_into` on a
loopback socket between the same two processes, with no frames, checksums or blocks. All four take
turns within each repeat. Prints a line each with the median rate, its spread, the ratio of medians,
and the CPU time of both processes together, which other load on the machine moves far less than the
rate; the last line is JSON.
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

import numpy as np

from kvasir.transfer import ReceiveResult, Trailer, make_receiver, make_sender
from kvasir.transfer.sender import FRAME_BYTES_MAX

LAYERS, BLOCK_BYTES = 16, 32 * 1024  # 16 tokens x 8 heads x 128 x bf16
WAIT_S = 60.0
RAW_CALL_BYTES = 1 << 20


def planes_of(blocks: int, fill: int) -> list[list[np.ndarray]]:
    return [
        [np.full((blocks, BLOCK_BYTES), fill, np.uint8) for _ in range(2)] for _ in range(LAYERS)
    ]


# --- the decode process ----------------------------------------------------------------------


def decode_process(kind: str, blocks: int, run_dir: str) -> None:
    """One receiver of a kind, or a raw socket: a line in starts a round, a line out ends it."""
    planes = planes_of(blocks, 1)
    if kind == "raw":
        raw_receiver(planes)
        return
    results: queue.Queue[ReceiveResult] = queue.Queue()
    bind = run_dir if kind == "shm" else None
    receiver = make_receiver(kind, planes, on_received=results.put, bind=bind)
    print(receiver.address, flush=True)
    for line in sys.stdin:
        attempt, scattered = json.loads(line)
        ids = order(blocks, scattered, seed=2)
        receiver.expect("bench", attempt, 0, ids, LAYERS, time.monotonic() + WAIT_S)
        print("ready", flush=True)
        result = results.get(timeout=WAIT_S)
        print(json.dumps([time.process_time(), result.ok, result.reason]), flush=True)
    receiver.close()


def raw_receiver(planes: list[list[np.ndarray]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        sock, _ = server.accept()
        with sock:
            for _ in sys.stdin:
                print("ready", flush=True)
                for layer in planes:
                    for plane in layer:
                        view = plane.reshape(-1).data
                        while view:
                            view = view[sock.recv_into(view[:RAW_CALL_BYTES]) :]
                sock.sendall(b"!")
                print(json.dumps([time.process_time(), True, ""]), flush=True)


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


def numpy_copy(source: list[list[np.ndarray]], target: list[list[np.ndarray]]) -> Round:
    watch = Watch()
    for planes, copies in zip(source, target, strict=True):
        for plane, copy in zip(planes, copies, strict=True):
            np.copyto(copy, plane)
    return watch.read()


class Shipping:
    """One kind of transport between this process and a decode process."""

    def __init__(
        self, kind: str, source: list[list[np.ndarray]], run_dir: str, frame_bytes: int
    ) -> None:
        self._blocks = len(source[0][0])
        self._decode = Decode(kind, self._blocks, run_dir)
        self._over: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self._sender = make_sender(
            kind, source, on_over=lambda *a: self._over.put(a), frame_bytes_max=frame_bytes
        )
        self._attempt = 0

    def round(self, scattered: bool) -> Round:
        self._attempt += 1
        ids = order(self._blocks, scattered, seed=1)
        self._decode.ready(self._attempt, scattered)
        watch = Watch()
        deadline_s = time.monotonic() + WAIT_S
        self._sender.open("bench", self._attempt, self._decode.address, deadline_s)
        self._sender.push("bench", self._attempt, 0, ids, range(LAYERS))
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

    def __init__(self, source: list[list[np.ndarray]], run_dir: str) -> None:
        self._source = source
        self._decode = Decode("raw", len(source[0][0]), run_dir)
        self._sock = socket.create_connection(("127.0.0.1", int(self._decode.address)))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def round(self) -> Round:
        self._decode.ready()
        watch = Watch()
        for planes in self._source:
            for plane in planes:
                view = plane.reshape(-1).data
                while view:
                    view = view[self._sock.sendmsg([view[:RAW_CALL_BYTES]]) :]
        assert self._sock.recv(1)
        here = watch.read()
        return here._replace(cpu_s=here.cpu_s + self._decode.cpu_s())

    def close(self) -> None:
        self._sock.close()
        self._decode.close()


# --- the report ------------------------------------------------------------------------------


def measure(rounds: dict[str, Callable[[], Round]], repeats: int) -> dict[str, list[Round]]:
    """All take turns, and the first turn is not counted."""
    found: dict[str, list[Round]] = {name: [] for name in rounds}
    for turn in range(repeats + 1):
        for name, run in rounds.items():
            result = run()
            if turn:
                found[name].append(result)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--frame-kib", type=int, default=FRAME_BYTES_MAX // 1024)
    parser.add_argument("--decode", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.decode:
        kind, blocks, run_dir = given.decode
        decode_process(kind, int(blocks), run_dir)
        return
    blocks = max(1, (given.mib << 20) // (LAYERS * 2 * BLOCK_BYTES))
    nbytes = blocks * LAYERS * 2 * BLOCK_BYTES
    source, target = planes_of(blocks, 7), planes_of(blocks, 1)
    with tempfile.TemporaryDirectory() as run_dir:
        shm = Shipping("shm", source, run_dir, given.frame_kib << 10)
        tcp = Shipping("tcp", source, run_dir, given.frame_kib << 10)
        raw = Raw(source, run_dir)
        found = measure(
            {
                "numpy copy": lambda: numpy_copy(source, target),
                "shm": lambda: shm.round(False),
                "shm scattered": lambda: shm.round(True),
                "raw socket": raw.round,
                "tcp": lambda: tcp.round(False),
                "tcp scattered": lambda: tcp.round(True),
            },
            given.repeats,
        )
        for end in (shm, tcp, raw):
            end.close()
    report(found, nbytes, given)


def report(found: dict[str, list[Round]], nbytes: int, given: argparse.Namespace) -> None:
    size = nbytes / 1e9
    rates = {name: sorted(size / r.seconds for r in rounds) for name, rounds in found.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    cpu = {
        name: statistics.median(r.cpu_s for r in rounds) / size for name, rounds in found.items()
    }
    floors = {"shm": "numpy copy", "tcp": "raw socket"}
    ratios = {}
    for name, values in rates.items():
        share, floor = "", floors.get(name.split()[0])
        if floor:
            ratios[name] = medians[name] / medians[floor]
            share = f"  {ratios[name]:5.0%} of {floor}, {cpu[name] / cpu[floor]:.2f} x its CPU"
        spread = f"({values[0]:.2f}..{values[-1]:.2f})"
        print(f"{name:14s} {medians[name]:6.2f} GB/s {spread:14s} {cpu[name]:.2f} CPU s/GB{share}")
    figures = {
        "bench": "transfer", "bytes": nbytes, "repeats": given.repeats,
        "frame_bytes": given.frame_kib << 10, "gb_per_s": medians, "cpu_s_per_gb": cpu,
        "ratio": ratios, "load": os.getloadavg()[0], "cores": os.cpu_count(),
        "python": platform.python_version(),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
