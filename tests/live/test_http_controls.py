"""Log-probabilities, choices, reasoning and stops on the wire, as OpenAI's client has them."""

import asyncio
import json
import math
from typing import Any

import pytest

from kvasir.gateway.fake import FakeDesk, FakeText
from kvasir.gateway.tokenize import TextModel
from tests.live.test_http import TINY, USER, chat_body, client_of, events_of, post, served

HALF = math.log(0.5)


def text_body(**more: Any) -> bytes:
    return json.dumps({"model": "fake", "prompt": "a", "max_tokens": 50, **more}).encode()


# --- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_of_a_chat_whole_and_streamed() -> None:
    with served(FakeDesk(FakeText(), tuple(map(ord, "Hé")))) as port, client_of(port) as client:
        ask = client.chat.completions.create
        whole = ask(model="fake", messages=USER, logprobs=True, top_logprobs=2)
        chunks = list(ask(model="fake", messages=USER, logprobs=True, top_logprobs=2, stream=True))
    (choice,) = whole.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert choice.logprobs.refusal is None
    assert [one.token for one in choice.logprobs.content] == ["H", "é"]
    assert [one.bytes for one in choice.logprobs.content] == [[72], [0xC3, 0xA9]]
    assert [one.logprob for one in choice.logprobs.content] == [HALF] * 2
    tops = [[(top.token, top.logprob) for top in one.top_logprobs]
            for one in choice.logprobs.content]  # fmt: skip
    assert tops == [[("H", HALF), ("I", 2 * HALF)], [("é", HALF), ("ê", 2 * HALF)]]
    *tokens, last = chunks
    assert last.choices[0].logprobs is None
    told = [chunk.choices[0].logprobs.content for chunk in tokens]
    assert [content for (content,) in told] == choice.logprobs.content
    assert len(choice.logprobs.content) == whole.usage.completion_tokens


@pytest.mark.parametrize(("asked", "told"), [(None, None), (False, None), (True, [[], []])])
def test_logprobs_without_top_ones(asked: bool | None, told: Any) -> None:
    with served(FakeDesk(FakeText(), tuple(b"Hi"))) as port:
        choice = post(port, "/v1/chat/completions", chat_body(logprobs=asked)).json()["choices"][0]
    got = choice["logprobs"]
    assert (got if got is None else [one["top_logprobs"] for one in got["content"]]) == told


@pytest.mark.parametrize("asked", [0, 2])
def test_logprobs_of_a_completion_whole_and_streamed(asked: int) -> None:
    with served(FakeDesk(FakeText(), tuple(map(ord, "Hé!")))) as port, client_of(port) as client:
        ask = client.completions.create
        whole = ask(model="fake", prompt="a", max_tokens=9, logprobs=asked)
        chunks = list(ask(model="fake", prompt="a", max_tokens=9, logprobs=asked, stream=True))
    told = whole.choices[0].logprobs
    assert told is not None
    assert (told.tokens, told.text_offset) == (["H", "é", "!"], [0, 1, 2])
    assert told.token_logprobs == [HALF] * 3
    assert told.top_logprobs is not None
    assert told.top_logprobs[0] == ({"H": HALF, "I": 2 * HALF} if asked else {"H": HALF})
    parts = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
    assert [part.tokens[0] for part in parts] == told.tokens
    assert [part.text_offset[0] for part in parts] == told.text_offset
    assert [part.top_logprobs[0] for part in parts] == told.top_logprobs


def test_none_for_a_completion_that_asks_for_none() -> None:
    with served(FakeDesk(FakeText(), tuple(b"Hi"))) as port:
        for asked in (None, False):
            answer = post(port, "/v1/completions", text_body(logprobs=asked)).json()
            assert answer["choices"][0]["logprobs"] is None


def test_a_token_that_is_part_of_a_character_is_told_by_its_bytes() -> None:
    text = TextModel.load(TINY)
    ids = asyncio.run(text.encode("a€<|im_end|>", special=False))
    with served(FakeDesk(text, ids)) as port:
        chat = post(port, "/v1/chat/completions", chat_body(logprobs=True)).json()["choices"][0]
        plain = post(port, "/v1/completions", text_body(logprobs=0)).json()["choices"][0]
    content = chat["logprobs"]["content"]
    assert [one["token"] for one in content] == ["a", "\\xe2", "\\x82", "\\xac", "<|im_end|>"]
    assert bytes(byte for one in content[:4] for byte in one["bytes"]).decode() == "a€"
    assert chat["message"]["content"] == plain["text"] == "a€"
    told = plain["logprobs"]
    assert told["tokens"][:3] == ["a", "bytes:\\xe2", "bytes:\\x82"]
    assert told["text_offset"] == [0, 1, 1, 1, 2]


# --- several choices ------------------------------------------------------------------------------


