"""One request's answer over an open HTTP connection. Knows ASGI and a `Desk`; no route, no rule.

    Placed   -> response headers (stream), with the plan in x-kvasir-path
    Tokens   -> one event a token, written at once; or kept for the JSON answer
    End      -> finish reason, usage, [DONE]; or the JSON answer
    Fail     -> an HTTP error before the headers, an `error` event after them
    hang-up  -> the pieces are closed, and with them the request
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Final, cast

import msgspec
from starlette.types import Receive, Send

from kvasir.gateway.answer import Answer, timing_of, usage_of
from kvasir.gateway.beams import beam_sources
from kvasir.gateway.errors import Header, HttpError, Refused, of_end, of_fail, of_status
from kvasir.gateway.fanin import Follower, Leader, Tagged, merge
from kvasir.gateway.openai import Plan
from kvasir.gateway.port import Desk, EndPiece, FailPiece, Pieces, PlacedPiece, TokensPiece
from kvasir.gateway.schema import (
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    ChatMessage,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
)
from kvasir.gateway.sse import DONE, Chunks, Shared, error_event, timing_part
from kvasir.observe.metrics import Metrics

JSON: Final[Header] = (b"content-type", b"application/json")
EVENTS: Final[tuple[Header, ...]] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_encode: Final = msgspec.json.Encoder().encode


class Reply:
    """The response side of one request: whole, or opened and written piece by piece."""

    __slots__ = ("opened", "over", "request_id", "send")

    def __init__(self, send: Send, request_id: str) -> None:
        self.send = send
        self.request_id = request_id
        self.opened = False
        self.over = False  # nothing is left to say, so a hang-up means nothing any more

    async def open_events(self, path: str) -> None:
        await self._start(200, [*EVENTS, (b"x-kvasir-path", path.encode())])

    async def write(self, body: bytes) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def close(self, body: bytes) -> None:
        self.over = True
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def whole(self, status: int, body: bytes, headers: Sequence[Header] = ()) -> None:
        size = (b"content-length", b"%d" % len(body))
        await self._start(status, [JSON, size, *headers])
        await self.close(body)

    async def error(self, error: HttpError, headers: Sequence[Header] = ()) -> None:
        """An HTTP error if nothing was said yet, else an event that ends the stream."""
        if self.opened:
            await self.close(error_event(error.body()))
        else:
            await self.whole(error.status, error.body(), [*error.headers(), *headers])

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.opened = True
        headers.append((b"x-request-id", self.request_id.encode("ascii")))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})


class Line:
    """While entered, a client that hangs up cancels what the current task waits for.

    The body must have been read: from there on, all that can be received is the disconnect.
    """

    __slots__ = ("_gone", "_receive", "_reply", "_task", "_watcher")

    def __init__(self, receive: Receive, reply: Reply) -> None:
        self._receive, self._reply = receive, reply
        self._gone = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(self._watch())

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, at: TracebackType | None
    ) -> bool:
        """Swallows the cancellation that it caused itself, and no other."""
        self._watcher.cancel()
        if self._gone and kind is not None and issubclass(kind, asyncio.CancelledError):
            return self._task.uncancel() == 0
        return False

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._reply.over:
            self._gone = True
            self._task.cancel()


class Exchange:
    """Runs a plan and answers. `began` is when the request came, on `clock`; seconds."""

    __slots__ = ("_answers", "_began", "_clock", "_created", "_desk", "_metrics", "_plan", "_reply",
                 "_shared")  # fmt: skip

    def __init__(
        self,
        plan: Plan,
        desk: Desk,
        reply: Reply,
        metrics: Metrics,
        clock: Callable[[], float],
        began: float,
    ) -> None:
        self._plan, self._desk, self._reply, self._metrics = plan, desk, reply, metrics
        self._clock, self._began = clock, began
        self._created = int(time.time())
        self._shared: Shared | None = None
        if plan.stream:
            self._shared = Shared(
                chat=plan.style.chat,
                answer_id=self._answer_id,
                created=self._created,
                model=plan.model,
                usage=plan.include_usage,
            )
        self._answers = [
            Answer(ask, plan.text, plan.style, self._chunks(i, ask.tokens))
            for i, ask in enumerate(plan.asks)
        ]

    @property
    def _answer_id(self) -> str:
        return ("chatcmpl-" if self._plan.style.chat else "cmpl-") + self._reply.request_id

    def _chunks(self, index: int, prompt: tuple[int, ...]) -> Chunks | None:
        if self._shared is None:
            return None
        return Chunks(self._shared, index, token_ids=self._plan.token_ids, prompt_ids=prompt)

    async def run(self) -> None:
        """Answers, or raises Refused. However it ends, the desk's pieces are closed."""
        answers, write = self._answers, self._reply.send
        sources = self._sources()
        pieces = sources[0] if len(sources) == 1 else merge(sources)
        left, answer = len(answers), answers[0]
        # One frame for the whole loop, because each frame is walked again for every token; `type`,
        # because `isinstance` asks the metaclass, at ten times the price.
        try:
            async for piece in pieces:
                if type(piece) is Tagged:
                    answer, piece = answers[piece.index], piece.piece
                if type(piece) is TokensPiece:
                    events = answer.take(piece.tokens, piece.logprobs)
                    if events:
                        body = {"type": "http.response.body", "body": events, "more_body": True}
                        await write(body)
                    self._count(answer, len(piece.tokens))
                elif isinstance(piece, PlacedPiece):
                    answer.place(piece)
                    if self._shared is not None and not self._reply.opened:
                        await self._reply.open_events(piece.path)
                elif isinstance(piece, EndPiece):
                    left -= 1
                    await self._end(answer, piece, left)
                    if not left:
                        return
                elif isinstance(piece, FailPiece):
                    raise Refused(of_fail(piece))
            raise Refused(of_status(503, "the answer broke off"))
        finally:
            await pieces.aclose()

    def _sources(self) -> list[Pieces]:
        """One a choice. All but the first choice of a prompt wait until that prompt is cached."""
        submit, n, beaming = self._desk.submit, self._plan.n, self._plan.beaming
        if beaming is not None:
            return beam_sources(submit, self._answers[0].ask, beaming)
        if n == 1:
            return [submit(answer.ask) for answer in self._answers]
        sources: list[Pieces] = []
        for i, answer in enumerate(self._answers):
            if i % n == 0:
                ready = asyncio.Event()
                sources.append(Leader(submit(answer.ask), ready))
            else:
                sources.append(Follower(partial(submit, answer.ask), ready))
        return sources

    def _count(self, answer: Answer, tokens: int) -> None:
        now, last = self._clock(), answer.last_at
        answer.last_at = now
        if last is not None:
            self._metrics.token_gap(now - last, tokens - 1)
        else:
            self._metrics.first_token(now - self._began, answer.path, answer.ask.model)
            if tokens > 1:
                self._metrics.token_gap(0.0, tokens - 2)
        if answer.stops is not None and answer.must_stop():
            self._desk.stop(answer.ask.request_id)

    async def _end(self, answer: Answer, piece: EndPiece, left: int) -> None:
        if piece.reason not in ("stop", "length"):
            raise Refused(of_end(piece))
        answer.end = piece
        if self._shared is None:
            answer.finish()
            if not left:
                await self._whole()
            return
        assert answer.chunks is not None
        reasoning, rest = answer.rest()
        last = partial(answer.chunks.last, rest, answer.finish_reason, reasoning=reasoning)
        timing = b"" if left or not self._plan.timing else timing_part(timing_of(self._answers))
        if left:
            await self._reply.write(last())
        elif self._plan.include_usage:
            usage = self._shared.usage(usage_of(self._answers, self._plan.n), timing)
            await self._reply.close(last() + usage + DONE)
        else:
            await self._reply.close(last(timing) + DONE)

    async def _whole(self) -> None:
        chat = self._plan.style.chat
        body = _encode(self._chat_answer() if chat else self._completion_answer())
        first = self._answers[0]
        path = (first.end.path if first.end else "") or first.path
        await self._reply.whole(200, body, [(b"x-kvasir-path", path.encode())])

    def _chat_answer(self) -> ChatAnswer:
        ids = self._plan.token_ids
        choices = []
        for i, answer in enumerate(self._answers):
            message = ChatMessage("".join(answer.parts))
            if answer.reasons:
                message.reasoning_content = "".join(answer.thoughts)
            logprobs = cast(ChatLogprobs | None, answer.logprobs())
            choice = ChatChoice(i, message, answer.finish_reason, logprobs)
            choice.token_ids = answer.ids if ids else msgspec.UNSET
            choices.append(choice)
        return ChatAnswer(
            id=self._answer_id,
            created=self._created,
            model=self._plan.model,
            choices=choices,
            usage=usage_of(self._answers, self._plan.n),
            prompt_token_ids=self._answers[0].ask.tokens if ids else msgspec.UNSET,
            kvasir=timing_of(self._answers) if self._plan.timing else msgspec.UNSET,
        )

    def _completion_answer(self) -> CompletionAnswer:
        choices = []
        for i, answer in enumerate(self._answers):
            text = "".join(answer.parts)
            logprobs = cast(CompletionLogprobs | None, answer.logprobs())
            choice = CompletionChoice(i, text, answer.finish_reason, logprobs)
            if self._plan.token_ids:
                choice.token_ids, choice.prompt_token_ids = answer.ids, answer.ask.tokens
            choices.append(choice)
        return CompletionAnswer(
            id=self._answer_id,
            created=self._created,
            model=self._plan.model,
            choices=choices,
            usage=usage_of(self._answers, self._plan.n),
            kvasir=timing_of(self._answers) if self._plan.timing else msgspec.UNSET,
        )

