"""What happened, for people and tools: one union behind metrics, traces, console and recordings.

Tokens are not events. A feed gives each event a sequence number; events hold no text and no time of
their own (the feed adds the node's `now`).
"""

from __future__ import annotations

import msgspec

from kvasir.core.ids import RequestId, WorkerId


class Event(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """Base of all."""


class WorkerJoined(Event, frozen=True):
    worker: WorkerId
    incarnation: int
    roles: tuple[str, ...]


class WorkerLeft(Event, frozen=True):
    worker: WorkerId
    incarnation: int
    reason: str


class Queued(Event, frozen=True):
    request_id: RequestId
    depth: int


class Routed(Event, frozen=True):
    """A placement with its reason, and the estimate that it rests on."""

    request_id: RequestId
    attempt: int
    path: str
    prefill: WorkerId
    decode: WorkerId
    why: str
    prefill_hit_blocks: int = 0
    decode_hit_blocks: int = 0
    transfer_estimate_s: float = 0.0


class Rejected(Event, frozen=True):
    request_id: RequestId
    status: int
    reason: str


class Prefilled(Event, frozen=True):
    worker: WorkerId
    request_id: RequestId
    queue_s: float
    prefill_s: float
    cached_tokens: int
    computed_tokens: int


class PrefixUsed(Event, frozen=True):
    """Of `input_tokens` that were prefilled, `hit_tokens` were cached where that was done (or came
    from a peer), and `attainable_tokens` in the longest cached prefix on any worker when the
    conductor routed. Hits can be more than attainable: blocks come while a request waits."""

    worker: WorkerId
    request_id: RequestId
    input_tokens: int
    hit_tokens: int
    attainable_tokens: int


class Shipped(Event, frozen=True):
    request_id: RequestId
    source: WorkerId
    target: WorkerId
    bytes: int
    seconds: float
    transport: str
    tier: int = 0
    codec: str = ""
    wire_bytes: int = 0


class KvCoded(Event, frozen=True):
    """A sender chose a form (`raw`: none) for KV of `bytes` that is to go over a link of so many
    bytes a second. Predicted seconds: of the form, and of the bytes as they are."""

    request_id: RequestId
    source: WorkerId
    target: WorkerId
    codec: str
    bytes: int
    link_bytes_s: float
    seconds: float
    raw_s: float
    why: str


class TransferFailed(Event, frozen=True):
    request_id: RequestId
    worker: WorkerId
    reason: str


class TransportFellBack(Event, frozen=True):
    """KV goes by `used`, as `wanted` failed between these two a short while ago."""

    request_id: RequestId
    source: WorkerId
    target: WorkerId
    wanted: str
    used: str
    reason: str


class Preempted(Event, frozen=True):
    worker: WorkerId
    request_id: RequestId
    tokens: int


class Recomputed(Event, frozen=True):
    """Tokens whose KV existed and has to be made again. `reason`: preempted, or why it was lost."""

    request_id: RequestId
    tokens: int
    reason: str


class Speculated(Event, frozen=True):
    """At the end of an attempt that guessed: so many tokens, of which `accepted` were right."""

    worker: WorkerId
    request_id: RequestId
    drafted: int
    accepted: int


class TierHit(Event, frozen=True):
    """Cached tokens that came out of a tier of the worker's own. `preempted`: of a sequence that
    had to give up its blocks; else of a prompt. `why`: what loading and computing were to take."""

    worker: WorkerId
    request_id: RequestId
    tier: str
    tokens: int
    bytes: int
    seconds: float
    preempted: bool = False
    why: str = ""


class TierPassed(Event, frozen=True):
    """Tokens that a tier held and that were computed instead. `why` is one of `sooner`, `late`,
    `damaged` and `gone`; `detail` has figures."""

    worker: WorkerId
    request_id: RequestId
    tokens: int
    why: str
    detail: str = ""


class TierStored(Event, frozen=True):
    """Blocks that were copied to a tier."""

    worker: WorkerId
    tier: str
    blocks: int
    bytes: int
    seconds: float


class CacheChanged(Event, frozen=True):
    """A kept prefix of so many blocks: `new`, `ready`, `lost`, `refused` or `ended`."""

    state: str
    blocks: int


class CopyOrdered(Event, frozen=True):
    """Cached blocks are to go from `source` to `target` before anybody asks, with the reason."""

    name: RequestId
    source: WorkerId
    target: WorkerId
    purpose: str
    blocks: int
    why: str


class BlocksCopied(Event, frozen=True):
    """An order was carried out: so many blocks came into the cache of `worker`."""

    worker: WorkerId
    source: WorkerId
    purpose: str
    blocks: int
    bytes: int
    seconds: float
    transport: str


class CopyFailed(Event, frozen=True):
    """An order came to nothing."""

    worker: WorkerId
    source: WorkerId
    purpose: str
    reason: str


class CopiesUsed(Event, frozen=True):
    """Of blocks that were copied: prompts began with `used` of them for the first time, `wasted`
    were evicted before any did."""

    worker: WorkerId
    purpose: str
    used: int
    wasted: int


class WorkerDraining(Event, frozen=True):
    """A worker takes nothing new, and is to leave within so many seconds."""

    worker: WorkerId
    incarnation: int
    within_s: float


class TierOff(Event, frozen=True):
    """An alarm: a tier of a worker failed. Its blocks are computed again where they are wanted."""

    worker: WorkerId
    tier: str
    reason: str


class TierBack(Event, frozen=True):
    """A tier that had failed works again."""

    worker: WorkerId
    tier: str


class Retried(Event, frozen=True):
    request_id: RequestId
    attempt: int
    reason: str


class Closed(Event, frozen=True):
    """The end of a request, at the gateway. Seconds on the gateway's clock."""

    request_id: RequestId
    model: str
    path: str
    reason: str
    attempts: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    second_token_delay_s: float | None = None
    duration_s: float = 0.0


AnyEvent = (
    WorkerJoined | WorkerLeft | Queued | Routed | Rejected | Prefilled | PrefixUsed | Shipped
    | KvCoded | TransferFailed | TransportFellBack | Preempted | Recomputed | Speculated
    | TierHit | TierPassed | TierStored | TierOff | TierBack | Retried | CacheChanged
    | Closed | CopyOrdered | BlocksCopied | CopyFailed | CopiesUsed | WorkerDraining
)  # fmt: skip
