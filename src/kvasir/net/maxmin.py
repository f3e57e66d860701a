"""Max-min fair rates: how flows share links. Knows capacities and paths, not who sends or why.

Progressive filling (Bertsekas and Gallager, Data Networks, section 6.5.2): all shares rise at once;
those on a link that fills up, or at their own cap, stop there. A flow of multiplicity m is m equal
shares on one path.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeVar, cast

from kvasir.net.topology import Route

Name = TypeVar("Name", bound=Hashable)
_Kind = tuple[tuple[int, ...], float | None]  # path and cap: flows that always get equal shares

SAME: Final = 1e-12  # relative: a share that differs by less is the old one
FULL: Final = 1e-9  # relative: a link this near to full is looked at as if it were
ROUNDS_SMALL: Final = 2  # in which a region grows only by what it disturbs


class Flow(NamedTuple):
    """`multiplicity` shares over `links`, each at most `cap` bytes per second (None: no cap)."""

    links: tuple[int, ...]
    multiplicity: int = 1
    cap: float | None = None


class _Solution(NamedTuple):
    """`shares` of the flows whose share changes; `levels` of the `region`'s links that have one."""

    shares: dict[Hashable, float]
    levels: dict[int, float]
    region: dict[int, None]


def flow_of(route: Route) -> Flow:
    """The flow of one transfer over a `route` of one path."""
    assert not route.ways, "a flow for each of a route's ways: see flows_of"
    return Flow(route.links, route.multiplicity, route.flow_cap)


def flows_of(route: Route) -> list[Flow]:
    """The flows of one transfer over `route`, one for each path in use."""
    return [Flow(way.links, way.pairs, route.flow_cap) for way in route.parts()]


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
    shares = _fill(capacities, list(index), counts, {})
    return [shares[at] * flow[1] for at, flow in zip(kind_of, order, strict=True)]


def _tight(capacities: Sequence[float], kinds: list[_Kind], counts: list[int]) -> set[int]:
    """Links whose flows' caps add up to more than they have: only these can fill up."""
    demand: dict[int, float] = {}
    for (links, cap), count in zip(kinds, counts, strict=True):
        most = math.inf if cap is None else cap * count
        for link in links:
            demand[link] = demand.get(link, 0.0) + most
    return {link for link, most in demand.items() if most > capacities[link]}


def _fill(
    capacities: Sequence[float], kinds: list[_Kind], counts: list[int], levels: dict[int, float]
) -> list[float]:
    """The share of each kind of flow; `counts` holds the number of shares of each.

    Puts into `levels` the share at which a link stopped flows; not every link does.

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
            levels[heap[0][1]] = level
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


class _Probe:
    """A flow's name that is nobody else's."""

    def __init__(self, at: int) -> None:
        self.at = at


class _Region:
    """Links to fill anew and the flows that cross one of them; the levels of all others stay.

    A flow's kind is the path and cap that it has inside: a level outside is a cap like its own.
    """

    def __init__(self, capacities: Sequence[float], levels: Mapping[int, float]) -> None:
        self.links: dict[int, None] = {}
        self._capacities = capacities
        self._levels = levels  # of the last solve
        self._flows: dict[Hashable, Flow] = {}
        self._before: dict[Hashable, float] = {}
        self._kinds: dict[Hashable, _Kind] = {}
        self._counts: dict[_Kind, int] = {}

    def join(self, name: Hashable, flow: Flow, share: float) -> None:
        """A flow whose kind is new because the region's links are; `share` is what it had."""
        links, multiplicity, cap = flow
        bound = math.inf if cap is None else cap
        inside = []
        for link in links:
            if link in self.links:
                inside.append(link)
            elif link in self._levels and self._levels[link] < bound:
                bound = self._levels[link]
        kind = (tuple(inside), None if bound == math.inf else bound)
        old = self._kinds.get(name)
        if old is None:
            self._flows[name] = flow
            self._before[name] = share
        else:
            self._counts[old] -= multiplicity
        self._kinds[name] = kind
        self._counts[kind] = self._counts.get(kind, 0) + multiplicity

    def fill(self, levels: dict[int, float]) -> dict[Hashable, float]:
        """Shares that change; puts the links' new levels into `levels`."""
        counts = {kind: count for kind, count in self._counts.items() if count}
        kinds = list(counts)
        filled = _fill(self._capacities, kinds, list(counts.values()), levels)
        share_of = dict(zip(kinds, filled, strict=True))
        shares: dict[Hashable, float] = {}
        for name, kind in self._kinds.items():
            share, before = share_of[kind], self._before[name]
            if share != before and abs(share - before) > SAME * max(share, before):
                shares[name] = share
        return shares

    def disturbed(
        self, shares: Mapping[Hashable, float], loads: Mapping[int, float]
    ) -> dict[int, None]:
        """Links outside that new shares make wrong: those with a level, and the overfilled."""
        found: dict[int, None] = {}
        more: dict[int, float] = {}
        for name, share in shares.items():
            links, multiplicity, _ = self._flows[name]
            delta = (share - self._before[name]) * multiplicity
            for link in links:
                if link in self.links:
                    continue
                if link in self._levels:
                    found[link] = None
                else:
                    more[link] = more.get(link, 0.0) + delta
        for link, delta in more.items():
            full = self._capacities[link] * (1 - FULL)
            if delta > 0 and loads.get(link, 0.0) + delta > full:
                found[link] = None
        return found


