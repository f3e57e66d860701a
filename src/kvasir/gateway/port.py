"""What the HTTP routes need of whatever serves: one `Desk`. Knows no HTTP, no node, no socket.

    routes --submit(Ask)--> Desk --Placed, Tokens ..., End--> routes
                                 `-Fail (instead of the rest)

The routes own text (prompt in, stop strings, deltas out); the desk owns everything else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from kvasir.core.ids import CacheId, RequestId, TenantId, WorkerId
from kvasir.core.messages import EndReason, Logprobs, Path, Report
from kvasir.core.request import Adapter, Grammar, Sampling, Steering
from kvasir.gateway.records import Records
from kvasir.gateway.served import Served

WorkerState = Literal["ready", "starting", "gone", "left"]  # left: on purpose


class Keeping(msgspec.Struct, frozen=True):
    """Keep the full blocks of the first `tokens` tokens for `ttl_s`. Without a name they are a
    marker's, found again by what they are. `must`: see `core.caches.Mark`."""

    tokens: int
    ttl_s: float
    cache: CacheId = ""
    must: bool = False


class CacheUse(msgspec.Struct, frozen=True):
    """Of a prompt with cache markers: tokens that were found, and that were written for 5 minutes
    and for an hour."""

    read: int
    written_5m: int
    written_1h: int


class CacheView(msgspec.Struct, frozen=True):
    """A kept prefix now: `new`, `ready` or `lost`, with so many seconds to live."""

    state: str
    left_s: float


class Ask(msgspec.Struct, frozen=True):
    """One prompt to be continued by `model`, under `adapter` or as it is. Token ids in, at most
    `max_tokens` token ids out.

    `sampling.stop_token_ids` already holds the model's end-of-sequence ids, unless the client asked
    to ignore them. `deadline_s` counts from submission. Objectives are seconds.
    """

    request_id: RequestId
    model: str
    tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    tenant: TenantId = "default"
    session: str | None = None
    deadline_s: float | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    band: int = 1
    steering: Steering | None = None
    adapter: Adapter | None = None
    keeps: tuple[Keeping, ...] = ()


class PlacedPiece(msgspec.Struct, frozen=True):
    """An attempt has a place. One more of these means one more attempt."""

    path: Path
    prefill: WorkerId
    decode: WorkerId = ""


class TokensPiece(msgspec.Struct, frozen=True, gc=False):
    """The next output tokens, in order, each exactly once over all attempts. `logprobs`: one for
    each of them, or none if they were not asked for."""

    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()


class EndPiece(msgspec.Struct, frozen=True):
    """The last piece of a request that was served. Tokens count; seconds on the desk's clock."""

    reason: EndReason
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    report: Report | None = None
    queue_s: float = 0.0
    ttft_s: float | None = None
    second_token_delay_s: float | None = None
    path: str = ""
    cache: CacheUse | None = None


class FailPiece(msgspec.Struct, frozen=True):
    """The last piece of a request that will not be served (any further)."""

    status: int
    reason: str
    retry_after_s: float | None = None


Piece = PlacedPiece | TokensPiece | EndPiece | FailPiece


class Pieces(Protocol):
    """Placed, then tokens, then one End; or Fail at any point. An async generator is one."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    def __anext__(self) -> Awaitable[Piece]: ...

    def aclose(self) -> Awaitable[None]:
        """Before the last piece: the client is gone, and the request is cancelled everywhere."""


class Detok(Protocol):
    """Turns one answer's tokens into text, one at a time."""

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is still in parts."""

    def finish(self) -> str:
        """What is still held back."""


class Text(Protocol):
    """A model's side of text: encoding, chat template, decoding."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab(self) -> int:
        """Token ids are in [0, vocab)."""

    async def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Token ids of `text`; `special` adds what the model wants around a bare prompt."""

    def render(self, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
        """The chat template's text. Raises RequestError for messages that it refuses."""

    def detokenizer(self, *, skip_special: bool = True) -> Detok: ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for: half a character, perhaps."""

    async def fault(self, grammar: Grammar) -> str:
        """What is wrong with a grammar, in a line; empty: it can be served. Raises Overloaded."""


class ModelCard(msgspec.Struct, frozen=True):
    """A served model; `created` is in Unix seconds, `max_context` in tokens. `made_up`: its tokens
    come from no distribution (engine: fake), so nothing can be asked of it. `reasons`: its answers
    may begin with <think> ... </think>. `parent`: the model that runs under `adapter`."""

    id: str
    created: int
    max_context: int
    owned_by: str = "kvasir"
    made_up: bool = False
    reasons: bool = False
    parent: str | None = None
    adapter: Adapter | None = None


class Health(msgspec.Struct, frozen=True):
    """`ready` iff every configured worker is."""

    ready: bool
    workers: dict[WorkerId, WorkerState]


class Desk(Protocol):
    """What serves. All calls come from one event loop."""

    def submit(self, ask: Ask) -> Pieces:
        """Start a request; nothing is raised here, failures are pieces."""

    def stop(self, request_id: RequestId) -> None:
        """A stop string matched: end the request as `stop`; an EndPiece follows."""

    def models(self) -> Sequence[ModelCard]: ...

    @property
    def served(self) -> Served:
        """What the names of models mean."""

    @property
    def caches(self) -> Records:
        """Prefixes that were made here to be kept."""

    @property
    def block_size(self) -> int:
        """Tokens of a block: only full ones are kept."""

    def cache(self, cache: CacheId) -> CacheView | None:
        """None: it is over, or never was."""

    def retain(self, tenant: TenantId, cache: CacheId, ttl_s: float) -> None:
        """Keep it so long from now; 0 ends it."""

    def leave(self, worker: WorkerId, within_s: float) -> None:
        """Let a worker go; what it still serves after `within_s` goes on elsewhere."""

    def health(self) -> Health: ...

    def text(self, model: str) -> Text:
        """Raises NotFound with the nearest name."""
