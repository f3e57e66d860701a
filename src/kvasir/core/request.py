"""One request, as the scheduler sees it: ids, lengths and keys, never text or tokens.

Token ids live at the gateway (prompt and emitted ones) and in the runner of the worker that serves.
"""

from __future__ import annotations

import msgspec

from kvasir.core.ids import BlockKey, NodeId, RequestId, TenantId


class Slo(msgspec.Struct, frozen=True, gc=False):
    """A request is good iff TTFT <= ttft_s and TPOT <= tpot_s jointly (and p99 ITL, if given)."""

    ttft_s: float
    tpot_s: float
    itl_p99_s: float | None = None


class Sampling(msgspec.Struct, frozen=True, gc=False):
    """How the next token is drawn. Greedy at temperature 0. Seeds count by (seed, position)."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


class Request(msgspec.Struct, frozen=True, gc=False):
    """What admission and routing may look at.

    `prompt_tokens` and `max_tokens` count tokens; `keys` name the prompt's full blocks in order.
    `band` is a priority, 0 the most urgent. `arrival_s` is on the clock of its gateway.
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
