"""Which form KV takes on its way: as it is, coded, or not at all and computed again.

Knows sizes, measured rates and what a deployment allows. Must not know bytes, transports or time.
Asked before a transfer, and before each of its chunks with what is left of it and the link's last
measured rate, it is CacheGen's adaptation (SIGCOMM'24, section 5.3), with a reserve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from kvasir.core.codec import PIECE_BYTES, RAW, Offer
from kvasir.core.specs.codec import CodecKind

RECOMPUTE: Final = "recompute"
RESERVE: Final = 1.0  # of the predicted seconds of chunks after the next: the link may get slower
GAIN_MIN: Final = 0.05  # of raw's predicted seconds: less is within what predictions are off by
CHUNK_BYTES: Final = 4 * PIECE_BYTES  # and
CHUNK_S: Final = 0.5  # of a link's time: so much at least is sent on one choice


class Task(msgspec.Struct, frozen=True, gc=False):
    """What is to be sent still: `bytes` of KV in `chunks`, coded and sent one after another.

    `link_bytes_s`: what the link gives this transfer. `recompute_s`: to compute these tokens where
    they are wanted; None where that is no choice. `budget_s`: until they must be there; None: as
    soon as possible.
    """

    bytes: int
    link_bytes_s: float
    chunks: int = 1
    recompute_s: float | None = None
    budget_s: float | None = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """`name` of an offer, or `recompute`; its predicted seconds, and raw's beside them."""

    name: str
    seconds: float
    raw_s: float
    why: str


def chunk_bytes(link_bytes_s: float) -> int:
    """How much is sent before the question is asked again."""
    return max(CHUNK_BYTES, int(link_bytes_s * CHUNK_S))


def allowed(offers: Iterable[Offer], kind: CodecKind, level_max: int) -> tuple[Offer, ...]:
    """Those that a deployment allows: all that lose no more than the one it names, which for
    `cachegen` is the released form's level `level_max`. `off`: raw alone."""
    every = tuple(offers)
    if kind == "off":
        return tuple(o for o in every if o.name == RAW)
    named = f"cachegen-{level_max}" if kind == "cachegen" else kind
    loss_max = max((o.loss for o in every if o.name == named), default=0.0)
    return tuple(o for o in every if o.loss <= loss_max)


def predicted_s(offer: Offer, task: Task) -> float:
    """Seconds until the last chunk is decoded; coding, wire and decoding work side by side on
    different chunks, and the slowest of the three sets the pace."""
    stages = (
        task.bytes / offer.encode_bytes_s,
        task.bytes * offer.ratio / task.link_bytes_s,
        task.bytes / offer.decode_bytes_s,
    )
    return (sum(stages) + (task.chunks - 1) * max(stages)) / task.chunks


def choose(offers: Sequence[Offer], task: Task) -> Choice:
    """Of what is faster than raw, the least lossy that keeps the budget; the fastest when there is
    no budget or none keeps it. Raw when nothing is faster. `offers` are those allowed; raw is
    always one."""
    raw = Offer(RAW, 0.0)
    raw_s = predicted_s(raw, task)
    ways = [(o.loss, predicted_s(o, task), o.name) for o in offers if o.name != RAW]
    if task.recompute_s is not None:
        ways.append((0.0, task.recompute_s, RECOMPUTE))
    ways = [way for way in ways if way[1] < raw_s * (1 - GAIN_MIN)]
    ways.append((0.0, raw_s, RAW))
    cautious = 1 + RESERVE * (task.chunks - 1) / task.chunks
    budget_s = -math.inf if task.budget_s is None else task.budget_s
    fitting = [way for way in ways if way[1] * cautious <= budget_s]
    if fitting:
        _, seconds, name = min(fitting)
        why = "loses least within the budget"
    else:
        _, seconds, name = min(ways, key=lambda way: (way[1], way[0]))
        why = "fastest" if task.budget_s is None else "fastest, the budget is lost"
    return Choice(name, seconds, raw_s, why)
