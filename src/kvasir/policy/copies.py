"""Which cached blocks are worth a copy elsewhere, before a request asks for them.

Pure: windows on the conductor's state in, a `Plan` or nothing out. Knows loads, hits, predicted
seconds. A copy is off the critical path, but it takes links from requests and room from other
blocks; so each kind has to pay by the same rule (`pays`).

Mooncake (arXiv 2407.00079, 6.2) replicates hot blocks as a side effect of routing a request away
from its cache; Preble (arXiv 2407.00023) splits a hot prefix's load over more workers once the load
is there. Here the copy goes first, and routing follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from kvasir.core.ids import WorkerId
from kvasir.core.specs.copies import CopiesSpec

BUSY: Final = 2.0  # a path that would take this many times its idle time is left to requests


class Loaded(Protocol):
    """A worker that could hold a copy. `prefill_s`: predicted seconds of prefill that wait."""

    @property
    def id(self) -> WorkerId: ...
    @property
    def prefill_s(self) -> float: ...


class Way(NamedTuple):
    """Predicted seconds of a transfer now, and of the same on an idle network."""

    seconds: float
    idle_s: float


class CopyView(Protocol):
    """One chain of blocks. `depths[worker]`: its leading blocks that stand on a worker's device, or
    are on their way there; `stored` counts those on its other tiers too. `targets`: who may take a
    copy; never those that leave. `computing`: a worker that will have all of it, as a prompt was
    sent there just now; may be empty.

    `way(source, target, blocks)` of so many leading blocks, less what `target` has; `saved_s` is
    what prefilling them at `target` would take.
    """

    @property
    def spec(self) -> CopiesSpec: ...
    @property
    def depths(self) -> Mapping[WorkerId, int]: ...
    @property
    def stored(self) -> Mapping[WorkerId, int]: ...
    @property
    def targets(self) -> Sequence[Loaded]: ...
    @property
    def computing(self) -> WorkerId: ...

    def way(self, source: WorkerId, target: WorkerId, blocks: int) -> Way: ...
    def saved_s(self, target: WorkerId, blocks: int) -> float: ...


class Used(NamedTuple):
    """Of one chain: how often prompts began with its first `blocks` of late."""

    blocks: int
    uses: float


class Plan(NamedTuple):
    """Copy the chain's first `blocks`."""

    blocks: int
    source: WorkerId
    target: WorkerId
    why: str


def pays(view: CopyView, source: WorkerId, target: WorkerId, blocks: int) -> Plan | None:
    """Computing would take longer than copying, and the path is not busy."""
    way, saved_s = view.way(source, target, blocks), view.saved_s(target, blocks)
    if way.seconds >= saved_s or way.seconds > BUSY * way.idle_s:
        return None
    why = f"{blocks} blocks in {way.seconds:.3g} s instead of {saved_s:.3g} s"
    return Plan(blocks, source, target, why)


def spread(view: CopyView, used: Sequence[Used]) -> Plan | None:
    """One more copy of the longest leading part that is hot on too few workers: a worker for each
    `uses_per_copy` uses. To the least loaded worker, if all that have it are busier: routing keeps
    to a cache while it can. `used`: by growing `blocks`."""
    most = min(view.spec.copies_max, len(view.targets))
    for blocks, uses in reversed(used):
        wanted = min(most, int(uses / view.spec.uses_per_copy))
        holders = [w for w, depth in view.depths.items() if depth >= blocks]
        having = {*holders, view.computing} & {target.id for target in view.targets}
        if not holders or len(having) >= wanted:
            continue
        least = min(view.targets, key=lambda t: (t.prefill_s, t.id not in having, t.id))
        if least.id in having:  # a prompt would go there and find it
            continue
        plan = pays(view, _nearest(view, holders, least.id, blocks), least.id, blocks)
        if plan is not None:
            return plan._replace(why=f"{uses:.1f} uses, {len(having)} copies: {plan.why}")
    return None


def bring(view: CopyView, target: WorkerId) -> Plan | None:
    """All of the chain that any worker has, to where its next prompt will be prefilled; out of that
    worker's own tiers if nobody has more. Whether loading is sooner than computing, it knows."""
    blocks, own = max(view.depths.values(), default=0), view.stored.get(target, 0)
    if own >= blocks and own > view.depths.get(target, 0):
        return Plan(own, target, target, f"{own} blocks out of its tiers")
    if view.depths.get(target, 0) >= blocks:
        return None
    holders = [w for w, depth in view.depths.items() if depth == blocks]
    return pays(view, _nearest(view, holders, target, blocks), target, blocks)


def rescue(view: CopyView, leaving: WorkerId) -> Plan | None:
    """What only a leaving worker has, to the worker that has most of the chain before it: chains
    stay whole, and what is elsewhere does not travel."""
    others = [t for t in view.targets if t.id != leaving]
    if not others:
        return None
    heir = max(others, key=lambda t: (view.depths.get(t.id, 0), -t.prefill_s, t.id)).id
    return pays(view, leaving, heir, view.depths.get(leaving, 0))


def _nearest(
    view: CopyView, holders: Sequence[WorkerId], target: WorkerId, blocks: int
) -> WorkerId:
    return min(holders, key=lambda w: (view.way(w, target, blocks).seconds, w))
