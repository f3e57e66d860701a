"""Nodes from a deployment: one configuration for a live process, the simulator and a replay."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.core.codec import RAW, CodecRules, Offer
from kvasir.core.errors import ConfigError
from kvasir.core.ids import Incarnation, NodeId, WorkerId
from kvasir.core.message import Tier
from kvasir.core.messages import Capacity, Location
from kvasir.core.specs import Deployment, PoolSpec
from kvasir.core.specs.tiers import ClusterTier, HostTier
from kvasir.cost.catalog import shape_of
from kvasir.cost.codec import DTYPE_BYTES, KNOWN, ratio_of
from kvasir.cost.pools import capacity_of, step_model
from kvasir.cost.step import StepModel
from kvasir.node.config import WorkerConfig
from kvasir.node.request import Requests
from kvasir.policy.codec import allowed
from kvasir.policy.speculate import Drafting
from kvasir.policy.tiers import PrefillCost, TierRule, TierRules

COST_TOKENS = (512, 2048)  # prompts at which a model of steps is asked
COST_CONTEXT = 4096


def worker_config(
    deployment: Deployment,
    worker: WorkerId,
    incarnation: Incarnation,
    location: Location,
    *,
    fingerprint: str = "",
    capacity: Capacity | None = None,
    offers: Sequence[Offer] = (),
) -> WorkerConfig:
    """`capacity` replaces the computed one when an engine has measured its own, `offers` the
    catalogue's ways to code KV when they were measured here. Raises ConfigError for a tier without
    room for a block, or KV that has no coded form."""
    pool = deployment.pool_of(worker)
    capacity = capacity or capacity_of(deployment, pool)
    limits, batch = deployment.limits, deployment.policy.batch
    guess = deployment.model_of(pool).speculate
    copies = deployment.policy.copies
    return WorkerConfig(
        worker=worker,
        incarnation=incarnation,
        roles=(pool.role,),
        model=deployment.model_of(pool).name,
        fingerprint=fingerprint,
        capacity=capacity,
        location=location,
        pool=pool.name,
        kv_events=pool.kv_events,
        batch=batch.name,
        evict=deployment.policy.evict,
        weights=tuple((t.name, t.cache_weight) for t in deployment.tenants if t.cache_weight != 1),
        chunk_tokens=batch.chunk_tokens,
        steps_max=batch.steps_max,
        waiting_max=pool.waiting_max,
        transfer=deployment.transport.mode,
        serial_tokens=deployment.transport.serial_tokens,
        beat_s=limits.beat_s,
        prompt_wait_s=limits.prompt_wait_s,
        kv_wait_s=limits.kv_wait_s,
        lease_s=limits.lease_s,
        pinned_share_max=deployment.caches.pool_share_max,
        speculate=Drafting(guess.tokens, guess.rows_max) if guess is not None else None,
        tiers=_tier_rules(deployment, pool, capacity),
        codec=_codec_rules(deployment, pool, offers),
        copies_share_max=copies.pool_share_max if copies.any else 0.0,
        tells_answers=copies.next_turn or copies.leaving,
    )


def _codec_rules(
    deployment: Deployment, pool: PoolSpec, offers: Sequence[Offer]
) -> CodecRules | None:
    transport = deployment.transport
    if transport.codec.kind == "off":
        return None
    model, dtype = deployment.model_of(pool), shape_of(deployment.model_of(pool)).dtype
    if not offers and dtype not in DTYPE_BYTES:
        raise ConfigError(f"no codec for KV of {dtype}", where=f"models.{model.name}")
    offers = offers or [
        Offer(name, known.loss, ratio_of(name, dtype), known.encode_bytes_s, known.decode_bytes_s)
        for name, known in KNOWN.items()
    ]
    ways = allowed(offers, transport.codec.kind, transport.codec.level_max)
    return CodecRules(
        tuple(way for way in ways if way.name != RAW), transport.bytes_per_s_max,
        deployment.slo.ttft_s,
    )  # fmt: skip


def _tier_rules(deployment: Deployment, pool: PoolSpec, capacity: Capacity) -> TierRules | None:
    if pool.tiers is None:
        return None
    hardware = deployment.hardware_of(pool)
    share = hardware.bandwidth_efficiency * pool.gpus
    sheet: tuple[tuple[Tier, HostTier | ClusterTier | None, float], ...] = (
        ("host", pool.tiers.host, hardware.host_bandwidth * share),
        ("disk", pool.tiers.disk, hardware.disk_bandwidth * share),
        ("cluster", pool.tiers.cluster, hardware.nic_bandwidth * share),
    )
    block_bytes = capacity.block_size * capacity.kv_token_bytes
    rules = []
    for tier, spec, bytes_per_s in sheet:
        if spec is None:
            continue
        blocks = spec.blocks_of(block_bytes)
        if not blocks:
            where = f"pools.{pool.name}.tiers.{tier}"
            raise ConfigError(f"{spec.bytes} bytes hold no block of {block_bytes}", where=where)
        rate = spec.bytes_per_s or bytes_per_s
        if isinstance(spec, ClusterTier):
            store = spec.url or "cluster"
            rules.append(TierRule(tier, blocks, rate, "lru", spec.write, store, spec.latency_s))
        else:
            rules.append(TierRule(tier, blocks, rate, spec.evict, spec.write))
    cost = _prefill_cost(step_model(deployment, pool))
    always = pool.tiers.load == "always"
    return TierRules(tuple(rules), cost, always, pool.tiers.wait_s) if rules else None


def _prefill_cost(model: StepModel) -> PrefillCost:
    """A model of steps as a line in tokens and one in their context, through three points."""
    few, many = COST_TOKENS
    short_s, long_s = model.batch(((few, 0),)), model.batch(((many, 0),))
    deep_s = model.batch(((few, COST_CONTEXT),))
    context_s = max(0.0, deep_s - short_s) / (few * COST_CONTEXT)
    pairs = (many * many - few * few) / 2
    token_s = max(0.0, long_s - short_s - context_s * pairs) / (many - few)
    overhead_s = max(0.0, short_s - token_s * few - context_s * few * few / 2)
    return PrefillCost(overhead_s, token_s, context_s)




def build_requests(deployment: Deployment, gateway: NodeId, incarnation: Incarnation) -> Requests:
    limits = deployment.limits
    return Requests(
        gateway, incarnation, beat_s=limits.beat_s, grace_s=limits.grace_s,
        attempts_max=limits.attempts_max, deaths_max=limits.deaths_max,
    )  # fmt: skip
