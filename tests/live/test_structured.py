"""Grammars, log-probabilities and several choices over a whole live cluster, with a real engine.

Through the desk where the matter is disaggregation, through the HTTP app where it is the protocol.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llguidance")

from kvasir.core.events import Preempted  # noqa: E402
from kvasir.core.messages import Prompt, Tokens  # noqa: E402
from kvasir.core.request import Grammar, Sampling, Steering  # noqa: E402
from kvasir.core.specs import LimitsSpec  # noqa: E402
from kvasir.engine.tiny import EOS_TOKEN_ID, make_tiny  # noqa: E402
from kvasir.gateway.app import make_app  # noqa: E402
from kvasir.gateway.tokenize import TextModel  # noqa: E402
from kvasir.observe.metrics import Metrics  # noqa: E402
from tests.live.cluster import (  # noqa: E402
    MODEL,
    Answer,
    Cluster,
    Layout,
    cluster,
    deployment_of,
    run,
)

MIXED: Layout = {"mixed": 1}
SHM: Layout = {"transport": "shm"}
TCP: Layout = {"transport": "tcp"}
LAYOUTS = pytest.mark.parametrize("layout", [MIXED, SHM, TCP], ids=["mixed", "shm", "tcp"])
SPLIT = pytest.mark.parametrize("layout", [SHM, TCP], ids=["shm", "tcp"])
FIRST = pytest.mark.parametrize("first", ["prefill", "decode"])

SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 999},
        "name": {"type": "string", "maxLength": 6},
        "list": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["id", "name", "list"],
    "additionalProperties": False,
}  # fmt: skip
STEERING = Steering((), Grammar("json", json.dumps(SCHEMA)))
N = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = torch.Generator().manual_seed(seed * 1000 + length)
    found: list[int] = torch.randint(0, 256, (length,), generator=rng).tolist()
    return found


async def structured(c: Cluster, seed: int) -> list[int]:
    """One answer, checked against the schema."""
    sampling = Sampling(seed=seed, single_step=True)
    answer = await c.ask(prompt_of(20 + seed, seed), N, sampling=sampling, steering=STEERING)
    assert (answer.reason, answer.fail) == ("stop", None)
    text = bytes(token for token in answer.tokens if token != EOS_TOKEN_ID).decode()
    jsonschema.validate(json.loads(text), SCHEMA)
    return answer.tokens


def texts(folder: Path, preempts: bool = False, **values: Any) -> list[list[int]]:
    async def main() -> list[list[int]]:
        async with cluster(deployment_of(folder, **values)) as c:
            found = list(await asyncio.gather(*(structured(c, seed) for seed in range(8))))
            await c.at_rest()
            assert bool(c.events(Preempted)) or not preempts
            return found

    return run(main())


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    return texts(folder, mixed=1)


# --- grammars -------------------------------------------------------------------------------------


@LAYOUTS
@FIRST
@pytest.mark.parametrize("chunk", [7, 512])
def test_texts_match_their_schema_and_are_the_same_everywhere(
    folder: Path, alone: list[list[int]], layout: Layout, first: str, chunk: int
) -> None:
    assert texts(folder, first_token=first, chunk=chunk, **layout) == alone


@LAYOUTS
def test_a_preempted_text_goes_on_in_its_grammar(
    folder: Path, alone: list[list[int]], layout: Layout
) -> None:
    small = {"kv_blocks": 22, "prefill_blocks": 64, "route": {"output_reserve_tokens": 0}}
    assert texts(folder, preempts=True, **small, **layout) == alone


@SPLIT
def test_a_text_whose_tokens_were_lost_goes_on_in_its_grammar(
    folder: Path, alone: list[list[int]], layout: Layout
) -> None:
    """The next attempt is sent the grammar again, and what was emitted."""
    lost: list[int] = []

    def lose_one(src: str, dst: str, message: Any) -> bool:
        if isinstance(message, Tokens) and message.drawn[0].index == 5 and not lost:
            lost.append(5)
            return False
        return True

    async def main() -> None:
        async with cluster(deployment_of(folder, **layout)) as c:
            c.tap("decode-0", lose_one)
            assert await structured(c, 3) == alone[3]
            assert lost == [5]
            await c.at_rest()

    run(main())


def test_no_node_sees_a_grammar(folder: Path) -> None:
    async def main() -> None:
        async with cluster(deployment_of(folder)) as c:
            seen: list[Prompt] = []
            for worker in c.workers:
                node = c.node(worker)
                handler = node._handlers[Prompt]

                def look(event: Prompt, handler: Any = handler) -> None:
                    seen.append(event)
                    handler(event)

                node._handlers[Prompt] = look
            await structured(c, 1)
            assert len(seen) == 2
            assert all(prompt.steering is None and not prompt.tokens for prompt in seen)

    run(main())


# --- log-probabilities ----------------------------------------------------------------------------


@LAYOUTS
@FIRST
def test_logprobs_of_every_token_wherever_it_was_drawn(
    folder: Path, layout: Layout, first: str
) -> None:
    """Those of token 0 too, whichever of its two messages comes first."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    sampling = Sampling(seed=5, ignore_eos=True, logprobs=3)
    prompt = prompt_of(33)

    def lose_first(src: str, dst: str, message: Any) -> bool:
        return not isinstance(message, Tokens)

    async def main() -> list[Answer]:
        async with cluster(deployment_of(folder, first_token=first, **layout)) as c:
            answers = [await c.ask(prompt, 12, sampling=sampling)]
            if "mixed" not in layout and first == "prefill":
                c.tap("prefill-0", lose_first)
                answers.append(await c.ask(prompt, 12, sampling=sampling))
            silent = await c.ask(prompt, 4)
            assert silent.logprobs == []
            await c.at_rest()
            return answers

    for answer in run(main()):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *answer.tokens]])).logits[0, 32:-1]
        logs = logits.log_softmax(-1)
        assert len(answer.logprobs) == len(answer.tokens) == 12
        for row, token, told in zip(logs, answer.tokens, answer.logprobs, strict=True):
            assert told.drawn == pytest.approx(float(row[token]), abs=1e-4)
            assert [v for _, v in told.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


# --- over HTTP ------------------------------------------------------------------------------------


@asynccontextmanager
async def served(folder: Path, **values: Any) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    async with cluster(deployment_of(folder, **values)) as c:
        c.desk._texts[MODEL] = TextModel.load(folder)
        app = make_app(c.desk, Metrics([MODEL]), LimitsSpec())
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield c, client


async def chat(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Name a dwarf."}]
    whole = {"model": MODEL, "messages": messages, "max_tokens": N, **body}
    return await client.post("/v1/chat/completions", json=whole)


def events_of(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


FORMAT = {"type": "json_schema", "json_schema": {"name": "dwarf", "schema": SCHEMA}}


def test_a_response_format_whole_and_streamed(folder: Path) -> None:
    async def main() -> None:
        async with served(folder) as (c, client):
            for seed in range(3):
                body = {"response_format": FORMAT, "seed": seed}
                whole = (await chat(client, **body)).json()["choices"][0]
                events = events_of(await chat(client, **body, stream=True))
                streamed = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
                assert streamed == whole["message"]["content"]
                assert whole["finish_reason"] == "stop"
                jsonschema.validate(json.loads(streamed), SCHEMA)
            choice = {"structured_outputs": {"choice": ["Dvalin", "Ægir"]}, "temperature": 2.0}
            picked = (await chat(client, **choice, n=8, seed=1)).json()["choices"]
            assert {one["message"]["content"] for one in picked} == {"Dvalin", "Ægir"}
            text = {"model": MODEL, "prompt": "x", "guided_regex": "[0-9]{4}", "max_tokens": 9}
            got = (await client.post("/v1/completions", json=text)).json()["choices"][0]["text"]
            assert got.isdecimal() and len(got) == 4
            await c.at_rest()

    run(main())


SLOW = {"type": "integer", "multipleOf": 1_000_003}  # 10 s where this was written
HUGE = {"type": "integer", "multipleOf": 1_000_000_007}


def test_a_bad_grammar_is_one_400_and_the_server_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.gateway.structured.CHECK_S_MAX", 1.0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"$ref": "#"}, "no text matches it"),
        (SLOW, "longer than 1 s to compile"),
        (HUGE, "fuel exhausted"),
        ({"enum": ["x" * 1000 + str(i) for i in range(140)]}, "over the limit of 128 KiB"),
    ]

    async def main() -> None:
        async with served(folder) as (c, client):
            for schema, said in wrong:
                form = {"type": "json_schema", "json_schema": {"schema": schema}}
                slow = asyncio.create_task(chat(client, response_format=form))
                beside = await chat(client, max_tokens=3, temperature=0)
                assert beside.status_code == 200, "others are served meanwhile"
                answer = await slow
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, "response_format")
                assert said in error["message"] and len(error["message"].splitlines()) <= 5
            assert not c.desk.open_count
            await c.at_rest()

    run(main())


def test_choices_share_their_prompt_and_count_seeds(folder: Path) -> None:
    """Choice j of seed s is the only choice of seed s + j; the prompt is computed once."""
    prompt = bytes(prompt_of(100)).decode("latin-1")[:90]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip

    async def main() -> None:
        async with served(folder) as (c, client):
            many = (await client.post("/v1/completions", json={**body, "n": 4, "seed": 7})).json()
            assert [one["index"] for one in many["choices"]] == [0, 1, 2, 3]
            ids = [one["token_ids"] for one in many["choices"]]
            assert len({tuple(one) for one in ids}) == 4
            for j in range(4):
                one = (await client.post("/v1/completions", json={**body, "seed": 7 + j})).json()
                assert one["choices"][0]["token_ids"] == ids[j]
            prompt_tokens = one["usage"]["prompt_tokens"]
            assert many["usage"]["prompt_tokens"] == prompt_tokens
            assert many["usage"]["completion_tokens"] == 32
            assert many["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            more = {**body, "prompt": "other " + prompt, "kvasir": {"timing": True}, "n": 3}
            timed = (await client.post("/v1/completions", json=more)).json()["kvasir"]
            assert timed[0]["bytes"] > 0
            assert [one["bytes"] < timed[0]["bytes"] for one in timed[1:]] == [True, True]
            await c.at_rest()

    run(main())


def test_a_failed_grammar_at_the_engine_is_an_error_not_a_text(folder: Path) -> None:
    async def main() -> None:
        async with cluster(deployment_of(folder)) as c:
            steering = Steering((), Grammar("regex", "("))
            answer = await c.ask(prompt_of(20), 9, sampling=Sampling(), steering=steering)
            assert (answer.reason, answer.tokens) == ("failed", [EOS_TOKEN_ID])
            assert (await c.ask(prompt_of(20), 9)).reason == "length"
            await c.at_rest()

    run(main())
