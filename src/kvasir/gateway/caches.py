"""Kept prefixes as clients see them: made by name, used, kept longer, ended; and cache markers.

Knows text, tokens and who made what. Must not know where a prefix stands, or why it was refused:
the conductor does. A cache is its tenant's alone; for others there is none of that name.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from kvasir.core.errors import RequestError
from kvasir.core.ids import CacheId, TenantId
from kvasir.core.request import Sampling
from kvasir.core.specs.tenants import CachesSpec
from kvasir.gateway.chat import messages_of
from kvasir.gateway.controls import known_tokens
from kvasir.gateway.errors import Refused, of_end, of_fail, of_status
from kvasir.gateway.port import (
    Ask,
    CacheUse,
    Desk,
    EndPiece,
    FailPiece,
    Keeping,
    ModelCard,
    Text,
)  # fmt: skip
from kvasir.gateway.records import Record
from kvasir.gateway.schema import BadField, CacheBody

NAME_CHARS_MAX: Final = 128
METADATA_MAX: Final = 16
METADATA_CHARS_MAX: Final = 512
POINTS_MAX: Final = 4
POINT_TTLS: Final = {"5m": 300.0, "1h": 3600.0}
SETTLE_S: Final = 2.0  # what the word that it is kept may come after the end of its request
SETTLE_EVERY_S: Final = 0.01


class Caching:
    """`/v1/caches` over a desk. `now` is in Unix seconds."""

    def __init__(self, desk: Desk, spec: CachesSpec, now: Callable[[], float]) -> None:
        self._desk, self._spec, self._now = desk, spec, now

    async def create(
        self, body: CacheBody, text: Text, card: ModelCard, tenant: TenantId, request_id: str
    ) -> dict[str, Any]:
        """Compute a prefix and keep it. Raises RequestError, Refused."""
        self._forget()
        ttl_s = self._ttl(body.ttl)
        _check_labels(body)
        tokens = await tokens_of(body, text)
        size = self._desk.block_size
        kept = len(tokens) // size * size
        if not kept:
            what = f"{len(tokens)} tokens are too few to keep: a block has {size}"
            raise BadField(what, "messages" if body.messages else "prompt")
        if len(tokens) >= card.max_context:
            what = f"{card.id} has a context of {card.max_context} tokens, this has {len(tokens)}"
            raise BadField(what, "messages" if body.messages else "prompt")
        cache = f"cache-{secrets.token_hex(16)}"
        ask = Ask(
            request_id, card.parent or card.id, tokens, 1, Sampling(0.0, ignore_eos=True),
            tenant=tenant, adapter=card.adapter, keeps=(Keeping(kept, ttl_s, cache, must=True),),
        )  # fmt: skip
        end = await self._run(ask)
        await self._settle(tenant, cache)
        messages = tuple(body.messages) if body.messages else None
        record = Record(cache, tenant, body.model, tokens, kept, messages, int(self._now()),
                        body.name, body.metadata)  # fmt: skip
        self._desk.caches.add(record)
        usage = {
            "prompt_tokens": end.prompt_tokens, "completion_tokens": 0,
            "total_tokens": end.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
        }  # fmt: skip
        return self._shown(record) | {"usage": usage}

    def every(self, tenant: TenantId) -> dict[str, Any]:
        self._forget()
        data = [self._shown(record) for record in self._desk.caches.of(tenant)]
        return {"object": "list", "data": data}

    def show(self, tenant: TenantId, cache: CacheId) -> dict[str, Any]:
        """Raises NoCache."""
        self._forget()
        return self._shown(self._desk.caches.find(tenant, cache))

    def extend(self, tenant: TenantId, cache: CacheId, ttl: float | None) -> dict[str, Any]:
        """Its time begins anew. Raises NoCache, BadField."""
        self._forget()
        record = self._desk.caches.find(tenant, cache)
        ttl_s = self._ttl(ttl)
        self._desk.retain(tenant, cache, ttl_s)
        return self._shown(record) | {"expires_at": int(self._now() + ttl_s)}

    def delete(self, tenant: TenantId, cache: CacheId) -> dict[str, Any]:
        """Raises NoCache."""
        self._forget()
        self._desk.caches.find(tenant, cache)
        self._desk.retain(tenant, cache, 0.0)
        self._desk.caches.drop(cache)
        return {"id": cache, "object": "cache.deleted", "deleted": True}

    async def _run(self, ask: Ask) -> EndPiece:
        pieces = self._desk.submit(ask)
        try:
            async for piece in pieces:
                if isinstance(piece, FailPiece):
                    raise Refused(of_fail(piece))
                if isinstance(piece, EndPiece):
                    if piece.reason not in ("stop", "length"):
                        raise Refused(of_end(piece))
                    return piece
        finally:
            await pieces.aclose()
        raise Refused(of_status(503, "the cache was not made"))

    async def _settle(self, tenant: TenantId, cache: CacheId) -> None:
        """The request is over; that its blocks are kept is told on another way."""
        state, left = self._desk.cache(cache), int(SETTLE_S / SETTLE_EVERY_S)
        while state is not None and state.state == "new" and left:
            await asyncio.sleep(SETTLE_EVERY_S)
            state, left = self._desk.cache(cache), left - 1
        if state is None or state.state == "new":
            self._desk.retain(tenant, cache, 0.0)
            raise Refused(of_status(429, "no worker could keep it; end another cache first"))

    def _forget(self) -> None:
        """Records of caches whose time is over."""
        for cache in self._desk.caches.all_ids():
            if self._desk.cache(cache) is None:
                self._desk.caches.drop(cache)

    def _shown(self, record: Record) -> dict[str, Any]:
        state = self._desk.cache(record.id)
        return {
            "id": record.id,
            "object": "cache",
            "model": record.model,
            "name": record.name,
            "metadata": record.metadata or {},
            "status": state.state if state is not None else "ended",
            "tokens": record.kept_tokens,
            "created_at": record.created_at,
            "expires_at": int(self._now() + (state.left_s if state is not None else 0.0)),
        }

    def _ttl(self, ttl: float | None) -> float:
        most = self._spec.ttl_s_max
        if ttl is None:
            return min(self._spec.ttl_s, most)
        if not 0 < ttl <= most:
            raise BadField(f"ttl must be over 0 and at most {most:g} seconds, not {ttl:g}", "ttl")
        return ttl


def _check_labels(body: CacheBody) -> None:
    if body.name is not None and len(body.name) > NAME_CHARS_MAX:
        raise BadField(f"name is over {NAME_CHARS_MAX} characters", "name")
    labels = body.metadata or {}
    longest = max((len(part) for pair in labels.items() for part in pair), default=0)
    if len(labels) > METADATA_MAX or longest > METADATA_CHARS_MAX:
        most = f"{METADATA_MAX} pairs of {METADATA_CHARS_MAX} characters"
        raise BadField(f"metadata holds at most {most}", "metadata")


async def tokens_of(body: CacheBody, text: Text) -> tuple[int, ...]:
    """Of a beginning: a chat's messages without the cue for an answer, or a bare prompt."""
    if body.tools:
        raise BadField("tools is not supported", "tools", next_step="leave tools out")
    if (body.messages is None) == (body.prompt is None):
        raise BadField("give either messages or prompt", "messages")
    if body.prompt is not None:
        if isinstance(body.prompt, str):
            return await text.encode(body.prompt, special=True)
        return known_tokens("prompt", tuple(body.prompt), text)
    rendered = text.render(messages_of(body.messages or []), add_generation_prompt=False)
    return await text.encode(rendered, special=False)


