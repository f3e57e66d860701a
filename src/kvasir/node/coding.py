"""In which form KV leaves a worker: what its links give, as far as that is known, and what came of
the forms so far. Knows peers, bytes and seconds; `policy.codec` decides.

A link's rate is what the conductor's oracle expects until the link has carried something; a form's
size is the catalogue's until something has been sent in it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from kvasir.core.codec import RAW, CodecRules, Offer, Sent, pieces_of
from kvasir.core.events import KvCoded
from kvasir.core.ids import RequestId, WorkerId
from kvasir.core.units import show_seconds
from kvasir.node.config import WorkerConfig
from kvasir.node.work import Work
from kvasir.policy.codec import Choice, Task, choose, chunk_bytes
from kvasir.policy.tiers import Pace, assumed

Key = tuple[RequestId, int]


class Part(NamedTuple):
    """A `Send` that has not left yet. `wire_bytes`: predicted."""

    to: WorkerId
    form: str
    kv_bytes: int
    wire_bytes: float


class Coding:
    """`going` parts by attempt and first block; `links` by peer, in bytes a second."""

    def __init__(self, config: WorkerConfig, rules: CodecRules) -> None:
        self.links: dict[WorkerId, Pace] = {}
        self.going: dict[Key, dict[int, Part]] = {}
        self._worker, self._rules = config.worker, rules
        self._ratios = {offer.name: assumed(offer.ratio) for offer in rules.offers}  # bytes a byte

    def link_bytes_s(self, work: Work) -> float:
        """What the link to its target gives; infinite when nobody knows."""
        measured = self.links.get(work.target)
        expected = measured.per_s if measured is not None else work.link_bytes_s or float("inf")
        return min(expected, self._rules.bytes_per_s_max or float("inf"))

    def chunk_bytes(self, work: Work) -> int | None:
        """How much of it to send on one choice; None for all."""
        link = self.link_bytes_s(work)
        return chunk_bytes(link) if link < float("inf") else None

    def choose(self, work: Work, left: int, now: float) -> KvCoded:
        """The form of what leaves next, of `left` bytes that are still to go."""
        link = self.link_bytes_s(work)
        waits_s = sum(p.wire_bytes for p in self._on_way_to(work.target)) / link
        budget_s = None
        if self._rules.ttft_s is not None and work.dispatch.first_token == "decode":
            budget_s = self._rules.ttft_s - (now - work.dispatched_at) - waits_s
        choice = choose(self._offers(), Task(left, link, pieces_of(left), None, budget_s))
        return self._told(work, left, link, choice)

    def leaves(self, work: Work, first_block: int, form: str, nbytes: int) -> None:
        ratio = self._ratios[form].per_s if form in self._ratios else 1.0
        part = Part(work.target, form, nbytes, nbytes * ratio)
        self.going.setdefault((work.id, work.attempt), {})[first_block] = part

    def sent(self, event: Sent) -> None:
        """What left, in how many bytes, and what the link was measured to give."""
        parts = self.going.get((event.request_id, event.attempt), {})
        part = parts.pop(event.first_block, None)
        if part is None:
            return
        if event.link_bytes and event.link_s > 0:
            old = self.links.get(part.to, assumed(event.link_bytes / event.link_s))
            self.links[part.to] = old.measured(event.link_bytes, event.link_s)
        if part.form in self._ratios:
            old = self._ratios[part.form]
            self._ratios[part.form] = old.measured(event.wire_bytes, part.kv_bytes)

    def over(self, key: Key) -> None:
        """Nothing more of it will be told."""
        self.going.pop(key, None)

    def _on_way_to(self, target: WorkerId) -> list[Part]:
        return [p for parts in self.going.values() for p in parts.values() if p.to == target]

    def _offers(self) -> list[Offer]:
        return [
            msgspec.structs.replace(offer, ratio=self._ratios[offer.name].per_s)
            for offer in self._rules.offers
        ]

    def _told(self, work: Work, left: int, link: float, choice: Choice) -> KvCoded:
        coded, raw = show_seconds(choice.seconds), show_seconds(choice.raw_s)
        why = choice.why if choice.name == RAW else f"{choice.why}: {coded}, raw {raw}"
        return KvCoded(
            work.id, self._worker, work.target, choice.name, left,
            link if link < float("inf") else 0.0, choice.seconds, choice.raw_s, why,
        )  # fmt: skip
