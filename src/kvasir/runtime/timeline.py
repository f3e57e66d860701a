"""A recording as a timeline: one process a worker, steps and requests as slices, KV as arrows.

Chrome's trace format (JSON object form), which Perfetto opens: times in microseconds, numeric pid
and tid, metadata names, events sorted by time. Built from journals alone, so live and simulated
recordings look alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvasir.core.effects import Fetch, Note, Send, Step
from kvasir.core.events import Preempted, Prefilled
from kvasir.core.ids import WorkerId
from kvasir.core.messages import Load, Received, SendOver, StepDone
from kvasir.node.worker import Worker
from kvasir.runtime.replay import build, header_of, journals, turns

STEPS, KV_IN, KV_OUT = 1, 2, 3
THREADS = {STEPS: "steps", KV_IN: "KV in", KV_OUT: "KV out"}
Mark = dict[str, Any]


def timeline(directory: Path) -> bytes:
    """The JSON. Raises ConfigError when the folder holds no recording."""
    marks: list[Mark] = []
    for path in journals(directory):
        header = header_of(path)
        if header.kind == "worker":
            pid = len({m["pid"] for m in marks}) + 1
            marks += _worker(path, header.node, pid)
    marks.sort(key=lambda m: (m["ts"], m["pid"], m["tid"]))
    return msgspec.json.encode({"traceEvents": marks, "displayTimeUnit": "ms"})


def _worker(path: Path, name: str, pid: int) -> Iterator[Mark]:
    yield _meta(pid, 0, "process_name", name)
    for tid, thread in THREADS.items():
        yield _meta(pid, tid, "thread_name", thread)
    node = build(header_of(path))
    assert isinstance(node, Worker)
    step: tuple[float, Step] | None = None
    inbound: dict[tuple[str, int], float] = {}
    outbound: dict[tuple[str, int], tuple[float, WorkerId]] = {}
    for turn in turns(path, node):
        now, event = turn.entry.now, turn.entry.event
        if isinstance(event, StepDone) and step is not None:
            yield _slice(pid, STEPS, step[0], now, _words(step[1]), _rows(step[1], event))
            step = None
        elif isinstance(event, Received):
            key = (event.request_id, event.attempt)
            began = inbound.pop(key, now)
            yield _slice(pid, KV_IN, began, now, f"receive {key[0]}", {"bytes": event.bytes})
            yield _arrow("f", pid, KV_IN, now, key)
        elif isinstance(event, SendOver):
            key = (event.request_id, event.attempt)
            began, to = outbound.pop(key, (now, ""))
            yield _slice(pid, KV_OUT, began, now, f"send {key[0]}", {"to": to, "ok": event.ok})
        for effect in turn.effects:
            if isinstance(effect, Step):
                step = (now, effect)
            elif isinstance(effect, Fetch):
                inbound[effect.request_id, effect.attempt] = now
            elif isinstance(effect, Send):
                key = (effect.request_id, effect.attempt)
                if key not in outbound:
                    yield _arrow("s", pid, KV_OUT, now, key)
                outbound.setdefault(key, (now, effect.to))
            elif isinstance(effect, Note) and isinstance(effect.event, (Preempted, Prefilled)):
                kind = type(effect.event).__name__
                yield _instant(pid, now, f"{kind} {effect.event.request_id}")
        yield from _counters(pid, now, node.load() if isinstance(event, StepDone) else None)


def _words(step: Step) -> str:
    prefill = sum(row.count for row in step.rows if row.count > 1)
    decode = sum(row.count == 1 for row in step.rows)
    if prefill and decode:
        return f"prefill {prefill} + decode {decode}"
    return f"prefill {prefill}" if prefill else f"decode {decode}"


def _rows(step: Step, done: StepDone) -> Mark:
    ids = [row.request_id for row in step.rows[:16]]
    return {"step": step.id, "iterations": done.steps_done, "rows": len(step.rows), "first": ids}


def _counters(pid: int, now: float, load: Load | None) -> Iterator[Mark]:
    if load is not None:
        values = {"running": load.running, "waiting": load.waiting}
        yield _mark("C", pid, 0, now, "requests", args=values)
        yield _mark("C", pid, 0, now, "KV blocks free", args={"blocks": load.kv_blocks_free})


def _mark(kind: str, pid: int, tid: int, at: float, name: str, **more: Any) -> Mark:
    return {"ph": kind, "pid": pid, "tid": tid, "ts": round(at * 1e6, 3), "name": name, **more}


def _meta(pid: int, tid: int, what: str, name: str) -> Mark:
    return _mark("M", pid, tid, 0.0, what, args={"name": name})


def _slice(pid: int, tid: int, start: float, end: float, name: str, args: Mark) -> Mark:
    return _mark("X", pid, tid, start, name, dur=round((end - start) * 1e6, 3), args=args)


def _arrow(kind: str, pid: int, tid: int, at: float, key: tuple[str, int]) -> Mark:
    more = {"bp": "e"} if kind == "f" else {}
    return _mark(kind, pid, tid, at, "KV", cat="kv", id=f"{key[0]}/{key[1]}", **more)


def _instant(pid: int, at: float, name: str) -> Mark:
    return _mark("i", pid, STEPS, at, name, s="t")
