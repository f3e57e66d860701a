"""Load on a server, measured from outside: what `kvasir bench` runs. Knows the OpenAI endpoints.

    fire()   sends shots at their times, at most `max_concurrency` at once
    Load     outcomes and gaps; `summary()` gives the figures that a simulation gives too

A latency starts when its request is sent (not while it waits for `max_concurrency`). A token counts
when the event that carries it was read; how many there were is what the server's `usage` says.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

import msgspec

from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.core.specs import SloSpec
from kvasir.measure.client import Client, HttpError, Response, SseParser, parse_base_url
from kvasir.measure.distribution import distribution
from kvasir.measure.itl import ItlRuns
from kvasir.measure.shots import Shot
from kvasir.measure.summary import PERCENTILES, RequestOutcome, Summary, summarise, tpot

ERROR_CHARS_MAX: Final = 200
LATE_S: Final = 0.01

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how to ask. `timing` asks a Kvasir server for the parts of each latency."""

    base_url: str
    model: str
    endpoint: Literal["completions", "chat"] = "completions"
    ignore_eos: bool = True
    temperature: float = 0.0
    timing: bool = False
    timeout_s: float = 600.0
    connections_max: int = 4096
    headers: dict[str, str] = {}
    extra_body: dict[str, Any] = {}

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"


class Load(NamedTuple):
    """What came back, in the order of the shots."""

    outcomes: list[RequestOutcome]
    itl: ItlRuns
    duration_s: float
    first_token: str
    bytes_by_transport: dict[str, int]
    notes: tuple[str, ...]

    def summary(
        self,
        slo: SloSpec | Slo | None = None,
        *,
        percentiles: Sequence[float] = PERCENTILES,
        gpus: int | None = None,
        first_token: str = "",
        request_rate: float | None = None,
        max_concurrency: int | None = None,
    ) -> Summary:
        """`first_token`: who makes it, when the server did not say."""
        return summarise(
            self.outcomes,
            self.itl,
            self.duration_s,
            slo,
            percentiles=percentiles,
            gpus=gpus,
            first_token=self.first_token or first_token,
            bytes_by_tier=self.bytes_by_transport,
            request_rate=request_rate,
            max_concurrency=max_concurrency,
            notes=self.notes,
        )


# --- what comes back ------------------------------------------------------------------------------


class Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def content(self) -> str | None:
        if self.delta is None:
            return self.text
        return self.delta.content or self.delta.reasoning_content or self.delta.content


class TokenDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: TokenDetails | None = None


class Workers(msgspec.Struct, frozen=True, gc=False):
    prefill: str = ""
    decode: str = ""


class Timing(msgspec.Struct, gc=False):
    """The `kvasir` object of the last event: where it ran and where the time went, as the server
    measured it."""

    path: str = ""
    workers: Workers = Workers()
    first_token: str = ""
    queue_s: float | None = None
    prefill_s: float | None = None
    transfer_s: float | None = None
    first_step_s: float | None = None
    second_token_delay_s: float | None = None
    bytes: int = 0
    transport: str = ""


class Chunk(msgspec.Struct, gc=False):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None
    kvasir: Timing | None = None


class Answer:
    """One stream, as far as it was read.

    Servers differ in two events: a chat's first one, with a role and no text, and the one with the
    finish reason, if it has text. Each may or may not stand for a token; `usage` decides.
    """

    def __init__(self, sent_s: float) -> None:
        self.sent_s = self.ended_s = sent_s
        self.usage = Usage()
        self.timing = Timing()
        self.complete = False
        self.error = ""
        self._opened_s: float | None = None
        self._times: list[float] = []
        self._closed_s: float | None = None

    def take(self, chunk: Chunk, now: float) -> None:
        if chunk.error:
            details = chunk.error if isinstance(chunk.error, dict) else {"message": chunk.error}
            self.error = str(details.get("message", "unknown"))[:ERROR_CHARS_MAX]
        for choice in chunk.choices[:1]:
            self.ended_s = now
            content, delta = choice.content, choice.delta
            if choice.finish_reason is not None:
                self.complete = True
                self._closed_s = now if content else None
            elif not content and delta is not None and delta.role is not None:
                self._opened_s = now
            elif content is not None:  # a token may be too short to show text
                self._times.append(now)
        self.usage = chunk.usage or self.usage
        self.timing = chunk.kvasir or self.timing

    def token_times(self) -> list[float]:
        """When each event that stands for a token came; complete once the stream is."""
        times, wanted = list(self._times), self.usage.completion_tokens
        if self._closed_s is not None and (wanted is None or len(times) < wanted):
            times.append(self._closed_s)
        if self._opened_s is not None and wanted is not None and len(times) < wanted:
            times.insert(0, self._opened_s)
        return times

    def outcome(self, shot: Shot, times: list[float]) -> RequestOutcome:
        error = self.error or self._missing(times)
        if error:
            return RequestOutcome(ok=False, start_s=self.sent_s, error=error)
        usage, timing = self.usage, self.timing
        details = usage.prompt_tokens_details or TokenDetails()
        tokens = usage.completion_tokens or len(times)
        ttft_s, e2e_s = times[0] - self.sent_s, self.ended_s - self.sent_s
        return RequestOutcome(
            ok=True,
            prompt_tokens=usage.prompt_tokens or shot.prompt_tokens,
            output_tokens=tokens,
            cached_tokens=details.cached_tokens or 0,
            start_s=self.sent_s,
            ttft_s=ttft_s,
            tpot_s=tpot(ttft_s, e2e_s, tokens),
            e2e_s=e2e_s,
            itl_p99_s=distribution(gaps(times), (99.0,)).percentile(99.0),
            path=timing.path,
            queue_s=timing.queue_s,
            prefill_s=timing.prefill_s,
            transfer_s=timing.transfer_s,
            first_step_s=timing.first_step_s,
            second_token_delay_s=timing.second_token_delay_s,
        )

    def _missing(self, times: list[float]) -> str:
        if not self.complete:
            return "the stream ended before the answer did"
        return "" if times else "no token came"


