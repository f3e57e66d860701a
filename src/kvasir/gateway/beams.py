"""Beam search over a desk: each round asks one token of every beam. Knows no HTTP and no engine.

    round 1   prompt            -> its likeliest tokens: `width` beams
    round 2   prompt + a token  -> theirs: the `width` best of all, by sum of log-probabilities

A beam's request finds all its full blocks in the caches where its parent's stand, so beams share
KV as far as they share tokens, and no worker knows of beams. vLLM's server searches in this way
too (`beam_search` of its OpenAI front end), and as there a beam that ends leaves its place free.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import msgspec

from kvasir.core.messages import Logprobs
from kvasir.gateway.port import Ask, EndPiece, FailPiece, Piece, Pieces, PlacedPiece, TokensPiece

Submit = Callable[[Ask], Pieces]


class Beaming(msgspec.Struct, frozen=True):
    """`width` beams are kept and told. A beam's score is the sum of its log-probabilities over
    length ** `length_penalty`."""

    width: int
    length_penalty: float = 1.0


class Beam(NamedTuple):
    """Output tokens so far, each one's log-probabilities, and their sum. `ended` by a stop token,
    which is its last."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    total: float = 0.0
    ended: bool = False

    def score(self, length_penalty: float) -> float:
        return self.total / float(max(len(self.tokens), 1) ** length_penalty)

    def grown(self, stops: Sequence[int], told: Logprobs) -> list[Beam]:
        """One beam a token that may follow."""
        found = []
        for token, logprob in told.top:
            one = Logprobs(logprob, told.top)
            beam = Beam((*self.tokens, token), (*self.logprobs, one), self.total + logprob)
            found.append(beam._replace(ended=token in stops))
        return found


class Answered(NamedTuple):
    """One beam's request: what may follow, its end, and where it ran."""

    told: Logprobs
    end: EndPiece
    placed: PlacedPiece | None


class Broken(Exception):
    """A beam's request ended otherwise; the answer ends with this piece."""

    def __init__(self, piece: EndPiece | FailPiece) -> None:
        self.piece = piece


def beam_sources(submit: Submit, ask: Ask, beaming: Beaming) -> list[Pieces]:
    """One source a beam, best first; all of one search, which the first that is asked starts."""
    search = _Search(submit, ask, beaming)
    return [search.told(i) for i in range(beaming.width)]


class _Search:
    def __init__(self, submit: Submit, ask: Ask, beaming: Beaming) -> None:
        self._submit, self._ask, self._beaming = submit, ask, beaming
        self._task: asyncio.Task[list[Beam]] | None = None
        self._first: Answered | None = None

    async def told(self, index: int) -> AsyncGenerator[Piece, None]:
        """The pieces of the index-th best beam."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            beams = await asyncio.shield(self._task)
        except Broken as broken:
            yield broken.piece
            return
        finally:
            self._task.cancel()  # the first source that is closed ends all; a no-op once done
        assert self._first is not None
        if self._first.placed is not None:
            yield self._first.placed
        beam, end = beams[index], self._first.end
        few = self._ask.sampling.logprobs
        told = () if few is None else tuple([Logprobs(p.drawn, p.top[:few]) for p in beam.logprobs])
        yield TokensPiece(beam.tokens, told)
        reason = "stop" if beam.ended else "length"
        yield msgspec.structs.replace(end, reason=reason, output_tokens=len(beam.tokens))

    async def _run(self) -> list[Beam]:
        ask, width, penalty = self._ask, self._beaming.width, self._beaming.length_penalty
        loop = asyncio.get_running_loop()
        began = loop.time()
        beams, ended = [Beam()], list[Beam]()
        for round_ in range(ask.max_tokens):
            asks = [self._one(beam, round_, i, loop.time() - began)
                    for i, beam in enumerate(beams)]  # fmt: skip
            answers = await _all([_answered(self._submit(one)) for one in asks])
            self._first = self._first or answers[0]
            stops = ask.sampling.stop_token_ids
            grown = [new for beam, answer in zip(beams, answers, strict=True)
                     for new in beam.grown(stops, answer.told)]  # fmt: skip
            ended += [beam for beam in grown if beam.ended]
            alive = [beam for beam in grown if not beam.ended]
            beams = sorted(alive, key=lambda beam: -beam.score(penalty))[:width]
        return sorted(ended + beams, key=lambda beam: -beam.score(penalty))[:width]

    def _one(self, beam: Beam, round_: int, index: int, waited_s: float) -> Ask:
        """The request for what may follow a beam."""
        ask, deadline_s = self._ask, self._ask.deadline_s
        if deadline_s is not None and deadline_s <= waited_s:
            raise Broken(EndPiece("deadline", len(ask.tokens), 0, len(beam.tokens)))
        wanted = 2 * self._beaming.width  # so many may end and leave enough
        return msgspec.structs.replace(
            ask,
            request_id=f"{ask.request_id}.{round_}.{index}",
            tokens=ask.tokens + beam.tokens,
            max_tokens=1,
            sampling=msgspec.structs.replace(ask.sampling, temperature=0.0, logprobs=wanted),
            deadline_s=None if deadline_s is None else deadline_s - waited_s,
        )


async def _all(asked: Sequence[Coroutine[Any, Any, Answered]]) -> list[Answered]:
    """In order. The first that breaks ends the others. Raises Broken."""
    tasks = [asyncio.create_task(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answered(pieces: Pieces) -> Answered:
    """Raises Broken."""
    placed: PlacedPiece | None = None
    told: Logprobs | None = None
    try:
        async for piece in pieces:
            if isinstance(piece, PlacedPiece):
                placed = piece
            elif isinstance(piece, TokensPiece):
                (told,) = piece.logprobs
            elif isinstance(piece, EndPiece) and piece.reason in ("stop", "length") and told:
                return Answered(told, piece, placed)
            else:
                raise Broken(piece)
    finally:
        await pieces.aclose()
    raise Broken(FailPiece(503, "the answer broke off"))
