"""The gateway over real sockets: a scripted desk behind it, OpenAI's client and raw bytes ahead."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvloop

import kvasir
from kvasir.core.errors import ConfigError
from kvasir.core.specs import LimitsSpec
from kvasir.gateway.app import make_app
from kvasir.gateway.fake import FakeDesk, FakeText
from kvasir.gateway.port import Ask, FailPiece, Piece, PlacedPiece
from kvasir.gateway.serve import listen, serve_http
from kvasir.gateway.tokenize import TextModel
from kvasir.observe.metrics import Metrics

pytestmark = pytest.mark.timeout(30)

HOST = "127.0.0.1"
TINY = Path(kvasir.__file__).parent / "models" / "tiny"
SCRIPT = tuple(b"Hello, world!")
USER = [{"role": "user", "content": "hi"}]
LONG = 3600.0  # seconds: a stage that does not end by itself


@contextlib.contextmanager
def served(desk: FakeDesk, limits: LimitsSpec | None = None) -> Iterator[int]:
    """A server in a thread of its own, on a free port; stopped at the end, its errors raised."""
    bound: list[int] = []
    is_bound = threading.Event()
    failed: list[BaseException] = []
    stop: list[Callable[[], None]] = []

    def on_bound(port: int) -> None:
        bound.append(port)
        is_bound.set()

    async def main() -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        stop.append(lambda: loop.call_soon_threadsafe(task.cancel))
        app = make_app(desk, Metrics(["fake"]), limits or LimitsSpec())
        with contextlib.suppress(asyncio.CancelledError):
            await serve_http(app, HOST, 0, on_bound=on_bound, grace_s=1)

    def run() -> None:
        try:
            uvloop.run(main())
        except BaseException as error:
            failed.append(error)
        finally:
            is_bound.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    is_bound.wait()
    try:
        if bound:
            yield bound[0]
    finally:
        stop[0]()
        thread.join()
    if failed:
        raise failed[0]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeDesk, int]]:
    desk = FakeDesk(FakeText(), SCRIPT)
    with served(desk) as bound:
        yield desk, bound


@pytest.fixture
def desk(shared: tuple[FakeDesk, int]) -> FakeDesk:
    """The desk behind `port`, with nothing seen yet."""
    for seen in (shared[0].asks, shared[0].cancelled, shared[0].ended, shared[0].stopped):
        seen.clear()
    return shared[0]


@pytest.fixture
def port(shared: tuple[FakeDesk, int]) -> int:
    return shared[1]


@contextlib.contextmanager
def client_of(port: int) -> Iterator[openai.OpenAI]:
    url = f"http://{HOST}:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def eventually(condition: Callable[[], bool]) -> None:
    """The test's own time limit bounds the wait."""
    while not condition():
        time.sleep(0.002)


