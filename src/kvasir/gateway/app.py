"""The HTTP routes over a `Desk`: OpenAI's, and health, metrics, version. Spawns no server.

Completions are raw ASGI, because each token passes here; the small routes are plain Starlette.
Every error is one JSON object with a status, and no traceback leaves the process.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import kvasir
from kvasir.core.errors import Forbidden, KvasirError, TooLarge, nearest
from kvasir.core.specs import LimitsSpec
from kvasir.core.specs.tenants import CachesSpec, TenantSpec
from kvasir.gateway.body import ClientGone, drop_line, read_body
from kvasir.gateway.caches import Caching
from kvasir.gateway.errors import HttpError, Refused, of_bug, of_error, of_status
from kvasir.gateway.exchange import Exchange, Line, Reply
from kvasir.gateway.openai import Caller, Plan, card_of, plan_chat, plan_completion, read_caller
from kvasir.gateway.port import Desk, ModelCard
from kvasir.gateway.schema import (
    decode_cache,
    decode_chat,
    decode_completion,
    decode_drain,
    decode_load,
    decode_ttl,
    decode_unload,
)  # fmt: skip
from kvasir.gateway.tenants import Tenants
from kvasir.observe.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger("kvasir.gateway")

Planner = Callable[[bytes, Desk, Caller, str], Awaitable[Plan]]
CLOSE: Final = (b"connection", b"close")


def make_app(
    desk: Desk,
    metrics: Metrics,
    limits: LimitsSpec,
    *,
    tenants: Sequence[TenantSpec] = (),
    caches: CachesSpec = CachesSpec(),  # noqa: B008  frozen
    clock: Callable[[], float] = time.perf_counter,
    new_id: Callable[[], str] = lambda: secrets.token_hex(12),
) -> Starlette:
    """All routes. `clock` gives seconds for TTFT and ITL; `new_id` names a request, never twice."""
    house = House(desk, metrics, limits, clock, new_id, Tenants(tenants))
    shelf = CacheRoutes(house, Caching(desk, caches, time.time))
    hot = {
        "/v1/chat/completions": Completions(house, _chat),
        "/v1/completions": Completions(house, _completion),
    }
    app = App(
        hot,
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in hot.items()),
            Route("/v1/models", house.models),
            Route("/v1/models/{id:path}", house.model),
            Route("/v1/load_lora_adapter", house.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", house.unload_adapter, methods=["POST"]),
            Route("/v1/workers/{id}/drain", house.drain, methods=["POST"]),
            Route("/v1/caches", shelf.create, methods=["POST"]),
            Route("/v1/caches", shelf.every, methods=["GET"]),
            Route("/v1/caches/{id}", shelf.show, methods=["GET"]),
            Route("/v1/caches/{id}", shelf.extend, methods=["PATCH"]),
            Route("/v1/caches/{id}", shelf.delete, methods=["DELETE"]),
            Route("/health", house.health),
            Route("/metrics", house.metrics_page),
            Route("/version", house.version),
        ],
        exception_handlers={HTTPException: house.wrong_address, Exception: house.bug},
    )
    app.router.redirect_slashes = False
    return app


class App(Starlette):
    """Starlette with a short way in for completions.

    Each await between the server and the desk is walked again for every token; the middleware and
    the router are seven more, a third of a stream's cost, and completions need neither.
    """

    def __init__(self, hot: Mapping[str, Completions], **given: Any) -> None:
        super().__init__(**given)
        self._hot = hot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = self._hot.get(scope["path"]) if scope["type"] == "http" else None
        if hot is not None and scope["method"] == "POST":
            await hot(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


async def _chat(raw: bytes, desk: Desk, caller: Caller, run_id: str) -> Plan:
    return await plan_chat(decode_chat(raw), desk, caller, run_id)


async def _completion(raw: bytes, desk: Desk, caller: Caller, run_id: str) -> Plan:
    return await plan_completion(decode_completion(raw), desk, caller, run_id)


class Completions:
    """POST a body, get an answer, whole or as events. An ASGI application."""

    def __init__(self, house: House, planner: Planner) -> None:
        self._house, self._planner = house, planner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        house = self._house
        began = house.clock()
        fresh = house.new_id()
        reply = Reply(send, fresh)
        caller: Caller | None = None
        try:
            caller = read_caller(scope["headers"], fresh)
            reply.request_id = caller.request_id
            caller = house.known(caller)
            raw = await read_body(receive, caller.body_bytes, house.limits.body_bytes_max)
            # A client may send one id twice, so its own id is only the first part of the name.
            run_id = f"{caller.request_id}-{fresh[:8]}" if caller.own_id else fresh
            with Line(receive, reply):
                plan = await self._planner(raw, house.desk, caller, run_id)
                await Exchange(plan, house.desk, reply, house.metrics, house.clock, began).run()
        except ClientGone:
            return
        except TooLarge as error:
            await reply.error(of_error(error), [CLOSE] if self._drops(caller) else [])
        except KvasirError as error:
            await reply.error(of_error(error))
        except Refused as refused:
            await reply.error(refused.error)
        except asyncio.CancelledError:  # the server's grace is over; this task is its own top
            if not reply.over:
                await reply.error(of_status(503, "the server is stopping"))
        except Exception:
            log.exception("request %s", reply.request_id)
            await reply.error(of_bug(reply.request_id))

    def _drops(self, caller: Caller | None) -> bool:
        limit = self._house.limits.body_bytes_max
        return caller is None or drop_line(caller.body_bytes, limit, expects=caller.expects)


class House:
    """What all routes share, and the small routes themselves."""

    def __init__(
        self,
        desk: Desk,
        metrics: Metrics,
        limits: LimitsSpec,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        tenants: Tenants,
    ) -> None:
        self.desk, self.metrics, self.limits = desk, metrics, limits
        self.clock, self.new_id = clock, new_id
        self._tenants = tenants

    def known(self, caller: Caller) -> Caller:
        """With the tenant whose key it has. Raises Unauthorised."""
        tenant = self._tenants.who(caller.authorization)
        if tenant == caller.tenant:
            return caller
        return msgspec.structs.replace(caller, tenant=tenant)

    async def models(self, request: Request) -> Response:
        try:
            self.known(read_caller(request.scope["headers"], ""))
        except KvasirError as error:
            return self.error(request, of_error(error))
        cards = [_card(card) for card in self.desk.models()]
        return self.json(request, {"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        try:
            self.known(read_caller(request.scope["headers"], ""))
            return self.json(request, _card(card_of(self.desk, request.path_params["id"])))
        except KvasirError as error:
            return self.error(request, of_error(error))

    async def load_adapter(self, request: Request) -> Response:
        return await self._changed(request, self._load)

    async def unload_adapter(self, request: Request) -> Response:
        return await self._changed(request, self._unload)

    async def _load(self, raw: bytes) -> str:
        body = decode_load(raw)
        await self.desk.served.load(body)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    async def _unload(self, raw: bytes) -> str:
        name = decode_unload(raw).lora_name
        self.desk.served.unload(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    async def _changed(
        self, request: Request, change: Callable[[bytes], Awaitable[str]]
    ) -> Response:
        """Answers in plain text; of adapters in vLLM's words."""
        try:
            caller = self.known(read_caller(request.scope["headers"], ""))
            limit = self.limits.body_bytes_max
            said = await change(await read_body(request.receive, caller.body_bytes, limit))
        except KvasirError as error:
            return self.error(request, of_error(error))
        except Refused as refused:
            return self.error(request, refused.error)
        except ClientGone:  # nobody reads this
            return self.error(request, of_status(400, "the body did not come"))
        return PlainTextResponse(said, headers={"x-request-id": self._request_id(request)})

    async def drain(self, request: Request) -> Response:
        """Let a worker go. Where callers are tenants none of them may: that is for whoever runs
        the processes."""
        return await self._changed(request, partial(self._drain, request.path_params["id"]))

    async def _drain(self, worker: str, raw: bytes) -> str:
        if self._tenants.named:
            what = "a tenant's key does not let workers go"
            raise Forbidden(what, next_step="send SIGTERM to the worker's process")
        known = self.desk.health().workers
        if worker not in known:
            near = nearest(worker, known)
            raise Refused(of_status(404, f"no worker {worker!r} here; nearest: {near}"))
        within_s = decode_drain(raw).within_s
        self.desk.leave(worker, within_s)
        return f"{worker} takes nothing new, and leaves within {within_s:g} s."

    async def health(self, request: Request) -> Response:
        """200 only when every configured worker is ready that has not left on purpose."""
        health = self.desk.health()
        ready = health.ready
        status = "ready" if ready else "not ready"
        body = {"status": status, "workers": health.workers}
        return self.json(request, body, 200 if ready else 503)

    async def metrics_page(self, request: Request) -> Response:
        headers = {"content-type": CONTENT_TYPE, "x-request-id": self._request_id(request)}
        return Response(self.metrics.render(), headers=headers)

    async def version(self, request: Request) -> Response:
        return self.json(request, {"version": kvasir.__version__})

    async def wrong_address(self, request: Request, error: Exception) -> Response:
        """No such path, or not with this method."""
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            wrong = of_status(405, f"{request.method} is not allowed on {path}; allowed: {allowed}")
            return self.error(request, wrong, {"allow": allowed})
        known = [route.path for route in request.app.routes]
        message = f"no path {path!r} here\n  nearest: {nearest(path, known)}"
        return self.error(request, of_status(error.status_code, message))

    async def bug(self, request: Request, error: Exception) -> Response:
        return self.error(request, of_bug(self._request_id(request)))

    def _request_id(self, request: Request) -> str:
        return read_caller(request.scope["headers"], self.new_id()).request_id

    def error(
        self, request: Request, error: HttpError, headers: Mapping[str, str] | None = None
    ) -> Response:
        retry = {name.decode(): value.decode() for name, value in error.headers()}
        own = {"x-request-id": self._request_id(request)}
        return _response(error.body(), error.status, {**retry, **own, **(headers or {})})

    def json(self, request: Request, body: Any, status: int = 200) -> Response:
        own = {"x-request-id": self._request_id(request)}
        return _response(msgspec.json.encode(body), status, own)


