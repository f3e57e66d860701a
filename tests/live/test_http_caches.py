"""`/v1/caches`, cache markers and API keys over HTTP, in front of a scripted desk."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partialmethod
from typing import Any

import httpx
import openai
import pytest
from starlette.types import ASGIApp

from kvasir.core.errors import RequestError
from kvasir.core.specs import LimitsSpec
from kvasir.core.specs.tenants import CachesSpec, TenantSpec
from kvasir.gateway.app import make_app
from kvasir.gateway.caches import keeps_of, points_of, shared, use_of
from kvasir.gateway.fake import FakeDesk, FakeText
from kvasir.gateway.port import FailPiece, Keeping
from kvasir.gateway.schema import BadField
from kvasir.observe.metrics import Metrics

BOOK = "In the beginning was Ymir, and there was neither sand nor sea. " * 4
CHAT = [{"role": "system", "content": BOOK}]
KEYS = {"ann": "key-of-ann", "bob": "key-of-bob"}
TENANTS = tuple(
    TenantSpec(name=name, keys_sha256=(hashlib.sha256(key.encode()).hexdigest(),))
    for name, key in KEYS.items()
)


class Client:
    """HTTP without a socket, one loop a call."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            async with self.open() as http:
                return await http.request(method, path, **more)

        return asyncio.run(main())

    def open(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://here")

    get, post = partialmethod(ask, "GET"), partialmethod(ask, "POST")
    patch, delete = partialmethod(ask, "PATCH"), partialmethod(ask, "DELETE")


def client(desk: FakeDesk | None = None, **more: Any) -> Client:
    return Client(make_app(desk or FakeDesk(FakeText()), Metrics(["fake"]), LimitsSpec(), **more))


def made(c: Client, **body: Any) -> dict[str, Any]:
    found = c.post("/v1/caches", json={"model": "fake", "messages": CHAT, **body})
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


def said(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    message: str = response.json()["error"]["message"]
    assert 0 < len(message.splitlines()) <= 5
    return message


def test_a_cache_is_made_shown_kept_longer_and_ended() -> None:
    desk = FakeDesk(FakeText())
    c = client(desk)
    one = made(c, ttl=60, name="edda", metadata={"lang": "en"})
    (ask,) = desk.asks
    assert (ask.max_tokens, ask.keeps[0].must, ask.keeps[0].ttl_s) == (1, True, 60)
    assert bytes(ask.tokens).decode() == f"system: {BOOK}"
    assert one["id"].startswith("cache-") and len(one["id"]) == 38
    assert (one["object"], one["status"], one["name"]) == ("cache", "ready", "edda")
    assert one["metadata"] == {"lang": "en"} and one["tokens"] == len(ask.tokens) // 16 * 16
    assert one["expires_at"] - one["created_at"] in (59, 60)
    assert one["usage"]["prompt_tokens"] == len(ask.tokens)

    listed = c.get("/v1/caches").json()["data"]
    assert [x["id"] for x in listed] == [one["id"]]
    assert c.get(f"/v1/caches/{one['id']}").json()["id"] == one["id"]
    longer = c.patch(f"/v1/caches/{one['id']}", json={"ttl": 500}).json()
    assert longer["expires_at"] - one["created_at"] in (499, 500, 501)
    assert c.delete(f"/v1/caches/{one['id']}").json()["deleted"] is True
    assert c.get("/v1/caches").json()["data"] == []
    assert "no such cache" in said(c.get(f"/v1/caches/{one['id']}"), 404)


def test_ids_are_new_each_time() -> None:
    c = client()
    assert len({made(c)["id"] for _ in range(20)}) == 20


def test_a_request_goes_on_from_a_cache_it_names() -> None:
    desk = FakeDesk(FakeText())
    c = client(desk)
    one = made(c)
    chat = {"model": "fake", "cache": one["id"], "messages": [{"role": "user", "content": "Who?"}]}
    assert c.post("/v1/chat/completions", json=chat).status_code == 200
    assert bytes(desk.asks[-1].tokens).decode() == f"system: {BOOK}\nuser: Who?"
    bare = made(c, messages=None, prompt=BOOK)
    more = {"model": "fake", "cache": bare["id"], "prompt": "And then?"}
    assert c.post("/v1/completions", json=more).status_code == 200
    assert bytes(desk.asks[-1].tokens).decode() == BOOK + "And then?"
    wrong = c.post("/v1/chat/completions", json=chat | {"cache": bare["id"]})
    assert "made of a prompt" in said(wrong, 400)
    assert "no such cache" in said(c.post("/v1/completions", json=more | {"cache": "x"}), 404)
    desk.kept.clear()  # their time is over
    assert "no such cache" in said(c.post("/v1/completions", json=more), 404)
    made(c)
    assert len(desk.caches.all_ids()) == 1, "what is over is not remembered"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"ttl": 0}, "ttl must be over 0"),
        ({"ttl": 1e9}, "at most 1000 seconds"),
        ({"prompt": "x"}, "either messages or prompt"),
        ({"messages": None}, "either messages or prompt"),
        ({"messages": [{"role": "user", "content": ""}]}, "too few to keep"),
        ({"messages": None, "prompt": "x" * 5000}, "context of 4096"),
        ({"messages": None, "prompt": [10**6] * 20}, "token id"),
        ({"name": "n" * 200}, "name is over"),
        ({"metadata": {"k": "v" * 600}}, "metadata holds at most"),
        ({"tools": [{}]}, "tools is not supported"),
    ],
)
def test_what_cannot_be_kept_is_said(body: dict[str, Any], words: str) -> None:
    c = client(caches=CachesSpec(ttl_s_max=1000))
    full = {"model": "fake", "messages": CHAT} | body
    assert words in said(c.post("/v1/caches", json=full), 400)


