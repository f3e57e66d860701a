"""OpenAI's rules: a decoded body becomes a plan of prompts to run, or an error that names a field.

Knows the protocol's meaning and a `Text`; no socket, no streaming. Limits are checked here, before
anything is submitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from kvasir.core.errors import NotFound, nearest
from kvasir.core.ids import TenantId
from kvasir.core.request import Steering
from kvasir.gateway.answer import Style
from kvasir.gateway.beams import Beaming
from kvasir.gateway.caches import keeps_of, points_of
from kvasir.gateway.chat import messages_of
from kvasir.gateway.controls import Controls, controls_of, known_tokens
from kvasir.gateway.port import Ask, Desk, Keeping, ModelCard, Text
from kvasir.gateway.reasoning import begins_inside
from kvasir.gateway.records import Record
from kvasir.gateway.schema import BadField, ChatBody, CompletionBody, unsupported
from kvasir.gateway.tenants import ANYBODY

PROMPTS_MAX: Final = 128
CHOICES_MAX: Final = 128
BEAMS_MAX: Final = 32
PENALTY_MAX: Final = 10
STOPS_MAX: Final = 64
STOP_CHARS_MAX: Final = 1024
COMPLETION_TOKENS_DEFAULT: Final = 16


class Caller(msgspec.Struct, frozen=True):
    """What a request's HTTP headers say. `own_id`: the client named the request itself."""

    request_id: str
    own_id: bool = False
    session: str | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    body_bytes: int | None = None
    expects: bool = False
    tenant: TenantId = ANYBODY
    authorization: str | None = None


class Plan(msgspec.Struct, frozen=True):
    """One body, ready to run: an ask for each choice, and how the answer is to look. Of each prompt
    there are `n` choices, one after another."""

    asks: tuple[Ask, ...]
    n: int
    text: Text
    style: Style
    stream: bool
    include_usage: bool
    token_ids: bool
    timing: bool
    beaming: Beaming | None = None

    @property
    def model(self) -> str:
        """As it was asked for."""
        adapter = self.asks[0].adapter
        return adapter.name if adapter is not None else self.asks[0].model


async def plan_chat(body: ChatBody, desk: Desk, caller: Caller, run_id: str) -> Plan:
    """Raises RequestError (400), NotFound (404)."""
    text, card = _served(body, desk)
    messages = [*_cached_messages(body, desk, caller), *body.messages]
    points, names = points_of(messages), _template_names(body.chat_template_kwargs)

    def head(some: list[dict[str, Any]]) -> str:
        return text.render(messages_of(some), add_generation_prompt=False, **names)

    prompt = text.render(
        messages_of(messages), add_generation_prompt=body.add_generation_prompt, **names
    )
    tokens = await text.encode(prompt, special=False)
    keeps = await keeps_of(points, head, text, prompt, tokens)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    controls = await controls_of(body, text, card)
    style = _style(body)
    grammar = controls.steering.grammar if controls.steering is not None else None
    if card.reasons and grammar is None:  # a grammar binds an answer from its first token
        style = msgspec.structs.replace(style, reasons=begins_inside(prompt))
    one = _ask(body, caller, card, tokens, asked, None, controls, keeps)
    return _plan(body, [one], text, style, run_id)


async def plan_completion(body: CompletionBody, desk: Desk, caller: Caller, run_id: str) -> Plan:
    """Raises RequestError (400), NotFound (404)."""
    text, card = _served(body, desk)
    controls = await controls_of(body, text, card)
    default, asks = COMPLETION_TOKENS_DEFAULT, []
    record = _cached(body, desk, caller)
    before = record.tokens if record is not None else ()
    for prompt in _prompts(body.prompt):
        if isinstance(prompt, str):
            tokens = before + await text.encode(prompt, special=not before)
        else:
            tokens = before + known_tokens("prompt", prompt, text)
        one = _ask(body, caller, card, tokens, body.max_tokens, default, controls)
        asks.append(one)
    return _plan(body, asks, text, _style(body), run_id)


def card_of(desk: Desk, model: str) -> ModelCard:
    """Raises NotFound with the nearest name."""
    cards = desk.models()
    for card in cards:
        if card.id == model:
            return card
    raise NotFound(f"no model {model!r} here", nearest=nearest(model, [c.id for c in cards]))


def _cached(
    body: ChatBody | CompletionBody, desk: Desk, caller: Caller
) -> Record | None:
    """The cache that the prompt goes on from, if it names one. Raises NoCache, BadField."""
    if body.cache is None:
        return None
    if desk.cache(body.cache) is None:  # its time is over
        desk.caches.drop(body.cache)
    record = desk.caches.find(caller.tenant, body.cache)
    if record.model != body.model:
        raise BadField(f"this cache is of the model {record.model!r}", "cache")
    return record


