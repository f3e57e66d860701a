"""Beam search against transformers' own, over a live cluster, and against all texts there are."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvasir.core.messages import Logprobs  # noqa: E402
from kvasir.core.request import Sampling  # noqa: E402
from kvasir.gateway.beams import Beaming, beam_sources  # noqa: E402
from kvasir.gateway.port import Ask, EndPiece, FailPiece, Piece, TokensPiece  # noqa: E402
from tests.live.cluster import MODEL, run  # noqa: E402
from tests.live.test_structured import LAYOUTS, folder, prompt_of, served  # noqa: E402, F401

PROMPT, LENGTH = 40, 12


@LAYOUTS
@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (3, 1.0), (5, 0.0)])
def test_beams_are_those_of_transformers(
    folder: Path, layout: dict[str, Any], width: int, penalty: float  # noqa: F811
) -> None:
    """No end of text: where one may come, the two differ in when they give up."""
    prompt = prompt_of(PROMPT)

    async def main() -> dict[str, Any]:
        async with served(folder, **layout) as (c, client):
            body = {"model": MODEL, "prompt": prompt, "max_tokens": LENGTH, "n": width,
                    "use_beam_search": True, "length_penalty": penalty, "ignore_eos": True,
                    "return_token_ids": True, "logprobs": 0}  # fmt: skip
            response = await client.post("/v1/completions", json=body)
            await c.at_rest()
            assert response.status_code == 200, response.text
            found: dict[str, Any] = response.json()
            return found

    answer = run(main())
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.inference_mode():
        wanted = reference.generate(
            torch.tensor([prompt]), num_beams=width, num_return_sequences=width, do_sample=False,
            max_new_tokens=LENGTH, min_new_tokens=LENGTH, eos_token_id=None, length_penalty=penalty,
            early_stopping=False, pad_token_id=0,
        )[:, PROMPT:]  # fmt: skip
    choices = answer["choices"]
    assert [choice["token_ids"] for choice in choices] == wanted.tolist()
    totals = [sum(choice["logprobs"]["token_logprobs"]) for choice in choices]
    assert totals == sorted(totals, reverse=True)
    assert answer["usage"]["completion_tokens"] == width * LENGTH
    if width > 1:
        greedy = reference.generate(torch.tensor([prompt]), do_sample=False, eos_token_id=None,
                                    max_new_tokens=LENGTH, pad_token_id=0)  # fmt: skip
        assert wanted.tolist()[0] != greedy[0, PROMPT:].tolist(), "beams that change nothing"


def test_what_would_bend_a_beam_is_refused(folder: Path) -> None:  # noqa: F811
    async def main() -> None:
        async with served(folder, mixed=1) as (c, client):
            for more in ({"stream": True}, {"stop": "a"}, {"presence_penalty": 1.0}, {"n": 33},
                         {"logit_bias": {"1": 2.0}}, {"length_penalty": 11.0}):  # fmt: skip
                body = {"model": MODEL, "prompt": "x", "use_beam_search": True, **more}
                response = await client.post("/v1/completions", json=body)
                assert response.status_code == 400, more
                assert "beam" in response.text or "length_penalty" in response.text
            await c.at_rest()

    run(main())


# --- against every text there is ------------------------------------------------------------------

STOP, VOCAB = 0, 3


def told(tokens: tuple[int, ...]) -> list[float]:
    """Log-probabilities of a made-up model: any numbers that depend on all tokens before."""
    weights = [1 + hash((*tokens, token, 7)) % 97 for token in range(VOCAB)]
    return [math.log(weight / sum(weights)) for weight in weights]


class Made:
    """A desk's `submit`, and what became of what it gave."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked = self.closed = 0
        self.fails_at = fails_at

    async def submit(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        self.asked += 1
        number = self.asked
        try:
            await asyncio.sleep(0)
            if number == self.fails_at:
                yield FailPiece(503, "no")
                return
            top = sorted(enumerate(told(ask.tokens[1:])), key=lambda one: -one[1])
            wanted = ask.sampling.logprobs
            assert wanted is not None and ask.max_tokens == 1
            yield TokensPiece((top[0][0],), (Logprobs(top[0][1], tuple(top[:wanted])),))
            yield EndPiece("length", len(ask.tokens), 0, 1)
        finally:
            self.closed += 1


def ask_of(length: int) -> Ask:
    return Ask("r", MODEL, (9,), length, Sampling(stop_token_ids=(STOP,)))


def every_text(length: int, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    found = []
    for count in range(1, length + 1):
        for text in itertools.product(range(VOCAB), repeat=count):
            whole = count == length or text[-1] == STOP
            if whole and STOP not in text[:-1]:
                total = sum(told(text[:i])[token] for i, token in enumerate(text))
                found.append((total / count**penalty, text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_wide_enough_it_finds_the_best_of_all_texts(penalty: float) -> None:
    async def main() -> list[tuple[int, ...]]:
        made, width = Made(), 31  # 2 ** 5 texts of five tokens do not stop
        found = []
        for source in beam_sources(made.submit, ask_of(5), Beaming(width, penalty)):
            pieces = [piece async for piece in source]
            found.append(next(p.tokens for p in pieces if isinstance(p, TokensPiece)))
            end = pieces[-1]
            assert isinstance(end, EndPiece)
            assert end.reason == ("stop" if found[-1][-1] == STOP else "length")
        assert made.asked == made.closed == 1 + 2 + 4 + 8 + 16
        return found

    assert asyncio.run(main()) == [text for _, text in every_text(5, penalty)[:31]]


def test_one_beam_that_fails_ends_the_search() -> None:
    async def main() -> None:
        made = Made(fails_at=5)
        sources = beam_sources(made.submit, ask_of(6), Beaming(4))
        for source in sources:
            assert [piece async for piece in source] == [FailPiece(503, "no")]
        assert made.asked == made.closed

    asyncio.run(main())


def test_a_client_that_leaves_ends_the_search() -> None:
    async def main() -> None:
        made = Made()
        source = beam_sources(made.submit, ask_of(10_000), Beaming(2))[0]
        first = asyncio.ensure_future(anext(source))
        while made.asked < 20:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        asked = made.asked
        for _ in range(50):
            await asyncio.sleep(0)
        assert made.asked == asked == made.closed

    asyncio.run(main())
