"""By which transport KV goes from one worker to another, under `transport.kind: auto`.

Knows kinds and what was seen of them between these two. Must not know addresses, sockets or bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

ORDER: Final = ("shm", "nixl", "mooncake", "tcp")  # the fastest first, where nothing was measured
ASIDE_S: Final = 30.0  # how long a kind is not used between two workers after it failed there
PROBE_BYTES: Final = 1 << 20  # less than that says little about a speed
MEMORY: Final = 0.5  # weight of the last measurement


class Seen(NamedTuple):
    """Of one kind between two workers: bytes a second, and when it failed last."""

    rate: float | None = None
    failed_s: float | None = None
    reason: str = ""


class Way(NamedTuple):
    """`kind` is used; `wanted` would have been, had it not failed (equal, if it did not)."""

    kind: str
    wanted: str
    why: str


def choose(
    able: Collection[str], seen: Mapping[str, Seen], nbytes: int, now: float
) -> Way | None:
    """None when `able`, what both workers can do, is empty.

    What failed lately stands aside. Of the rest, what was never measured carries one transfer of at
    least PROBE_BYTES; then the fastest goes, and until then the first in ORDER.
    """
    ranked = [kind for kind in ORDER if kind in able]
    if not ranked:
        return None
    fit = [kind for kind in ranked if not _failed(seen, kind, now)] or ranked
    kind, why = _best(fit, seen, nbytes)
    wanted = ranked[0] if ranked[0] not in fit else kind
    if wanted != kind:
        why = f"{wanted} failed: {seen[wanted].reason}"
    return Way(kind, wanted, why)


def measured(old: Seen, nbytes: int, seconds: float) -> Seen:
    """After a transfer that went well, timed while nothing but the way held it back."""
    if nbytes < PROBE_BYTES or seconds <= 0:
        return old
    rate = nbytes / seconds
    return Seen(rate if old.rate is None else old.rate + MEMORY * (rate - old.rate))


def _best(fit: list[str], seen: Mapping[str, Seen], nbytes: int) -> tuple[str, str]:
    rates = {kind: seen[kind].rate for kind in fit if kind in seen}
    unknown = [kind for kind in fit if rates.get(kind) is None]
    if unknown and (nbytes >= PROBE_BYTES or len(unknown) == len(fit)):
        return unknown[0], "not measured yet" if len(fit) > 1 else "the only one"
    rate, fastest = max((rates[kind] or 0.0, kind) for kind in fit if kind not in unknown)
    return fastest, f"{rate / 1e9:.2f} GB/s"


def _failed(seen: Mapping[str, Seen], kind: str, now: float) -> bool:
    failed_s = seen[kind].failed_s if kind in seen else None
    return failed_s is not None and now - failed_s < ASIDE_S
