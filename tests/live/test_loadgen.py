"""The load generator against a small server of its own: latencies, errors, both dialects of chat.

The server is told by each request's prompt how to answer, and waits on a clock of the test.
"""

import asyncio
import itertools
import json
import math
import re
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.specs import SloSpec
from kvasir.measure.client import Chunks, HttpError, SseParser, parse_base_url
from kvasir.measure.loadgen import Load, Target, fire
from kvasir.measure.shots import Shot, arrival_times, prompt_of_blocks, random_shots

pytestmark = pytest.mark.timeout(30)

Body = dict[str, Any]
Write = Callable[[bytes], Awaitable[None]]
Handler = Callable[[Body, Write], Awaitable[None]]


class ManualClock:
    """A clock that moves when somebody sleeps on it, so that latencies are exact."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


class Server:
    """HTTP/1.1 over a socket on a free port; `requests` and `connections` are what it saw."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[tuple[str, dict[str, str], Body]] = []
        self.connections = self.busy = self.busy_max = 0
        self.tasks: list[asyncio.Task[Any]] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        try:
            while line := await reader.readline():
                headers: dict[str, str] = {}
                while (row := (await reader.readline()).decode().strip()) != "":
                    name, _, value = row.partition(":")
                    headers[name.lower()] = value.strip()
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                self.requests.append((line.decode().split()[1], headers, body))
                self.busy += 1
                self.busy_max = max(self.busy_max, self.busy)

                async def write(data: bytes) -> None:
                    writer.write(data)
                    await writer.drain()

                await self.handler(body, write)
                self.busy -= 1
        except (ConnectionError, CutError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


class CutError(Exception):
    """The handler wants the connection closed."""


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Server]:
    server = Server(handler)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        for task in server.tasks:
            task.cancel()
        await asyncio.gather(*server.tasks)
        await listener.wait_closed()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**content: Any) -> bytes:
    return chunk(b"data: " + json.dumps(content).encode() + b"\n\n")


def token(text: str = "a", finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])


def usage(output: int, prompt: int = 5, **more: Any) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output}
    return event(choices=[], usage=counts | {"prompt_tokens_details": {"cached_tokens": 2}}, **more)


DONE = chunk(b"data: [DONE]\n\n") + END


def timed(clock: ManualClock, ttft_s: float, gaps: list[float], **more: Any) -> Handler:
    """A completion whose tokens come at exact times of `clock`."""

    async def answer(body: Body, write: Write) -> None:
        clock.now += ttft_s
        await write(HEAD + token())
        for gap in gaps:
            await settle()
            clock.now += gap
            await write(token())
        await write(token("", "length") + usage(1 + len(gaps), **more) + DONE)

    return answer


async def settle() -> None:
    """Let the client read what was written before the clock moves on."""
    for _ in range(20):
        await asyncio.sleep(0.001)


async def ask(server: Server, count: int = 1, **more: Any) -> Load:
    """`count` requests, all at once."""
    target = Target(base_url=server.url, model="m", **more)
    text = target.endpoint == "chat"
    shots = random_shots(count, input_tokens=4, output_tokens=9, text=text)
    return await fire(target, shots)


def one_answer(handler: Handler, **more: Any) -> Load:
    async def run() -> Load:
        async with serving(handler) as server:
            return await ask(server, **more)

    return asyncio.run(run())


# --- what is measured -------------------------------------------------------------------------


def test_latencies_follow_the_clock() -> None:
    async def run() -> Load:
        clock = ManualClock()
        async with serving(timed(clock, 0.5, [0.25, 0.125, 0.125])) as server:
            target = Target(base_url=server.url, model="m")
            return await fire(target, [Shot(0.0, (1, 2, 3), 3, 4)], clock=clock, sleep=clock.sleep)

    load = asyncio.run(run())
    (outcome,) = load.outcomes
    assert outcome.ok, outcome.error
    assert outcome.ttft_s == 0.5
    assert [r.first_s for r in load.itl] == [0.25, 0.125, 0.125]
    assert outcome.e2e_s == 1.0
    assert outcome.tpot_s == 0.5 / 3
    assert outcome.itl_p99_s == pytest.approx(0.2475)
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (5, 4, 2)
    assert load.duration_s == 1.0 and load.notes == ()
    summary = load.summary(SloSpec(ttft_s=0.5, tpot_s=0.2), gpus=2)
    assert summary.completed == 1 and summary.goodput_per_gpu == 0.5
    assert summary.peak_concurrency == 1 and summary.peak_output_tokens_per_s == 3