def test_a_refusal_of_the_scheduler_is_the_answer() -> None:
    fail = FailPiece(429, "2 caches are kept already, which is the limit")
    c = client(FakeDesk(FakeText(), fail=fail))
    assert "2 caches" in said(c.post("/v1/caches", json={"model": "fake", "messages": CHAT}), 429)
    assert c.get("/v1/caches").json()["data"] == []


def test_a_cache_that_no_worker_kept_is_not_there() -> None:
    class Never(FakeDesk):
        def retain(self, tenant: str, cache: str, ttl_s: float) -> None:
            self.kept.pop(cache, None)

    c = client(Never(FakeText()))
    found = c.post("/v1/caches", json={"model": "fake", "messages": CHAT})
    assert "no worker could keep it" in said(found, 429)


# --- tenants --------------------------------------------------------------------------------------


def as_(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer ", f"Basic {KEYS['ann']}", "x"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/caches", "/v1/models"])
def test_without_a_tenants_key_nothing_is_served(given: str | None, path: str) -> None:
    c = client(tenants=TENANTS)
    headers = {"authorization": given} if given is not None else {}
    if path == "/v1/models":
        said(c.get(path, headers=headers), 401)
    else:
        body = {"model": "fake", "messages": CHAT}
        said(c.post(path, json=body, headers=headers), 401)


def test_a_tenants_key_names_it_and_no_tenants_means_anybody() -> None:
    desk = FakeDesk(FakeText())
    c = client(desk, tenants=TENANTS)
    body = {"model": "fake", "messages": CHAT}
    for name in KEYS:
        assert c.post("/v1/chat/completions", json=body, headers=as_(name)).status_code == 200
    assert [ask.tenant for ask in desk.asks] == ["ann", "bob"]
    client(desk).post("/v1/chat/completions", json=body, headers={"authorization": "Bearer any"})
    assert desk.asks[-1].tenant == "default"


def test_a_tenant_sees_its_own_caches_and_of_others_not_that_they_are() -> None:
    c = client(tenants=TENANTS)
    body = {"model": "fake", "messages": CHAT}
    one = c.post("/v1/caches", json=body, headers=as_("ann")).json()["id"]
    assert c.get("/v1/caches", headers=as_("bob")).json()["data"] == []
    use = {"model": "fake", "cache": one, "prompt": "x"}
    nothing = "cache-" + "0" * 32
    for wanted in (one, nothing):  # word for word the same
        calls = (
            c.get(f"/v1/caches/{wanted}", headers=as_("bob")),
            c.patch(f"/v1/caches/{wanted}", json={"ttl": 1}, headers=as_("bob")),
            c.delete(f"/v1/caches/{wanted}", headers=as_("bob")),
            c.post("/v1/completions", json=use | {"cache": wanted}, headers=as_("bob")),
        )
        assert len({said(call, 404) for call in calls}) == 1
        assert {call.json()["error"]["code"] for call in calls} == {None}
    assert c.get(f"/v1/caches/{one}", headers=as_("ann")).json()["status"] == "ready"


