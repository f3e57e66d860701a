"""CPU time of the HTTP gateway per request, over a scripted desk: no engine, no tokenizer.

    python bench/gateway.py [--requests 8000] [--streams 3200] [--repeat 5]

The server runs in a process of its own, pinned to one core, the client here on another. A figure is
the server's user and system time over the requests it answered; the median of the runs, and their
range. Each of the 16 tokens of an answer takes its own turn of the event loop, also for JSON;
`paced` puts 5 ms between them, so that each one is its own wake-up, as from an engine. What the
scripted desk itself costs is part of each figure, and is shown beside it.

Goals: 0.10 ms for a JSON answer, 0.25 ms for a stream of 16 tokens, tokenising apart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import uvloop

from kvasir.core.specs import LimitsSpec
from kvasir.gateway.app import make_app
from kvasir.gateway.fake import FakeDesk, FakeText
from kvasir.gateway.port import Ask
from kvasir.gateway.serve import serve_http
from kvasir.observe.metrics import Metrics

HOST = "127.0.0.1"
GOALS_MS = {"json": 0.10, "stream": 0.25, "paced": 0.25}
CONNECTIONS = {"json": 32, "stream": 32, "paced": 256}
TOKENS = 16
SCRIPT = range(97, 97 + TOKENS)
PACE_S = 0.005
SYSTEM = "You are a helpful assistant that answers in one short sentence. " * 4


class Run(NamedTuple):
    cpu_ms: float
    system_ms: float
    per_s: float


class Row(NamedTuple):
    """Milliseconds per request, and requests per second."""

    kind: str
    requests: int
    cpu_ms: float
    cpu_ms_min: float
    cpu_ms_max: float
    system_ms: float
    desk_ms: float
    per_s: float


def serve(ready: Connection, token_s: float, core: int) -> None:
    os.sched_setaffinity(0, {core})
    desk = FakeDesk(FakeText(), script=SCRIPT, token_s=token_s)
    desk.keep = False
    app = make_app(desk, Metrics(["fake"]), LimitsSpec())
    uvloop.run(serve_http(app, HOST, 0, on_bound=ready.send))


def request(i: int, stream: bool) -> bytes:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"What is the number {i:08d} called?"},
    ]
    body: dict[str, object] = {"model": "fake", "messages": messages, "max_tokens": TOKENS}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(raw)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + raw


async def client(port: int, count: int, stream: bool) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    for i in range(count):
        writer.write(request(i, stream))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        if stream:
            events = await reader.readuntil(b"0\r\n\r\n")
            assert events.count(b"data: ") == TOKENS + 3
        else:
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(size)
    writer.close()


class Cpu(NamedTuple):
    """Seconds of a process so far, in ticks of 10 ms."""

    user: float
    system: float


def cpu_of(pid: int) -> Cpu:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    tick = os.sysconf("SC_CLK_TCK")
    return Cpu(int(fields[11]) / tick, int(fields[12]) / tick)


async def load(port: int, count: int, connections: int, stream: bool) -> None:
    await asyncio.gather(*(client(port, count // connections, stream) for _ in range(connections)))


@contextlib.contextmanager
def server(token_s: float) -> Iterator[tuple[int, int]]:
    """Its pid and port. Server and client each have a core, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, token_s, cores[0]), daemon=True)
    process.start()
    os.sched_setaffinity(0, {cores[-1]})
    try:
        assert process.pid is not None
        yield process.pid, ours.recv()
    finally:
        process.terminate()
        process.join()
        os.sched_setaffinity(0, set(cores))


def measure(kind: str, count: int, repeat: int) -> Row:
    connections, stream = CONNECTIONS[kind], kind != "json"
    count = count // connections * connections
    runs: list[Run] = []
    with server(PACE_S if kind == "paced" else 0.0) as (pid, port):
        uvloop.run(load(port, connections * 4, connections, stream))  # warm
        for _ in range(repeat):
            before, began = cpu_of(pid), time.perf_counter()
            uvloop.run(load(port, count, connections, stream))
            after, seconds = cpu_of(pid), time.perf_counter() - began
            user, system = after.user - before.user, after.system - before.system
            ms = 1e3 / count
            runs.append(Run((user + system) * ms, system * ms, count / seconds))
    return Row(
        kind=kind,
        requests=count * repeat,
        cpu_ms=statistics.median(run.cpu_ms for run in runs),
        cpu_ms_min=min(run.cpu_ms for run in runs),
        cpu_ms_max=max(run.cpu_ms for run in runs),
        system_ms=statistics.median(run.system_ms for run in runs),
        desk_ms=desk_alone_ms(PACE_S if kind == "paced" else 0.0, connections),
        per_s=statistics.median(run.per_s for run in runs),
    )


def desk_alone_ms(token_s: float, at_once: int) -> float:
    """CPU of the scripted desk without any HTTP, in this process, per request."""
    desk = FakeDesk(FakeText(), script=SCRIPT, token_s=token_s)
    desk.keep = False
    ask = Ask("r", "fake", tuple(range(50)), TOKENS)

    async def one() -> None:
        async for _ in desk.submit(ask):
            pass

    async def many(rounds: int) -> None:
        for _ in range(rounds):
            await asyncio.gather(*(one() for _ in range(at_once)))

    rounds = max(1, 2000 // at_once)
    uvloop.run(many(1))
    began = time.process_time()
    uvloop.run(many(rounds))
    return (time.process_time() - began) / (rounds * at_once) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8000, help="JSON requests a run")
    parser.add_argument("--streams", type=int, default=3200, help="streams of 16 tokens a run")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each kind")
    asked = parser.parse_args()
    rows = []
    for kind in ("json", "stream", "paced"):
        count = asked.requests if kind == "json" else asked.streams
        row = measure(kind, count, asked.repeat)
        goal = GOALS_MS[kind]
        print(
            f"{kind:<7} {row.cpu_ms:.3f} CPU ms a request [{row.cpu_ms_min:.3f}-"
            f"{row.cpu_ms_max:.3f}], of it system {row.system_ms:.3f}, desk {row.desk_ms:.3f}; "
            f"{row.cpu_ms / goal:.0%} of the goal of {goal:.2f}; {row.per_s:.0f} requests/s"
        )
        rows.append(row._asdict())
    print(json.dumps({"bench": "gateway", "tokens": TOKENS, "rows": rows}))


if __name__ == "__main__":
    main()