def test_the_request_asks_for_what_is_needed() -> None:
    async def run() -> Server:
        async def answer(body: Body, write: Write) -> None:
            await write(HEAD + token("a", "length") + usage(1) + DONE)

        async with serving(answer) as server:
            await ask(
                server,
                timing=True,
                headers={"Authorization": "Bearer k"},
                extra_body={"top_p": 0.5},
            )
            return server

    ((path, headers, body),) = asyncio.run(run()).requests
    assert path == "/v1/completions" and headers["authorization"] == "Bearer k"
    assert len(body["prompt"]) == 4 and all(isinstance(t, int) for t in body["prompt"])
    expected = {
        "model": "m", "max_tokens": 9, "stream": True, "temperature": 0.0, "ignore_eos": True,
        "stream_options": {"include_usage": True}, "kvasir": {"timing": True}, "top_p": 0.5,
    }  # fmt: skip
    assert {k: body[k] for k in expected} == expected


def test_the_kvasir_block_gives_the_split() -> None:
    block = {
        "path": "disaggregated", "workers": {"prefill": "p0", "decode": "d0"}, "attempts": 1,
        "queue_s": 0.1, "prefill_s": 0.2, "transfer_s": 0.3, "first_step_s": None, "ttft_s": 0.7,
        "second_token_delay_s": 0.04, "bytes": 4096, "transport": "shm",
    }  # fmt: skip

    async def answer(body: Body, write: Write) -> None:
        await write(HEAD + token() + token("", "stop") + usage(1, kvasir=block) + DONE)

    load = one_answer(answer, timing=True)
    (outcome,) = load.outcomes
    assert outcome.path == "disaggregated" and outcome.first_step_s is None
    assert (outcome.queue_s, outcome.prefill_s, outcome.transfer_s) == (0.1, 0.2, 0.3)
    summary = load.summary(first_token="prefill")
    assert summary.bytes_by_tier == {"shm": 4096} and summary.first_token == "prefill"
    assert summary.split is not None and summary.split.second_token_delay_s == 0.04


def chat(delta: dict[str, str | None], finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


@pytest.mark.parametrize(
    ("events", "tokens"),
    [
        # a role, then a token an event; the last token closes
        ([chat({"role": "assistant", "content": ""}), chat({"content": "a"}),
          chat({"content": "b"}, "length")], 2),
        # the role comes with the first token, whose text is held back; the end is no token
        ([chat({"role": "assistant", "content": ""}), chat({"content": "ab"}),
          chat({}, "length")], 2),
        # text held back to the end comes with the finish reason, and is no token of its own
        ([chat({"role": "assistant", "content": "a"}), chat({"content": ""}),
          chat({"content": "b"}, "length")], 2),
        # thoughts are tokens
        ([chat({"role": "assistant", "content": None}), chat({"reasoning_content": "hm"}),
          chat({"content": "a"}), chat({}, "stop")], 2),
    ],
)  # fmt: skip
def test_dialects_of_chat(events: list[bytes], tokens: int) -> None:
    async def answer(body: Body, write: Write) -> None:
        assert body["messages"][0]["role"] == "user"
        await write(HEAD + b"".join(events) + usage(tokens) + DONE)

    load = one_answer(answer, endpoint="chat")
    (outcome,) = load.outcomes
    assert outcome.ok, outcome.error
    assert outcome.output_tokens == tokens
    assert load.itl.samples == tokens - 1


def test_without_usage_events_are_counted() -> None:
    async def answer(body: Body, write: Write) -> None:
        await write(HEAD + token() + token() + token("b", "stop") + DONE)

    (outcome,) = one_answer(answer).outcomes
    assert (outcome.prompt_tokens, outcome.output_tokens) == (4, 3)


# --- what goes wrong --------------------------------------------------------------------------


async def refuse(body: Body, write: Write) -> None:
    text = b'{"error": {"message": "try later"}}'
    await write(b"HTTP/1.1 429 Too Many\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))


async def cut_stream(body: Body, write: Write) -> None:
    await write(HEAD + token())
    raise CutError


async def stop_early(body: Body, write: Write) -> None:
    await write(HEAD + token() + DONE)


async def fail_inside(body: Body, write: Write) -> None:
    await write(HEAD + token() + event(error={"message": "worker lost"}) + DONE)


async def no_token(body: Body, write: Write) -> None:
    await write(HEAD + token("", "stop") + usage(0) + DONE)


async def nonsense(body: Body, write: Write) -> None:
    await write(b"SSH-2.0-x\r\n")
    raise CutError


async def bad_event(body: Body, write: Write) -> None:
    await write(HEAD + chunk(b"data: {nope\n\n") + DONE)


async def bad_chunk(body: Body, write: Write) -> None:
    await write(HEAD + b"-5\r\n")
    raise CutError


async def hang(body: Body, write: Write) -> None:
    await write(HEAD + token())
    await asyncio.sleep(20)


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (refuse, "HTTP 429: .*try later"),
        (cut_stream, "closed"),
        (stop_early, "ended before the answer did"),
        (fail_inside, "worker lost"),
        (no_token, "no token came"),
        (nonsense, "not HTTP/1.1"),
        (bad_event, "cannot be read"),
        (bad_chunk, "not a length"),
        (hang, "no end after 0.2 s"),
    ],
)
def test_a_failure_is_an_outcome(handler: Handler, said: str) -> None:
    async def run() -> Load:
        async with serving(handler) as server, asyncio.timeout(5):
            return await ask(server, timeout_s=0.2 if handler is hang else 10.0)

    load = asyncio.run(run())
    (outcome,) = load.outcomes
    assert not outcome.ok
    summary = load.summary(SloSpec())
    assert summary.failed == 1 and summary.slo is not None and summary.slo.good == 0
    (error,) = summary.errors
    assert re.search(said, error), error
    assert load.itl.samples == 0


