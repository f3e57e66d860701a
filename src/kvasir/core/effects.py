"""What a node asks its world to do. One closed union; a world performs all of it or
says so at start.

Decisions are effects: a journal keeps their digest and `kvasir verify` compares them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from kvasir.core.errors import UnsupportedEffect
from kvasir.core.events import AnyEvent
from kvasir.core.ids import BlockId, BlockKey, NodeId, RequestId, StepId, WorkerId
from kvasir.core.message import Tier
from kvasir.core.messages import AnyMessage, EndReason, PrefillReport
from kvasir.core.request import Sampling


class Effect(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """Base of all; the tag in a journal is the class name."""


class Tell(Effect, frozen=True):
    """Send a message to a node. It may be lost or late; it is not retried."""

    to: NodeId
    message: AnyMessage


class Row(msgspec.Struct, frozen=True, gc=False):
    """One sequence's share of a step.

    Computes KV of `count` tokens at positions [start, start + count). `blocks` are appended to the
    sequence's block table first (`fresh` starts a new table). With `sample`, the token after the
    last position is drawn: output token `index` of the request. `end_at`: the output index at which
    the row is over by length. With `stays`, the row goes on in every later step without being
    named, one token an iteration, until it ends, is released, or a step names or drops it.

    With `draft`, the runner guesses up to so many tokens in each iteration, computes them together
    with the last known one, and keeps those that it would have drawn anyway, and one more: 1 to
    draft + 1 tokens. KV of guesses that were wrong stays behind, and is written over. Such a row
    has `count` 1, samples, and does not stay.
    """

    request_id: RequestId
    attempt: int
    start: int
    count: int
    blocks: tuple[BlockId, ...] = ()
    fresh: bool = False
    sample: bool = False
    index: int = -1
    end_at: int = 0
    gateway: NodeId = ""
    sampling: Sampling | None = None
    stays: bool = False
    draft: int = 0


class Step(Effect, frozen=True):
    """Run the model once over all rows, or up to `steps` times when all rows decode.

    `rows` are those that are new to the batch or get blocks; `carried` others go on unnamed (see
    `Row.stays`). `dropped` (request, attempt) leave the batch before it starts. Ends after the
    first iteration in which a row finished, `steps` is reached, or a `Cut` came.
    """

    id: StepId
    rows: tuple[Row, ...]
    steps: int = 1
    carried: int = 0
    dropped: tuple[tuple[RequestId, int], ...] = ()


class Cut(Effect, frozen=True):
    """End the running step after its current iteration: something waits that can join."""

    step: StepId


class Send(Effect, frozen=True):
    """Ship KV of logical blocks [first_block, first_block + len(blocks)) of an attempt to `to`.

    With `step` set, layer by layer while that step computes them (it may be running: layers that
    are done leave now); else at once. `last` closes the
    transfer and carries `report`. No byte is read after `deadline`. Answered by one `SendOver`
    after the last part, or after a failure or Release. With a `codec` (`raw` for none) the part is
    coded so on its way, where the transport can, and answered by a `Sent` when it has left.
    """

    request_id: RequestId
    attempt: int
    to: WorkerId
    first_block: int
    blocks: tuple[BlockId, ...]
    bytes: int
    deadline: float
    step: StepId | None = None
    last: bool = False
    report: PrefillReport | None = None
    codec: str = ""


class Fetch(Effect, frozen=True):
    """Expect KV of logical blocks [first_block, first_block + len(blocks)) into `blocks`.

    Answered by one `Received`. No byte is written after it, nor after `deadline`.
    """

    request_id: RequestId
    attempt: int
    source: WorkerId
    first_block: int
    blocks: tuple[BlockId, ...]
    bytes: int
    deadline: float
    table: tuple[BlockId, ...] = ()


NOWHERE: Final = -1  # a slot of a tier that has none


class Store(Effect, frozen=True):
    """Copy full blocks, by name, into slots of a tier. Answered by one `Stored`: until then nobody
    writes to the blocks, and nobody but this effect touches the slots."""

    id: int
    tier: Tier
    keys: tuple[BlockKey, ...]
    blocks: tuple[BlockId, ...]
    slots: tuple[int, ...]


class Ask(Effect, frozen=True):
    """How many leading ones of `keys` a shared tier holds now. Answered by one `Held`, which says
    none when the tier does not answer."""

    request_id: RequestId
    attempt: int
    tier: Tier
    keys: tuple[BlockKey, ...]


class Reopen(Effect, frozen=True):
    """Try a tier that failed once more. Answered by one `TierReady` or `TierGone`."""

    tier: Tier


class Shelf(msgspec.Struct, frozen=True, gc=False):
    """Slots of one tier, in the order of the blocks that they hold; those of a shared tier, which
    finds blocks by key, are all NOWHERE."""

    tier: Tier
    slots: tuple[int, ...]


class Restore(Effect, frozen=True):
    """Copy what `shelves` hold, one after another, into `blocks`, if it is what `keys` name.

    Answered by one `Restored`: how many leading blocks came before `deadline`, or before one that
    was missing or damaged. No byte is written after it.
    """

    request_id: RequestId
    attempt: int
    keys: tuple[BlockKey, ...]
    blocks: tuple[BlockId, ...]
    shelves: tuple[Shelf, ...]
    deadline: float


class Release(Effect, frozen=True):
    """Forget an attempt: its tokens, block table, and any transfer of it that still runs."""

    request_id: RequestId
    attempt: int


class Quit(Effect, frozen=True):
    """This node is over, on purpose: end what runs it, and do not start it again."""


class SetRole(Effect, frozen=True):
    role: Literal["prefill", "decode", "mixed"]


class LoadAdapter(Effect, frozen=True):
    adapter: str


class SetPower(Effect, frozen=True):
    watts: float


class Timer(Effect, frozen=True):
    """Wake the node with `Alarm(name)` at time `at`."""

    name: str
    at: float


class Reply(Effect, frozen=True):
    """Gateway to its client. `first`: output index of the first of `count` new tokens.

    `end` closes the answer; `path` is the plan, known at the first byte.
    """

    request_id: RequestId
    first: int
    count: int
    path: str = ""
    end: EndReason | None = None


class Refuse(Effect, frozen=True):
    """Gateway to its client: an error instead of (the rest of) an answer."""

    request_id: RequestId
    status: int
    reason: str
    retry_after_s: float | None = None


class Note(Effect, frozen=True):
    """Something worth observing happened. Feeds metrics, traces, console and recordings."""

    event: AnyEvent


AnyEffect = (
    Tell | Step | Cut | Send | Fetch | Store | Ask | Reopen | Restore | Release | Quit
    | SetRole | LoadAdapter | SetPower | Timer | Reply | Refuse | Note
)  # fmt: skip


def require(world: str, performs: Iterable[type[Effect]], needed: Iterable[type[Effect]]) -> None:
    """Raises UnsupportedEffect naming what `world` cannot do, before anything starts."""
    missing = sorted(e.__name__ for e in set(needed) - set(performs))
    if missing:
        raise UnsupportedEffect(
            f"{world} cannot perform {', '.join(missing)}",
            where=world,
            next_step="leave out what needs it, or use a backend that can",
        )
