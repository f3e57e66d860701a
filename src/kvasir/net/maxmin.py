"""Max-min fair rates: how flows share links. Knows capacities and paths, not who sends or why.

Progressive filling (Bertsekas and Gallager, Data Networks, section 6.5.2): all shares rise at once;
those on a link that fills up, or at their own cap, stop there. A flow of multiplicity m is m equal
shares on one path.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from kvasir.net.topology import Route

Name = TypeVar("Name", bound=Hashable)
_Kind = tuple[tuple[int, ...], float | None]  # path and cap: flows that always get equal shares


class Flow(NamedTuple):
    """`multiplicity` shares over `links`, each at most `cap` bytes per second (None: no cap)."""

    links: tuple[int, ...]
    multiplicity: int = 1
    cap: float | None = None


def flow_of(route: Route) -> Flow:
    """The flow of one transfer over `route`."""
    return Flow(route.links, route.multiplicity, route.flow_cap)


def solve(capacities: Sequence[float], flows: Iterable[Flow]) -> list[float]:
    """Total rate of each flow, bytes per second, in the order given.

    `capacities` by link index. A flow over a link without capacity gets 0. Every flow has a link or
    a cap. O(sum of path lengths * log links); flows of equal path and cap cost one, and links that
    cannot fill up cost next to nothing.
    """
    order = list(flows)
    index: dict[_Kind, int] = {}
    counts: list[int] = []
    kind_of: list[int] = []
    for links, multiplicity, cap in order:
        at = index.setdefault((links, cap), len(counts))
        if at == len(counts):
            counts.append(multiplicity)
        else:
            counts[at] += multiplicity
        kind_of.append(at)
    shares = _fill(capacities, list(index), counts)
    return [shares[at] * flow[1] for at, flow in zip(kind_of, order, strict=True)]


def _tight(capacities: Sequence[float], kinds: list[_Kind], counts: list[int]) -> set[int]:
    """Links whose flows' caps add up to more than they have: only these can fill up."""
    demand: dict[int, float] = {}
    for (links, cap), count in zip(kinds, counts, strict=True):
        most = math.inf if cap is None else cap * count
        for link in links:
            demand[link] = demand.get(link, 0.0) + most
    return {link for link, most in demand.items() if most > capacities[link]}


def _fill(capacities: Sequence[float], kinds: list[_Kind], counts: list[int]) -> list[float]:
    """The share of each kind of flow; `counts` holds the number of shares of each.

    `weight` counts the shares on a link that still rise, `rest` is what stopped ones leave to them.
    Levels in the heap may be too low, never too high: a stop at or below a link's level can only
    raise it. They are brought up to date when they reach the top.
    """
    tight = _tight(capacities, kinds, counts)
    shares = [math.inf if cap is None else cap for _, cap in kinds]
    rising = [False] * len(kinds)
    weight: dict[int, int] = {}
    users: dict[int, list[int]] = {}
    for at, (links, _) in enumerate(kinds):
        assert links or shares[at] < math.inf, "a flow has neither a link nor a cap"
        for link in links:
            if link in tight:
                rising[at] = True
                weight[link] = weight.get(link, 0) + counts[at]
                users.setdefault(link, []).append(at)
    rest = {link: capacities[link] for link in weight}
    heap = [(rest[link] / count, link) for link, count in weight.items()]
    heapq.heapify(heap)
    by_cap = sorted(
        (at for at, up in enumerate(rising) if up), key=shares.__getitem__, reverse=True
    )
    while heap:
        level = _lowest(heap, weight, rest)
        while by_cap and not rising[by_cap[-1]]:
            by_cap.pop()
        if not by_cap:
            break
        if shares[by_cap[-1]] <= level:
            stopped = [by_cap[-1]]
            level = shares[by_cap[-1]]
        else:
            stopped = users[heap[0][1]]
        for at in stopped:
            if not rising[at]:
                continue
            rising[at] = False
            shares[at] = level
            taken = level * counts[at]
            for link in kinds[at][0]:
                if link in tight:
                    weight[link] -= counts[at]
                    rest[link] -= taken
    return shares


def _lowest(heap: list[tuple[float, int]], weight: dict[int, int], rest: dict[int, float]) -> float:
    """The level at which the next link fills up; that link is at the heap's top afterwards."""
    while heap:
        level, link = heap[0]
        count = weight[link]
        if not count:
            heapq.heappop(heap)
            continue
        now = rest[link] / count
        if now <= level:  # below by rounding only
            return level
        heapq.heapreplace(heap, (now, link))
    return math.inf


class FlowSet(Generic[Name]):
    """Flows that come and go over links of given capacity, and their rates.

    `capacities` is read at each solve, so it may grow or change; say `changed()` when it did.
    """

    def __init__(self, capacities: Sequence[float]) -> None:
        self._capacities = capacities
        self._flows: dict[Name, Flow] = {}
        self._rates: dict[Name, float] | None = {}

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, name: Name) -> bool:
        return name in self._flows

    def add(self, name: Name, flow: Flow) -> None:
        """Start a flow. Names are distinct."""
        assert name not in self._flows, f"flow {name!r} is already there"
        self._flows[name] = flow
        self._rates = None

    def remove(self, name: Name) -> None:
        """End a flow. Raises KeyError when there is none of that name."""
        del self._flows[name]
        self._rates = None

    def changed(self) -> None:
        """Capacities are others than at the last solve."""
        self._rates = None

    def rates(self) -> dict[Name, float]:
        """Bytes per second of every flow, in the order of arrival. Do not change it."""
        if self._rates is None:
            solved = solve(self._capacities, self._flows.values())
            self._rates = dict(zip(self._flows, solved, strict=True))
        return self._rates

    def rate_if(self, flow: Flow) -> float:
        """What `flow` would get if it started now, bytes per second."""
        return solve(self._capacities, (*self._flows.values(), flow))[-1]
