"""A body's wishes about tokens: sampling values, log-probabilities, grammars. Knows the fields'
meaning and limits; no prompt, no answer. Names and defaults are OpenAI's, beyond them vLLM's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from kvasir.core.request import Grammar, Sampling, Steering
from kvasir.gateway.port import ModelCard, Text
from kvasir.gateway.schema import BadField, ChatBody, CompletionBody

Body = ChatBody | CompletionBody

SEED_BITS: Final = 63
LOGPROBS_MAX: Final = 20
BIAS_MAX: Final = 100.0
BIASES_MAX: Final = 1024
CHOICES_OF_TEXT_MAX: Final = 4096

# Field -> (least, most, default): what may be asked.
RANGES: Final = {
    "temperature": (0.0, 2.0, 1.0),
    "min_p": (0.0, 1.0, 0.0),
    "presence_penalty": (-2.0, 2.0, 0.0),
    "frequency_penalty": (-2.0, 2.0, 0.0),
}


def known_tokens(name: str, tokens: tuple[int, ...], text: Text) -> tuple[int, ...]:
    """Token ids that the client chose. Raises BadField."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < text.vocab:
        raise BadField(f"{name} has a token id that is not in [0, {text.vocab})", name)
    return tokens


class Controls(NamedTuple):
    sampling: Sampling
    steering: Steering | None


async def controls_of(body: Body, text: Text, card: ModelCard) -> Controls:
    """Raises BadField; Overloaded when too many grammars wait to be checked."""
    sampling = _sampling(body, text, card)
    if body.use_beam_search and card.made_up:
        raise BadField("no beam search here: engine fake makes its tokens up", "use_beam_search")
    bias, grammar = _bias(body, text), await _served_grammar(body, text, card)
    if grammar is not None:
        sampling = msgspec.structs.replace(sampling, single_step=True)
    steering = Steering(bias, grammar) if bias or grammar is not None else None
    return Controls(sampling, steering)


def _sampling(body: Body, text: Text, card: ModelCard) -> Sampling:
    top_p = 1.0 if body.top_p is None else body.top_p
    if not 0 < top_p <= 1:
        raise BadField(f"top_p must be in (0, 1], not {top_p}", "top_p")
    top_k = 0 if body.top_k is None else body.top_k
    if top_k < -1:
        raise BadField(f"top_k must be 1 or more, or 0 or -1 for all, not {top_k}", "top_k")
    repetition = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    if not 0 < repetition < float("inf"):
        over = f"repetition_penalty must be over 0, not {repetition}"
        raise BadField(over, "repetition_penalty")
    if body.seed is not None and not -(2**SEED_BITS) <= body.seed < 2**SEED_BITS:
        raise BadField("seed must fit in 64 bits", "seed")
    if body.min_tokens is not None and body.min_tokens < 0:
        raise BadField(f"min_tokens must not be negative: {body.min_tokens}", "min_tokens")
    own = known_tokens("stop_token_ids", tuple(body.stop_token_ids or ()), text)
    return Sampling(
        temperature=_in_range(body, "temperature"),
        min_p=_in_range(body, "min_p"),
        presence_penalty=_in_range(body, "presence_penalty"),
        frequency_penalty=_in_range(body, "frequency_penalty"),
        top_p=top_p,
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=own if body.ignore_eos else (*text.eos_ids, *own),
        top_k=max(0, top_k),
        repetition_penalty=repetition,
        min_tokens=body.min_tokens or 0,
        logprobs=_logprobs(body, card),
    )


def _in_range(body: Body, name: str) -> float:
    least, most, default = RANGES[name]
    value: float | None = getattr(body, name)
    if value is None:
        return default
    if not least <= value <= most:
        raise BadField(f"{name} must be in [{least:g}, {most:g}], not {value}", name)
    return value


# --- log-probabilities ----------------------------------------------------------------------------


def _logprobs(body: Body, card: ModelCard) -> int | None:
    """How many likeliest tokens are told beside the drawn one's; None: nothing is."""
    count = _chat_logprobs(body) if isinstance(body, ChatBody) else _text_logprobs(body)
    if count is None:
        return None
    if card.made_up:
        raise BadField("no log-probabilities here: engine fake makes its tokens up", "logprobs")
    return count


def _chat_logprobs(body: ChatBody) -> int | None:
    top = body.top_logprobs
    if body.logprobs is not None and not isinstance(body.logprobs, bool):
        raise BadField(
            f"logprobs must be true or false in a chat, not {body.logprobs}", "logprobs",
            next_step=f'"logprobs": true, "top_logprobs": {body.logprobs}',
        )  # fmt: skip
    if not body.logprobs:
        if top:
            raise BadField("top_logprobs needs logprobs to be true", "top_logprobs")
        return None
    return _few("top_logprobs", top or 0)


