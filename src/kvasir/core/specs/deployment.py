"""`kvasir.yaml`: models, hardware, topology, pools, policy, slo, transport, limits, workload,
faults."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.specs.base import Spec, wrong
from kvasir.core.specs.codec import CodecSpec
from kvasir.core.specs.copies import CopiesSpec
from kvasir.core.specs.endpoints import Endpoint, check_endpoints
from kvasir.core.specs.faults import FaultSpec
from kvasir.core.specs.hardware import HARDWARE, HardwareSpec
from kvasir.core.specs.model import ModelShape
from kvasir.core.specs.slo import SloSpec
from kvasir.core.specs.speculate import SpeculateSpec
from kvasir.core.specs.tenants import CachesSpec, TenantSpec, check_tenants
from kvasir.core.specs.tiers import TiersSpec
from kvasir.core.specs.topology import TopologySpec
from kvasir.core.specs.workload import WorkloadSpec

Role = Literal["prefill", "decode", "mixed"]
TransportKind = Literal["auto", "shm", "nixl", "mooncake", "tcp"]
TransferMode = Literal["streamed", "serial", "pull"]
CurvePoint = tuple[Annotated[int, Field(gt=0)], Annotated[float, Field(ge=0)]]


class ModelSpec(Spec):
    """A served model. `shape`: a bundled name or sizes; `path`: a HuggingFace folder.

    `fake_kv`: engine fake holds and moves as many KV bytes a token as the shape says, in place of
    32, so that links are loaded as the model would load them. `reasoning_parser: think`: chat
    answers may begin with <think> ... </think>, which is told apart as `reasoning_content`.
    `adapters`: LoRA adapters (PEFT folders) by the name that a client asks for as `model`; at most
    `adapters_max` at a time. With `allow_runtime_adapters` more are loaded and unloaded over HTTP,
    from inside `adapters_folder`. `speculate`: guess tokens ahead; null guesses nothing.
    Engine torch computes in `dtype` (auto: the one that the folder's config names), keeps linear
    layers in 8 or 4 bits (`weights`) and KV in one byte a value (`kv`).
    """

    name: str
    path: str | None = None
    shape: str | ModelShape | None = None
    version: str = ""
    max_context: int | None = Field(default=None, gt=0)
    fake_kv: bool = False
    reasoning_parser: Literal["think"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["plain", "int8", "int4"] = "plain"
    kv: Literal["int8", "fp8"] | None = None
    adapters: dict[str, str] = Field(default_factory=dict)
    adapters_max: int = Field(default=8, gt=0)
    adapters_folder: str | None = None
    allow_runtime_adapters: bool = False
    speculate: SpeculateSpec | None = None

    @property
    def kv_name(self) -> str:
        """Whose KV it is and in what form, as block keys are salted with it: name and version, and
        what is not the default of what changes its values."""
        form = ("dtype", "auto"), ("weights", "plain"), ("kv", None)
        other = [f"/{name}={getattr(self, name)}" for name, usual in form
                 if getattr(self, name) != usual]  # fmt: skip
        return f"{self.name}@{self.version}{''.join(other)}"

    @model_validator(mode="after")
    def _adapters_fit(self) -> ModelSpec:
        if len(self.adapters) > self.adapters_max:
            what = f"{len(self.adapters)} adapters, but adapters_max is {self.adapters_max}"
            raise wrong(what, "adapters")
        if not all(self.adapters):
            raise wrong("an adapter needs a name", "adapters")
        if self.allow_runtime_adapters and self.adapters_folder is None:
            what = "needs adapters_folder: nothing outside of it is loaded"
            raise wrong(what, "allow_runtime_adapters")
        return self


class FittedCost(Spec):
    """Step time from measured constants, seconds (`kvasir measure engine` fits them).

    step = overhead + per_token * new tokens + curve(new tokens) + per_row * sequences
           + per_attention * sum over prompts (new * context)
           + per_prompt_context * sum over prompts (positions held afterwards)
           + per_context * sum over decoding sequences (context)

    `curve`: pairs of new tokens and seconds, for engines whose time is not a line in them; straight
    between two pairs, constant before the first, on at the last slope after the last.
    """

    overhead_s: float = Field(default=0.002, ge=0)
    per_token_s: float = Field(default=20e-6, ge=0)
    per_attention_s: float = Field(default=0.0, ge=0)
    per_context_s: float = Field(default=0.0, ge=0)
    per_row_s: float = Field(default=0.0, ge=0)
    per_prompt_context_s: float = Field(default=0.0, ge=0)
    curve: tuple[CurvePoint, ...] = ()

    @field_validator("curve")
    @classmethod
    def _grows(cls, curve: tuple[CurvePoint, ...]) -> tuple[CurvePoint, ...]:
        for before, after in pairwise(curve):
            if after[0] <= before[0] or after[1] < before[1]:
                raise ValueError(f"curve: {list(after)} after {list(before)}; both must grow")
        return curve


class MeasuredCost(Spec):
    """Step time from measured tables of kernels (`cost: measured`), and how the weights are kept.

    `system` names the tables; empty: those of the pool's hardware. Formats are the tables' own
    names: `bfloat16`, `fp8`, `fp8_block`, `nvfp4`, ...; `moe` empty: as `gemm`. `ep`: experts are
    divided among that many accelerators, each whole. `dp`: attention is copied that often, each
    copy on tp / dp accelerators with its share of the sequences. `asynchronous`: the host
    prepares the next step while one runs.
    """

    kind: Literal["measured"] = "measured"
    system: str = ""
    gemm: str = "bfloat16"
    moe: str = ""
    kv: Literal["bfloat16", "fp8"] = "bfloat16"
    ep: int = Field(default=1, gt=0)
    dp: int = Field(default=1, gt=0)
    asynchronous: bool = True


class ProfileCost(Spec):
    """Step time from a profile of whole iterations (`cost: splitwise`, `cost: distserve`).

    `source` names who published it; the pool's model, hardware and tp choose the profile. Without
    one, `prefill` are pairs of a batch's new tokens and seconds, `decode` of its sequences and
    seconds: straight between two pairs, on at the outer slopes. A step with prompts and decoding
    sequences takes `mixed` times what all its tokens would take as prompts (1.1: Splitwise's
    figure; DistServe's fits have no such factor).
    """

    kind: Literal["profile"] = "profile"
    source: Literal["splitwise", "distserve"] | None = None
    prefill: tuple[CurvePoint, ...] = ()
    decode: tuple[CurvePoint, ...] = ()
    mixed: float = Field(default=1.1, ge=1)

    @field_validator("prefill", "decode")
    @classmethod
    def _takes_time(cls, curve: tuple[CurvePoint, ...]) -> tuple[CurvePoint, ...]:
        if not curve:
            return curve
        if len(curve) < 2 or any(b[0] <= a[0] for a, b in pairwise(curve)):
            raise ValueError("give two pairs or more, by growing count")
        (x, y), (x2, y2) = curve[:2]
        falls = curve[-1][1] < curve[-2][1]
        if falls or any(s <= 0 for _, s in curve) or y - (y2 - y) / (x2 - x) * (x - 1) <= 0:
            raise ValueError("a step would take no time: seconds at 1 and beyond the last pair")
        return curve

    @model_validator(mode="after")
    def _one_profile(self) -> ProfileCost:
        curves = bool(self.prefill), bool(self.decode)
        if any(curves) if self.source else not all(curves):
            raise ValueError("give either `source`, or both `prefill` and `decode`")
        return self


def _cost_class(value: object) -> str:
    """Which cost is meant, by `kind` or by its keys; so that a wrong key is told of one cost."""
    if not isinstance(value, dict):
        return type(value).__name__
    kinds: tuple[type[Spec], ...] = (FittedCost, MeasuredCost, ProfileCost)
    for cost in kinds[1:]:
        if value.get("kind") == cost.model_fields["kind"].default:
            return cost.__name__
    return max(kinds, key=lambda cost: len(value.keys() & cost.model_fields.keys())).__name__


Cost = Annotated[
    Annotated[FittedCost, Tag("FittedCost")]
    | Annotated[MeasuredCost, Tag("MeasuredCost")]
    | Annotated[ProfileCost, Tag("ProfileCost")],
    Discriminator(_cost_class),
]


class PoolSpec(Spec):
    """`count` equal instances of `tp` x `pp` accelerators. `racks` or `nodes` (by the topology's
    names: `node-0`, or those that it lists) limit where they may stand. `kv_events`: they tell what
    they have cached; without, the conductor guesses. `tiers`: where KV goes when the device is
    full; null forgets it."""

    name: str
    role: Role
    count: int = Field(gt=0)
    model: str = ""
    hardware: str = "h100"
    tp: int = Field(default=1, gt=0)
    pp: int = Field(default=1, gt=0)
    racks: tuple[int, ...] | None = None
    nodes: tuple[str, ...] | None = None
    batch_max: int = Field(default=256, gt=0)
    batch_tokens_max: int = Field(default=8192, gt=0)
    waiting_max: int = Field(default=4096, gt=0)
    kv_blocks: int | None = Field(default=None, gt=0)
    memory_fraction: float = Field(default=0.9, gt=0, le=1)
    kv_events: bool = True
    tiers: TiersSpec | None = None
    cost: Cost | None = None

    @field_validator("cost", mode="before")
    @classmethod
    def _cost_by_name(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in ("measured", "splitwise", "distserve"):
            raise ValueError("by name there are measured, splitwise and distserve")
        return MeasuredCost() if value == "measured" else {"source": value}

    @model_validator(mode="after")
    def _one_limit(self) -> PoolSpec:
        if self.racks is not None and self.nodes is not None:
            raise wrong("give racks or nodes, not both", "nodes")
        return self

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def worker_ids(self) -> Iterator[str]:
        return (f"{self.name}-{i}" for i in range(self.count))


class RouteSpec(Spec):
    """Which worker. Weights and switches of the route policies; a policy uses those it knows.

    `balance_abs` requests and `balance_ratio`: a gap in load beyond which cache no longer counts
    (SGLang, Preble). `prefix_ratio`: how much longer the best prefix must be to be fetched
    (Mooncake). `cache_threshold` share of a prompt that makes a match (SGLang). `temperature` 0
    takes the best (Dynamo). `queue_tokens_max` of a prompt queue (Splitwise). `hash_blocks` leading
    blocks name a prompt, `load_bound` times the mean load is full (consistent hashing, sessions).
    `fetch_prefix`: a prefill worker may take a prefix from a peer's cache (Mooncake, netkv_joint).
    `fallback`: the policy behind `session`. `stay_weight`: what a second taken from sequences that
    decode counts for (netkv_joint).
    """

    name: str = "netkv"
    cache_weight: float = Field(default=1.0, ge=0)
    load_weight: float = Field(default=1.0, ge=0)
    kv_weight: float = Field(default=1.0, ge=0)
    balance_abs: int = Field(default=64, ge=0)
    balance_ratio: float = Field(default=1.5, ge=1)
    prefix_ratio: float = Field(default=1.5, ge=1)
    fetch_prefix: bool = True
    cache_threshold: float = Field(default=0.3, ge=0, le=1)
    temperature: float = Field(default=0.0, ge=0)
    queue_tokens_max: int = Field(default=8192, gt=0)
    hash_blocks: int = Field(default=4, gt=0)
    load_bound: float = Field(default=1.25, ge=1)
    fallback: str = "cache_load"
    stay_weight: float = Field(default=1.0, ge=0)
    oracle: Literal["static", "self", "tier", "path", "exact_maxmin"] = "tier"
    cost: Literal["serial", "overlap", "streamed"] = "serial"
    decode_choice: Literal["arrival", "prefill_end"] = "arrival"
    local_prefill_tokens: int = Field(default=0, ge=0)
    output_reserve_tokens: int = Field(default=512, ge=0)

    @model_validator(mode="after")
    def _falls_back(self) -> RouteSpec:
        if self.fallback == "session":
            raise ValueError("fallback: session cannot fall back to itself")
        return self


class BatchSpec(Spec):
    """How a worker fills a step. `chunk_tokens` caps one prompt's share of it."""

    name: str = "token_budget"
    chunk_tokens: int = Field(default=8192, gt=0)
    steps_max: int = Field(default=256, gt=0)


class PolicySpec(Spec):
    route: RouteSpec = RouteSpec()
    batch: BatchSpec = BatchSpec()
    admit: str = "bounded"
    evict: str = "lru"
    copies: CopiesSpec = CopiesSpec()


class TransportSpec(Spec):
    """How KV bytes travel. `bytes_per_s_max` throttles each sender (None: not at all).

    `kind`: `shm` on one host, `tcp` anywhere, `nixl` and `mooncake` where these are installed; with
    `auto` each pair of workers uses what both can do, see `transfer/choice.py`.

    `mode`: `streamed` sends layer by layer while prefill computes, `serial` when it is over, `pull`
    too, and only when the decode side asks under DistServe's rule; it needs `decode_choice:
    prefill_end`. A prompt of less than `serial_tokens` is sent serially in any mode (Splitwise: 512
    on H100), as a copy per layer costs more than it hides. See `policy/handover.py`.

    `streams`: TCP connections for a pair of workers, each with a thread at both ends; layers are
    dealt out among them. For networks faster than one core copies (`transfer/stripes.py`).

    `codec`: fewer bytes on slow links. It needs a `kind` whose bytes travel on a stream: `tcp`, or
    `auto`, which then leaves alone what goes another way.
    """

    kind: TransportKind = "shm"
    mode: TransferMode = "streamed"
    serial_tokens: int = Field(default=0, ge=0)
    bytes_per_s_max: float | None = Field(default=None, gt=0)
    frame_bytes_max: int = Field(default=4 * 1024 * 1024, gt=0)
    streams: int = Field(default=1, ge=1, le=64)
    codec: CodecSpec = CodecSpec()

    @model_validator(mode="after")
    def _codes_streams(self) -> TransportSpec:
        if self.streams > 1 and (self.kind != "tcp" or self.codec.kind != "off"):
            raise wrong("several streams are for kind tcp without a codec", "streams")
        if self.codec.kind != "off" and self.kind not in ("tcp", "auto"):
            raise wrong(f"{self.kind} sends KV as it is: a codec needs kind tcp or auto", "kind")
        return self


class LimitsSpec(Spec):
    """Every queue, wait and retry has its bound here. Seconds unless the name says otherwise.

    `index_blocks_max`: distinct blocks in the prefix index, about 130 bytes each; it knows nothing
    of those beyond. `drain_s`: how long a worker that gets SIGTERM may take to leave; what runs
    there then goes on elsewhere. `guess_ttl_s`: how long a prompt is taken to be cached where it
    was sent, of workers that send no KV events.
    """

    queue_max: int = Field(default=4096, gt=0)
    attempts_max: int = Field(default=8, gt=0)
    beat_s: float = Field(default=1.0, gt=0)
    dead_after_s: float = Field(default=5.0, gt=0)
    grace_s: float = Field(default=3.0, gt=0)
    prompt_wait_s: float = Field(default=10.0, gt=0)
    deaths_max: int = Field(default=3, gt=0)
    kv_wait_s: float = Field(default=120.0, gt=0)
    lease_s: float = Field(default=120.0, gt=0)
    queue_wait_s: float = Field(default=600.0, gt=0)
    index_blocks_max: int = Field(default=1 << 24, gt=0)
    guess_ttl_s: float = Field(default=120.0, gt=0)
    drain_s: float = Field(default=30.0, gt=0)
    body_bytes_max: int = Field(default=8 * 1024 * 1024, gt=0)
    message_bytes_max: int = Field(default=64 * 1024 * 1024, gt=0)


class HostSpec(Spec):
    """What hosts add to a request, for the simulator: a live cluster has its own.

    `request_s`: from a client's send to the gateway's first decision and from its first token back
    to the client, together: HTTP, parsing, tokenising, the event's write and read. `bench/twin.py`
    measures it. What a host adds to each step is `overhead_s` of the pool's cost.
    """

    request_s: float = Field(default=0.0, ge=0)


class Deployment(Spec):
    """One file for everything. Validated whole before anything starts, then frozen.

    `endpoints`, by worker or `main`: where processes are that do not all stand on one host.
    `tenants`: who may ask, by API key; none: anybody may, as one tenant.
    """

    name: str = "deployment"
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    hardware: tuple[HardwareSpec, ...] = ()
    topology: TopologySpec = TopologySpec()
    pools: tuple[PoolSpec, ...] = Field(min_length=1)
    policy: PolicySpec = PolicySpec()
    slo: SloSpec = SloSpec()
    transport: TransportSpec = TransportSpec()
    limits: LimitsSpec = LimitsSpec()
    host: HostSpec = HostSpec()
    workload: WorkloadSpec = WorkloadSpec()
    caches: CachesSpec = CachesSpec()
    tenants: tuple[TenantSpec, ...] = ()
    faults: FaultSpec | None = None
    endpoints: dict[str, Endpoint] = Field(default_factory=dict)
    engine: Literal["torch", "fake"] = "torch"
    block_size: int = Field(default=16, gt=0)
    first_token: Literal["prefill", "decode"] = "prefill"
    seed: int = 0

    @model_validator(mode="after")
    def _names_resolve(self) -> Deployment:
        names = [p.name for p in self.pools]
        if len(set(names)) != len(names):
            raise ValueError(f"pools: the names {names} are not distinct")
        for pool in self.pools:
            self.hardware_of(pool)
            self.model_of(pool)
        self._distinct_models()
        roles = {p.role for p in self.pools}
        if roles in ({"prefill"}, {"decode"}):
            raise ValueError(f"pools: only {roles.pop()} workers; add the other role, or use mixed")
        if self.transport.mode == "pull" and self.policy.route.decode_choice != "prefill_end":
            what = "pull chooses the decode worker after prefill: needs decode_choice: prefill_end"
            raise wrong(what, "transport", "mode")
        check_tenants(self.tenants)
        check_endpoints(self.endpoints, self.worker_ids(), self.transport.kind)
        return self

    def _distinct_models(self) -> None:
        """What a client may ask for as `model` is one thing each."""
        seen: set[str] = set()
        for i, model in enumerate(self.models):
            for name in (model.name, *model.adapters):
                if name in seen:
                    path = ("name",) if name == model.name else ("adapters", name)
                    raise wrong(f"{name!r} is the name of two models", "models", i, *path)
                seen.add(name)

    def hardware_of(self, pool: PoolSpec) -> HardwareSpec:
        own = {h.name: h for h in self.hardware}
        found = own.get(pool.hardware) or HARDWARE.get(pool.hardware)
        if found is None:
            near = nearest(pool.hardware, [*own, *HARDWARE])
            raise ValueError(
                f"pools.{pool.name}: hardware {pool.hardware!r} unknown; nearest: {near}"
            )
        return found

    def model_of(self, pool: PoolSpec) -> ModelSpec:
        """The pool's model; the first one when the pool names none."""
        if not pool.model:
            return self.models[0]
        for model in self.models:
            if model.name == pool.model:
                return model
        near = nearest(pool.model, [m.name for m in self.models])
        raise ValueError(f"pools.{pool.name}: model {pool.model!r} unknown; nearest: {near}")

    def pool_of(self, worker: str) -> PoolSpec:
        for pool in self.pools:
            if worker in pool.worker_ids():
                return pool
        raise ConfigError(
            f"no pool has a worker {worker!r}",
            nearest=nearest(worker, [w for p in self.pools for w in p.worker_ids()]),
        )

    def worker_ids(self) -> list[str]:
        return [w for pool in self.pools for w in pool.worker_ids()]