def test_nobody_listens() -> None:
    async def run() -> Load:
        async with serving(refuse) as server:
            url = server.url
        return await fire(Target(base_url=url, model="m"), [Shot(0.0, "x", 1, 1)])

    (outcome,) = asyncio.run(run()).outcomes
    assert not outcome.ok and outcome.error.startswith("no connection: ")


def test_a_bad_target_is_refused_before_anything_is_sent() -> None:
    for target, prompt, said in (
        (Target(base_url="localhost:8000", model="m"), "x", "not a base URL"),
        (Target(base_url="http://h:port", model="m"), "x", "not a URL"),
        (Target(base_url="http://h", model="m", endpoint="chat"), (1, 2), "text prompts"),
        (Target(base_url="http://h", model="m", headers={"a": "b\r\nc: d"}), "x", "line break"),
    ):
        with pytest.raises(ConfigError, match=said):
            asyncio.run(fire(target, [Shot(0.0, prompt, 1, 1)]))


# --- connections and pace ---------------------------------------------------------------------


async def quick(body: Body, write: Write) -> None:
    await asyncio.sleep(0.01)
    await write(HEAD + token() + token("b", "stop") + usage(2) + DONE)


def test_max_concurrency_holds_and_connections_are_kept() -> None:
    async def run() -> tuple[Server, Load]:
        async with serving(quick) as server:
            target = Target(base_url=server.url, model="m")
            shots = random_shots(30, input_tokens=2, output_tokens=2)
            return server, await fire(target, shots, max_concurrency=3)

    server, load = asyncio.run(run())
    assert server.busy_max == 3 and server.connections == 3 and len(server.requests) == 30
    summary = load.summary(max_concurrency=3)
    assert summary.completed == 30 and summary.peak_concurrency == 3
    assert summary.input_tokens == 150  # as the server counted


def test_a_connection_closed_meanwhile_is_replaced() -> None:
    """Both ways: the client sees the end before it sends, or only in place of an answer."""

    async def run(handler: Handler) -> Load:
        async with serving(handler) as server:
            target = Target(base_url=server.url, model="m")
            shots = random_shots(5, input_tokens=2, output_tokens=2)
            return await fire(target, shots, max_concurrency=1)

    async def close_after(body: Body, write: Write) -> None:
        await quick(body, write)
        raise CutError

    calls = itertools.count()

    async def close_instead(body: Body, write: Write) -> None:
        if next(calls) % 2:
            raise CutError
        await quick(body, write)

    assert asyncio.run(run(close_after)).summary().completed == 5
    assert asyncio.run(run(close_instead)).summary().completed == 5
    assert next(calls) == 9  # four requests were sent twice


