"""What a body may say, and what the client is told when it says something else."""

import asyncio
import json
from typing import Any

import pytest

from kvasir.core.errors import LINES_MAX, KvasirError, NotFound, RequestError
from kvasir.core.request import Grammar, Sampling, Steering
from kvasir.gateway.answer import Answer, Style, usage_of
from kvasir.gateway.errors import of_error, of_fail
from kvasir.gateway.fake import FakeDesk, FakeText
from kvasir.gateway.openai import Caller, Plan, plan_chat, plan_completion, read_caller
from kvasir.gateway.port import Ask, EndPiece, FailPiece
from kvasir.gateway.schema import BadField, decode_chat, decode_completion
from kvasir.gateway.sse import DONE, Chunks, Shared

CONTEXT = 100
USER = [{"role": "user", "content": "hi"}]


def plan(body: dict[str, Any] | bytes, *, caller: Caller | None = None) -> Plan:
    """A chat body has messages, any other is a plain completion."""
    raw = body if isinstance(body, bytes) else json.dumps({"model": "fake", **body}).encode()
    desk = FakeDesk(FakeText(), max_context=CONTEXT)
    who = caller or Caller("run")
    if b"messages" in raw:
        return asyncio.run(plan_chat(decode_chat(raw), desk, who, "run"))
    return asyncio.run(plan_completion(decode_completion(raw), desk, who, "run"))


def refused(body: dict[str, Any] | bytes) -> KvasirError:
    with pytest.raises(RequestError) as caught:
        plan(body)
    assert len(str(caught.value).splitlines()) <= LINES_MAX
    return caught.value


# --- accepted ---------------------------------------------------------------------------------


def test_a_chat_body_becomes_one_ask() -> None:
    made = plan({"messages": USER, "temperature": 0, "top_p": 0.5, "seed": 7, "max_tokens": 3})
    (ask,) = made.asks
    assert bytes(ask.tokens) == b"user: hi"
    assert (ask.request_id, ask.model, ask.max_tokens) == ("run", "fake", 3)
    assert (ask.sampling.temperature, ask.sampling.top_p, ask.sampling.seed) == (0, 0.5, 7)
    assert made.style.chat
    assert not made.stream


def test_max_completion_tokens_wins_over_max_tokens() -> None:
    made = plan({"messages": USER, "max_tokens": 3, "max_completion_tokens": 5})
    assert made.asks[0].max_tokens == 5


def test_chat_may_fill_the_context_and_completions_make_sixteen_tokens() -> None:
    assert plan({"messages": USER}).asks[0].max_tokens == CONTEXT - len("user: hi")
    assert plan({"prompt": "abc"}).asks[0].max_tokens == 16
    assert plan({"prompt": "x" * (CONTEXT - 3)}).asks[0].max_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("ab", [(97, 98)]),
        (["ab"], [(97, 98)]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        (["a", "b"], [(97,), (98,)]),
        (["a", [5]], [(97,), (5,)]),
    ],
)
def test_shapes_of_a_prompt(prompt: Any, tokens: list[tuple[int, ...]]) -> None:
    asks = plan({"prompt": prompt}).asks
    assert [ask.tokens for ask in asks] == tokens
    assert len({ask.request_id for ask in asks}) == len(tokens)


def test_text_parts_are_joined_and_other_keys_of_a_message_kept() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    made = plan({"messages": [{"role": "user", "content": parts, "name": "eve"}]})
    assert bytes(made.asks[0].tokens) == b"user: hi"


def test_end_of_sequence_stops_unless_it_is_to_be_ignored() -> None:
    eos = FakeText.eos_ids
    assert plan({"prompt": "a", "stop_token_ids": [5]}).asks[0].sampling.stop_token_ids == (*eos, 5)
    ignoring = plan({"prompt": "a", "stop_token_ids": [5], "ignore_eos": True}).asks[0].sampling
    assert (ignoring.ignore_eos, ignoring.stop_token_ids) == (True, (5,))


def test_how_the_answer_is_to_look() -> None:
    made = plan({
        "prompt": "a", "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True, "kvasir": {"timing": True, "deadline_s": 2.5}, "stop": ["x", "y"],
    })  # fmt: skip
    assert (made.stream, made.include_usage, made.token_ids, made.timing) == (True,) * 4
    assert made.style.stops == ("x", "y")
    assert made.asks[0].deadline_s == 2.5


