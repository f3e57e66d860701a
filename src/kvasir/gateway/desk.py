"""The desk over a live cluster: the request node with its token ids, as the HTTP routes see it.

Keeps prompt and emitted tokens; the node keeps counts. Decides nothing: it turns the node's effects
into pieces, and puts token ids on the messages that carry them.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from kvasir.core import effects as fx
from kvasir.core.caches import Mark, Retain
from kvasir.core.copies import Leave
from kvasir.core.events import AnyEvent, Closed
from kvasir.core.ids import CONDUCTOR, CacheId, NodeId, RequestId, TenantId, WorkerId
from kvasir.core.keys import block_keys, salt_of
from kvasir.core.messages import (
    AnyMessage,
    Arrive,
    Done,
    Drawn,
    EndReason,
    Hangup,
    Path,
    Prompt,
    Report,
    Tokens,
)  # fmt: skip
from kvasir.core.request import Request, Slo
from kvasir.core.specs import Deployment
from kvasir.core.specs.tenants import group_of
from kvasir.gateway.caches import use_of
from kvasir.gateway.port import (
    Ask,
    CacheUse,
    CacheView,
    EndPiece,
    FailPiece,
    Health,
    Keeping,
    ModelCard,
    Piece,
    Pieces,
    PlacedPiece,
    Text,
    TokensPiece,
)  # fmt: skip
from kvasir.gateway.records import Records
from kvasir.gateway.served import Served
from kvasir.node.request import Requests
from kvasir.world.journal import Journal
from kvasir.world.live.host import Bus, Host

PERFORMS = (fx.Tell, fx.Timer, fx.Reply, fx.Refuse, fx.Note)


class Open:
    """One request that a client waits for."""

    __slots__ = (
        "adapter", "emitted", "ended", "keeps", "pieces", "prompt", "report", "steering",
    )  # fmt: skip

    def __init__(self, ask: Ask) -> None:
        self.prompt = ask.tokens
        self.steering = ask.steering
        self.adapter = ask.adapter  # it may be unloaded meanwhile
        self.keeps: dict[Keeping, CacheId] = {}
        self.emitted: array[int] = array("I")
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.report: Report | None = None
        self.ended = False


class LiveDesk:
    """`gateway.port.Desk`. Everything runs on one event loop."""

    def __init__(
        self, deployment: Deployment, node: Requests, bus: Bus, texts: dict[str, Text],
        served: Served, health: Callable[[], Health], *, journal: Journal | None,
        observe: Callable[[AnyEvent], None],
    ) -> None:  # fmt: skip
        fx.require("the gateway", PERFORMS, ())
        self._deployment = deployment
        self._node = node
        self._bus = bus
        self._texts = texts
        self.served = served
        self.caches = Records()
        self.block_size = deployment.block_size
        self._health = health
        self._observe = observe
        self._created = int(time.time())
        self._open: dict[RequestId, Open] = {}
        self._incoming: dict[RequestId, Drawn] = {}
        self.id: NodeId = node.gateway
        self.host = Host(
            self.id, node, bus, journal, arriving=self._arriving,
            perform={
                fx.Tell: self._tell, fx.Reply: self._reply, fx.Refuse: self._refuse,
                fx.Note: self._note,
            },
        )  # fmt: skip

    # --- the Desk ---------------------------------------------------------------------------------

    def submit(self, ask: Ask) -> Pieces:
        found = self._open[ask.request_id] = Open(ask)
        request = self._request(ask)
        found.keeps = self._names(ask, request)
        marks = [Mark(cache, keep.tokens // self.block_size, keep.ttl_s, keep.must)
                 for keep, cache in found.keeps.items() if cache]  # fmt: skip
        self.host.feed(Arrive(request, tuple(marks)))
        return _Pieces(self, ask.request_id, found)

    def stop(self, request_id: RequestId) -> None:
        self.host.feed(Hangup(request_id, "stop"))

    def cancel(self, request_id: RequestId) -> None:
        """The client is gone."""
        self.host.feed(Hangup(request_id, "cancelled"))

    def cache(self, cache: CacheId) -> CacheView | None:
        known = self._node.caches.get(cache)
        if known is None:
            return None
        left_s = known.ends_at - time.monotonic()
        return CacheView(known.state.state, left_s) if left_s > 0 else None

    def retain(self, tenant: TenantId, cache: CacheId, ttl_s: float) -> None:
        self.host.feed(Retain(self.id, tenant, cache, ttl_s))

    def leave(self, worker: WorkerId, within_s: float) -> None:
        self._bus.tell(self.id, CONDUCTOR, Leave(worker, within_s))

    def models(self) -> Sequence[ModelCard]:
        from kvasir.cost.catalog import shape_of

        return [
            ModelCard(
                name, self._created, m.max_context or shape_of(m).max_context,
                made_up=self._deployment.engine == "fake", reasons=m.reasoning_parser is not None,
                parent=m.name if adapter else None, adapter=adapter,
            )
            for name, (m, adapter) in self.served.entries.items()
        ]  # fmt: skip

    def health(self) -> Health:
        return self._health()

    def text(self, model: str) -> Text:
        return self._texts[self.served.find(model).model.name]

    @property
    def open_count(self) -> int:
        return len(self._open)

    def _names(self, ask: Ask, request: Request) -> dict[Keeping, CacheId]:
        """What is to be kept; without a name if it has no full block. A marker's cache is named by
        tenant and content, so the next marker at the same place finds it; no client sees that."""
        found: dict[Keeping, CacheId] = {}
        for keep in ask.keeps:
            blocks = keep.tokens // self.block_size
            own = f"{ask.tenant}/{request.keys[blocks - 1].hex()}" if blocks else ""
            found[keep] = keep.cache or own
        return found

    def _request(self, ask: Ask) -> Request:
        d = self._deployment
        model = next(m for m in d.models if m.name == ask.model)
        version = model.version
        digest = ask.adapter.digest if ask.adapter is not None else None
        salt = salt_of(model.kv_name, digest, group_of(d.tenants, ask.tenant))
        slo = None
        if ask.slo_ttft_s is not None or ask.slo_tpot_s is not None:
            slo = Slo(ask.slo_ttft_s or d.slo.ttft_s, ask.slo_tpot_s or d.slo.tpot_s)
        now = time.monotonic()
        return Request(
            id=ask.request_id,
            model=ask.model,
            prompt_tokens=len(ask.tokens),
            max_tokens=ask.max_tokens,
            keys=block_keys(ask.tokens, d.block_size, salt),
            gateway=self.id,
            version=version,
            adapter=ask.adapter.name if ask.adapter is not None else None,
            tenant=ask.tenant,
            salt=salt,
            band=ask.band,
            session=ask.session,
            arrival_s=now,
            deadline_s=now + ask.deadline_s if ask.deadline_s is not None else None,
            slo=slo,
            sampling=ask.sampling,
        )

    # --- the node's inputs and effects ------------------------------------------------------------

    def _arriving(self, message: AnyMessage) -> bool:
        if isinstance(message, Tokens):
            self._incoming = {drawn.request_id: drawn for drawn in message.drawn}
        elif isinstance(message, Done):
            found = self._open.get(message.request_id)
            if found is not None:
                found.report = message.report
        return True

    def _tell(self, effect: fx.Tell) -> None:
        message = effect.message
        if isinstance(message, Prompt):
            found = self._open[message.request_id]
            tokens = (array("I", found.prompt) + found.emitted)[: message.count]
            assert len(tokens) == message.count, (len(tokens), message.count)
            message = msgspec.structs.replace(
                message, tokens=tokens.tobytes(), steering=found.steering, adapter=found.adapter
            )
        self._bus.tell(self.id, effect.to, message)

    def _reply(self, effect: fx.Reply) -> None:
        found = self._open.get(effect.request_id)
        if found is None or effect.end is not None:
            return  # the end is told by `Closed`, which knows more
        if effect.count:
            incoming = self._incoming[effect.request_id]
            assert effect.first == len(found.emitted)
            skipped = effect.first - incoming.index  # they came before
            new = array("I", incoming.tokens)[skipped:]
            assert len(new) == effect.count
            found.emitted.extend(new)
            found.pieces.put_nowait(TokensPiece(tuple(new), incoming.logprobs[skipped:]))
        else:
            life = self._node.lives[effect.request_id]
            found.pieces.put_nowait(
                PlacedPiece(cast(Path, effect.path), life.prefill, life.decode)
            )

    def _refuse(self, effect: fx.Refuse) -> None:
        found = self._open.get(effect.request_id)
        if found is not None and not found.ended:
            found.ended = True
            found.pieces.put_nowait(FailPiece(effect.status, effect.reason, effect.retry_after_s))

    def _note(self, effect: fx.Note) -> None:
        event = effect.event
        if isinstance(event, Closed):
            self._closed(event)
        self._observe(event)

    def _closed(self, event: Closed) -> None:
        found = self._open.pop(event.request_id, None)
        if found is None or found.ended:
            return
        found.ended = True
        report = found.report
        queue_s = report.prefill.queue_s if report is not None else 0.0
        if report is not None and self._deployment.first_token == "decode":
            queue_s += report.decode_queue_s
        found.pieces.put_nowait(
            EndPiece(
                cast(EndReason, event.reason), event.prompt_tokens, event.cached_tokens,
                event.output_tokens, report, queue_s, event.ttft_s, event.second_token_delay_s,
                event.path, self._use(found, event.cached_tokens),
            )
        )  # fmt: skip

    def _use(self, found: Open, cached_tokens: int) -> CacheUse | None:
        kept = self._node.caches
        refused = [keep for keep, cache in found.keeps.items() if cache not in kept]
        return use_of(tuple(found.keeps), refused, self.block_size, cached_tokens)


class _Pieces:
    """The pieces of one request, as they come."""

    __slots__ = ("_desk", "_found", "_over", "_request_id")

    def __init__(self, desk: LiveDesk, request_id: RequestId, found: Open) -> None:
        self._desk, self._request_id, self._found = desk, request_id, found
        self._over = False

    def __aiter__(self) -> _Pieces:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        piece = await self._found.pieces.get()
        self._over = isinstance(piece, (EndPiece, FailPiece))
        return piece

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._desk.cancel(self._request_id)
