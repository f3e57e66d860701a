"""A run as a timeline: one process a worker, steps and transfers as slices, KV as arrows.

Chrome's trace format (JSON object form), which Perfetto opens: times in microseconds, numeric pid,
tid and flow ids, metadata names, events sorted by time, slices of one thread never overlapping.
Drawn from what nodes handle and decide, either while a simulation runs or from a recording; knows
no world.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from kvasir.core.effects import AnyEffect, Fetch, Note, Send, Step, Tell
from kvasir.core.events import Preempted, Prefilled
from kvasir.core.ids import RequestId, StepId, WorkerId
from kvasir.core.messages import AnyMessage, Load, Received, SendOver, StepDone
from kvasir.runtime.replay import header_of, journals, turns

STEPS: Final = 1  # thread of a worker's steps; its KV lanes come after it
IDS_MAX: Final = 16
NANO: Final = 1e-3  # microseconds
ORDER: Final = {"M": 0, "X": 1, "C": 2, "i": 3, "s": 4, "f": 5}  # of one instant
Key = tuple[RequestId, int]
Mark = dict[str, Any]


class Place(NamedTuple):
    """Where an arrow begins or ends; `at` in microseconds."""

    pid: int
    tid: int
    at: float


class Timeline:
    """Listens to workers. `json()` is the file."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int, int, int, bytes]] = []
        self._tracks = 0
        self.sent: dict[Key, Place] = {}
        self.came: dict[Key, Place] = {}

    def listen(self, name: str, kind: str) -> Track | None:
        """A process for a worker; other nodes have none."""
        if kind != "worker":
            return None
        self._tracks += 1
        return Track(self, self._tracks, name)

    def add(self, kind: str, place: Place, name: str, **more: Any) -> None:
        pid, tid, at = place
        mark = {"ph": kind, "pid": pid, "tid": tid, "ts": at, "name": name, **more}
        self._marks.append((at, ORDER[kind], pid, tid, msgspec.json.encode(mark)))

    def json(self) -> bytes:
        self._arrows()
        marks = b",\n".join(mark[-1] for mark in sorted(self._marks))
        return b'{"displayTimeUnit":"ms","traceEvents":[\n' + marks + b"\n]}\n"

    def _arrows(self) -> None:
        """From where KV was first sent to where it all was received; both ends or none.

        An arrow ends a nanosecond inside its slice, or it would belong to what comes next. Clocks
        of live workers may disagree: an arrow back in time is left out, like one of nothing.
        """
        pairs = ((k, self.sent[k], end) for k, end in self.came.items() if k in self.sent)
        for number, (key, begin, end) in enumerate(pairs, start=1):
            end = end._replace(at=round(end.at - NANO, 3))
            if end.at >= begin.at:
                more = {"cat": "kv", "id": number, "args": {"request": key[0], "attempt": key[1]}}
                self.add("s", begin, "KV", **more)
                self.add("f", end, "KV", bp="e", **more)


class Lanes:
    """Threads `first`, `first` + 2, ... of one process: the lowest that is free."""

    def __init__(self, first: int) -> None:
        self._next = first
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        lane, self._next = self._next, self._next + 2
        return lane

    def give(self, lane: int) -> None:
        heapq.heappush(self._free, lane)


class Open(NamedTuple):
    """A transfer under way."""

    began: float
    lane: int
    to: WorkerId = ""