def gaps(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


# --- sending --------------------------------------------------------------------------------------


async def fire(
    target: Target,
    shots: Sequence[Shot],
    *,
    max_concurrency: int | None = None,
    clock: Clock = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
    on_end: Callable[[], None] = lambda: None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> Load:
    """Send every shot and wait for all answers. `on_end` and `on_answer` are called after each.

    A request that fails is an outcome, not an exception. Raises ConfigError for a bad base URL, or
    for token ids to a chat endpoint, which takes only text.
    """
    if target.endpoint == "chat" and not all(isinstance(s.prompt, str) for s in shots):
        raise ConfigError("a chat endpoint takes text prompts, not token ids")
    client = Client(parse_base_url(target.base_url), target.headers, target.connections_max)
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    answers: list[Answer] = [Answer(0.0)] * len(shots)
    started_s = clock()

    async def shoot(index: int, body: bytes) -> None:
        async with slots:
            answers[index] = await _ask(client, target, body, clock)
        on_answer(answers[index])
        on_end()

    try:
        async with asyncio.TaskGroup() as group:
            for index, shot in enumerate(shots):
                body = request_body(target, shot)
                if (wait_s := started_s + shot.at_s - clock()) > 0:
                    await sleep(wait_s)
                group.create_task(shoot(index, body))
        duration_s = clock() - started_s
    finally:
        await client.close()
    late = [a.sent_s - started_s - s.at_s for a, s in zip(answers, shots, strict=True)]
    return _load(answers, shots, duration_s, _late_note(late) if not max_concurrency else ())


def request_body(target: Target, shot: Shot) -> bytes:
    """`extra_body` has the last word."""
    asked: dict[str, Any]
    if target.endpoint == "chat":
        asked = {"messages": [{"role": "user", "content": shot.prompt}]}
    else:
        asked = {"prompt": shot.prompt}
    asked |= {
        "model": target.model,
        "max_tokens": shot.output_tokens,
        "temperature": target.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.ignore_eos:
        asked["ignore_eos"] = True
    if target.timing:
        asked["kvasir"] = {"timing": True}
    return msgspec.json.encode(asked | target.extra_body)


async def _ask(client: Client, target: Target, body: bytes, clock: Clock) -> Answer:
    answer = Answer(clock())
    try:
        async with asyncio.timeout(target.timeout_s), client.post(target.path, body) as response:
            await _read(response, answer, clock)
    except TimeoutError:
        answer.error = f"no end after {target.timeout_s:g} s"
    except HttpError as error:
        answer.error = str(error)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        answer.error = f"no connection: {reason}"
    return answer


async def _read(response: Response, answer: Answer, clock: Clock) -> None:
    if response.status != 200:
        answer.error = f"HTTP {response.status}: {await response.text(ERROR_CHARS_MAX)}"
        return
    decode = msgspec.json.Decoder(Chunk).decode
    parser = SseParser()
    async for piece in response.pieces():
        now = clock()
        for data in parser.feed(piece):
            if data == b"[DONE]":
                continue
            try:
                answer.take(decode(data), now)
            except msgspec.DecodeError as error:
                raise HttpError(f"an event that cannot be read: {error}") from None


def _load(
    answers: Sequence[Answer], shots: Sequence[Shot], duration_s: float, notes: tuple[str, ...]
) -> Load:
    outcomes: list[RequestOutcome] = []
    itl = ItlRuns()
    moved: Counter[str] = Counter()
    made_by: set[str] = set()
    for answer, shot in zip(answers, shots, strict=True):
        times = answer.token_times()
        outcomes.append(answer.outcome(shot, times))
        if not outcomes[-1].ok:
            continue
        itl.add_each(gaps(times), times[0])
        made_by.add(answer.timing.first_token)
        if answer.timing.bytes:
            moved[answer.timing.transport or "unknown"] += answer.timing.bytes
    first_token = made_by.pop() if len(made_by) == 1 else ""
    return Load(outcomes, itl, duration_s, first_token, dict(sorted(moved.items())), notes)


def _late_note(late_s: Sequence[float]) -> tuple[str, ...]:
    """A client that cannot keep its own times measures itself."""
    p99 = distribution(late_s, (99.0,)).percentile(99.0)
    if p99 <= LATE_S:
        return ()
    note = f"the client sent late (p99 {p99 * 1e3:.0f} ms): it may be what limits these figures"
    return (note,)
