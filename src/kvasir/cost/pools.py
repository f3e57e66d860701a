"""From a deployment's pools to cost models and capacities: the one place both worlds ask."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.core.errors import ConfigError
from kvasir.core.messages import Capacity
from kvasir.core.specs import Deployment, PoolSpec
from kvasir.core.specs.deployment import FittedCost, MeasuredCost, ProfileCost
from kvasir.core.specs.model import ModelShape
from kvasir.cost.catalog import shape_name, shape_of
from kvasir.cost.measured import Measured, kv_tokens
from kvasir.cost.profile import profiled
from kvasir.cost.step import Fitted, Roofline, StepModel, kv_blocks
from kvasir.cost.tables import SystemTables

TablesOf = Callable[[str], SystemTables | None]


def step_model(
    deployment: Deployment, pool: PoolSpec, tables: TablesOf | None = None
) -> StepModel:
    """Fitted constants, a profile or tables where the pool asks for them, else the roofline.

    `tables` finds the measured tables of a system; without it a pool that asks for them gets the
    same operators from rooflines. Raises ConfigError for an unknown shape or profile.
    """
    if isinstance(pool.cost, FittedCost):
        return Fitted(pool.cost)
    model, hardware = deployment.model_of(pool), deployment.hardware_of(pool)
    if isinstance(pool.cost, ProfileCost):
        where = f"pools.{pool.name}.cost"
        return profiled(pool.cost, shape_name(model), hardware.name, pool.tp, where)
    shape = shape_of(model)
    if pool.cost is None:
        return Roofline(shape, hardware, pool.tp, pool.pp)
    found = tables(pool.cost.system or pool.hardware) if tables is not None else None
    return Measured(shape, hardware, pool.tp, pool.pp, pool.cost, found)


def _blocks_that_fit(deployment: Deployment, pool: PoolSpec, shape: ModelShape) -> int:
    hardware = deployment.hardware_of(pool)
    if not isinstance(pool.cost, MeasuredCost):
        return kv_blocks(
            shape, hardware, pool.tp, pool.pp, deployment.block_size, pool.memory_fraction
        )
    tokens = kv_tokens(shape, hardware, pool.tp, pool.pp, pool.cost, pool.memory_fraction)
    if tokens < deployment.block_size:
        raise ConfigError(
            f"the weights leave no room for KV on {pool.tp * pool.pp} {hardware.name}",
            where=f"pools.{pool.name}, memory_fraction {pool.memory_fraction}",
            next_step="raise tp or pp, or take hardware with more memory",
        )
    return tokens // deployment.block_size


def capacity_of(deployment: Deployment, pool: PoolSpec) -> Capacity:
    """What an instance of the pool can hold. Raises ConfigError when the weights do not fit."""
    model = deployment.model_of(pool)
    shape = shape_of(model)
    blocks = pool.kv_blocks or _blocks_that_fit(deployment, pool, shape)
    return Capacity(
        kv_blocks=blocks,
        block_size=deployment.block_size,
        kv_token_bytes=shape.kv_token_bytes,
        batch_max=pool.batch_max,
        batch_tokens_max=pool.batch_tokens_max,
        context_max=model.max_context or shape.max_context,
    )
