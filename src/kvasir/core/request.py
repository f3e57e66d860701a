"""One request, as the scheduler sees it: ids, lengths and keys, never text or tokens.

Token ids live at the gateway (prompt and emitted ones) and in the runner of the worker that serves.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvasir.core.ids import BlockKey, NodeId, RequestId, TenantId


class Slo(msgspec.Struct, frozen=True, gc=False):
    """A request is good iff TTFT <= ttft_s and TPOT <= tpot_s jointly (and p99 ITL, if given)."""

    ttft_s: float
    tpot_s: float
    itl_p99_s: float | None = None


class Sampling(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How the next token is drawn. Greedy at temperature 0. Seeds count by (seed, position).

    `top_k` 0: all tokens. Penalties as OpenAI (presence, frequency: over the output) and
    arXiv 1909.05858 (repetition: over prompt and output) define them. No stop token is drawn
    before `min_tokens` are. `logprobs`: so many likeliest tokens are told beside each drawn one's
    log-probability; None: nothing is. `single_step`: the engine is not asked for runs of steps.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    logprobs: int | None = None
    single_step: bool = False


class Grammar(msgspec.Struct, frozen=True, gc=False):
    """What an answer must match from its first token to its last. `text`: a JSON schema as JSON, a
    regular expression (Rust's dialect), or a grammar in Lark's notation (or GBNF)."""

    kind: Literal["json", "regex", "lark"]
    text: str


class Steering(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a client wants of the tokens themselves. Like token ids it is for processes, not nodes:
    it travels with `Prompt`, and no journal holds it. `logit_bias`: (token id, what is added)."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None


class Adapter(msgspec.Struct, frozen=True, gc=False):
    """A LoRA adapter of a model. `digest` names the content of its files, so a name may come to
    stand for others; block keys are salted with it. Like token ids, `path` is for processes."""

    name: str
    path: str
    digest: str


class Request(msgspec.Struct, frozen=True, gc=False):
    """What admission and routing may look at.

    `prompt_tokens` and `max_tokens` count tokens; `keys` name the prompt's full blocks in order.
    `model` is the base, `adapter` the name of what runs on it; `salt` tells adapters apart by
    content. `band` is a priority, 0 the most urgent. `arrival_s` is on the clock of its gateway.
    """

    id: RequestId
    model: str
    prompt_tokens: int
    max_tokens: int
    keys: tuple[BlockKey, ...] = ()
    gateway: NodeId = "gateway-0"
    version: str = ""
    adapter: str | None = None
    tenant: TenantId = "default"
    salt: bytes = b""
    band: int = 1
    session: str | None = None
    arrival_s: float = 0.0
    deadline_s: float | None = None
    slo: Slo | None = None
    sampling: Sampling = Sampling()

    @property
    def total_tokens_max(self) -> int:
        return self.prompt_tokens + self.max_tokens
