"""A runner for a pool, by the deployment's engine. torch is imported only where it computes."""

from __future__ import annotations

import json
from pathlib import Path

from kvasir.core.errors import ConfigError, ModelError
from kvasir.core.specs import Deployment, PoolSpec
from kvasir.cost.catalog import shape_of
from kvasir.cost.pools import capacity_of, step_model
from kvasir.engine.base import Runner
from kvasir.measure.calibration import load_tables


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
    from kvasir.engine.fake import KV_TOKEN_BYTES, FakeRunner

    spec = deployment.model_of(pool)
    model = step_model(deployment, pool, load_tables)
    capacity = capacity_of(deployment, pool)
    token_bytes = capacity.kv_token_bytes if spec.fake_kv else KV_TOKEN_BYTES
    if token_bytes % KV_TOKEN_BYTES:
        raise ConfigError(
            f"fake_kv: {token_bytes} bytes of KV a token are no multiple of {KV_TOKEN_BYTES}",
            where=f"models.{spec.name}",
        )
    return FakeRunner(
        blocks_count=capacity.kv_blocks, block_size=deployment.block_size,
        context_max=capacity.context_max, seconds=model.batch, vocab=shape_of(spec).vocab,
        eos_token_ids=_eos_ids(spec.path), kv_token_bytes=token_bytes,
    )  # fmt: skip


def _eos_ids(folder: str | None) -> tuple[int, ...]:
    """What ends a text of this model, so that made-up tokens avoid it."""
    path = Path(folder or ".") / "config.json"
    found = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    return tuple(found) if isinstance(found, list) else (found,) if found is not None else ()