class CacheRoutes:
    """`/v1/caches`: each route is one call of `Caching` for the tenant that asks."""

    def __init__(self, house: House, caching: Caching) -> None:
        self._house, self._caching = house, caching

    async def create(self, request: Request) -> Response:
        async def made(raw: bytes, caller: Caller) -> Any:
            body, desk = decode_cache(raw), self._house.desk
            text, card = desk.text(body.model), card_of(desk, body.model)
            run_id = self._house.new_id()
            return await self._caching.create(body, text, card, caller.tenant, run_id)

        return await self._answer(request, made)

    async def every(self, request: Request) -> Response:
        async def listed(raw: bytes, caller: Caller) -> Any:
            return self._caching.every(caller.tenant)

        return await self._answer(request, listed)

    async def show(self, request: Request) -> Response:
        async def shown(raw: bytes, caller: Caller) -> Any:
            return self._caching.show(caller.tenant, request.path_params["id"])

        return await self._answer(request, shown)

    async def extend(self, request: Request) -> Response:
        async def kept(raw: bytes, caller: Caller) -> Any:
            cache = request.path_params["id"]
            return self._caching.extend(caller.tenant, cache, decode_ttl(raw).ttl)

        return await self._answer(request, kept)

    async def delete(self, request: Request) -> Response:
        async def ended(raw: bytes, caller: Caller) -> Any:
            return self._caching.delete(caller.tenant, request.path_params["id"])

        return await self._answer(request, ended)

    async def _answer(
        self, request: Request, act: Callable[[bytes, Caller], Awaitable[Any]]
    ) -> Response:
        house = self._house
        try:
            caller = house.known(read_caller(request.scope["headers"], ""))
            limit = house.limits.body_bytes_max
            raw = await read_body(request.receive, caller.body_bytes, limit)
            return house.json(request, await act(raw, caller))
        except KvasirError as error:
            return house.error(request, of_error(error))
        except Refused as refused:
            return house.error(request, refused.error)
        except ClientGone:  # nobody reads this
            return house.error(request, of_status(400, "the body did not come"))


def _response(body: bytes, status: int, headers: Mapping[str, str]) -> Response:
    return Response(body, status, headers=dict(headers), media_type="application/json")


def _card(card: ModelCard) -> dict[str, Any]:
    """OpenAI's model object; `max_model_len` is where vLLM's clients look for the context, `parent`
    for what an adapter runs on."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "max_model_len": card.max_context,
        "parent": card.parent,
    }
