"""Own transfers in flight, link by link: what one more would get beside them.

Knows routes and names of transfers. Must not know workers, bytes, time or policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kvasir.net.maxmin import FlowSet, flows_of
from kvasir.net.topology import Route, Topology


class OwnFlows:
    """Shard pairs counted on each link; exact max-min rates once somebody asks for them."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._routes: dict[str, Route] = {}
        self._pairs: dict[int, int] = {}  # link -> own shard pairs on it, never 0
        self._exact: FlowSet[tuple[str, int]] | None = None

    def add(self, name: str, route: Route) -> None:
        """A transfer over `route` begins. Names are distinct."""
        assert name not in self._routes, f"transfer {name!r} is already there"
        self._routes[name] = route
        for link, pairs in route.pairs_by_link():
            self._pairs[link] = self._pairs.get(link, 0) + pairs
        if self._exact is not None:
            _add(self._exact, name, route)

    def remove(self, name: str) -> None:
        """It is over. Raises KeyError when there is none of that name."""
        route = self._routes.pop(name)
        for link, pairs in route.pairs_by_link():
            left = self._pairs[link] - pairs
            if left:
                self._pairs[link] = left
            else:
                del self._pairs[link]
        if self._exact is not None:
            for at, _ in enumerate(route.parts()):
                self._exact.remove((name, at))

    def bottleneck_rate(self, route: Route, others: Sequence[float | None] = ()) -> float:
        """Bytes per second of the whole bundle by the narrowest share on its path.

        A pair gets min over links of capacity * (1 - c') / (1 + pairs already there), and no more
        than its cap. `others` is c' by tier; None and missing tiers count as 0. O(path length).

        It never says more than max-min fairness with equal flows on each link would give, and less
        where neighbours are held back elsewhere.
        """
        capacities, links, own = self._topology.capacities, self._topology.links, self._pairs
        share = math.inf if route.flow_cap is None else route.flow_cap
        for link, count in route.pairs_by_link():
            capacity = capacities[link]
            if others:
                tier = links[link].tier
                capacity *= 1.0 - ((others[tier] if tier < len(others) else None) or 0.0)
            here = capacity / (count + own.get(link, 0))
            if here < share:
                share = here
        return share * route.multiplicity

    def exact_rate(self, route: Route) -> float:
        """Bytes per second of the bundle by max-min fairness beside all own flows, now.

        A bundle over several paths is over when its slowest pair is.
        """
        if self._exact is None:
            self._exact = FlowSet(self._topology.capacities)
            for name, other in self._routes.items():
                _add(self._exact, name, other)
        flows = flows_of(route)
        rates = self._exact.rates_if(flows)
        slowest = min(r / flow.multiplicity for r, flow in zip(rates, flows, strict=True))
        return slowest * route.multiplicity

    def check(self, names: Iterable[str]) -> None:
        """Assert that exactly `names` are here and that the counts are what they add up to."""
        assert sorted(names) == sorted(self._routes), "own flows are not the transfers in flight"
        pairs: dict[int, int] = {}
        for route in self._routes.values():
            for link, count in route.pairs_by_link():
                pairs[link] = pairs.get(link, 0) + count
        assert pairs == self._pairs, f"counted on links {self._pairs}, in flight {pairs}"
        parts = sum(len(route.parts()) for route in self._routes.values())
        assert self._exact is None or len(self._exact) == parts


def _add(flows: FlowSet[tuple[str, int]], name: str, route: Route) -> None:
    for at, flow in enumerate(flows_of(route)):
        flows.add((name, at), flow)
