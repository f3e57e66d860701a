"""What nodes say to one another, and what a world tells a node. Frozen, typed, small.

    gateway  --Submit, Ended, GatewayBeat-------------------> conductor
    gateway <--Placed, Lost, Declined------------------------ conductor
    worker   --Hello, Accepted, Refused, PrefillDone, Load,
               KvEvents, TransferReport, Finished, Copied,
               Left-----------------------------------------> conductor
    worker  <--Welcome, Dispatch, Abort, Drain, KvResync,
               Copy------------------------------------------ conductor
    gateway  --Prompt--> worker --Tokens, Done--> gateway
    decode   --KvWant--> prefill --KvGone--> decode

There is one path of recovery: an attempt that went wrong anywhere is `Lost`, and the gateway, which
holds prompt and emitted tokens, submits the next attempt. Nothing is retried below that.

`Prompt` and `Tokens` carry token ids on the wire; the process that owns a node takes them off
(`bare`) before the node sees the message, so nodes and journals hold lengths only.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvasir.core.caches import CacheState, Keep, Kept, Mark, Pin, Retain
from kvasir.core.codec import Coded, Sent
from kvasir.core.copies import Copied, Copy, Leave, Left
from kvasir.core.ids import (
    BlockKey,
    CacheId,
    Epoch,
    Incarnation,
    NodeId,
    RequestId,
    StepId,
    WorkerId,
)
from kvasir.core.message import Message, Tier
from kvasir.core.request import Adapter, Request, Steering
from kvasir.core.tiers import Held, Restored, Stored, TierGone, TierReady

WIRE_VERSION = 1

Path = Literal["disaggregated", "aggregated"]
Phase = Literal["prefill", "decode", "both"]
HandOver = Literal["prefill_then_pull", "both_at_once", "through_store", "none"]
TextEnd = Literal["", "stop", "length", "failed"]  # failed: no token continues its grammar
EndReason = Literal["stop", "length", "cancelled", "deadline", "failed"]


# --- shared parts ---------------------------------------------------------------------------------


class Location(msgspec.Struct, frozen=True, gc=False):
    """Where an instance stands: global indices of its accelerators, in rank order."""

    gpus: tuple[int, ...] = (0,)


class Capacity(msgspec.Struct, frozen=True, gc=False):
    kv_blocks: int
    block_size: int
    kv_token_bytes: int
    batch_max: int
    batch_tokens_max: int
    context_max: int


class PrefillReport(msgspec.Struct, frozen=True, gc=False):
    """How prefill went, measured where it ran. Travels with the KV, so no clocks are compared."""

    worker: WorkerId
    queue_s: float
    prefill_s: float
    cached_tokens: int
    computed_tokens: int


class Report(msgspec.Struct, frozen=True, gc=False):
    """The split of one attempt's time and bytes, complete at its end. Seconds, tokens, bytes."""

    prefill: PrefillReport
    decode_worker: WorkerId
    transfer_s: float = 0.0
    transfer_bytes: int = 0
    transport: str = ""
    decode_queue_s: float = 0.0
    first_step_s: float = 0.0
    preemptions: int = 0
    recomputed_tokens: int = 0
    codec: str = ""