def test_usage_is_for_streams_only() -> None:
    assert not plan({"prompt": "a", "stream_options": {"include_usage": True}}).include_usage


def test_unknown_fields_and_neutral_values_are_ignored() -> None:
    plan({
        "prompt": "a", "user": "u", "metadata": {"a": 1}, "made_up": [1], "n": 1, "best_of": 1,
        "min_tokens": 0, "logprobs": None, "presence_penalty": 0.0, "frequency_penalty": 0,
        "top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "echo": False, "suffix": None,
        "logit_bias": {}, "stop": None, "seed": None, "temperature": None,
    })  # fmt: skip
    plan({"messages": USER, "tools": [], "response_format": {"type": "text"}, "logprobs": False})
    plan({"messages": USER, "best_of": 1, "bad_words": [], "use_beam_search": False})


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"messages": USER, "n": 0}, "n", "at least 1"),
        ({"messages": USER, "n": 129}, "n", "at most 128 choices"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "at most 128 choices"),
        ({"messages": USER, "min_tokens": -1}, "min_tokens", "not be negative"),
        ({"messages": USER, "min_tokens": 9, "max_tokens": 8}, "min_tokens", "over the 8"),
        ({"messages": USER, "logprobs": 3}, "logprobs", "true or false in a chat"),
        ({"messages": USER, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"messages": USER, "logprobs": False, "top_logprobs": 3}, "top_logprobs", "needs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "[0, 20]"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "a number in a completion"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "[0, 20]"),
        ({"prompt": "a", "logprobs": -1}, "logprobs", "[0, 20]"),
        ({"messages": USER, "tools": [{}]}, "tools", "not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of", "not supported"),
        ({"messages": USER, "best_of": 3}, "best_of", "not supported"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo", "not supported"),
        ({"prompt": "a", "use_beam_search": True, "stop": "b"}, "use_beam_search", "excludes"),
        ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs", "not supported"),
        ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty", "[-2, 2]"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", "[-2, 2]"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "over 0"),
        ({"prompt": "a", "top_k": -2}, "top_k", "1 or more"),
        ({"prompt": "a", "min_p": 1.5}, "min_p", "[0, 1]"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "[-100, 100]"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias", "no token id"),
        ({"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias", "not in"),
        ({"messages": USER, "response_format": {"type": "xml"}}, "response_format.type", "one of"),
        (
            {"messages": USER, "response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "a JSON schema",
        ),
        ({"prompt": "a", "structured_outputs": {"wish": 1}}, "structured_outputs", "needs one of"),
        (
            {"prompt": "a", "structured_outputs": {"regex": "a", "json": {}}},
            "structured_outputs",
            "needs one of",
        ),
        (
            {"prompt": "a", "structured_outputs": {"choice": []}},
            "structured_outputs.choice",
            "list of texts",
        ),
        ({"prompt": "a", "guided_regex": ""}, "guided_regex", "not empty"),
        ({"prompt": "a", "guided_regex": "nothing"}, "guided_regex", "no text matches"),
        ({"prompt": "a", "guided_regex": "a", "guided_json": {}}, "guided_regex", "exclude"),
        ({"prompt": "a", "guided_regex": "a", "ignore_eos": True}, "ignore_eos", "exclude"),
        ({"prompt": "a", "guided_regex": "a", "min_tokens": 2}, "min_tokens", "exclude"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "string or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "only text parts, not 'image_url'",
        ),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"messages": USER, "max_tokens": "9"}, "max_tokens", "expected"),
        ({"messages": USER, "temperature": 2.5}, "temperature", "[0, 2]"),
        ({"messages": USER, "temperature": -1}, "temperature", "[0, 2]"),
        ({"messages": USER, "top_p": 0}, "top_p", "(0, 1]"),
        ({"messages": USER, "seed": 2**63}, "seed", "64 bits"),
        ({"messages": USER, "stop": [""]}, "stop", "empty"),
        ({"messages": USER, "stop": ["x"] * 65}, "stop", "at most 64"),
        ({"messages": USER, "kvasir": {"deadline_s": 0}}, "kvasir.deadline_s", "over 0"),
        (
            {"messages": USER, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
            "may not set messages",
        ),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "1 to 128 prompts"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({}, "prompt", "empty"),
        ({"prompt": [1, "a"]}, "prompt", "mixes"),
        ({"prompt": ["a"] * 129}, "prompt", "1 to 128 prompts"),
        ({"prompt": [-1]}, "prompt", "token id that is not in"),
        ({"prompt": [FakeText.vocab]}, "prompt", "token id that is not in"),
        ({"prompt": "a", "stop_token_ids": [-4]}, "stop_token_ids", "not in"),
        ({"prompt": {"a": 1}}, "prompt", "expected"),
        (b'{"prompt": "a"}', "model", "model is required"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any] | bytes, param: str, said: str) -> None:
    error = refused(body)
    assert isinstance(error, BadField)
    assert (error.status, error.param) == (400, param)
    assert said in error.what


@pytest.mark.parametrize("raw", [b"", b"{", b"messages", b'{"model": "fake", "messages": "\xff"}'])
def test_a_body_that_is_no_json(raw: bytes) -> None:
    error = refused(raw)
    assert error.status == 400
    assert "no JSON" in error.what or "expected" in error.what.lower()


@pytest.mark.parametrize("raw", [b"[]", b'"messages"', b"3"])
def test_json_that_is_no_object(raw: bytes) -> None:
    assert "expected `object`" in refused(raw).what


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ({"prompt": "x" * 60, "max_tokens": 41}, ("100", "101", "60", "41")),
        ({"prompt": "x" * 100}, ("100", "101", "1")),
        ({"messages": USER, "max_tokens": 93}, ("100", "101", "8", "93")),
    ],
)
def test_more_than_the_context_is_refused_with_the_numbers(
    body: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    error = refused(body)
    assert isinstance(error, BadField)
    assert error.code == "context_length_exceeded"
    assert all(number in error.what.replace("(", " ").split() for number in numbers)


def test_an_unknown_model_is_not_found_and_the_nearest_is_named() -> None:
    with pytest.raises(NotFound) as caught:
        plan({"messages": USER, "model": "fale"})
    shown = of_error(caught.value)
    assert (shown.status, shown.code, shown.param) == (404, "model_not_found", "model")
    assert "nearest: fake" in shown.message


# --- headers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [b"abc", b"x" * 128, b"a b", b'quote"'])
def test_a_usable_request_id_is_kept(own: bytes) -> None:
    caller = read_caller([(b"x-request-id", own)], "fresh")
    assert (caller.request_id, caller.own_id) == (own.decode(), True)


@pytest.mark.parametrize("own", [b"", b"x" * 129, b"caf\xc3\xa9", b"a\tb"])
def test_an_unusable_request_id_is_replaced(own: bytes) -> None:
    caller = read_caller([(b"x-request-id", own)], "fresh")
    assert (caller.request_id, caller.own_id) == ("fresh", False)


def test_objectives_and_session_come_from_headers() -> None:
    headers = [
        (b"x-slo-ttft-ms", b"250"), (b"x-slo-tpot-ms", b"30.5"), (b"x-session-affinity", b"s1"),
    ]  # fmt: skip
    (ask,) = plan({"prompt": "a"}, caller=read_caller(headers, "fresh")).asks
    assert (ask.slo_ttft_s, ask.slo_tpot_s, ask.session) == (0.25, 0.0305, "s1")


@pytest.mark.parametrize("value", [b"soon", b"0", b"-1", b"nan", b"inf"])
def test_an_objective_that_is_no_time_is_refused(value: bytes) -> None:
    with pytest.raises(BadField, match="x-slo-ttft-ms"):
        read_caller([(b"x-slo-ttft-ms", value)], "fresh")


# --- errors on the wire -----------------------------------------------------------------------


def test_an_error_has_openais_shape() -> None:
    body = json.loads(of_error(BadField("n must be 1", "n")).body())
    assert body == {
        "error": {
            "message": "n must be 1", "type": "invalid_request_error", "param": "n", "code": None,
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("piece", "after"),
    [
        (FailPiece(429, "full", 2.1), b"3"),
        (FailPiece(429, "full", 0.0), b"1"),
        (FailPiece(503, "no worker"), b"1"),
        (FailPiece(400, "no"), None),
    ],
)
def test_retry_after_is_in_whole_seconds(piece: FailPiece, after: bytes | None) -> None:
    assert dict(of_fail(piece).headers()).get(b"retry-after") == after


# --- events -----------------------------------------------------------------------------------


def events(raw: bytes) -> list[Any]:
    lines = raw.decode().split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("ids", [True, False])
def test_every_event_is_whole_json(chat: bool, usage: bool, ids: bool) -> None:
    shared = Shared(chat=chat, answer_id='i"d', created=5, model="m\\é", usage=usage)
    chunks = Chunks(shared, 2, token_ids=ids, prompt_ids=(1, 2))
    text = ["", 'q"\n\u2028', "é"]
    raw = b"".join([*(chunks.token(t, i) for i, t in enumerate(text)), chunks.last("!", "stop")])
    shown = events(raw)
    assert len(shown) == len(text) + 1
    for event in shown:
        (choice,) = event["choices"]
        assert (event["id"], event["model"], event["created"]) == ('i"d', "m\\é", 5)
        assert event["object"] == ("chat.completion.chunk" if chat else "text_completion")
        assert choice["index"] == 2
        assert ("usage" in event) == usage
    contents = [e["choices"][0]["delta"]["content"] if chat else e["choices"][0]["text"]
                for e in shown]  # fmt: skip
    assert contents == [*text, "!"]
    reasons = [event["choices"][0]["finish_reason"] for event in shown]
    assert reasons == [None, None, None, "stop"]
    if ids:
        assert [e["choices"][0]["token_ids"] for e in shown[:-1]] == [[0], [1], [2]]
        holder = shown[0] if chat else shown[0]["choices"][0]
        assert holder["prompt_token_ids"] == [1, 2]


def test_the_role_comes_once() -> None:
    shared = Shared(chat=True, answer_id="i", created=0, model="m", usage=False)
    chunks = Chunks(shared, 0)
    first, second, last = events(
        chunks.token("a", 1) + chunks.token("b", 2) + chunks.last("", "length")
    )
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert second["choices"][0]["delta"] == {"content": "b"}
    assert last["choices"][0]["delta"] == {}
    (only,) = events(Chunks(shared, 0).last("", "stop"))
    assert only["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert DONE == b"data: [DONE]\n\n"


# --- one choice -------------------------------------------------------------------------------


def answer(*stops: str, include: bool = False) -> Answer:
    style = Style(stops=stops, include_stop=include)
    return Answer(Ask("r", "fake", (1,), 9), FakeText(), style, None)


def test_a_stop_string_cuts_the_text_and_is_told_once() -> None:
    growing = answer("lo")
    told = []
    for token in b"hello you":
        growing.take((token,))
        told.append(growing.must_stop())
    growing.end = EndPiece("length", 1, 0, 9)
    assert "".join(growing.parts) + growing.rest().content == "hel"
    assert told.count(True) == 1
    assert told[4]
    assert growing.finish_reason == "stop"


def test_a_stop_string_may_be_kept() -> None:
    growing = answer("l", "lo", include=True)
    growing.take(tuple(b"hello you"))
    growing.end = EndPiece("length", 1, 0, 9)
    growing.finish()
    assert "".join(growing.parts) == "hel"
    growing = answer("lo", include=True)
    growing.take(tuple(b"hello you"))
    assert "".join(growing.parts) == "hello"


@pytest.mark.parametrize(("include", "text"), [(False, "hell"), (True, "hello")])
def test_a_token_that_stops_has_no_text_unless_it_is_included(include: bool, text: str) -> None:
    ask = Ask("r", "fake", (1,), 9, Sampling(stop_token_ids=(0, ord("o"))))
    growing = Answer(ask, FakeText(), Style(include_stop=include), None)
    growing.take(tuple(b"hello"))
    assert "".join(growing.parts) == text


def test_no_stop_string_before_min_tokens() -> None:
    ask = Ask("r", "fake", (1,), 9, Sampling(min_tokens=6))
    growing = Answer(ask, FakeText(), Style(stops=("l", "y")), None)
    growing.take(tuple(b"hello you"))
    assert "".join(growing.parts) + growing.rest().content == "hello "


@pytest.mark.parametrize(
    ("field", "value", "name", "given"),
    [
        ("top_k", 7, "top_k", 7),
        ("top_k", -1, "top_k", 0),
        ("min_p", 0.1, "min_p", 0.1),
        ("presence_penalty", -2, "presence_penalty", -2),
        ("frequency_penalty", 1.5, "frequency_penalty", 1.5),
        ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
        ("min_tokens", 3, "min_tokens", 3),
        ("logprobs", 0, "logprobs", 0),
        ("logprobs", 5, "logprobs", 5),
        ("logprobs", False, "logprobs", None),
        ("logprobs", None, "logprobs", None),
    ],
)
def test_a_sampling_field_reaches_the_engine(
    field: str, value: Any, name: str, given: Any
) -> None:
    (ask,) = plan({"prompt": "a", field: value}).asks
    assert getattr(ask.sampling, name) == given
    assert (ask.steering, ask.sampling.single_step) == (None, False)


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ],
)
def test_logprobs_of_a_chat(fields: dict[str, Any], given: int | None) -> None:
    (ask,) = plan({"messages": USER, **fields}).asks
    assert ask.sampling.logprobs == given


OBJECT = '{"type": "object"}'


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json", '{"type":"object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "é"}}}},
            Grammar("json", '{"a": "é"}'),
        ),
        ({"structured_outputs": {"json": {"type": "object"}}}, Grammar("json", OBJECT)),
        ({"guided_json": OBJECT}, Grammar("json", OBJECT)),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ['"', "b\n"]}, Grammar("lark", 'start: "\\"" | "b\\n"')),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar("lark", 'start: "a"')),
        ({"guided_grammar": "root ::= x"}, Grammar("lark", "root ::= x")),
    ],
)
def test_every_way_to_ask_for_a_form(fields: dict[str, Any], grammar: Grammar | None) -> None:
    for body in ({"messages": USER}, {"prompt": "a"}):
        (ask,) = plan({**body, **fields}).asks
        assert ask.steering == (None if grammar is None else Steering((), grammar))
        assert ask.sampling.single_step == (grammar is not None)