# --- markers --------------------------------------------------------------------------------------


def part(text: str, **marker: Any) -> dict[str, Any]:
    own = {"cache_control": {"type": "ephemeral", **marker}} if marker.pop("on", True) else {}
    return {"type": "text", "text": text, **own}


def test_markers_keep_the_prompt_up_to_them() -> None:
    desk = FakeDesk(FakeText())
    c = client(desk)
    messages = [
        {"role": "system", "content": [part(BOOK, ttl="1h"), {"type": "text", "text": "More."}]},
        {"role": "user", "content": [part("Who was first?" * 4)]},
    ]
    found = c.post("/v1/chat/completions", json={"model": "fake", "messages": messages})
    assert found.status_code == 200, found.text
    (ask,) = desk.asks
    prompt = bytes(ask.tokens).decode()
    kept = [(prompt[: keep.tokens], keep.ttl_s, keep.must) for keep in ask.keeps]
    assert kept == [(f"system: {BOOK}", 3600.0, False), (prompt, 300.0, False)]
    usage = found.json()["usage"]
    whole = len(prompt) // 16 * 16
    assert usage["cache_read_input_tokens"] == whole
    assert usage["cache_creation_input_tokens"] == 0


def test_openais_client_may_send_markers_and_reads_their_usage() -> None:
    c = client()

    async def main() -> Any:
        base = "http://here/v1"
        async with openai.AsyncOpenAI(api_key="x", base_url=base, http_client=c.open()) as ai:
            return await ai.chat.completions.create(
                model="fake",
                messages=[{"role": "system", "content": [part(BOOK)]}],  # type: ignore[list-item]
            )

    answer = asyncio.run(main())
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.model_extra["cache_read_input_tokens"] > 0
    plain = c.post("/v1/chat/completions", json={"model": "fake", "messages": CHAT}).json()
    assert "cache_read_input_tokens" not in plain["usage"]


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ({"type": "persistent"}, "only"),
        ("ephemeral", "only"),
        ({"type": "ephemeral", "ttl": "2h"}, "must be 5m or 1h"),
        ({"type": "ephemeral", "ttl": ["5m"]}, "must be 5m or 1h"),
    ],
)
def test_wrong_markers_are_named(marker: Any, words: str) -> None:
    marked = {"type": "text", "text": "x", "cache_control": marker}
    messages = [{"role": "user", "content": [marked]}]
    with pytest.raises(BadField, match=words) as caught:
        points_of(messages)
    assert str(caught.value.param).startswith("messages[0].content[0].cache_control")


def test_five_markers_are_too_many() -> None:
    with pytest.raises(BadField, match="at most 4"):
        points_of([{"role": "user", "content": [part("x")] * 5}])


def test_use_is_split_as_anthropic_splits_it() -> None:
    hour, short = Keeping(100, 3600.0), Keeping(200, 300.0)
    assert use_of((), (), 16, 64) is None
    first = use_of((hour, short), (), 16, 0)
    assert first is not None and (first.read, first.written_1h, first.written_5m) == (0, 96, 96)
    again = use_of((hour, short), (), 16, 112)
    assert again is not None and (again.read, again.written_1h, again.written_5m) == (112, 0, 80)
    refused = use_of((hour, short), (short,), 16, 0)
    assert refused is not None and (refused.written_1h, refused.written_5m) == (96, 0)
    tiny = use_of((Keeping(5, 300.0),), (), 16, 0)
    assert tiny is not None and (tiny.read, tiny.written_5m) == (0, 0)


def test_shared_beginnings() -> None:
    assert [shared(a, b) for a, b in (("", "x"), ("abc", "abd"), ("ab", "abc"))] == [0, 2, 2]
    assert shared((1, 2, 3), (1, 2, 3)) == 3


def test_a_template_that_refuses_a_beginning_costs_the_marker_only() -> None:
    def refuse(messages: list[dict[str, Any]]) -> str:
        raise RequestError("roles must alternate")

    points = points_of([{"role": "user", "content": [part("x")]}])
    assert asyncio.run(keeps_of(points, refuse, FakeText(), "x", (120,))) == ()


