"""From a deployment's pools to cost models and capacities: the one place both worlds ask."""

from __future__ import annotations

from kvasir.core.messages import Capacity
from kvasir.core.specs import Deployment, PoolSpec
from kvasir.cost.catalog import shape_of
from kvasir.cost.step import Fitted, Roofline, StepModel, kv_blocks


def step_model(deployment: Deployment, pool: PoolSpec) -> StepModel:
    """Fitted constants when the pool gives them, else the roofline of its hardware.

    Raises ConfigError for an unknown shape.
    """
    if pool.cost is not None:
        return Fitted(pool.cost)
    shape = shape_of(deployment.model_of(pool))
    return Roofline(shape, deployment.hardware_of(pool), pool.tp, pool.pp)


def capacity_of(deployment: Deployment, pool: PoolSpec) -> Capacity:
    """What an instance of the pool can hold. Raises ConfigError when the weights do not fit."""
    model = deployment.model_of(pool)
    shape = shape_of(model)
    blocks = pool.kv_blocks or kv_blocks(
        shape, deployment.hardware_of(pool), pool.tp, pool.pp, deployment.block_size,
        pool.memory_fraction,
    )  # fmt: skip
    return Capacity(
        kv_blocks=blocks,
        block_size=deployment.block_size,
        kv_token_bytes=shape.kv_token_bytes,
        batch_max=pool.batch_max,
        batch_tokens_max=pool.batch_tokens_max,
        context_max=model.max_context or shape.max_context,
    )