# --- markers --------------------------------------------------------------------------------------


class Point(msgspec.Struct, frozen=True):
    """A marker, and the messages up to it."""

    messages: list[dict[str, Any]]
    ttl_s: float


def points_of(messages: Sequence[dict[str, Any]]) -> list[Point]:
    """Anthropic's `cache_control`, on a message or on a text part of it. Raises BadField."""
    found: list[Point] = []
    for i, message in enumerate(messages):
        before, content = list(messages[:i]), message.get("content")
        parts: list[Any] = content if isinstance(content, list) else []
        for j, part in enumerate(parts):
            marker = part.get("cache_control") if isinstance(part, dict) else None
            if marker is not None:
                ttl_s = _point_ttl(marker, f"messages[{i}].content[{j}]")
                found.append(Point([*before, {**message, "content": parts[: j + 1]}], ttl_s))
        if message.get("cache_control") is not None:
            ttl_s = _point_ttl(message["cache_control"], f"messages[{i}]")
            found.append(Point([*before, message], ttl_s))
    if len(found) > POINTS_MAX:
        what = f"at most {POINTS_MAX} parts may have cache_control, not {len(found)}"
        raise BadField(what, "messages")
    return found


def _point_ttl(given: Any, where: str) -> float:
    field = f"{where}.cache_control"
    if not isinstance(given, dict) or given.get("type") != "ephemeral":
        raise BadField(f'{field}: only {{"type": "ephemeral"}}', field)
    ttl = given.get("ttl", "5m")
    if not isinstance(ttl, str) or ttl not in POINT_TTLS:
        raise BadField(f"{field}.ttl must be 5m or 1h, not {ttl!r}", f"{field}.ttl")
    return POINT_TTLS[ttl]


async def keeps_of(
    points: Sequence[Point], render: Callable[[list[dict[str, Any]]], str], text: Text,
    prompt: str, tokens: tuple[int, ...],
) -> tuple[Keeping, ...]:  # fmt: skip
    """What of a chat's prompt is to be kept: as many tokens as it shares with the beginning that
    ends at a marker. A beginning that the template refuses to render is not kept."""
    found = []
    for point in points:
        try:
            head = render(point.messages)
        except RequestError:
            continue
        begun = await text.encode(head[: shared(head, prompt)], special=False)
        found.append(Keeping(shared(begun, tokens), point.ttl_s))
    return tuple(found)


S = TypeVar("S", str, tuple[int, ...])


def shared(one: S, other: S) -> int:
    """How much of their beginnings is equal. By halving, as slices compare faster than items."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def use_of(
    keeps: Sequence[Keeping], refused: Sequence[Keeping], block_size: int, cached_tokens: int
) -> CacheUse | None:
    """Anthropic's split of the tokens before the last marker: read, and written by how long they
    are kept; what was `refused` is not written. None without markers."""
    if not keeps:
        return None
    rounded = {keep: keep.tokens // block_size * block_size for keep in keeps}
    read = at = min(cached_tokens, max(rounded.values()))
    written = dict.fromkeys(POINT_TTLS.values(), 0)
    for keep in sorted(keeps, key=lambda keep: keep.tokens):
        if keep not in refused:
            written[keep.ttl_s] = written.get(keep.ttl_s, 0) + max(0, rounded[keep] - at)
            at = max(at, rounded[keep])
    return CacheUse(read, written[POINT_TTLS["5m"]], written[POINT_TTLS["1h"]])
