"""The contract of a KV transfer, for any transport. Knows blocks, layers and planes; no sockets.

    prefill worker (P)                                   decode worker (D)
      Sender                                               Receiver
        open --------------- begin ------------------------> (bound to this peer)
        push(layers) ------- data, data, ... --------------> into the blocks that `expect` named
        finish ------------- trailer ----------------------> on_received(ok)
        on_over(ok) <------- ack | nack -------------------

Both sides hand over *planes*: per layer a list of planes (K, V), each a C-contiguous uint8 array
[blocks, block_bytes] on cache memory. Blocks are whole and physical; block i of an attempt is
logical, and the lists given to `push` and `expect` map it to physical blocks of either side.

Every method may be called from any thread and none waits for a peer. Callbacks run on the thread of
the sender or receiver: they must be quick and must not call `close`. Times are `time.monotonic()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import msgspec

from kvasir.core.codec import Coded, Sent
from kvasir.core.ids import BlockId, RequestId
from kvasir.core.messages import Logprobs, PrefillReport

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Plane = npt.NDArray[np.uint8]
    Planes = Sequence[Sequence[Plane]]

Kind = Literal["shm", "nixl", "mooncake", "tcp"]
GIVEN_UP = "given up by the sender"  # begins the reason when the sender stopped on purpose


class Key(NamedTuple):
    """What names a transfer on both sides."""

    request_id: RequestId
    attempt: int


class Shard(NamedTuple):
    """Whose part of the KV the planes hold: a rank and its heads [head_first, head_end).

    Both sides must name the same shard; TP 1 is the default.
    """

    rank: int = 0
    head_first: int = 0
    head_end: int = 0


WHOLE = Shard()


class KvForm(NamedTuple):
    """How KV lies in a block of any plane: `block_tokens` after one another, floats of `dtype`."""

    dtype: str
    block_tokens: int


class Trailer(msgspec.Struct, frozen=True, gc=False):
    """The last frame. `tokens`: what prefill sampled, `logprobs` of them where they are asked for.
    The sender fills in blocks, layers, bytes with what it sent, and the receiver compares them with
    what it got."""

    tokens: tuple[int, ...] = ()
    report: PrefillReport | None = None
    blocks: int = 0
    layers: int = 0
    bytes: int = 0
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ReceiveResult:
    """How an inbound transfer ended. `seconds`: from the first data frame to the last frame."""

    request_id: RequestId
    attempt: int
    ok: bool
    bytes: int
    seconds: float
    transport: str
    reason: str = ""
    trailer: Trailer | None = None
    coded: Coded | None = None

    @property
    def by_sender(self) -> bool:
        return not self.ok and self.reason.startswith(GIVEN_UP)


@dataclass(frozen=True, slots=True)
class Timeline:
    """When an outbound transfer did what, in `time.monotonic()` seconds; None: not yet."""

    opened_s: float
    first_frame_s: float | None
    last_frame_s: float | None
    over_s: float | None
    bytes: int


OnOver = Callable[[RequestId, int, bool, str], None]  # request_id, attempt, ok, reason
OnReceived = Callable[[ReceiveResult], None]
OnSent = Callable[[Sent], None]


class Sender(Protocol):
    """The prefill side. Each `open` is answered by exactly one `on_over`.

    After `on_over` no byte of cache memory is read for that attempt, except by a peer that maps it
    and did not answer in time, or when the sender was closed: it then finds a wrong checksum. ok
    means that the receiver has every byte with the right checksum. A failure names its reason:
    "stopped", "deadline", "connection lost: ...", "queue full", "closed", or what the receiver
    refused. A connection that breaks is made again where the transport can break (tcp), and the
    transfer goes on with what the receiver lacks.
    """

    def open(self, request_id: RequestId, attempt: int, address: str, deadline_s: float) -> None:
        """Start a transfer to a receiver's address. Raises TransferError after `close`."""

    def push(
        self,
        request_id: RequestId,
        attempt: int,
        first_block: int,
        blocks: Sequence[BlockId],
        layers: range | int,
        coding: str = "",
        *,
        tell: bool = False,
    ) -> None:
        """Queue `layers` of logical blocks [first_block, first_block + len(blocks)).

        `blocks` are physical ids here. The bytes are read when sent, in the order of the pushes to
        that peer, so they must stay as they are until `on_over`. Ignored once the transfer is over.

        `coding` (`raw`: none) is how they go, where the transport sends bytes on a stream and there
        would be fewer. With `tell`, `on_sent` hears when this push and those before it have left.
        """

    def finish(self, request_id: RequestId, attempt: int, trailer: Trailer) -> None:
        """Nothing more will be pushed. Ignored once the transfer is over."""

    def stop(self, request_id: RequestId, attempt: int, reason: str = "stopped") -> None:
        """Abort. A frame that is half out is finished from a copy. Ignored once over."""

    def timeline(self, request_id: RequestId, attempt: int) -> Timeline | None:
        """Times of a transfer that is open, or among the last ones that ended."""

    def close(self) -> None:
        """End all transfers ("closed"), join the thread, close every connection."""


class Receiver(Protocol):
    """The decode side. Each `expect` is answered by exactly one `on_received`.

    After `on_received` no byte is written for that attempt. Frames of attempts that nobody expects
    are drained, never written, and their sender is told.
    """

    @property
    def addresses(self) -> tuple[str, ...]:
        """What peers may pass to `Sender.open`, one for each kind of transport."""

    def expect(
        self,
        request_id: RequestId,
        attempt: int,
        first_block: int,
        blocks: Sequence[BlockId],
        layers_count: int,
        deadline_s: float,
    ) -> None:
        """Await layers [0, layers_count) of logical blocks [first_block, first_block + len(blocks))
        into the physical `blocks` here. Raises TransferError after `close`."""

    def forget(self, request_id: RequestId, attempt: int, reason: str = "released") -> None:
        """Stop writing; `on_received` follows with ok=False. Ignored once over."""

    def close(self) -> None:
        """End all transfers ("closed"), join the thread, close every connection."""
