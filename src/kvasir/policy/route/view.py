"""What a route policy may look at, and what it answers. The prose is the contract.

The conductor asks twice: once with `stage` "prefill", once with "decode" (at arrival or when
prefill ends, as the deployment says). It has already left out workers that are dead, draining, of
the wrong role or model, or whose free KV could not hold the request (NetKV's feasibility filter),
so a policy only ranks. Never empty. A policy that decides both phases at once names the decode
worker too when it is asked for "prefill"; the conductor then does not ask again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, Protocol

from xxhash import xxh3_64_intdigest

from kvasir.core.ids import BlockKey, RequestId, WorkerId
from kvasir.core.specs import RouteSpec
from kvasir.net.oracle import Arm

OUTPUT_TOKENS_MEAN: Final = 256  # expected output of any request, until lengths are measured
SESSION_SETS: Final = 256
SESSIONS_PER_SET: Final = 16


class WorkerView(Protocol):
    """One worker as the conductor knows it: own bookkeeping, plus the last beat where it is known.

    `mixed` workers take either phase. `requests` are dispatched here and not over. Of these,
    `prefilling` have prefill work left: `prefill_tokens` uncached tokens, `prefill_s` predicted
    seconds. `decoding` sequences it decodes or will decode; `batch_max` its bound on them.
    `context_tokens` KV tokens they hold. `blocks_reserved` of `blocks_total`. `iteration_s`
    measured by the worker; None is unknown.
    """

    @property
    def id(self) -> WorkerId: ...
    @property
    def mixed(self) -> bool: ...
    @property
    def requests(self) -> int: ...
    @property
    def prefilling(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def decoding(self) -> int: ...
    @property
    def batch_max(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def blocks_reserved(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def iteration_s(self) -> float | None: ...

    def predict_prefill(self, tokens: int, cached: int) -> float: ...
    def predict_iteration(self, decoding: int, context_tokens: int) -> float: ...


class Transfer(NamedTuple):
    """The oracle's answer: seconds, and where it comes from."""

    seconds: float
    source: str


class RouteView(Protocol):
    """`hits[worker]` leading blocks cached there. `source` prefill worker (stage decode), or "".

    `decoders` at stage prefill: decode workers with room, for policies that name both; may be
    empty. `keys` of the prompt's full blocks. `seed` of the deployment and `attempt` make `draw`
    what randomness there is. `fetches`: a prefill worker can take a prefix from a peer.
    `blocks_cached(worker)` blocks of anybody that stand in its cache.

    `transfer(target)` is the predicted time to ship what `target` lacks from `source`; zero when
    they are the same. Another `source`, a number of `blocks` and an oracle `arm` may be given.
    `prefill_ahead_s` seconds of prefill still to come, which can hide a transfer.
    """

    @property
    def stage(self) -> Literal["prefill", "decode"]: ...
    @property
    def request_id(self) -> RequestId: ...
    @property
    def attempt(self) -> int: ...
    @property
    def session(self) -> str | None: ...
    @property
    def keys(self) -> Sequence[BlockKey]: ...
    @property
    def seed(self) -> int: ...
    @property
    def fetches(self) -> bool: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def candidates(self) -> Sequence[WorkerView]: ...
    @property
    def decoders(self) -> Sequence[WorkerView]: ...
    @property
    def hits(self) -> dict[WorkerId, int]: ...
    @property
    def source(self) -> WorkerId: ...
    @property
    def prefill_ahead_s(self) -> float: ...
    @property
    def spec(self) -> RouteSpec: ...

    def blocks_cached(self, worker: WorkerId) -> int: ...
    def transfer(
        self, target: WorkerId, source: WorkerId = "", blocks: int | None = None,
        arm: Arm | None = None,
    ) -> Transfer: ...  # fmt: skip


class Pin(NamedTuple):
    """A session's worker for one stage."""

    session: str
    worker: WorkerId


class RouteMemory(NamedTuple):
    """What a policy must remember: round robin's turns, and which worker serves a session.

    `sessions` is a small set-associative cache: a hash picks the set, each holds its latest 16 pins
    (most recent last), so it is bounded and a change copies one set.
    """

    prefill_turn: int = 0
    decode_turn: int = 0
    sessions: tuple[tuple[Pin, ...], ...] = ((),) * SESSION_SETS


class Choice(NamedTuple):
    """`estimate_s` is the transfer that the choice counted on. `decode` at stage prefill: the
    decode worker too; the same one named twice runs both phases. `fetch_blocks` leading blocks are
    to come from the cache of `fetch_from` before prefill."""

    worker: WorkerId
    why: str
    estimate_s: float = 0.0
    decode: WorkerId = ""
    fetch_from: WorkerId = ""
    fetch_blocks: int = 0


Route = Callable[[RouteView, RouteMemory], tuple[Choice, RouteMemory]]


def cached_tokens(view: RouteView, worker: WorkerView) -> int:
    """Prompt tokens that `worker` need not compute; the last one is always computed."""
    hit = view.hits.get(worker.id, 0) * view.block_size
    return min(hit, max(view.input_tokens - 1, 0))


def prefill_left_s(view: RouteView, worker: WorkerView) -> float:
    """Seconds until this request's prefill would be done on `worker`: its queue, then itself."""
    return worker.prefill_s + worker.predict_prefill(
        view.input_tokens, cached_tokens(view, worker)
    )


def draw(view: RouteView, salt: str = "") -> int:
    """64 uniform bits of (seed, request, attempt, stage, salt): the same wherever it is asked."""
    text = f"{view.request_id} {view.attempt} {view.stage} {salt}"
    return xxh3_64_intdigest(text.encode(), seed=view.seed & 0xFFFFFFFFFFFFFFFF)