def test_a_bias_is_for_token_ids() -> None:
    (ask,) = plan({"prompt": "a", "logit_bias": {"5": -100, "7": 1.5}}).asks
    assert ask.steering == Steering(((5, -100.0), (7, 1.5)))


def test_choices_of_each_prompt_count_their_seeds() -> None:
    made = plan({"prompt": ["a", "b"], "n": 3, "seed": 5})
    assert [ask.tokens for ask in made.asks] == [(97,)] * 3 + [(98,)] * 3
    assert [ask.sampling.seed for ask in made.asks] == [5, 6, 7] * 2
    assert len({ask.request_id for ask in made.asks}) == 6
    unseeded = plan({"messages": USER, "n": 2})
    assert [ask.sampling.seed for ask in unseeded.asks] == [None, None]


@pytest.mark.parametrize("fields", [{"logprobs": True}, {"guided_regex": "a"}])
def test_made_up_tokens_have_no_probabilities_and_no_form(fields: dict[str, Any]) -> None:
    body = decode_chat(json.dumps({"model": "fake", "messages": USER, **fields}).encode())
    with pytest.raises(BadField, match="engine fake makes its tokens up"):
        asyncio.run(plan_chat(body, FakeDesk(FakeText(), made_up=True), Caller("r"), "r"))


def test_usage_of_choices_counts_their_prompt_once() -> None:
    choices = [answer() for _ in range(4)]
    for one in choices:
        one.end = EndPiece("stop", 5, 2, 3)
    usage = usage_of(choices, 2)
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 12)
    assert usage.prompt_tokens_details.cached_tokens == 4


def test_usage_adds_up_over_choices() -> None:
    choices = [answer(), answer()]
    for one in choices:
        one.end = EndPiece("stop", 5, 2, 3)
    usage = usage_of(choices)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 6, 16)
    assert usage.prompt_tokens_details.cached_tokens == 4