class Track:
    """One worker's process."""

    def __init__(self, timeline: Timeline, pid: int, name: str) -> None:
        self._timeline, self._pid = timeline, pid
        self._steps: dict[StepId, tuple[float, Step]] = {}
        self._inbound: dict[Key, Open] = {}
        self._outbound: dict[Key, Open] = {}
        self._lanes_in, self._lanes_out = Lanes(STEPS + 1), Lanes(STEPS + 2)
        self._named: set[int] = set()
        self._meta(0, "process_name", name)
        self._thread(STEPS, "steps")

    def add(self, now: float, event: AnyMessage, effects: Sequence[AnyEffect]) -> None:
        if isinstance(event, StepDone):
            self._step_done(now, event)
        elif isinstance(event, Received):
            self._received(now, event)
        elif isinstance(event, SendOver):
            self._sent(now, event)
        for effect in effects:
            self._effect(now, effect)

    # --- what begins ------------------------------------------------------------------------------

    def _effect(self, now: float, effect: AnyEffect) -> None:
        if isinstance(effect, Step):
            self._steps[effect.id] = (now, effect)
            self._counter(now, "batch", {"rows": len(effect.rows) + effect.carried})
        elif isinstance(effect, Fetch):
            key = (effect.request_id, effect.attempt)
            if key not in self._inbound:
                self._inbound[key] = Open(now, self._lane(self._lanes_in, "KV in"))
        elif isinstance(effect, Send):
            key = (effect.request_id, effect.attempt)
            if key not in self._outbound:
                lane = self._lane(self._lanes_out, "KV out")
                self._outbound[key] = Open(now, lane, effect.to)
                self._timeline.sent[key] = self._place(lane, now)
        elif isinstance(effect, Tell) and isinstance(effect.message, Load):
            load = effect.message
            self._counter(now, "requests", {"running": load.running, "waiting": load.waiting})
            self._counter(now, "KV blocks free", {"blocks": load.kv_blocks_free})
        elif isinstance(effect, Note) and isinstance(effect.event, (Preempted, Prefilled)):
            name = f"{type(effect.event).__name__} {effect.event.request_id}"
            self._timeline.add("i", self._place(STEPS, now), name, s="t")

    # --- what ends --------------------------------------------------------------------------------

    def _step_done(self, now: float, event: StepDone) -> None:
        began = self._steps.pop(event.step, None)
        if began is None:
            return
        at, step = began
        ids = [row.request_id for row in step.rows[:IDS_MAX]]
        more = {"iterations": event.steps_done, "rows": len(step.rows) + step.carried, "named": ids}
        self._slice(STEPS, at, now, _words(step), {"step": step.id, **more})

    def _received(self, now: float, event: Received) -> None:
        key = (event.request_id, event.attempt)
        began = self._inbound.pop(key, None)
        if began is None:
            return
        more = {"bytes": event.bytes, "ok": event.ok, "transport": event.transport}
        self._slice(began.lane, began.began, now, f"receive {key[0]}", more)
        self._lanes_in.give(began.lane)
        if event.ok:
            self._timeline.came[key] = self._place(began.lane, now)

    def _sent(self, now: float, event: SendOver) -> None:
        key = (event.request_id, event.attempt)
        began = self._outbound.pop(key, None)
        if began is not None:
            more = {"to": began.to, "ok": event.ok}
            self._slice(began.lane, began.began, now, f"send {key[0]}", more)
            self._lanes_out.give(began.lane)

    # --- marks ------------------------------------------------------------------------------------

    def _place(self, tid: int, at: float) -> Place:
        return Place(self._pid, tid, round(at * 1e6, 3))

    def _slice(self, tid: int, start: float, end: float, name: str, args: Mark) -> None:
        place = self._place(tid, start)
        dur = round(round(end * 1e6, 3) - place.at, 3)
        self._timeline.add("X", place, name, dur=dur, args=args)

    def _counter(self, now: float, name: str, values: dict[str, int]) -> None:
        self._timeline.add("C", self._place(0, now), name, args=values)

    def _lane(self, lanes: Lanes, name: str) -> int:
        lane = lanes.take()
        if lane not in self._named:
            self._thread(lane, f"{name} {(lane - STEPS + 1) // 2}")
        return lane

    def _thread(self, tid: int, name: str) -> None:
        self._named.add(tid)
        self._meta(tid, "thread_name", name)

    def _meta(self, tid: int, what: str, name: str) -> None:
        self._timeline.add("M", Place(self._pid, tid, 0.0), what, args={"name": name})


def _words(step: Step) -> str:
    prefill = sum(row.count for row in step.rows if row.count > 1)
    decode = step.carried + sum(row.count == 1 for row in step.rows)
    if prefill and decode:
        return f"prefill {prefill} + decode {decode}"
    return f"prefill {prefill}" if prefill else f"decode {decode}"


def timeline(directory: Path) -> bytes:
    """The JSON of a recording. Raises ConfigError when the folder holds none."""
    drawn = Timeline()
    for path in journals(directory):
        header = header_of(path)
        track = drawn.listen(header.node, header.kind)
        if track is not None:
            for turn in turns(path):
                track.add(turn.entry.now, turn.entry.event, turn.effects)
    return drawn.json()
