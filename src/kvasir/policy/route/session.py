"""Session affinity: a conversation stays where its KV is (ConServe, arXiv 2606.01839, pins the
decode worker of a conversation; so do most load balancers)."""

from __future__ import annotations

from collections.abc import Mapping

from xxhash import xxh3_64_intdigest

from kvasir.core.ids import WorkerId
from kvasir.policy.route.hashing import load_limit
from kvasir.policy.route.view import (
    SESSION_SETS,
    SESSIONS_PER_SET,
    Choice,
    Pin,
    Route,
    RouteMemory,
    RouteView,
)


def session_over(routes: Mapping[str, Route]) -> Route:
    """A policy that falls back to `spec.fallback` in `routes`: for requests without a session, new
    sessions, and those whose worker is gone or full. Each stage has its own worker."""

    def session(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
        name = f"{view.stage} {view.session}" if view.session is not None else ""
        known = pinned(memory, name) if name else ""
        for worker in view.candidates:
            if worker.id == known and worker.requests < load_limit(view):
                why = f"session {view.session}"
                choice = Choice(known, why, _estimate(view, known))
                return choice, pin(memory, name, known)
        choice, memory = routes[view.spec.fallback](view, memory)
        return choice, _pin_choice(memory, name, view, choice) if name else memory

    return session


def pinned(memory: RouteMemory, name: str) -> WorkerId:
    """The worker of a session, or ""."""
    for found in memory.sessions[_set_of(name)]:
        if found.session == name:
            return found.worker
    return ""


def pin(memory: RouteMemory, name: str, worker: WorkerId) -> RouteMemory:
    """`name` is the most recent of its set now; the least recent goes when the set is full."""
    at = _set_of(name)
    others = tuple(p for p in memory.sessions[at] if p.session != name)
    kept = others[max(0, len(others) + 1 - SESSIONS_PER_SET) :]
    sets = memory.sessions
    return memory._replace(sessions=(*sets[:at], (*kept, Pin(name, worker)), *sets[at + 1 :]))


def _pin_choice(memory: RouteMemory, name: str, view: RouteView, choice: Choice) -> RouteMemory:
    memory = pin(memory, name, choice.worker)
    if view.stage == "prefill" and choice.decode:
        memory = pin(memory, f"decode {view.session}", choice.decode)
    return memory


def _estimate(view: RouteView, worker: WorkerId) -> float:
    return view.transfer(worker).seconds if view.stage == "decode" else 0.0


def _set_of(name: str) -> int:
    return xxh3_64_intdigest(name.encode()) % SESSION_SETS
