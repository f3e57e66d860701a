"""The shapes of OpenAI's protocol on the wire, in and out. Knows types; no rule, no desk, no text.

Unknown fields are ignored, as OpenAI's servers do. A field of the wrong type is a RequestError that
names it. `unsupported` lists known fields that would change the answer and are not served yet.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

import msgspec

from kvasir.core.errors import RequestError

# --- in -------------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Extension(msgspec.Struct):
    """The body's own `kvasir` block. Seconds."""

    timing: bool = False
    deadline_s: float | None = None


class Common(msgspec.Struct):
    """What chat and plain completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    kvasir: Extension | None = None
    n: int | None = None
    min_tokens: int | None = None
    logprobs: bool | int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    best_of: int | None = None
    echo: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    cache: str | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None


class ChatBody(Common):
    messages: list[dict[str, Any]] = []
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None


class CompletionBody(Common):
    prompt: str | list[int | str | list[int]] = ""
    suffix: str | None = None


class LoadBody(msgspec.Struct):
    """vLLM's; `base_model_name` where several models take adapters."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadBody(msgspec.Struct):
    lora_name: str


class DrainBody(msgspec.Struct):
    within_s: float = 30.0


class CacheBody(msgspec.Struct):
    """`ttl` in seconds. Either `messages` or `prompt`."""

    model: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    ttl: float | None = None
    name: str | None = None
    metadata: dict[str, str] | None = None
    tools: list[Any] | None = None


class TtlBody(msgspec.Struct):
    """Seconds from now; the deployment's default without."""

    ttl: float | None = None


Body = TypeVar(
    "Body", ChatBody, CompletionBody, LoadBody, UnloadBody, DrainBody, CacheBody, TtlBody
)
DRAIN_S_MAX: Final = 86_400.0

# Field -> values at which it changes nothing, so that leaving it out of the work is no lie.
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
}
_CHECKED: Final = {
    shape: tuple((name, NEUTRAL[name]) for name in shape.__struct_fields__ if name in NEUTRAL)
    for shape in (ChatBody, CompletionBody)
}


def unsupported(body: ChatBody | CompletionBody) -> str | None:
    """The first field that asks for something that is not served, or None."""
    for name, neutral in _CHECKED[type(body)]:
        value = getattr(body, name)
        if value is not None and value not in neutral:
            return name
    return None


_chat_decoder: Final = msgspec.json.Decoder(ChatBody)
_completion_decoder: Final = msgspec.json.Decoder(CompletionBody)


def decode_chat(raw: bytes) -> ChatBody:
    """Raises RequestError."""
    return _decode(_chat_decoder, raw)


def decode_completion(raw: bytes) -> CompletionBody:
    """Raises RequestError."""
    return _decode(_completion_decoder, raw)


def decode_load(raw: bytes) -> LoadBody:
    """Raises RequestError."""
    return _decode(msgspec.json.Decoder(LoadBody), raw)


def decode_unload(raw: bytes) -> UnloadBody:
    """Raises RequestError."""
    return _decode(msgspec.json.Decoder(UnloadBody), raw)


def decode_drain(raw: bytes) -> DrainBody:
    """Raises RequestError."""
    body = _decode(msgspec.json.Decoder(DrainBody), raw or b"{}")
    if not 0 < body.within_s <= DRAIN_S_MAX:
        what = f"within_s must be over 0 and at most {DRAIN_S_MAX:g}, not {body.within_s:g}"
        raise BadField(what, "within_s")
    return body


def decode_cache(raw: bytes) -> CacheBody:
    """Raises RequestError."""
    return _decode(msgspec.json.Decoder(CacheBody), raw)


def decode_ttl(raw: bytes) -> TtlBody:
    """Raises RequestError."""
    return _decode(msgspec.json.Decoder(TtlBody), raw)


def _decode(decoder: msgspec.json.Decoder[Body], raw: bytes) -> Body:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        what, param = _explained(str(error))
        raise BadField(what, param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            f"the body is no JSON: {error}", next_step="send one JSON object in UTF-8"
        ) from None


_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>[^`]*)`")


def _explained(message: str) -> tuple[str, str | None]:
    """msgspec's words and path -> a sentence and the field's name as OpenAI's `param`."""
    missing = _MISSING.search(message)
    if missing:
        return f"{missing['name']} is required", missing["name"]
    found = _AT.match(message)
    path = (found["path"] or "").lstrip(".") if found else ""
    what = (found["what"] if found else message).lower()
    return (f"{path}: {what}", path) if path else (what, None)


class BadField(RequestError):
    """A body's field is wrong; `param` names it, `code` is OpenAI's word for it, if it has one."""

    def __init__(
        self, what: str, param: str | None, *, code: str | None = None, next_step: str = ""
    ) -> None:
        super().__init__(what, next_step=next_step)
        self.param, self.code = param, code


# --- out ------------------------------------------------------------------------------------------


class Cached(msgspec.Struct):
    cached_tokens: int


class Reasoned(msgspec.Struct):
    reasoning_tokens: int


class Created(msgspec.Struct):
    """Tokens that were written, by how long they are kept (Anthropic's names)."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class Usage(msgspec.Struct):
    """The last three with cache markers only, and parts of `prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached
    completion_tokens_details: Reasoned | msgspec.UnsetType = msgspec.UNSET
    cache_creation_input_tokens: int | msgspec.UnsetType = msgspec.UNSET
    cache_read_input_tokens: int | msgspec.UnsetType = msgspec.UNSET
    cache_creation: Created | msgspec.UnsetType = msgspec.UNSET


class Workers(msgspec.Struct):
    prefill: str
    decode: str


class Timing(msgspec.Struct):
    """Where a request's time went. Seconds, bytes; None is unknown. `codec`: the form in which KV
    was sent, empty for the bytes as they are."""

    path: str
    workers: Workers
    attempts: int
    queue_s: float
    prefill_s: float | None
    transfer_s: float | None
    first_step_s: float | None
    ttft_s: float | None
    second_token_delay_s: float | None
    bytes: int
    transport: str
    codec: str


class TopLogprob(msgspec.Struct):
    """`bytes`: of a token that is no whole text, `token` shows them as `\\x..`."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Columns, one row a token. `text_offset`: where in `text` a token's first character is."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class ChatMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatAnswer(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    kvasir: Timing | list[Timing] | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


class CompletionAnswer(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: str = "text_completion"
    kvasir: Timing | list[Timing] | msgspec.UnsetType = msgspec.UNSET
