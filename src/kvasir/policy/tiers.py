"""Load or compute: whether cached tokens are taken out of a tier, by what either is predicted to
take. Knows seconds, bytes and tokens; must not know keys, nor how bytes are moved.

That a stored prefix may be slower than computing it is the trade-off of CacheGen (arXiv 2310.07240,
its `text` level) and of Cake (arXiv 2410.03065), which does both from two ends. Here one request's
blocks are loaded up to where that stops paying, and the rest is computed, never both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from kvasir.core.message import Tier
from kvasir.core.units import show_seconds

KEEP: Final = 0.8  # of what was measured before, with each new measurement,
OUTWEIGH: Final = 4.0  # of which the old ones together weigh at most so many times as much
FORGIVE: Final = 0.02  # of the way back to what was assumed, each time a tier was passed over
LUCK: Final = 0.02  # share of a prompt that a shared tier may always be hoped to hold
RETRY_S_MIN: Final = 1.0  # until a tier that failed is tried again,
RETRY_S_MAX: Final = 60.0  # twice as long each time


class PrefillCost(NamedTuple):
    """Seconds of a step that prefills: overhead_s + token_s a token + context_s a token and
    position before it. Its shape is the cost model's, its size is measured."""

    overhead_s: float
    token_s: float
    context_s: float

    def more(self, start: int, count: int) -> float:
        """What `count` more tokens after `start` add to a step."""
        return self.token_s * count + self.context_s * count * (start + count / 2)


class TierRule(NamedTuple):
    """One tier of a worker. `evict` and `write` as in the spec; `bytes_per_s` and `latency_s` are
    assumed first. `shared`: names the store that all share, whose `blocks` are those of all."""

    tier: Tier
    blocks: int
    bytes_per_s: float
    evict: str
    write: str
    shared: str = ""
    latency_s: float = 0.0


class TierRules(NamedTuple):
    """A worker's tiers, fastest first. `always`: load all that there is."""

    tiers: tuple[TierRule, ...]
    cost: PrefillCost
    always: bool
    wait_s: float


class Pace(NamedTuple):
    """So much in so many seconds, measured again and again: the older, the less it counts."""

    amount: float
    seconds: float

    @property
    def per_s(self) -> float:
        return self.amount / self.seconds

    def measured(self, amount: float, seconds: float) -> Pace:
        keep = min(KEEP, OUTWEIGH * amount / self.amount) if amount else KEEP
        return Pace(keep * self.amount + amount, keep * self.seconds + max(seconds, 1e-9))

    def forgiven(self, assumed_per_s: float) -> Pace:
        """A little nearer to what was assumed. A tier that is not used is not measured either: so
        one that was slow for a while is tried again in the end, one that took three times as long
        as computing after some fifty requests."""
        before_s, after_s = 1 / self.per_s, 1 / assumed_per_s
        return Pace(self.amount, self.amount * (before_s + FORGIVE * (after_s - before_s)))


def assumed(per_s: float) -> Pace:
    return Pace(per_s, 1.0)


def asks(gain_s: float, ask_s: float, found_share: float) -> bool:
    """Whether a shared tier is asked for a prompt that it may hold. `gain_s`: saved if all of it is
    there; `ask_s`: what asking takes; `found_share`: how much of what was asked for was there, of
    late. Asking in vain so costs at most LUCK of the computing that follows."""
    return max(found_share, LUCK) * gain_s > ask_s


def retry_s(failures: int) -> float:
    """How long a shared tier that failed so many times on end is left alone."""
    return min(RETRY_S_MIN * 2.0 ** (failures - 1), RETRY_S_MAX)


class Offer(NamedTuple):
    """The next cached tokens of a prompt, all on one tier: seconds to load and to compute them."""

    tier: Tier
    tokens: int
    load_s: float
    compute_s: float


class Choice(NamedTuple):
    """Load the first `offers` of them. `load_s` and `compute_s` are of those, or, when none is
    loaded, of all; a load that takes longer than `worth_s` is not worth it."""

    offers: int
    load_s: float
    compute_s: float
    worth_s: float
    why: str


def choose(
    offers: Sequence[Offer], wait_s: float, *, behind: int = 0, always: bool = False
) -> Choice:
    """So many leading offers that loading them and computing the rest costs least waiting.

    `wait_s` is lost with any load: a step that runs ends before the attempt can go on. So many
    others are `behind`, who wait while the engine computes this one and not while it loads: a
    second of computing counts once for it and once for each of them. `always` takes all.
    """
    best, best_s, gain_s = 0, 0.0, -wait_s
    for count, offer in enumerate(offers, start=1):
        gain_s += (1 + behind) * offer.compute_s - offer.load_s
        if gain_s > best_s:
            best, best_s = count, gain_s
    if always:
        best = len(offers)
    of = offers[:best] or offers
    load_s = wait_s + sum(offer.load_s for offer in of)
    compute_s = sum(offer.compute_s for offer in of)
    names = "+".join(dict.fromkeys(offer.tier for offer in of))
    tokens = sum(offer.tokens for offer in of)
    load, compute = show_seconds(load_s), show_seconds(compute_s)
    why = f"{tokens} tokens: {load} from {names}, {compute} to compute"
    if behind:
        why += f", {behind} behind"
    return Choice(best, load_s, compute_s, (1 + behind) * compute_s, why)