def _cached_messages(body: ChatBody, desk: Desk, caller: Caller) -> Sequence[dict[str, Any]]:
    record = _cached(body, desk, caller)
    if record is None:
        return ()
    if record.messages is None:
        what = "this cache was made of a prompt, not of messages"
        raise BadField(what, "cache", next_step="use it with /v1/completions")
    return record.messages


INSTEAD: Final = {
    "best_of": "n gives several choices; nothing ranks them",
    "echo": "leave echo out: a prompt's own log-probabilities are not kept",
}


def _served(body: ChatBody | CompletionBody, desk: Desk) -> tuple[Text, ModelCard]:
    name = unsupported(body)
    if name is not None:
        instead = INSTEAD.get(name, f"leave {name} out")
        raise BadField(f"{name} is not supported", name, next_step=instead)
    return desk.text(body.model), card_of(desk, body.model)


def _plan(
    body: ChatBody | CompletionBody, prompts: Sequence[Ask], text: Text, style: Style, run_id: str
) -> Plan:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= CHOICES_MAX // len(prompts):
        most = f"{CHOICES_MAX} choices in all, prompts times n"
        raise BadField(f"n must be at least 1 and make at most {most}, not {n}", "n")
    asks = [_choice(ask, j) for ask in prompts for j in range(n)]
    if len(asks) > 1:
        asks = [msgspec.structs.replace(a, request_id=f"{run_id}-{i}") for i, a in enumerate(asks)]
    else:
        asks = [msgspec.structs.replace(asks[0], request_id=run_id)]
    stream = bool(body.stream)
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Plan(
        asks=tuple(asks),
        n=n,
        text=text,
        style=style,
        stream=stream,
        include_usage=stream and usage,
        token_ids=bool(body.return_token_ids),
        timing=body.kvasir is not None and body.kvasir.timing,
        beaming=_beaming(body, prompts, n),
    )


def _beaming(body: ChatBody | CompletionBody, prompts: Sequence[Ask], n: int) -> Beaming | None:
    """Beam search, `n` beams wide. Raises BadField for what would bend or end a beam in another
    way than by the model's own log-probabilities."""
    if not body.use_beam_search:
        return None
    sampling, steering = prompts[0].sampling, prompts[0].steering or Steering()
    plain = msgspec.structs.replace(
        sampling, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, min_tokens=0
    )
    bent = sampling != plain or steering != Steering()
    if bent or body.stream or body.stop:
        what = "streams, stop strings, penalties, min_tokens, logit_bias and grammars"
        raise BadField(f"use_beam_search excludes {what}", "use_beam_search")
    if len(prompts) > 1 or n > BEAMS_MAX:
        raise BadField(f"use_beam_search takes one prompt and n up to {BEAMS_MAX}", "n")
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    if not -PENALTY_MAX <= penalty <= PENALTY_MAX:
        over = f"length_penalty must be in [-{PENALTY_MAX}, {PENALTY_MAX}], not {penalty}"
        raise BadField(over, "length_penalty")
    return Beaming(n, penalty)


def _choice(ask: Ask, j: int) -> Ask:
    """The j-th choice of a prompt: what one request with the next seeds would give."""
    seed = ask.sampling.seed
    if seed is None or j == 0:
        return ask
    sampling = msgspec.structs.replace(ask.sampling, seed=seed + j)
    return msgspec.structs.replace(ask, sampling=sampling)


def _style(body: ChatBody | CompletionBody) -> Style:
    return Style(
        stops=_stops(body.stop),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=body.skip_special_tokens is not False,
        chat=isinstance(body, ChatBody),
    )


def _ask(
    body: ChatBody | CompletionBody,
    caller: Caller,
    card: ModelCard,
    tokens: tuple[int, ...],
    asked: int | None,
    default: int | None,
    controls: Controls,
    keeps: tuple[Keeping, ...] = (),
) -> Ask:
    """Of one prompt; its id is still to come."""
    if not tokens:
        raise BadField("the prompt is empty: it needs at least one token", _input_name(body))
    max_tokens = _room(len(tokens), asked, default, card)
    least = controls.sampling.min_tokens
    if least > max_tokens:
        over = f"min_tokens is {least}, over the {max_tokens} that may be made"
        raise BadField(over, "min_tokens")
    return Ask(
        request_id="",
        model=card.parent or card.id,
        adapter=card.adapter,
        tokens=tokens,
        max_tokens=max_tokens,
        sampling=controls.sampling,
        steering=controls.steering,
        session=caller.session,
        deadline_s=_deadline(body),
        slo_ttft_s=caller.slo_ttft_s,
        slo_tpot_s=caller.slo_tpot_s,
        tenant=caller.tenant,
        keeps=keeps,
    )