def post(port: int, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://{HOST}:{port}{path}"
    return httpx.post(url, content=content, headers=headers, timeout=30)


def get(port: int, path: str) -> httpx.Response:
    return httpx.get(f"http://{HOST}:{port}{path}", timeout=30)


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a whole stream, which ends with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def send(port: int, raw: bytes) -> socket.socket:
    sock = socket.create_connection((HOST, port))
    sock.sendall(raw)
    return sock


def read_reply(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One response with a content-length."""
    with sock.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        return status, headers, file.read(int(headers.get("content-length", 0)))


def raw_post(path: str, body: bytes, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {HOST}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chat_body(**more: Any) -> bytes:
    return json.dumps({"model": "fake", "messages": USER, **more}).encode()


# --- OpenAI's own client ----------------------------------------------------------------------


def test_chat(port: int, desk: FakeDesk) -> None:
    with client_of(port) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="fake", messages=USER, temperature=0, max_tokens=50
        )
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (8, 13, 21)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert answer.id == "chatcmpl-" + raw.headers["x-request-id"]
    assert raw.headers["x-kvasir-path"] == "disaggregated"
    assert desk.ended == [desk.asks[0].request_id]


def test_chat_stream_with_usage(port: int) -> None:
    with client_of(port) as client:
        chunks = list(
            client.chat.completions.create(
                model="fake", messages=USER, max_tokens=5, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    *tokens, last, usage = chunks
    assert [c.choices[0].delta.content for c in tokens] == list("Hello")
    assert tokens[0].choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (8, 5)
    assert all(c.usage is None for c in [*tokens, last])
    assert len({c.id for c in chunks}) == 1


def test_completion_with_token_ids(port: int, desk: FakeDesk) -> None:
    with client_of(port) as client:
        answer = client.completions.create(
            model="fake", prompt=[5, 6, 7], max_tokens=3, extra_body={"return_token_ids": True}
        )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("Hel", "length")
    assert choice.token_ids == list(SCRIPT[:3])
    assert choice.prompt_token_ids == [5, 6, 7]
    assert desk.asks[0].tokens == (5, 6, 7)


def test_an_unknown_model_is_the_clients_not_found(port: int) -> None:
    with client_of(port) as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="fale", messages=USER)
    assert caught.value.code == "model_not_found"
    assert "nearest: fake" in caught.value.message


def test_models(port: int) -> None:
    with client_of(port) as client:
        (card,) = client.models.list().data
        assert (card.id, card.owned_by) == ("fake", "kvasir")
        assert client.models.retrieve("fake").id == "fake"
        with pytest.raises(openai.NotFoundError, match="no model 'org/other'"):
            client.models.retrieve("org/other")


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (FailPiece(429, "the queue is full", 2.0), openai.RateLimitError),
        (FailPiece(503, "no decode worker"), openai.InternalServerError),
        (FailPiece(400, "no"), openai.BadRequestError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_declined(
    fail: FailPiece, error: type[openai.APIStatusError], stream: bool
) -> None:
    with served(FakeDesk(FakeText(), SCRIPT, fail=fail)) as port, client_of(port) as client:
        with pytest.raises(error, match=fail.reason) as caught:
            client.chat.completions.create(model="fake", messages=USER, stream=stream)
        assert caught.value.status_code == fail.status
        after = caught.value.response.headers.get("retry-after")
        assert after == {429: "2", 503: "1", 400: None}[fail.status]


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("bundle", [1, 4])
def test_one_event_a_token_and_one_more_with_the_reason(path: str, bundle: int) -> None:
    with served(FakeDesk(FakeText(), SCRIPT, bundle=bundle)) as port:
        body = {"model": "fake", "prompt": "a", "messages": USER, "stream": True, "max_tokens": 50}
        events = events_of(post(port, path, body))
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * len(SCRIPT) + ["stop"]
    assert all("usage" not in event for event in events)


def test_one_event_a_token_also_when_a_character_has_several() -> None:
    text = TextModel.load(TINY)
    ids = asyncio.run(text.encode("a€🙂!", special=False))
    assert len(ids) > len("a€🙂!")
    with served(FakeDesk(text, ids)) as port:
        body = {"model": "fake", "prompt": "a", "stream": True, "return_token_ids": True}
        *events, last = events_of(post(port, "/v1/completions", {**body, "max_tokens": 50}))
        whole = post(port, "/v1/completions", {"model": "fake", "prompt": "a", "max_tokens": 50})
    assert [event["choices"][0]["token_ids"] for event in events] == [[i] for i in ids]
    parts = [event["choices"][0]["text"] for event in [*events, last]]
    assert "".join(parts) == whole.json()["choices"][0]["text"] == "a€🙂!"
    assert "" in parts[:-1]
    assert not any("\ufffd" in part for part in parts)


def test_text_still_held_back_comes_with_the_reason() -> None:
    text = TextModel.load(TINY)
    ids = asyncio.run(text.encode("a€", special=False))[:-1]
    with served(FakeDesk(text, ids)) as port:
        body = {"model": "fake", "prompt": "a", "stream": True, "max_tokens": 50}
        *events, last = events_of(post(port, "/v1/completions", body))
    assert [event["choices"][0]["text"] for event in events] == ["a", "", ""]
    assert last["choices"][0]["text"] == "\ufffd"


def test_tokens_leave_at_once_and_headers_before_them() -> None:
    with served(FakeDesk(FakeText(), SCRIPT, first_s=0.1, token_s=0.05)) as port:
        body = {"model": "fake", "messages": USER, "max_tokens": 4, "stream": True}
        url = f"http://{HOST}:{port}/v1/chat/completions"
        began, at = time.perf_counter(), []
        with httpx.stream("POST", url, json=body, timeout=30) as response:
            assert response.headers["x-kvasir-path"] == "disaggregated"
            headers_s = time.perf_counter() - began
            for line in response.iter_lines():
                if '"finish_reason":null' in line:
                    at.append(time.perf_counter())
    assert headers_s < at[0] - began
    assert len(at) == 4
    gaps = [later - earlier for earlier, later in pairwise(at)]
    assert min(gaps) > 0.02, gaps


def test_the_plan_is_in_the_header() -> None:
    with served(FakeDesk(FakeText(), SCRIPT, path="aggregated")) as port:
        for stream in (False, True):
            reply = post(port, "/v1/chat/completions", chat_body(stream=stream))
            assert reply.headers["x-kvasir-path"] == "aggregated"


@pytest.mark.parametrize("usage", [False, True])
def test_timing_comes_with_the_last_event_and_with_the_whole_answer(port: int, usage: bool) -> None:
    more = {"kvasir": {"timing": True}, "stream_options": {"include_usage": usage}}
    events = events_of(post(port, "/v1/chat/completions", chat_body(stream=True, **more)))
    whole = post(port, "/v1/chat/completions", chat_body(**more)).json()
    assert ["kvasir" in event for event in events] == [False] * (len(events) - 1) + [True]
    for block in (events[-1]["kvasir"], whole["kvasir"]):
        assert block["path"] == "disaggregated"
        assert block["workers"] == {"prefill": "prefill-0", "decode": "decode-0"}
        assert (block["bytes"], block["transport"], block["attempts"]) == (4096, "shm", 1)
        assert {"queue_s", "prefill_s", "transfer_s", "first_step_s", "second_token_delay_s"} <= (
            block.keys()
        )


def test_a_stop_string_ends_the_request(desk: FakeDesk, port: int) -> None:
    body = {"model": "fake", "prompt": "a", "max_tokens": 50, "stop": [", w"]}
    whole = post(port, "/v1/completions", body).json()
    events = events_of(post(port, "/v1/completions", {**body, "stream": True}))
    assert whole["choices"][0]["text"] == "Hello"
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(events) - 1 == whole["usage"]["completion_tokens"] == len("Hello, w")
    assert desk.stopped == [ask.request_id for ask in desk.asks]


def test_several_prompts_are_several_choices(port: int, desk: FakeDesk) -> None:
    body = {"model": "fake", "prompt": ["a", [5, 6]], "max_tokens": 3}
    whole = post(port, "/v1/completions", body).json()
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [(0, "Hel"), (1, "Hel")]
    assert whole["usage"]["prompt_tokens"] == 3
    assert whole["usage"]["completion_tokens"] == 6
    more = {"stream": True, "stream_options": {"include_usage": True}, "kvasir": {"timing": True}}
    *events, usage = events_of(post(port, "/v1/completions", {**body, **more}))
    for index in (0, 1):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "Hel"
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "length"]
    assert usage["usage"]["total_tokens"] == 9
    assert len(usage["kvasir"]) == 2
    assert len(desk.ended) == 4


def test_a_failure_in_the_middle_is_an_event_and_the_end() -> None:
    fail = FailPiece(503, "all attempts were used up")
    with served(FakeDesk(FakeText(), SCRIPT, fail=fail, fail_at=2)) as port:
        reply = post(port, "/v1/chat/completions", chat_body(stream=True))
        *tokens, error, rest = reply.text.split("\n\n")
        assert (reply.status_code, len(tokens), rest) == (200, 2, "")
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == fail.reason
        whole = post(port, "/v1/chat/completions", chat_body())
        assert (whole.status_code, whole.json()["error"]["type"]) == (503, "service_unavailable")
        with client_of(port) as client, pytest.raises(openai.APIError, match=fail.reason):
            list(client.chat.completions.create(model="fake", messages=USER, stream=True))


def test_a_bug_is_a_plain_error_without_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(FakeDesk):
        async def pieces(self, ask: Ask) -> AsyncGenerator[Piece, None]:
            if ask.max_tokens > 1:
                yield PlacedPiece("aggregated", "w", "w")
            raise RuntimeError("secret detail")

        submit = pieces

    with served(Buggy(FakeText())) as port:
        early = post(port, "/v1/chat/completions", chat_body(max_tokens=1, stream=True))
        late = post(port, "/v1/chat/completions", chat_body(stream=True))
    assert early.status_code == 500
    assert early.json()["error"]["type"] == "internal_error"
    assert late.text.startswith('data: {"error":')
    for shown in (early.text, late.text):
        assert "secret" not in shown
        assert "Traceback" not in shown
    assert "secret detail" in caplog.text


# --- hang-ups ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [{"placed_s": LONG}, {"first_s": LONG}, {"token_s": LONG}],
    ids=["before a place", "before the first token", "mid-stream"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_hang_up_cancels_the_request(stage: dict[str, float], stream: bool) -> None:
    desk = FakeDesk(FakeText(), SCRIPT, **stage)
    with served(desk) as port:
        sock = send(port, raw_post("/v1/chat/completions", chat_body(stream=stream)))
        eventually(lambda: bool(desk.asks))
        if stream and "placed_s" not in stage:
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert not desk.cancelled
        sock.close()
        eventually(lambda: bool(desk.cancelled))
    assert desk.cancelled == [desk.asks[0].request_id]
    assert not desk.ended


def test_a_hang_up_cancels_every_prompt_of_a_request() -> None:
    desk = FakeDesk(FakeText(), SCRIPT, token_s=LONG)
    body = json.dumps({"model": "fake", "prompt": ["a", "b", "c"], "stream": True}).encode()
    with served(desk) as port:
        sock = send(port, raw_post("/v1/completions", body))
        eventually(lambda: len(desk.asks) == 3)
        sock.close()
        eventually(lambda: len(desk.cancelled) == 3)
    assert set(desk.cancelled) == {ask.request_id for ask in desk.asks}


def test_a_hang_up_within_the_body_asks_nothing(desk: FakeDesk, port: int) -> None:
    sock = send(port, raw_post("/v1/chat/completions", chat_body())[:-5])
    sock.close()
    assert post(port, "/v1/chat/completions", chat_body()).status_code == 200
    assert len(desk.asks) == 1


# --- what clients get wrong -------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_no_json(port: int, path: str) -> None:
    with send(port, raw_post(path, b"{not json")) as sock:
        status, headers, body = read_reply(sock)
        assert (status, headers["content-type"]) == (400, "application/json")
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        sock.sendall(raw_post(path, chat_body(prompt="a")))
        assert read_reply(sock)[0] == 200


def test_a_body_of_ten_megabytes_is_refused_and_the_connection_goes_on(port: int) -> None:
    limit = LimitsSpec().body_bytes_max
    with send(port, raw_post("/v1/chat/completions", b"x" * 10_000_000)) as sock:
        status, _, body = read_reply(sock)
        assert status == 413
        assert json.loads(body)["error"]["type"] == "request_too_large"
        sock.sendall(raw_post("/v1/chat/completions", chat_body()))
        assert read_reply(sock)[0] == 200
    assert limit < 10_000_000


def test_a_declared_length_over_the_limit_is_refused_unread(port: int) -> None:
    head = raw_post("/v1/completions", b"").replace(b"Length: 0", b"Length: 99999999999")
    with send(port, head) as sock:
        status, headers, _ = read_reply(sock)
        assert (status, headers["connection"]) == (413, "close")


def test_an_undeclared_body_is_limited_while_it_is_read(port: int) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with send(port, head.encode()) as sock:
        for _ in range(10):
            sock.sendall(b"F4240\r\n" + b"x" * 1_000_000 + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        assert read_reply(sock)[0] == 413


def test_a_body_in_parts_is_one_body(port: int) -> None:
    raw = raw_post("/v1/chat/completions", chat_body())
    with send(port, raw[:-20]) as sock:
        time.sleep(0.02)
        sock.sendall(raw[-20:])
        assert read_reply(sock)[0] == 200


def test_a_wrong_path_or_method_is_json(port: int) -> None:
    missing = get(port, "/v1/chat/completion")
    assert missing.status_code == 404
    assert "nearest: /v1/chat/completions" in missing.json()["error"]["message"]
    wrong = get(port, "/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "method_not_allowed"
    assert post(port, "/health", b"").status_code == 405


def test_what_is_over_the_context_is_refused_with_both_numbers(port: int) -> None:
    body = {"model": "fake", "prompt": "x" * 4000, "max_tokens": 97}
    error = post(port, "/v1/completions", body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "4097" in error["message"]
    assert "4096" in error["message"]
    assert len(error["message"].splitlines()) <= 5


def test_request_ids(port: int, desk: FakeDesk) -> None:
    path = "/v1/chat/completions"
    for _ in range(2):
        own = post(port, path, chat_body(), **{"x-request-id": "mine-1"})
        assert own.headers["x-request-id"] == "mine-1"
        assert own.json()["id"] == "chatcmpl-mine-1"
    assert all(ask.request_id.startswith("mine-1-") for ask in desk.asks)
    assert len({ask.request_id for ask in desk.asks}) == 2
    bad = post(port, path, chat_body(), **{"x-request-id": "x" * 129})
    assert 0 < len(bad.headers["x-request-id"]) <= 128
    assert bad.headers["x-request-id"] != post(port, path, b"{").headers["x-request-id"]
    assert post(port, path, b"{", **{"x-request-id": "e"}).headers["x-request-id"] == "e"
    assert "x-request-id" in get(port, "/health").headers


# --- the small routes -------------------------------------------------------------------------


def test_health_is_good_only_when_every_worker_is_ready(port: int) -> None:
    good = get(port, "/health")
    assert good.status_code == 200
    assert good.json() == {
        "status": "ready", "workers": {"prefill-0": "ready", "decode-0": "ready"},
    }  # fmt: skip
    with served(FakeDesk(FakeText(), workers={"p": "ready", "d": "starting"})) as other:
        bad = get(other, "/health")
    assert (bad.status_code, bad.json()["workers"]["d"]) == (503, "starting")


def test_version(port: int) -> None:
    assert get(port, "/version").json() == {"version": kvasir.__version__}


def test_metrics_count_what_clients_saw() -> None:
    with served(FakeDesk(FakeText(), SCRIPT)) as port:
        post(port, "/v1/chat/completions", chat_body(stream=True, max_tokens=5))
        page = get(port, "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    labels = 'model="fake",path="disaggregated"'
    assert f"kvasir_time_to_first_token_seconds_count{{{labels}}} 1.0" in page.text
    assert "kvasir_inter_token_latency_seconds_count 4.0" in page.text


def test_metrics_answer_head(port: int) -> None:
    with send(port, f"HEAD /metrics HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()) as sock:
        reply = sock.recv(1 << 16)
        assert reply.startswith(b"HTTP/1.1 200")
        assert reply.endswith(b"\r\n\r\n")


# --- the server -------------------------------------------------------------------------------


def test_a_port_in_use_is_a_config_error() -> None:
    with listen(HOST, 0) as sock:
        taken = sock.getsockname()[1]
        with pytest.raises(ConfigError, match="already in use") as caught, listen(HOST, taken):
            pass
    assert f"{HOST}:{taken}" in str(caught.value)
    assert "--port" in str(caught.value)


def test_an_address_that_is_not_ours_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="listen"), listen("192.0.2.1", 0):
        pass
    with pytest.raises(ConfigError, match="no such address"), listen("no.such.host.invalid", 0):
        pass


def test_a_stop_lets_answers_end() -> None:
    desk = FakeDesk(FakeText(), SCRIPT, token_s=0.02)
    got: list[httpx.Response] = []
    with served(desk) as port:
        asking = threading.Thread(
            target=lambda: got.append(post(port, "/v1/chat/completions", chat_body(stream=True))),
            daemon=True,
        )
        asking.start()
        eventually(lambda: bool(desk.asks))
    asking.join()
    assert len(events_of(got[0])) == len(SCRIPT) + 1


def test_a_stop_cuts_answers_that_do_not_end() -> None:
    desk = FakeDesk(FakeText(), SCRIPT, token_s=LONG)
    with served(desk) as port:
        sock = send(port, raw_post("/v1/chat/completions", chat_body(stream=True)))
        eventually(lambda: bool(desk.asks))
    assert desk.cancelled == [desk.asks[0].request_id]
    with sock.makefile("rb") as file:
        assert b"the server is stopping" in file.read()
    sock.close()