class FlowSet(Generic[Name]):
    """Flows that come and go over links of given capacity, and their rates.

    A change is solved where it is felt. A link that stops flows has a level: no share on it is
    larger. A share is the least of the flow's cap and its links' levels, so a change reaches
    another flow only over a link that stops some, or one that it overfills: the region to solve is
    the changed flow's such links, and grows by those that the solution disturbs, after a few rounds
    by all that may be. It never leaves the connected component. Rates outside it stay the same to
    the bit, and so do those that come out within SAME of what they were.

    `capacities` is read at each solve, so it may grow or change; say `changed()` when it did.
    """

    def __init__(self, capacities: Sequence[float]) -> None:
        self._capacities = capacities
        self._flows: dict[Name, Flow] = {}
        self._rates: dict[Name, float] = {}  # of all flows; those of `_fresh` are not solved yet
        self._shares: dict[Name, float] = {}
        self._users: dict[int, dict[Name, None]] = {}  # by link; without `_fresh`
        self._loads: dict[int, float] = {}  # of links with users, to rounding
        self._levels: dict[int, float] = {}  # of links that stop a flow
        self._fresh: dict[Name, None] = {}
        self._stale: dict[int, None] = {}  # links whose level is to be found again

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, name: Name) -> bool:
        return name in self._flows

    def add(self, name: Name, flow: Flow) -> None:
        """Start a flow. Names are distinct."""
        assert name not in self._flows, f"flow {name!r} is already there"
        self._flows[name] = flow
        self._rates[name] = 0.0
        self._fresh[name] = None

    def remove(self, name: Name) -> None:
        """End a flow. Raises KeyError when there is none of that name."""
        flow = self._flows.pop(name)
        rate = self._rates.pop(name)
        if name in self._fresh:
            del self._fresh[name]
            return
        del self._shares[name]
        for link in flow.links:
            users = self._users[link]
            del users[name]
            if link in self._levels:
                self._stale[link] = None
            if users:
                self._loads[link] -= rate
            else:
                del self._users[link], self._loads[link]

    def changed(self, links: Iterable[int] | None = None) -> None:
        """Capacities of `links` (None: of any) are others than at the last solve."""
        found = self._users if links is None else links
        self._stale.update(dict.fromkeys(link for link in found if link in self._users))

    def rates(self) -> dict[Name, float]:
        """Bytes per second of every flow, in the order of arrival. Do not change it."""
        self.settle()
        return self._rates

    def settle(self) -> dict[Name, float]:
        """Solve what has changed since the last solve; the rates that are others than before."""
        if not self._fresh and not self._stale:
            return {}
        fresh: dict[Hashable, Flow] = {name: self._flows[name] for name in self._fresh}
        solution = self._solve(fresh, self._stale)
        moved: dict[Name, float] = {}
        for name in self._fresh:
            self._shares[name] = 0.0
            moved[name] = 0.0
            for link in self._flows[name].links:
                self._users.setdefault(link, {})[name] = None
                self._loads.setdefault(link, 0.0)
        for name, share in cast("dict[Name, float]", solution.shares).items():
            self._shares[name] = share
            moved[name] = share * self._flows[name].multiplicity
        self._take(moved, solution)
        self._fresh.clear()
        self._stale.clear()
        return moved

    def _take(self, moved: dict[Name, float], solution: _Solution) -> None:
        """New rates and levels; loads of the region are summed anew, so rounding cannot add up."""
        for name, rate in moved.items():
            more = rate - self._rates[name]
            self._rates[name] = rate
            for link in self._flows[name].links:
                self._loads[link] += more
        for link in solution.region:
            if link in solution.levels:
                self._levels[link] = solution.levels[link]
            else:
                self._levels.pop(link, None)
            if link in self._users:
                self._loads[link] = sum(self._rates[name] for name in self._users[link])

    def rate_if(self, flow: Flow) -> float:
        """What `flow` would get if it started now, bytes per second."""
        return self.rates_if([flow])[0]

    def rates_if(self, flows: Sequence[Flow]) -> list[float]:
        """What each of `flows` would get if all of them started now, bytes per second."""
        self.settle()
        fresh: dict[Hashable, Flow] = {_Probe(at): flow for at, flow in enumerate(flows)}
        shares = self._solve(fresh, {}).shares
        return [shares.get(probe, 0.0) * flow.multiplicity for probe, flow in fresh.items()]

    def _solve(self, fresh: Mapping[Hashable, Flow], stale: Iterable[int]) -> _Solution:
        """Shares that change when `fresh` flows join and the levels of `stale` links are void."""
        region = _Region(self._capacities, self._levels)
        wider = dict.fromkeys(stale)
        for flow in fresh.values():
            assert flow.links or flow.cap is not None, "a flow has neither a link nor a cap"
            if flow.cap is None and not any(link in self._levels for link in flow.links):
                wider.update(dict.fromkeys(flow.links))
        for turn in itertools.count(1):
            region.links.update(wider)
            for name, flow in fresh.items():
                region.join(name, flow, 0.0)
            for known in dict.fromkeys(n for link in wider for n in self._users.get(link, ())):
                region.join(known, self._flows[known], self._shares[known])
            levels: dict[int, float] = {}
            shares = region.fill(levels)
            wider = region.disturbed(shares, self._loads)
            if not wider:
                break
            if turn >= ROUNDS_SMALL:
                wider = self._joined(wider)
        return _Solution(shares, levels, region.links)

    def _joined(self, links: Iterable[int]) -> dict[int, None]:
        """`links` and all with a level that flows join to them: what they can disturb, and more."""
        found = dict.fromkeys(links)
        seen: set[Name] = set()
        queue = list(found)
        while queue:
            for name in self._users.get(queue.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    for link in self._flows[name].links:
                        if link in self._levels and link not in found:
                            found[link] = None
                            queue.append(link)
        return found

    def check(self) -> None:
        """Assert that the books agree with the flows and that no link is overfilled."""
        self.settle()
        users: dict[int, dict[Name, None]] = {}
        for name, flow in self._flows.items():
            for link in flow.links:
                users.setdefault(link, {})[name] = None
        assert users == self._users and users.keys() == self._loads.keys()
        assert self._flows.keys() == self._rates.keys() == self._shares.keys()
        for link, names in users.items():
            load, capacity = math.fsum(self._rates[n] for n in names), self._capacities[link]
            assert load <= capacity * (1 + FULL), (link, load, capacity)
            assert abs(self._loads[link] - load) <= FULL * capacity, (link, load)
