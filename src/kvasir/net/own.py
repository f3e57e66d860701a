"""Own transfers in flight, link by link: what one more would get beside them.

Knows routes and names of transfers. Must not know workers, bytes, time or policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kvasir.net.maxmin import FlowSet, flow_of
from kvasir.net.topology import Route, Topology


class OwnFlows:
    """Shard pairs counted on each link; exact max-min rates once somebody asks for them."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._routes: dict[str, Route] = {}
        self._pairs: dict[int, int] = {}  # link -> own shard pairs on it, never 0
        self._exact: FlowSet[str] | None = None

    def add(self, name: str, route: Route) -> None:
        """A transfer over `route` begins. Names are distinct."""
        assert name not in self._routes, f"transfer {name!r} is already there"
        self._routes[name] = route
        for link in route.links:
            self._pairs[link] = self._pairs.get(link, 0) + route.multiplicity
        if self._exact is not None:
            self._exact.add(name, flow_of(route))

    def remove(self, name: str) -> None:
        """It is over. Raises KeyError when there is none of that name."""
        route = self._routes.pop(name)
        for link in route.links:
            left = self._pairs[link] - route.multiplicity
            if left:
                self._pairs[link] = left
            else:
                del self._pairs[link]
        if self._exact is not None:
            self._exact.remove(name)

    def bottleneck_rate(self, route: Route, others: Sequence[float | None] = ()) -> float:
        """Bytes per second of the whole bundle by the narrowest share on its path.

        A pair gets min over links of capacity * (1 - c') / (1 + pairs already there), and no more
        than its cap. `others` is c' by tier; None and missing tiers count as 0. O(path length).

        It never says more than max-min fairness with equal flows on each link would give, and less
        where neighbours are held back elsewhere.
        """
        capacities, links, own = self._topology.capacities, self._topology.links, self._pairs
        count = route.multiplicity
        share = math.inf if route.flow_cap is None else route.flow_cap
        for link in route.links:
            capacity = capacities[link]
            if others:
                tier = links[link].tier
                capacity *= 1.0 - ((others[tier] if tier < len(others) else None) or 0.0)
            here = capacity / (count + own.get(link, 0))
            if here < share:
                share = here
        return share * count

    def exact_rate(self, route: Route) -> float:
        """Bytes per second of the bundle by max-min fairness beside all own flows, now."""
        if self._exact is None:
            self._exact = FlowSet(self._topology.capacities)
            for name, other in self._routes.items():
                self._exact.add(name, flow_of(other))
        return self._exact.rate_if(flow_of(route))

    def check(self, names: Iterable[str]) -> None:
        """Assert that exactly `names` are here and that the counts are what they add up to."""
        assert sorted(names) == sorted(self._routes), "own flows are not the transfers in flight"
        pairs: dict[int, int] = {}
        for route in self._routes.values():
            for link in route.links:
                pairs[link] = pairs.get(link, 0) + route.multiplicity
        assert pairs == self._pairs, f"counted on links {self._pairs}, in flight {pairs}"
        assert self._exact is None or len(self._exact) == len(self._routes)
