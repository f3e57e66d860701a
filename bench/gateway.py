"""CPU time of the HTTP gateway per request, over a scripted desk: no engine, no tokenizer.

    python bench/gateway.py [--requests 20000] [--streams 4000]

The server runs in a process of its own, the client here; the figure is the server's user and system
time over the requests it answered. Goals (per request): 0.10 ms for JSON, 0.25 ms for a stream of
16 tokens. `paced` sends tokens 5 ms apart, so that each one is its own wake-up, as from an engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import uvloop

from kvasir.core.specs import LimitsSpec
from kvasir.gateway.app import make_app
from kvasir.gateway.fake import FakeDesk, FakeText
from kvasir.gateway.serve import serve_http
from kvasir.observe.metrics import Metrics

HOST = "127.0.0.1"
GOALS_MS = {"json": 0.10, "stream": 0.25}
CONNECTIONS = {"json": 32, "stream": 32, "paced": 256}
TOKENS = 16
SYSTEM = "You are a helpful assistant that answers in one short sentence. " * 4


def serve(ready: Connection, token_s: float, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    desk = FakeDesk(FakeText(), script=range(97, 97 + TOKENS), token_s=token_s)
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


def cpu_s(pid: int) -> float:
    """User and system seconds of a process so far, in ticks of 10 ms."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(port: int, count: int, connections: int, stream: bool) -> None:
    await asyncio.gather(
        *(client(port, count // connections, stream) for _ in range(connections))
    )


def measure(kind: str, count: int) -> dict[str, float | str]:
    cores = sorted(os.sched_getaffinity(0))
    apart = len(cores) > 1
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    token_s = 0.005 if kind == "paced" else 0.0
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, token_s, cores[0] if apart else None), daemon=True
    )
    server.start()
    if apart:
        os.sched_setaffinity(0, {cores[1]})
    port, pid = ours.recv(), server.pid
    assert pid is not None
    connections, stream = CONNECTIONS[kind], kind != "json"
    uvloop.run(load(port, connections * 4, connections, stream))  # warm
    done = count // connections * connections
    before, began = cpu_s(pid), time.perf_counter()
    uvloop.run(load(port, done, connections, stream))
    seconds, cpu = time.perf_counter() - began, cpu_s(pid) - before
    server.terminate()
    server.join()
    if apart:
        os.sched_setaffinity(0, set(cores))
    return {"kind": kind, "requests": done, "per_s": done / seconds, "cpu_ms": cpu / done * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=40_000, help="JSON requests")
    parser.add_argument("--streams", type=int, default=12_800, help="streams of 16 tokens")
    asked = parser.parse_args()
    rows = []
    for kind, count in (
        ("json", asked.requests), ("stream", asked.streams), ("paced", asked.streams)
    ):  # fmt: skip
        row = measure(kind, count)
        goal = GOALS_MS["json" if kind == "json" else "stream"]
        share = float(row["cpu_ms"]) / goal
        print(f"{kind:<8} {row['per_s']:>8.0f} req/s  {row['cpu_ms']:.3f} CPU ms a request  "
              f"({share:.0%} of the goal of {goal:.2f})")  # fmt: skip
        rows.append(row)
    print(json.dumps({"bench": "gateway", "tokens": TOKENS, "rows": rows}))


if __name__ == "__main__":
    main()
