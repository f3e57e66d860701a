"""CPU time of the HTTP gateway per request, over a scripted desk: no engine, no tokenizer.

    python bench/gateway.py [--requests 8000] [--streams 3200] [--repeat 5]

Each server runs in a process of its own, pinned to one core, the client here on another. A figure
is the server's user and system time over the requests it answered: the median of the runs, and
their range. The 16 tokens of an answer take a turn of the event loop each, also for JSON; `paced`
puts 5 ms between them, so that each one is its own wake-up, as from an engine.

`bare` is the limit of this stack, run by run beside ours: the same HTTP server, the same turns and
writes, but fixed bytes and no gateway. On a busy machine both rise together.

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
from starlette.types import ASGIApp, Receive, Scope, Send

from kvasir.core.specs import LimitsSpec
from kvasir.gateway.app import make_app
from kvasir.gateway.fake import FakeDesk, FakeText
from kvasir.gateway.serve import serve_http
from kvasir.observe.metrics import Metrics

HOST = "127.0.0.1"
GOALS_MS = {"json": 0.10, "stream": 0.25, "paced": 0.25}
CONNECTIONS = {"json": 32, "stream": 32, "paced": 256}
TOKENS = 16
SCRIPT = range(97, 97 + TOKENS)
PACE_S = 0.005
SYSTEM = "You are a helpful assistant that answers in one short sentence. " * 4
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]' + b" " * 120 + b"}\n\n"


class Run(NamedTuple):
    """Per request."""

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
    bare_ms: float
    bare_ms_min: float
    per_s: float


# --- servers --------------------------------------------------------------------------------------


def serve(ready: Connection, kind: str, bare: bool, core: int) -> None:
    os.sched_setaffinity(0, {core})
    token_s = PACE_S if kind == "paced" else 0.0
    app = bare_app(token_s, stream=kind != "json") if bare else our_app(token_s)
    uvloop.run(serve_http(app, HOST, 0, on_bound=ready.send))


def our_app(token_s: float) -> ASGIApp:
    desk = FakeDesk(FakeText(), script=SCRIPT, token_s=token_s)
    desk.keep = False
    return make_app(desk, Metrics(["fake"]), LimitsSpec())


def bare_app(token_s: float, *, stream: bool) -> ASGIApp:
    kind = (b"content-type", b"text/event-stream" if stream else b"application/json")
    size = [] if stream else [(b"content-length", b"330")]

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0)
        start = {"type": "http.response.start", "status": 200, "headers": [kind, *size]}
        if stream:
            await send(start)
        for _ in range(TOKENS):
            await asyncio.sleep(token_s)
            if stream:
                await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        if not stream:
            await send(start)
        last = EVENT * 3 if stream else b" " * 330
        await send({"type": "http.response.body", "body": last, "more_body": False})

    return answer


@contextlib.contextmanager
def server(kind: str, bare: bool, core: int) -> Iterator[tuple[int, int]]:
    """Its pid and port. It has a core, and the client the other, where there are two."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, kind, bare, core), daemon=True)
    process.start()
    try:
        assert process.pid is not None
        yield process.pid, ours.recv()
    finally:
        process.terminate()
        process.join()


# --- client ---------------------------------------------------------------------------------------


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


async def load(port: int, count: int, connections: int, stream: bool) -> None:
    await asyncio.gather(*(client(port, count // connections, stream) for _ in range(connections)))


# --- figures --------------------------------------------------------------------------------------


class Cpu(NamedTuple):
    """Seconds of a process so far, in ticks of 10 ms."""

    user: float
    system: float


def cpu_of(pid: int) -> Cpu:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    tick = os.sysconf("SC_CLK_TCK")
    return Cpu(int(fields[11]) / tick, int(fields[12]) / tick)


def run_once(pid: int, port: int, kind: str, count: int) -> Run:
    before, began = cpu_of(pid), time.perf_counter()
    uvloop.run(load(port, count, CONNECTIONS[kind], kind != "json"))
    after, seconds = cpu_of(pid), time.perf_counter() - began
    user, system = after.user - before.user, after.system - before.system
    return Run((user + system) * 1e3 / count, system * 1e3 / count, count / seconds)


def measure(kind: str, count: int, repeat: int, core: int) -> Row:
    connections = CONNECTIONS[kind]
    count = count // connections * connections
    with server(kind, False, core) as ours, server(kind, True, core) as bare:
        for pid, port in (ours, bare):  # warm
            run_once(pid, port, kind, connections * 4)
        pairs = [(run_once(*ours, kind, count), run_once(*bare, kind, count))
                 for _ in range(repeat)]  # fmt: skip
    mine = [pair[0] for pair in pairs]
    floor = [pair[1].cpu_ms for pair in pairs]
    return Row(
        kind=kind,
        requests=count * repeat,
        cpu_ms=statistics.median(run.cpu_ms for run in mine),
        cpu_ms_min=min(run.cpu_ms for run in mine),
        cpu_ms_max=max(run.cpu_ms for run in mine),
        system_ms=statistics.median(run.system_ms for run in mine),
        bare_ms=statistics.median(floor),
        bare_ms_min=min(floor),
        per_s=statistics.median(run.per_s for run in mine),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8000, help="JSON requests a run")
    parser.add_argument("--streams", type=int, default=3200, help="streams of 16 tokens a run")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(GOALS_MS), choices=list(GOALS_MS))
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    rows = []
    for kind in asked.kinds:
        count = asked.requests if kind == "json" else asked.streams
        row = measure(kind, count, asked.repeat, cores[0])
        goal = GOALS_MS[kind]
        print(
            f"{kind:<7} {row.cpu_ms:.3f} CPU ms a request [{row.cpu_ms_min:.3f}-"
            f"{row.cpu_ms_max:.3f}], of it system {row.system_ms:.3f}; bare {row.bare_ms:.3f} "
            f"[{row.bare_ms_min:.3f}-]; {row.cpu_ms / goal:.0%} of the goal of {goal:.2f}; "
            f"{row.per_s:.0f} requests/s",
            flush=True,
        )
        rows.append(row._asdict())
    print(json.dumps({"bench": "gateway", "tokens": TOKENS, "rows": rows}))


if __name__ == "__main__":
    main()
