"""Why did the router choose that? Asked after the fact, of a recording.

The conductor runs again on its recorded inputs; when the request in question is routed, the policy
is asked once more about each candidate alone, and its own words for that one are its score terms.
So nothing is kept while serving, and the explanation cannot differ from the decision.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.ids import RequestId, WorkerId
from kvasir.node.conductor import Conductor
from kvasir.node.placement import RouteWindow
from kvasir.policy.route import Choice, RouteMemory, RouteView
from kvasir.runtime.replay import build, header_of, journals, turns


class Candidate(NamedTuple):
    worker: WorkerId
    hit_blocks: int
    why: str
    chosen: bool


class Decision(NamedTuple):
    """One question to the policy about the request, and every possible answer."""

    stage: str
    time: float
    input_tokens: int
    candidates: tuple[Candidate, ...]


def explain(directory: Path, request_id: RequestId) -> list[Decision]:
    """Decisions about `request_id`, in order. Raises ConfigError for an unknown request."""
    path = next((p for p in journals(directory) if header_of(p).kind == "conductor"), None)
    if path is None:
        raise ConfigError("the recording has no conductor's journal", where=str(directory))
    conductor = build(header_of(path))
    assert isinstance(conductor, Conductor)
    found: list[Decision] = []
    seen: dict[RequestId, None] = {}
    policy = conductor.route

    def listening(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
        choice, after = policy(view, memory)
        seen[view.request_id] = None
        if view.request_id == request_id:
            found.append(_decision(conductor.now, view, memory, choice))
        return choice, after

    def _decision(
        now: float, view: RouteView, memory: RouteMemory, choice: Choice
    ) -> Decision:
        assert isinstance(view, RouteWindow)
        candidates = []
        if choice.worker == choice.decode:  # it keeps both phases, and need not be a candidate
            hits = view.hits.get(choice.worker, 0)
            candidates.append(Candidate(choice.worker, hits, choice.why, True))
        for worker in view.candidates:
            alone, _ = policy(view.only(worker.id), memory)
            hits = view.hits.get(worker.id, 0)
            chosen = worker.id == choice.worker != choice.decode
            why = choice.why if chosen else alone.why
            candidates.append(Candidate(worker.id, hits, why, chosen))
        return Decision(view.stage, now, view.input_tokens, tuple(candidates))

    conductor.route = listening
    for _ in turns(path, conductor):
        pass
    if not found:
        raise ConfigError(
            f"no decision about request {request_id!r} in this recording",
            where=str(path),
            nearest=nearest(request_id, list(seen)[:1000]) if seen else "",
        )
    return found


def lines(decisions: list[Decision]) -> list[str]:
    """For people: one block a decision, the chosen candidate marked."""
    shown = []
    for d in decisions:
        shown.append(f"{d.stage} worker, {d.input_tokens} input tokens, time {d.time:.3f} s")
        for c in d.candidates:
            mark = "->" if c.chosen else "  "
            shown.append(f"  {mark} {c.worker:<14} hit {c.hit_blocks:>5} blocks  {c.why}")
    return shown