def test_choices_of_a_chat_whole_and_streamed() -> None:
    desk = FakeDesk(FakeText(), tuple(b"Hi"))
    with served(desk) as port, client_of(port) as client:
        whole = client.chat.completions.create(model="fake", messages=USER, n=3, seed=4)
        assert [ask.sampling.seed for ask in desk.asks] == [4, 5, 6]
        body = chat_body(n=3, stream=True, stream_options={"include_usage": True})
        *events, usage = events_of(post(port, "/v1/chat/completions", body))
    assert [(one.index, one.message.content) for one in whole.choices] == [
        (0, "Hi"), (1, "Hi"), (2, "Hi"),
    ]  # fmt: skip
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 6)
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (8, 6)
    for index in range(3):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(one["delta"].get("content", "") for one in mine) == "Hi"
        assert mine[0]["delta"]["role"] == "assistant"
    firsts = [e["choices"][0]["index"] for e in events][:2]
    assert firsts == [0, 0], "the others wait until the prompt is cached"


def test_a_client_that_leaves_leaves_all_choices() -> None:
    desk = FakeDesk(FakeText(), tuple(b"Hi") * 500, token_s=0.01)
    with served(desk) as port, client_of(port) as client:
        stream = client.chat.completions.create(model="fake", messages=USER, n=2, stream=True)
        seen = {chunk.choices[0].index for chunk, _ in zip(stream, range(20), strict=False)}
        assert seen == {0, 1}
        stream.close()
        while len(desk.cancelled) < 2:  # the test's own time limit bounds the wait
            asyncio.run(asyncio.sleep(0.01))
    assert sorted(desk.cancelled) == sorted(ask.request_id for ask in desk.asks)


# --- reasoning ------------------------------------------------------------------------------------

THOUGHT = "<think>hm é</think>So."


@pytest.mark.parametrize("bundle", [1, 5])
def test_reasoning_is_told_apart_whole_and_streamed(bundle: int) -> None:
    desk = FakeDesk(FakeText(), tuple(map(ord, THOUGHT)), reasons=True, bundle=bundle)
    with served(desk) as port:
        whole = post(port, "/v1/chat/completions", chat_body()).json()
        *events, last = events_of(post(port, "/v1/chat/completions", chat_body(stream=True)))
        plain = post(port, "/v1/completions", text_body()).json()
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm é", "So.")
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4 + 8 + 1}
    assert len(events) == len(THOUGHT), "one event a token"
    deltas = [event["choices"][0]["delta"] for event in [*events, last]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm é"
    assert "".join(delta.get("content", "") for delta in deltas) == "So."
    assert plain["choices"][0]["text"] == THOUGHT, "a plain completion is left as it is"


def test_reasoning_that_was_cut_short() -> None:
    desk = FakeDesk(FakeText(), tuple(map(ord, "<think>hm</th")), reasons=True)
    with served(desk) as port:
        message = post(port, "/v1/chat/completions", chat_body()).json()["choices"][0]["message"]
        events = events_of(post(port, "/v1/chat/completions", chat_body(stream=True)))
    assert (message["reasoning_content"], message["content"]) == ("hm</th", "")
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm</th"


def test_no_reasoning_under_a_grammar_or_without_the_switch() -> None:
    for desk, more in (
        (FakeDesk(FakeText(), tuple(map(ord, THOUGHT))), {}),
        (FakeDesk(FakeText(), tuple(map(ord, THOUGHT)), reasons=True), {"guided_regex": "x"}),
    ):
        with served(desk) as port:
            message = post(port, "/v1/chat/completions", chat_body(**more)).json()
        assert message["choices"][0]["message"] == {"role": "assistant", "content": THOUGHT}


# --- stops and special tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("include", "said"), [(False, "a€"), (True, "a€🙂b")])
def test_a_stop_string_over_tokens_that_are_parts_of_characters(
    stream: bool, include: bool, said: str
) -> None:
    text = TextModel.load(TINY)
    ids = asyncio.run(text.encode("a€🙂bc", special=False))
    body = text_body(stop=["🙂b"], include_stop_str_in_output=include, stream=stream)
    with served(FakeDesk(text, ids)) as port:
        reply = post(port, "/v1/completions", body)
    choices = [e["choices"][0] for e in events_of(reply)] if stream else reply.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == said
    assert choices[-1]["finish_reason"] == "stop"
    assert not any("\ufffd" in choice["text"] for choice in choices)


def test_special_tokens_are_shown_when_they_are_not_to_be_skipped() -> None:
    text = TextModel.load(TINY)
    ids = asyncio.run(text.encode("a<|im_start|>b", special=False))
    with served(FakeDesk(text, ids)) as port:
        for skip, said in ((None, "ab"), (True, "ab"), (False, "a<|im_start|>b")):
            answer = post(port, "/v1/completions", text_body(skip_special_tokens=skip)).json()
            assert answer["choices"][0]["text"] == said
