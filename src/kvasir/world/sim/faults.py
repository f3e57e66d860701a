"""Seeded faults: late and lost messages, dying workers, clients that hang up, a bad network.

All randomness of a simulation is here and in `telemetry`, from one seed; without faults there is
none. Knows times, probabilities and names, nothing of what the messages say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.ids import WorkerId
from kvasir.core.messages import AnyMessage, KvEvents, Load, Location
from kvasir.core.specs import Deployment
from kvasir.core.specs.faults import CrossTraffic, FaultSpec, LinkFault, Outage
from kvasir.measure.recovery import Span, Window
from kvasir.net.place import node_named
from kvasir.net.topology import Topology


class Death(NamedTuple):
    """`back_at` is infinite for a worker that does not come back."""

    at: float
    worker: WorkerId
    back_at: float


class Faults:
    """One run's faults, of a spec that `resolve` has been over. Asked in the order of virtual time,
    so a seed gives one history."""

    def __init__(self, spec: FaultSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed
        self._until_s = math.inf if spec.until_s is None else spec.until_s
        self._random = random.Random(seed)
        lags: dict[type, float] = {KvEvents: spec.kv_event_lag_s, Load: spec.load_lag_s}
        self._lags = {kind: lag_s for kind, lag_s in lags.items() if lag_s}

    def lost(self, now: float) -> bool:
        return now < self._until_s and self._random.random() < self.spec.loss

    def delay(self, now: float, message: AnyMessage | None = None) -> float:
        """Extra seconds for one message; messages may overtake one another."""
        if now >= self._until_s:
            return 0.0
        late_s = self._random.random() * self.spec.delay_s_max
        return late_s + self._lags.get(type(message), 0.0)

    def deaths(self, workers: list[WorkerId], span_s: float | None) -> list[Death]:
        """When which worker dies, and when it is back: random ones before `span_s`, and outages."""
        found = []
        for _ in range(self.spec.deaths):
            at = self._random.random() * min(math.inf if span_s is None else span_s, self._until_s)
            back = at + self.spec.down_s * (0.5 + self._random.random())
            found.append(Death(at, self._random.choice(workers), back))
        for outage in self.spec.outages:
            found += [
                Death(from_s, outage.worker, until_s) for from_s, until_s in turns(outage)
            ]
        return sorted(found)

    def hangup(self) -> float | None:
        """Seconds after arrival at which this client leaves; None: it stays."""
        if self._random.random() >= self.spec.cancel:
            return None
        return self._random.random() * self.spec.cancel_s_max


def turns(fault: LinkFault | Outage) -> list[Span]:
    """When it is bad, in order."""
    for_s = math.inf if fault.for_s is None else fault.for_s
    starts = [fault.at_s + turn * fault.every_s for turn in range(fault.times)]
    return [Span(at, at + for_s) for at in starts]


def windows(spec: FaultSpec) -> list[Window]:
    """Outages, link faults and traffic by entry, in the order of the user's spec. Random deaths and
    lost messages have no times that are known beforehand."""
    found = [
        Window(f"{outage.worker or outage.node} down", tuple(turns(outage)))
        for outage in spec.outages
    ]
    found += [
        Window(f"{one.worker} leaves", (Span(one.at_s, one.at_s + one.within_s),))
        for one in spec.departures
    ]
    for fault in spec.links:
        what = fault.link or f"NICs of {fault.worker}"
        found.append(Window(f"{what} at {fault.scale:g} of capacity", tuple(turns(fault))))
    for cross in spec.traffic:
        until_s = math.inf if cross.until_s is None else cross.until_s
        what = f"traffic to accelerator {cross.target}"
        found.append(Window(what, (Span(cross.from_s, until_s),)))
    return found


def check(deployment: Deployment) -> None:
    """Raises ConfigError as `resolve` does, with or without faults."""
    if resolve(deployment) is None:
        Topology(deployment.topology).place(deployment)


def resolve(deployment: Deployment) -> FaultSpec | None:
    """The deployment's faults with workers' NICs as links and nodes as their workers.

    Raises ConfigError for a link, worker, node or accelerator that is not there, and where pools
    do not fit the topology.
    """
    spec = deployment.faults
    if spec is None:
        return None
    topology = Topology(deployment.topology)
    locations = topology.place(deployment)
    for location in locations.values():
        topology.route(location, location)  # its links have names from here on
    _check_traffic(spec.traffic, deployment.topology.gpus)
    links = [
        link for i, fault in enumerate(spec.links)
        for link in _links(topology, locations, fault, f"faults.links[{i}]")
    ]  # fmt: skip
    for i, departure in enumerate(spec.departures):
        _known(departure.worker, locations, "worker", f"faults.departures[{i}]")
    outages = [
        one for i, outage in enumerate(spec.outages)
        for one in _workers(topology, locations, outage, f"faults.outages[{i}]")
    ]  # fmt: skip
    return spec.model_copy(update={"links": tuple(links), "outages": tuple(outages)})


def _check_traffic(traffic: Iterable[CrossTraffic], gpus: int) -> None:
    for i, cross in enumerate(traffic):
        last = max(*cross.sources, cross.target)
        if last >= gpus:
            raise ConfigError(
                f"traffic names accelerator {last}, the topology has {gpus}",
                where=f"faults.traffic[{i}]",
                next_step=f"use 0 to {gpus - 1}",
            )


def _links(
    topology: Topology, locations: Mapping[WorkerId, Location], fault: LinkFault, where: str
) -> list[LinkFault]:
    """One fault for each link that it befalls."""
    names = [link.name for link in topology.links]
    if fault.worker:
        _known(fault.worker, locations, "worker", where)
        chosen = [names[link] for link in topology.nics(locations[fault.worker])]
    else:
        _known(fault.link, names, "link", where)
        chosen = [fault.link]
    return [fault.model_copy(update={"link": name, "worker": ""}) for name in chosen]


def _workers(
    topology: Topology, locations: Mapping[WorkerId, Location], outage: Outage, where: str
) -> list[Outage]:
    """One outage for each worker that it befalls."""
    if outage.worker:
        _known(outage.worker, locations, "worker", where)
        return [outage]
    node = node_named(topology.nodes, outage.node, where=where)
    there = range(node.first, node.first + node.gpus)
    hit = [w for w, location in locations.items() if any(g in there for g in location.gpus)]
    return [outage.model_copy(update={"worker": worker, "node": ""}) for worker in hit]


def _known(name: str, names: Iterable[str], kind: str, where: str) -> None:
    known = list(names)
    if name not in known:
        raise ConfigError(
            f"no {kind} {name!r}",
            where=where,
            nearest=nearest(name, known),
            next_step=f"name a {kind} of the deployment",
        )