class Active(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One live attempt, as a beat lists it. `done` counts tokens: computed, or emitted."""

    request_id: RequestId
    attempt: int
    done: int = 0


class Usage(msgspec.Struct, frozen=True, gc=False):
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


# --- gateway and conductor ------------------------------------------------------------------------


class Submit(Message, frozen=True):
    """Ask for a place. `emitted` output tokens of earlier attempts count as prompt now. `marks`:
    what of the prompt is to be kept."""

    request: Request
    attempt: int = 1
    emitted: int = 0
    marks: tuple[Mark, ...] = ()


class Placed(Message, frozen=True):
    """Where an attempt runs. `decode` is empty while it is still to be chosen (prefill_end).
    `kept_tokens`: so many of the prompt's are in a cache that its tenant keeps."""

    request_id: RequestId
    attempt: int
    path: Path
    prefill: WorkerId
    decode: WorkerId = ""
    why: str = ""
    kept_tokens: int = 0


class Lost(Message, frozen=True):
    """`died`: a worker ended while it served this; who does that again and again is refused."""

    request_id: RequestId
    attempt: int
    reason: str
    died: bool = False


class Declined(Message, frozen=True):
    """The request will not be served. `status` is the HTTP status to answer with."""

    request_id: RequestId
    attempt: int
    status: int
    reason: str
    retry_after_s: float | None = None


class Ended(Message, frozen=True):
    """The gateway's last word on a request; conductor and workers free everything."""

    request_id: RequestId
    attempt: int
    reason: EndReason
    usage: Usage
    path: str = ""
    ttft_s: float | None = None


class GatewayBeat(Message, frozen=True):
    gateway: NodeId
    incarnation: Incarnation
    active: tuple[Active, ...] = ()


# --- worker protocol ------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """`kv_events`: tells what its cache holds; of one that does not, the conductor guesses."""

    worker: WorkerId
    incarnation: Incarnation
    roles: tuple[str, ...]
    model: str
    fingerprint: str
    capacity: Capacity
    location: Location = Location()
    hand_over: HandOver = "both_at_once"
    kv_layout: str = ""
    pool: str = ""
    kv_events: bool = True


class Welcome(Message, frozen=True):
    """`again`: the conductor does not know this incarnation; say Hello and tell all blocks."""

    epoch: Epoch
    again: bool = False


class Dispatch(Message, frozen=True):
    """Do `phase` of an attempt. `source` holds the KV to fetch (decode); `target` will want it
    (prefill, empty when still unknown). Prompt token ids come from the gateway by `Prompt`. Before
    a prefill, as many leading blocks as `prefix_from` holds beyond the worker's own, up to
    `prefix_blocks`, are fetched from its cache; without them they are computed. What of `pins` is
    prefilled here stays."""

    epoch: Epoch
    request: Request
    attempt: int
    emitted: int
    phase: Phase
    first_token: Literal["prefill", "decode"]
    source: WorkerId = ""
    target: WorkerId = ""
    prefix_from: WorkerId = ""
    prefix_blocks: int = 0
    pins: tuple[Pin, ...] = ()
    link_bytes_s: float = 0.0  # what the network should give a decode's transfer that may be coded

    @property
    def input_tokens(self) -> int:
        return self.request.prompt_tokens + self.emitted

    @property
    def output_tokens_max(self) -> int:
        return self.request.max_tokens - self.emitted


class Accepted(Message, frozen=True):
    worker: WorkerId
    request_id: RequestId
    attempt: int


class Refused(Message, frozen=True):
    """Before or during service: this worker will not go on with the attempt, and holds nothing.
    With a `status` (HTTP's) no other attempt would go better: the request is declined."""

    worker: WorkerId
    request_id: RequestId
    attempt: int
    reason: str
    status: int = 0


class PrefillDone(Message, frozen=True):
    """KV of all input tokens stands in `worker`; `handle` is opaque to the conductor."""

    worker: WorkerId
    request_id: RequestId
    attempt: int
    report: PrefillReport
    handle: str = ""


class TransferReport(Message, frozen=True):
    """Measured by the receiver. Feeds the network oracle and the byte counters."""

    request_id: RequestId
    attempt: int
    source: WorkerId
    target: WorkerId
    bytes: int
    seconds: float
    transport: str


class Finished(Message, frozen=True):
    """The worker's part of the attempt is over. Kept until the gateway's `Ended`, in case `Done`
    was lost. `answer` names the blocks after the prompt's that it filled, where sessions are
    looked ahead for."""

    worker: WorkerId
    request_id: RequestId
    attempt: int
    reason: EndReason
    output_tokens: int
    report: Report
    answer: tuple[BlockKey, ...] = ()


class Load(Message, frozen=True):
    """The worker's beat: truth about its memory and queue. A field that is unknown is None.
    `pinned` blocks are kept for the caches `pins`."""

    worker: WorkerId
    incarnation: Incarnation
    waiting: int
    running: int
    kv_blocks_free: int
    iteration_s: float | None = None
    active: tuple[Active, ...] = ()
    leases: int = 0
    quarantined: int = 0
    pins: tuple[CacheId, ...] = ()
    pinned: int = 0


class KvEvents(Message, frozen=True):
    """Blocks that appeared in or vanished from one tier of a worker's cache; `seq` counts over all
    tiers. `reset`: start from nothing, on every tier. Of a chain, `added` in its order and
    `removed` tail first make the index quick; any order is right."""

    worker: WorkerId
    incarnation: Incarnation
    seq: int
    added: tuple[BlockKey, ...] = ()
    removed: tuple[BlockKey, ...] = ()
    reset: bool = False
    tier: Tier = "device"


class KvResync(Message, frozen=True):
    epoch: Epoch


class Abort(Message, frozen=True):
    epoch: Epoch
    request_id: RequestId
    attempt: int
    reason: str


class Drain(Message, frozen=True):
    """Take nothing new. `leave`: and go, if you hold nothing for anybody."""

    epoch: Epoch
    leave: bool = False


# --- worker to worker, worker to gateway ----------------------------------------------------------


class KvWant(Message, frozen=True):
    """The decode side has room: send blocks `first_block` to the end of the input. With `keys`:
    send these blocks, out of the cache, under a name of their own (`ids.prefix_id`).

    `addresses`: where the target's receiver listens, one for each kind of transport that it can do;
    like token ids they are for processes, not nodes.
    """

    request_id: RequestId
    attempt: int
    target: WorkerId
    first_block: int
    addresses: tuple[str, ...] = ()
    keys: tuple[BlockKey, ...] = ()
    link_bytes_s: float = 0.0  # as in `Dispatch`


class KvGone(Message, frozen=True):
    request_id: RequestId
    attempt: int
    reason: str


class Prompt(Message, frozen=True):
    """Prompt and emitted tokens for an attempt; `tokens`: `count` little-endian uint32.

    The worker's process loads `adapter` before its node sees the message; `fault` is why it could
    not.
    """

    request_id: RequestId
    attempt: int
    count: int
    tokens: bytes = b""
    steering: Steering | None = None
    adapter: Adapter | None = None
    fault: str = ""


class Logprobs(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The natural log-probability of one drawn token, and the likeliest tokens in its place (id,
    log-probability), likeliest first: of the model's own distribution, before any sampling value.
    """

    drawn: float
    top: tuple[tuple[int, float], ...] = ()


class Drawn(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """`count` tokens from position `index` of one request's output; `tokens` as in `Prompt`. `end`:
    the last of them ends the text, whether `Done` arrives or not. `logprobs`: one a token, or none
    if they were not asked for."""

    request_id: RequestId
    attempt: int
    index: int
    count: int
    tokens: bytes = b""
    end: TextEnd = ""
    logprobs: tuple[Logprobs, ...] = ()


class Tokens(Message, frozen=True):
    """What one iteration (or run of them) drew for one gateway, straight from the worker: of each
    attempt once."""

    drawn: tuple[Drawn, ...]


class Done(Message, frozen=True):
    """After the last `Tokens` of an attempt: `output_tokens` in all, over all attempts."""

    request_id: RequestId
    attempt: int
    reason: EndReason
    output_tokens: int
    report: Report


# --- from the world to its own node ---------------------------------------------------------------


class Start(Message, frozen=True):
    """First input of every node: the world is ready."""


class Alarm(Message, frozen=True):
    """A `Timer` came due."""

    name: str


class Arrive(Message, frozen=True):
    """A client's request, counted and keyed. `marks`: what of its prompt is to be kept."""

    request: Request
    marks: tuple[Mark, ...] = ()


class Hangup(Message, frozen=True):
    """The client is gone, or the gateway has all that it needs (`stop`: a stop string matched)."""

    request_id: RequestId
    reason: EndReason = "cancelled"


class RowDone(msgspec.Struct, frozen=True, gc=False):
    """One row of a step: `sampled` tokens were drawn; `end` says why the row is over, if it is.

    `keys` name blocks that became full with generated tokens (none in simulation of traces).
    `drafted` tokens were guessed and computed, and `accepted` of them were right (`Row.draft`).
    """

    request_id: RequestId
    attempt: int
    sampled: int
    end: TextEnd = ""
    keys: tuple[BlockKey, ...] = ()
    drafted: int = 0
    accepted: int = 0


class StepDone(Message, frozen=True):
    """`rows`: the Step's rows in their order, then those carried rows that ended or have `keys`;
    of the other carried rows each drew `steps_done` tokens. `first_s` is how long the first
    iteration took."""

    step: StepId
    steps_done: int
    rows: tuple[RowDone, ...]
    first_s: float = 0.0


class Received(Message, frozen=True):
    """An inbound transfer is over, for better or worse: its memory is no longer written to.

    `by_sender`: the sender let go of the attempt on purpose, and the conductor hears why from it.
    """

    request_id: RequestId
    attempt: int
    ok: bool
    bytes: int = 0
    seconds: float = 0.0
    transport: str = ""
    reason: str = ""
    report: PrefillReport | None = None
    by_sender: bool = False
    coded: Coded | None = None


class SendOver(Message, frozen=True):
    """An outbound transfer is over, for better or worse: its memory is no longer read."""

    request_id: RequestId
    attempt: int
    ok: bool


class WorkerGone(Message, frozen=True):
    """The launcher saw the process end. Heartbeats find it too, later."""

    worker: WorkerId
    incarnation: Incarnation
    reason: str


class NetReading(Message, frozen=True):
    """Switch counters by tier: utilisation in [0, 1] over the last window."""

    measured_at: float
    utilisation: tuple[float, ...]


AnyMessage = (
    Submit | Placed | Lost | Declined | Ended | GatewayBeat
    | Hello | Welcome | Dispatch | Accepted | Refused | PrefillDone | TransferReport | Finished
    | Load | KvEvents | KvResync | Abort | Drain
    | KvWant | KvGone | Prompt | Tokens | Done | Retain | CacheState | Keep | Kept
    | Start | Alarm | Arrive | Hangup | StepDone | Received | SendOver | Sent | TierReady
    | TierGone | Stored | Held | Restored | WorkerGone | NetReading | Copy | Copied | Leave | Left
)  # fmt: skip


def bare(message: AnyMessage) -> AnyMessage:
    """The message as a node may see it: without token ids (or wishes about them), addresses, files.
    """
    if isinstance(message, Prompt):
        return msgspec.structs.replace(message, tokens=b"", steering=None, adapter=None)
    if isinstance(message, Tokens):
        return Tokens(
            tuple(
                Drawn(d.request_id, d.attempt, d.index, d.count, b"", d.end) for d in message.drawn
            )
        )
    if isinstance(message, KvWant):
        return msgspec.structs.replace(message, addresses=())
    return message
