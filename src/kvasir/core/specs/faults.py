"""What goes wrong in a simulated run, and who else is on the network. `serve` ignores it.

Times are virtual seconds from the start of the run. Names of links, workers and nodes are those of
the deployment's topology and pools; whether they are there is checked with the topology at hand.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from kvasir.core.specs.base import Spec, wrong

TURNS_MAX = 100_000


class LinkFault(Spec):
    """From `at_s` a link has `scale` of its capacity, for `for_s` (None: for good).

    `scale` 0 is down, 0.1 a slow NIC. Either one `link` by the topology's name (`rack-0-up`,
    `gpus-0..3-nic-in`, `leaf-0>spine-1`), or all NICs of a `worker`, both ways. It flaps `times`
    times, every `every_s`. What crosses a dead link stalls until it is back or somebody gives up.
    Where faults of one link overlap, the last word counts.
    """

    link: str = ""
    worker: str = ""
    at_s: float = Field(ge=0)
    scale: float = Field(default=0.0, ge=0, le=1)
    for_s: float | None = Field(default=None, gt=0)
    times: int = Field(default=1, ge=1, le=TURNS_MAX)
    every_s: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> LinkFault:
        _one_of(link=self.link, worker=self.worker)
        _turns(self.for_s, self.times, self.every_s)
        return self


class Outage(Spec):
    """At `at_s` a `worker` dies, or with a `node` all workers that have an accelerator on it.

    They are back `for_s` later (None: never), with nothing in memory; and so on, `times` times
    every `every_s`.
    """

    worker: str = ""
    node: str = ""
    at_s: float = Field(ge=0)
    for_s: float | None = Field(default=None, gt=0)
    times: int = Field(default=1, ge=1, le=TURNS_MAX)
    every_s: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> Outage:
        _one_of(worker=self.worker, node=self.node)
        _turns(self.for_s, self.times, self.every_s)
        return self


class Departure(Spec):
    """At `at_s` a `worker` is told to leave within `within_s`, and does not come back."""

    worker: str
    at_s: float = Field(ge=0)
    within_s: float = Field(default=30.0, gt=0)


class CrossTraffic(Spec):
    """Others' flows from each of `sources` to `target`, each of at most `bandwidth` bytes a second.

    Accelerators by index. Constant, or `on_s` on and `off_s` off in turn: means of exponential
    durations with `random`. All sources are on together: several make an incast burst. Where each
    accelerator has a NIC of its own they meet our transfers on uplinks only.
    """

    sources: tuple[int, ...] = Field(min_length=1)
    target: int = Field(ge=0)
    bandwidth: float = Field(gt=0)
    from_s: float = Field(default=0.0, ge=0)
    until_s: float | None = Field(default=None, gt=0)
    on_s: float | None = Field(default=None, gt=0)
    off_s: float = Field(default=0.0, ge=0)
    random: bool = False

    @model_validator(mode="after")
    def _whole(self) -> CrossTraffic:
        if self.target in self.sources:
            raise wrong(f"accelerator {self.target} is source and target", "target")
        if min(self.sources) < 0:
            raise wrong(f"no accelerator {min(self.sources)}", "sources")
        if self.until_s is not None and self.until_s <= self.from_s:
            raise wrong(f"it ends at {self.until_s:g} s and begins at {self.from_s:g} s", "until_s")
        if self.off_s and self.on_s is None:
            raise wrong("how long it is on between its pauses is missing", "on_s")
        return self


class FaultSpec(Spec):
    """Probabilities are per message or per request; seconds are means or bounds.

    A control message is lost with `loss`, else late by up to `delay_s_max`; news of caches and of
    loads are late by `kv_event_lag_s` and `load_lag_s` beside that. `deaths` of random workers
    before `until_s`, each for `down_s` on average. A client leaves with probability `cancel` within
    `cancel_s_max`. `until_s`: none of these after it (None: no end), so that a run can come to
    rest; `outages`, `departures`, `links` and `traffic` have times of their own.
    """

    loss: float = Field(default=0.0, ge=0, lt=1)
    delay_s_max: float = Field(default=0.0, ge=0)
    kv_event_lag_s: float = Field(default=0.0, ge=0)
    load_lag_s: float = Field(default=0.0, ge=0)
    deaths: int = Field(default=0, ge=0, le=TURNS_MAX)
    down_s: float = Field(default=1.0, gt=0)
    cancel: float = Field(default=0.0, ge=0, le=1)
    cancel_s_max: float = Field(default=2.0, ge=0)
    until_s: float | None = Field(default=None, ge=0)
    outages: tuple[Outage, ...] = ()
    departures: tuple[Departure, ...] = ()
    links: tuple[LinkFault, ...] = ()
    traffic: tuple[CrossTraffic, ...] = ()

    @model_validator(mode="after")
    def _deaths_have_an_end(self) -> FaultSpec:
        if self.deaths and self.until_s is None:
            raise wrong("random deaths are spread from 0 to until_s, which is missing", "deaths")
        return self


def _one_of(**names: str) -> None:
    given = [key for key, name in names.items() if name]
    if len(given) != 1:
        raise wrong(f"give one of {' and '.join(names)}", *given[1:])


def _turns(for_s: float | None, times: int, every_s: float) -> None:
    if times > 1 and (for_s is None or for_s > every_s):
        raise wrong("it comes again before it is over: times > 1 needs for_s <= every_s", "every_s")