def _text_logprobs(body: CompletionBody) -> int | None:
    if body.logprobs is True:
        raise BadField(
            "logprobs must be a number in a completion, not true", "logprobs",
            next_step='"logprobs": 0 for the drawn tokens alone',
        )  # fmt: skip
    if body.logprobs is None or body.logprobs is False:
        return None
    return _few("logprobs", body.logprobs)


def _few(name: str, count: int) -> int:
    if not 0 <= count <= LOGPROBS_MAX:
        raise BadField(f"{name} must be in [0, {LOGPROBS_MAX}], not {count}", name)
    return count


# --- bias and grammar -----------------------------------------------------------------------------


async def _served_grammar(body: Body, text: Text, card: ModelCard) -> Grammar | None:
    wanted = _wanted(body)
    if wanted is None:
        return None
    name, grammar = wanted
    if card.made_up:
        raise BadField(f"{name} cannot be followed: engine fake makes its tokens up", name)
    for other in ("ignore_eos", "min_tokens"):
        if getattr(body, other):
            raise BadField(f"{other} and {name} exclude one another", other)
    fault = await text.fault(grammar)
    if fault:
        raise BadField(f"{name} cannot be served: {fault}", name)
    return grammar


def _bias(body: Body, text: Text) -> tuple[tuple[int, float], ...]:
    given = body.logit_bias or {}
    if len(given) > BIASES_MAX:
        raise BadField(f"logit_bias has {len(given)} entries, over {BIASES_MAX}", "logit_bias")
    bias = []
    for name, value in given.items():
        if not name.isdecimal() or not name.isascii():
            raise BadField(f"logit_bias has a key that is no token id: {name[:32]!r}", "logit_bias")
        if not -BIAS_MAX <= value <= BIAS_MAX:
            raise BadField(f"logit_bias must be in [-100, 100], not {value}", "logit_bias")
        bias.append((int(name[:12]), value))
    known_tokens("logit_bias", tuple(token for token, _ in bias), text)
    return tuple(bias)


def _wanted(body: Body) -> tuple[str, Grammar] | None:
    """The field that asks for a form, and the form. Raises BadField for two of them."""
    found = [
        (name, grammar)
        for name, grammar in (
            ("response_format", _response_format(body.response_format)),
            ("structured_outputs", _structured(body.structured_outputs)),
            ("guided_json", _grammar("guided_json", "json", body.guided_json)),
            ("guided_regex", _grammar("guided_regex", "regex", body.guided_regex)),
            ("guided_choice", _grammar("guided_choice", "choice", body.guided_choice)),
            ("guided_grammar", _grammar("guided_grammar", "grammar", body.guided_grammar)),
        )
        if grammar is not None
    ]
    if len(found) > 1:
        (first, _), (second, _) = found[:2]
        raise BadField(f"{first} and {second} exclude one another", second)
    return found[0] if found else None


FORMATS: Final = ("text", "json_object", "json_schema")
FORMS: Final = ("json", "json_object", "regex", "choice", "grammar")


def _response_format(given: Mapping[str, Any] | None) -> Grammar | None:
    if given is None or given.get("type") == "text":
        return None
    kind = given.get("type")
    if kind == "json_object":
        return _grammar("response_format", "json_object", True)
    if kind != "json_schema":
        names = ", ".join(FORMATS)
        raise BadField(f"response_format.type must be one of {names}", "response_format.type")
    inner = given.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        where = "response_format.json_schema.schema"
        raise BadField(f"{where} must be a JSON schema", where)
    return _grammar("response_format", "json", schema)


def _structured(given: Mapping[str, Any] | None) -> Grammar | None:
    asked = {name: value for name, value in (given or {}).items() if value not in (None, False)}
    forms = [name for name in FORMS if name in asked]
    if given is None or not asked:
        return None
    if len(forms) != 1:
        raise BadField(f"structured_outputs needs one of {', '.join(FORMS)}", "structured_outputs")
    return _grammar(f"structured_outputs.{forms[0]}", forms[0], asked[forms[0]])


def _grammar(name: str, form: str, value: Any) -> Grammar | None:
    """One of FORMS as it is sent on. Raises BadField."""
    if value is None:
        return None
    if form == "json_object":
        return Grammar("json", '{"type":"object"}')
    if form == "json" and isinstance(value, dict):
        return Grammar("json", json.dumps(value, ensure_ascii=False, sort_keys=False))
    if form == "choice":
        return Grammar("lark", _choice(name, value))
    if not isinstance(value, str) or not value:
        raise BadField(f"{name} must be text that is not empty", name)
    return Grammar("json" if form == "json" else "regex" if form == "regex" else "lark", value)


def _choice(name: str, value: Any) -> str:
    texts = value if isinstance(value, list) else []
    if not texts or not all(isinstance(one, str) and one for one in texts):
        raise BadField(f"{name} must be a list of texts, none empty", name)
    if len(texts) > CHOICES_OF_TEXT_MAX:
        raise BadField(f"{name} holds {len(texts)} texts, over {CHOICES_OF_TEXT_MAX}", name)
    return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in texts)
