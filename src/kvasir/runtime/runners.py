"""A runner for a pool, by the deployment's engine. torch is imported only where it computes."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.core.effects import Row
from kvasir.core.errors import ModelError
from kvasir.core.specs import Deployment, PoolSpec
from kvasir.cost.pools import capacity_of, step_model
from kvasir.engine.base import Runner


def make_runner(deployment: Deployment, pool: PoolSpec) -> Runner:
    """Raises ModelError when the model folder is missing or not usable."""
    if deployment.engine == "fake":
        return _fake(deployment, pool)
    model = deployment.model_of(pool)
    if model.path is None:
        raise ModelError(
            f"model {model.name!r} has no path, and engine torch needs a folder",
            where=f"models.{model.name}",
            next_step="set its path to a HuggingFace folder, or engine: fake",
        )
    from kvasir.engine.torch_runner import TorchRunner

    blocks = capacity_of(deployment, pool).kv_blocks
    return TorchRunner(model.path, blocks_count=blocks, block_size=deployment.block_size)


def _fake(deployment: Deployment, pool: PoolSpec) -> Runner:
    from kvasir.engine.fake import FakeRunner

    model = step_model(deployment, pool)
    capacity = capacity_of(deployment, pool)

    def seconds(rows: Sequence[Row], iteration: int) -> float:
        return model.batch([(row.count, row.start) for row in rows])

    return FakeRunner(
        blocks_count=capacity.kv_blocks, block_size=deployment.block_size,
        context_max=capacity.context_max, seconds=seconds,
    )  # fmt: skip