def _input_name(body: ChatBody | CompletionBody) -> str:
    return "messages" if isinstance(body, ChatBody) else "prompt"


def _room(prompt: int, asked: int | None, default: int | None, card: ModelCard) -> int:
    """Tokens that may be made: as asked if they fit, else the default or what the context holds."""
    if asked is not None and asked < 1:
        raise BadField(f"max_tokens must be at least 1, not {asked}", "max_tokens")
    rest = card.max_context - prompt
    wanted = asked if asked is not None else max(1, rest if default is None else min(default, rest))
    if wanted > rest:
        raise BadField(
            f"{card.id} has a context of {card.max_context} tokens; this request needs "
            f"{prompt + wanted} ({prompt} prompt + {wanted} output)",
            "max_tokens" if asked is not None and prompt < card.max_context else None,
            code="context_length_exceeded",
            next_step="shorten the prompt, or ask for fewer tokens",
        )
    return wanted


def _deadline(body: ChatBody | CompletionBody) -> float | None:
    seconds = body.kvasir.deadline_s if body.kvasir is not None else None
    if seconds is not None and not seconds > 0:
        raise BadField(f"deadline_s must be over 0 seconds, not {seconds}", "kvasir.deadline_s")
    return seconds


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(found):
        raise BadField("a stop string is empty", "stop")
    if len(found) > STOPS_MAX or any(len(one) > STOP_CHARS_MAX for one in found):
        limit = f"{STOPS_MAX} stop strings of {STOP_CHARS_MAX} characters"
        raise BadField(f"at most {limit} are supported", "stop")
    return found


def _prompts(prompt: str | list[int | str | list[int]]) -> list[str | tuple[int, ...]]:
    """OpenAI's four shapes: text, texts, token ids, lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(one, int) for one in prompt):
        return [tuple(prompt)]  # type: ignore[arg-type]
    if not prompt or len(prompt) > PROMPTS_MAX:
        raise BadField(f"prompt must hold 1 to {PROMPTS_MAX} prompts, not {len(prompt)}", "prompt")
    found: list[str | tuple[int, ...]] = []
    for one in prompt:
        if isinstance(one, int):
            raise BadField("prompt mixes token ids with whole prompts", "prompt")
        found.append(one if isinstance(one, str) else tuple(one))
    return found


# --- chat -----------------------------------------------------------------------------------------


TEMPLATE_RESERVED: Final = frozenset({"messages", "add_generation_prompt", "self"})


def _template_names(given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    for name in given or ():
        if name in TEMPLATE_RESERVED:
            raise BadField(f"chat_template_kwargs may not set {name}", "chat_template_kwargs")
    return given or {}


# --- headers --------------------------------------------------------------------------------------

ID_CHARS_MAX: Final = 128


def read_caller(headers: Sequence[tuple[bytes, bytes]], fresh_id: str) -> Caller:
    """What the headers say; an unusable id or session is as good as none. Raises RequestError."""
    found = {name: value for name, value in headers if name in _HEADERS}
    own = _printable(found.get(b"x-request-id"))
    length = found.get(b"content-length")
    return Caller(
        request_id=own or fresh_id,
        own_id=own is not None,
        session=_printable(found.get(b"x-session-affinity") or found.get(b"x-session-id")),
        slo_ttft_s=_milliseconds(found, b"x-slo-ttft-ms"),
        slo_tpot_s=_milliseconds(found, b"x-slo-tpot-ms"),
        body_bytes=int(length) if length is not None and length.isdigit() else None,
        expects=b"expect" in found,
        authorization=found[b"authorization"].decode("latin-1")
        if b"authorization" in found else None,
    )


_HEADERS: Final = frozenset({
    b"x-request-id", b"content-length", b"x-session-affinity", b"x-session-id",
    b"x-slo-ttft-ms", b"x-slo-tpot-ms", b"expect", b"authorization",
})  # fmt: skip


def _printable(raw: bytes | None) -> str | None:
    """At most 128 printable ASCII characters, or None."""
    if raw is None or not 0 < len(raw) <= ID_CHARS_MAX or not raw.isascii():
        return None
    text = raw.decode("ascii")
    return text if text.isprintable() else None


def _milliseconds(found: Mapping[bytes, bytes], name: bytes) -> float | None:
    raw = found.get(name)
    if raw is None:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        label = name.decode()
        raise BadField(f"the header {label} is no positive number of milliseconds", label)
    return value / 1e3
