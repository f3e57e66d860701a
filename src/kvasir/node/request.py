"""The request node: the life of each request at its gateway, from arrival to the last token.

Knows counts and where attempts run. Must not know token ids or text (the gateway around it keeps
them), HTTP, or why a place was chosen. It is the only one that tries again: whatever goes wrong, it
submits the next attempt with what has been emitted, so no token is lost and none comes twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from kvasir.core.caches import CacheState, Mark, Retain
from kvasir.core.effects import AnyEffect, Note, Refuse, Reply, Tell, Timer
from kvasir.core.events import Closed, Recomputed
from kvasir.core.ids import CONDUCTOR, CacheId, NodeId, RequestId, WorkerId
from kvasir.core.message import Message
from kvasir.core.messages import (
    Active,
    Alarm,
    AnyMessage,
    Arrive,
    Declined,
    Done,
    Drawn,
    Ended,
    EndReason,
    GatewayBeat,
    Hangup,
    Lost,
    Placed,
    Prompt,
    Report,
    Start,
    Submit,
    Tokens,
    Usage,
)  # fmt: skip
from kvasir.core.request import Request

BEAT = "beat"
DEADLINE = "deadline:"


class Life:
    """One request. `emitted` output tokens stand at the gateway, in order, each once."""

    __slots__ = (
        "arrived_at", "attempt", "carried", "deaths", "decode", "emitted", "end", "first_at",
        "kept_tokens", "last_at", "marks", "path", "prefill", "report", "request", "second_at",
        "submitted_at",
    )  # fmt: skip

    def __init__(self, request: Request, now: float, marks: tuple[Mark, ...] = ()) -> None:
        self.request = request
        self.marks = marks
        self.kept_tokens = 0  # of the prompt, in a cache that its tenant keeps
        self.attempt = 1
        self.emitted = 0
        self.carried = 0  # of them, how many this attempt began with
        self.end: EndReason | None = None  # the last emitted token ends the text
        self.deaths = 0  # workers that ended while they served it
        self.arrived_at = now
        self.submitted_at = now
        self.path = ""
        self.prefill: WorkerId = ""
        self.decode: WorkerId = ""
        self.first_at: float | None = None
        self.second_at: float | None = None
        self.last_at: float | None = None
        self.report: Report | None = None


class Known(NamedTuple):
    """What the conductor said last of a cache that was made here, and when it ends."""

    state: CacheState
    ends_at: float


class Requests:
    """State machine of one gateway's requests."""

    def __init__(
        self, gateway: NodeId, incarnation: int, *, beat_s: float, grace_s: float,
        attempts_max: int, deaths_max: int, conductor: NodeId = CONDUCTOR,
    ) -> None:  # fmt: skip
        self.gateway = gateway
        self.incarnation = incarnation
        self.conductor = conductor
        self.beat_s, self.grace_s, self.attempts_max = beat_s, grace_s, attempts_max
        self.deaths_max = deaths_max
        self.lives: dict[RequestId, Life] = {}
        self.caches: dict[CacheId, Known] = {}
        self._retained: dict[CacheId, Retain] = {}  # not answered yet
        self._now = 0.0
        self._out: list[AnyEffect] = []
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Start: self._on_start, Alarm: self._on_alarm, Arrive: self._on_arrive,
            Placed: self._on_placed, Tokens: self._on_tokens, Done: self._on_done,
            Lost: self._on_lost, Declined: self._on_declined, Hangup: self._on_hangup,
            Retain: self._on_retain, CacheState: self._on_cache_state,
        }  # fmt: skip

    def handle(self, now: float, event: AnyMessage) -> list[AnyEffect]:
        self._now, self._out = now, []
        self._handlers[type(event)](event)
        return self._out

    def _on_start(self, event: Start) -> None:
        self._out.append(Timer(BEAT, self._now + self.beat_s))

    def _on_alarm(self, event: Alarm) -> None:
        if event.name.startswith(DEADLINE):
            life = self.lives.get(event.name.removeprefix(DEADLINE))
            if life is not None:
                self._out.append(Refuse(life.request.id, 504, "its deadline passed"))
                self._close(life, "deadline")
            return
        active = tuple(
            Active(life.request.id, life.attempt, life.emitted)
            for life in self.lives.values()
            if self._now - life.submitted_at > self.grace_s
        )
        self._tell(self.conductor, GatewayBeat(self.gateway, self.incarnation, active))
        self._tell_of_caches()
        self._out.append(Timer(BEAT, self._now + self.beat_s))

    # --- the usual way ----------------------------------------------------------------------------

    def _on_arrive(self, event: Arrive) -> None:
        request = event.request
        assert request.id not in self.lives, request.id
        life = self.lives[request.id] = Life(request, self._now, event.marks)
        if request.deadline_s is not None:
            self._out.append(Timer(DEADLINE + request.id, request.deadline_s))
        self._tell(self.conductor, Submit(request, life.attempt, 0, life.marks))

    def _on_placed(self, event: Placed) -> None:
        life = self._current(event.request_id, event.attempt)
        if life is None:
            return
        new = dict.fromkeys(w for w in (event.prefill, event.decode) if w)
        for worker in new:
            if worker not in (life.prefill, life.decode):
                count = life.request.prompt_tokens + life.carried
                self._tell(worker, Prompt(event.request_id, event.attempt, count))
        if not life.prefill:  # the first place of this attempt
            life.path = life.path or event.path
            self._out.append(Reply(event.request_id, life.emitted, 0, path=event.path))
        life.prefill, life.decode = event.prefill, event.decode
        life.kept_tokens = max(life.kept_tokens, event.kept_tokens)

    def _on_tokens(self, event: Tokens) -> None:
        for drawn in event.drawn:
            life = self.lives.get(drawn.request_id)
            if life is not None and life.attempt == drawn.attempt:
                self._more(life, drawn)

    def _more(self, life: Life, drawn: Drawn) -> None:
        """The next tokens of one request; those that came before are dropped."""
        if drawn.index > life.emitted:
            self._again(life, "tokens were lost on the way")
            return
        new = drawn.index + drawn.count - life.emitted
        if new <= 0:
            return
        if life.first_at is None:
            life.first_at = self._now
        elif life.second_at is None:
            life.second_at = self._now
        life.last_at = self._now
        self._out.append(Reply(drawn.request_id, life.emitted, new))
        life.emitted += new
        life.end = drawn.end or None

    def _on_done(self, event: Done) -> None:
        life = self._current(event.request_id, event.attempt)
        if life is None:
            return
        life.report = event.report
        if event.output_tokens > life.emitted:
            self._again(life, "tokens were lost on the way")
        else:
            self._close(life, event.reason)

    # --- the other ways ---------------------------------------------------------------------------

    def _on_lost(self, event: Lost) -> None:
        life = self._current(event.request_id, event.attempt)
        if life is not None:
            life.deaths += event.died
            self._again(life, event.reason)

    def _again(self, life: Life, reason: str) -> None:
        request = life.request
        if life.end is not None or life.emitted >= request.max_tokens:
            self._close(life, life.end or "length")
            return
        if life.attempt >= self.attempts_max or life.deaths >= self.deaths_max:
            self._out.append(
                Refuse(request.id, 503, f"gave up after {life.attempt} attempts: {reason}", 1.0)
            )
            self._close(life, "failed")
            return
        life.attempt += 1
        life.carried = life.emitted
        life.submitted_at = self._now
        if life.prefill:
            lost = request.prompt_tokens + life.emitted
            self._note(Recomputed(request.id, lost, "lost"))
        life.prefill = life.decode = ""
        self._tell(self.conductor, Submit(request, life.attempt, life.emitted, life.marks))

    def _on_declined(self, event: Declined) -> None:
        life = self._current(event.request_id, event.attempt)
        if life is None:
            return
        self._out.append(
            Refuse(event.request_id, event.status, event.reason, event.retry_after_s)
        )
        self._close(life, "failed")

    def _on_hangup(self, event: Hangup) -> None:
        life = self.lives.get(event.request_id)
        if life is not None:
            self._close(life, event.reason)

    def _close(self, life: Life, reason: EndReason) -> None:
        del self.lives[life.request.id]
        usage = usage_of(life)
        ttft_s = life.first_at - life.arrived_at if life.first_at is not None else None
        self._out.append(Reply(life.request.id, life.emitted, 0, path=life.path, end=reason))
        self._tell(
            self.conductor,
            Ended(life.request.id, life.attempt, reason, usage, life.path, ttft_s),
        )
        self._note(
            Closed(
                life.request.id, life.request.model, life.path, reason, life.attempt,
                usage.prompt_tokens, usage.cached_tokens, usage.output_tokens, ttft_s,
                tpot_of(life), second_delay_of(life), self._now - life.arrived_at,
            )
        )  # fmt: skip

    # --- caches -----------------------------------------------------------------------------------

    def _on_retain(self, event: Retain) -> None:
        """A client keeps a cache longer, or no longer."""
        self._retained[event.cache] = event
        self._tell(self.conductor, event)

    def _on_cache_state(self, event: CacheState) -> None:
        self._retained.pop(event.cache, None)
        if event.state in ("refused", "ended"):
            self.caches.pop(event.cache, None)
        else:
            self.caches[event.cache] = Known(event, self._now + event.left_s)

    def _tell_of_caches(self) -> None:
        """Say again what was not answered; forget what must be over."""
        for event in self._retained.values():
            self._tell(self.conductor, event)
        for cache, known in list(self.caches.items()):
            if self._now > known.ends_at + self.grace_s:
                del self.caches[cache]

    # --- small things -----------------------------------------------------------------------------

    def _current(self, request_id: RequestId, attempt: int) -> Life | None:
        life = self.lives.get(request_id)
        return life if life is not None and life.attempt == attempt else None

    def _tell(self, to: NodeId, message: Message) -> None:
        self._out.append(Tell(to, cast(AnyMessage, message)))

    def _note(self, event: Any) -> None:
        self._out.append(Note(event))

    def check(self) -> None:
        for request_id, life in self.lives.items():
            assert life.request.id == request_id
            assert 0 <= life.emitted <= life.request.max_tokens, (request_id, life.emitted)
            assert 1 <= life.attempt <= self.attempts_max


def usage_of(life: Life) -> Usage:
    """Cached tokens come from where prefill ran, and are a part of the prompt's tokens. Those of a
    cache that the tenant keeps are cached wherever it ran."""
    cached = life.report.prefill.cached_tokens if life.report is not None else 0
    cached, prompt = max(cached, life.kept_tokens), life.request.prompt_tokens
    return Usage(prompt, min(cached, prompt), life.emitted)


def tpot_of(life: Life) -> float | None:
    """Mean seconds per output token after the first; None with fewer than two tokens."""
    if life.first_at is None or life.last_at is None or life.emitted < 2:
        return None
    return (life.last_at - life.first_at) / (life.emitted - 1)


def second_delay_of(life: Life) -> float | None:
    """Seconds between the first two tokens: a hand-over shows here under `first_token: prefill`."""
    if life.first_at is None or life.second_at is None:
        return None
    return life.second_at - life.first_at