def test_bodies_with_a_length_and_bodies_to_the_end() -> None:
    events = b"data: " + json.dumps({"choices": [{"text": "a", "finish_reason": "stop"}]}).encode()

    async def with_length(body: Body, write: Write) -> None:
        data = events + b"\r\n\r\n"
        head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"
        await write(head + b"Content-Length: %d\r\n\r\n%b" % (len(data), data))

    async def to_the_end(body: Body, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\n\r\n" + events + b"\n\n")
        raise CutError

    for handler in (with_length, to_the_end):
        (outcome,) = one_answer(handler).outcomes
        assert outcome.ok, outcome.error


def test_open_loop_sends_on_time() -> None:
    """The server never answers in time for the next one; nobody waits for it."""

    async def run() -> tuple[list[float], Load]:
        clock = ManualClock()
        seen: list[float] = []

        async def answer(body: Body, write: Write) -> None:
            seen.append(clock.now)
            while len(seen) < 3:
                await asyncio.sleep(0.001)
            await write(HEAD + token() + token("", "stop") + usage(1) + DONE)

        async def sleep(seconds: float) -> None:
            await settle()
            clock.now += seconds

        async with serving(answer) as server:
            target = Target(base_url=server.url, model="m")
            shots = [Shot(t, (1,), 1, 1) for t in (0.5, 2.0, 2.25)]
            return seen, await fire(target, shots, clock=clock, sleep=sleep)

    seen, load = asyncio.run(run())
    assert seen == [100.5, 102.0, 102.25]
    assert [o.start_s for o in load.outcomes] == [100.5, 102.0, 102.25]


def test_a_late_client_says_so() -> None:
    async def run() -> Load:
        clock = ManualClock()

        async def oversleep(seconds: float) -> None:
            clock.now += seconds + 0.5

        async with serving(quick) as server:
            target = Target(base_url=server.url, model="m")
            return await fire(target, [Shot(1.0, (1,), 1, 1)], clock=clock, sleep=oversleep)

    assert "the client sent late (p99 500 ms)" in asyncio.run(run()).notes[0]


# --- shots ------------------------------------------------------------------------------------


def test_random_shots() -> None:
    kind = {"input_tokens": 100, "output_tokens": 10, "range_ratio": 0.2, "prefix_tokens": 7}
    shots = random_shots(50, rate=5.0, seed=3, **kind)  # type: ignore[arg-type]
    assert shots == random_shots(50, rate=5.0, seed=3, **kind)  # type: ignore[arg-type]
    assert len({s.prompt[:7] for s in shots}) == 1 and len({s.prompt for s in shots}) == 50
    assert all(len(s.prompt) == s.prompt_tokens for s in shots)
    assert {87 <= s.prompt_tokens <= 127 and 8 <= s.output_tokens <= 12 for s in shots} == {True}
    assert len({s.prompt_tokens for s in shots}) > 10
    assert shots[-1].at_s == pytest.approx(10.0)
    words = random_shots(1, input_tokens=6, output_tokens=1, text=True)[0].prompt
    assert isinstance(words, str) and len(words.split()) == 6
    with pytest.raises(ValueError, match="positive"):
        random_shots(1, input_tokens=1, output_tokens=1, rate=0)


@pytest.mark.parametrize(("burstiness", "cv"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_are_gamma(burstiness: float, cv: float) -> None:
    times = arrival_times(20_000, 10.0, burstiness, Random(1))
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.01)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.05)


def test_rates_without_chance() -> None:
    assert arrival_times(3, math.inf, 1.0, Random(1)) == [0.0] * 3
    assert arrival_times(3, 2.0, math.inf, Random(1)) == [0.5, 1.0, 1.5]


def test_equal_blocks_give_equal_tokens() -> None:
    first, second = prompt_of_blocks((1, 2), 16, 30), prompt_of_blocks((1, 3), 16, 20)
    assert len(first) == 30 and len(second) == 20
    assert first[:16] == second[:16] and first[16:20] != second[16:20]


# --- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_sse_in_pieces_of_any_size(size: int) -> None:
    text = b": hello\r\ndata: 1\r\n\r\nevent: x\ndata:2\ndata: 3\n\nid: 4\n\n\ndata: 5\n"
    parser = SseParser()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert [e for p in pieces for e in parser.feed(p)] == [b"1", b"2\n3"]
    assert parser.feed(b"\n") == [b"5"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_in_pieces_of_any_size(size: int) -> None:
    coded = b"4\r\nwiki\r\n00C;x=y\r\npedia in\r\n\r\n\r\n0\r\nTrailer: 1\r\n\r\n"
    chunks = Chunks()
    pieces = [chunks.feed(coded[i : i + size]) for i in range(0, len(coded), size)]
    assert b"".join(pieces) == b"wikipedia in\r\n\r\n" and chunks.ended


@pytest.mark.parametrize("coded", [b"-5\r\n", b"x\r\n", b"2\r\nabc\r\n", b"1" * 70_000])
def test_what_is_not_chunked(coded: bytes) -> None:
    with pytest.raises(HttpError):
        Chunks().feed(coded)


def test_an_event_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir.measure.client.EVENT_BYTES_MAX", 100)
    parser = SseParser()
    with pytest.raises(HttpError, match="100 bytes"):
        for _ in range(20):
            parser.feed(b"data: 123456")


@pytest.mark.parametrize(
    ("url", "authority", "port", "path"),
    [
        ("http://h", "h", 80, ""),
        ("https://h/", "h", 443, ""),
        ("http://h:8000/a/", "h:8000", 8000, "/a"),
        ("http://[::1]:80", "[::1]", 80, ""),
    ],
)
def test_base_urls(url: str, authority: str, port: int, path: str) -> None:
    base = parse_base_url(url)
    assert (base.authority, base.port, base.path) == (authority, port, path)
