"""Which transport carries KV to which worker, and what came of it.

Knows addresses and clocks; `transfer/choice.py` decides. Where a deployment names one kind, each
peer has one address and there is nothing to choose.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvasir.core.events import TransportFellBack
from kvasir.core.ids import RequestId, WorkerId
from kvasir.transfer import Timeline
from kvasir.transfer.choice import Seen, choose, measured

Key = tuple[RequestId, int]
LOST: Final = ("cannot connect", "connection lost")  # how the reason of a broken way begins


class Going(NamedTuple):
    """A transfer on its way. `whole`: it was all there at the start, so that it can be timed."""

    target: WorkerId
    kind: str
    nbytes: int
    whole: bool


@dataclass(slots=True)
class Peer:
    addresses: dict[str, str] = field(default_factory=dict)  # by kind
    seen: dict[str, Seen] = field(default_factory=dict)
    told: str = ""  # the kind that was last said to stand in for another


class Ways:
    """Of one worker to all others. `able`: the kinds that it can send by."""

    def __init__(self, worker: WorkerId, able: Sequence[str]) -> None:
        self._worker, self._able = worker, frozenset(able)
        self._peers: dict[WorkerId, Peer] = {}
        self._going: dict[Key, Going] = {}

    def learn(self, target: WorkerId, addresses: Sequence[str]) -> None:
        """Where a peer listens. Another address is another life of it: what was seen is void."""
        by_kind = {address.partition("://")[0]: address for address in addresses}
        if self._peers.get(target, Peer()).addresses != by_kind:
            self._peers[target] = Peer(by_kind)

    def open(
        self, key: Key, target: WorkerId, nbytes: int, whole: bool
    ) -> tuple[str, TransportFellBack | None]:
        """The address to send to, empty when there is none, and what is to be said about it."""
        peer = self._peers.get(target)
        able = self._able & peer.addresses.keys() if peer is not None else frozenset()
        way = choose(able, peer.seen if peer else {}, nbytes if whole else 0, time.monotonic())
        if peer is None or way is None:
            return "", None
        self._going[key] = Going(target, way.kind, nbytes, whole)
        said = None
        if way.kind not in {way.wanted, peer.told}:
            said = TransportFellBack(
                key[0], self._worker, target, way.wanted, way.kind, way.why
            )  # fmt: skip
        peer.told = way.kind if way.kind != way.wanted else ""
        return peer.addresses[way.kind], said

    def over(self, key: Key, ok: bool, reason: str, timeline: Timeline | None) -> None:
        going = self._going.pop(key, None)
        peer = self._peers.get(going.target) if going is not None else None
        if going is None or peer is None:
            return
        old = peer.seen.get(going.kind, Seen())
        if not ok and reason.startswith(LOST):
            peer.seen[going.kind] = Seen(old.rate, time.monotonic(), reason)
        elif ok and going.whole and timeline is not None and timeline.over_s is not None:
            first_s = timeline.first_frame_s or timeline.over_s
            peer.seen[going.kind] = measured(old, timeline.bytes, timeline.over_s - first_s)
