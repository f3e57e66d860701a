"""A runner for a pool, by the deployment's engine. torch is imported only where it computes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvasir.core.errors import ConfigError, ModelError
from kvasir.core.message import Tier
from kvasir.core.specs import Deployment, ModelSpec, PoolSpec
from kvasir.core.specs.speculate import SpeculateSpec
from kvasir.cost.catalog import shape_of
from kvasir.cost.pools import capacity_of, step_model
from kvasir.engine.base import Runner, RunnerSpec
from kvasir.engine.peft import adapter_of
from kvasir.engine.speculate import NgramGuesser
from kvasir.engine.steps import Guesser
from kvasir.measure.calibration import load_tables
from kvasir.node.config import WorkerConfig
from kvasir.store.disk import DiskShelves
from kvasir.store.memory import HostShelves
from kvasir.world.live.tiers import Open

if TYPE_CHECKING:
    from kvasir.engine.base import Allocate


def make_runner(
    deployment: Deployment, pool: PoolSpec, allocate: Allocate | None = None
) -> Runner:
    """With the adapters that its model names. `allocate`: memory for its cache. Raises ModelError
    when the model folder or that of an adapter is missing or not usable."""
    model = deployment.model_of(pool)
    make = _fake if deployment.engine == "fake" else _torch
    runner = make(deployment, pool, allocate)
    for name, path in model.adapters.items():
        runner.adapters.load(adapter_of(name, path, model.path))
    return runner


def _torch(
    deployment: Deployment, pool: PoolSpec, allocate: Allocate | None
) -> Runner:
    model = deployment.model_of(pool)
    if model.path is None:
        raise ModelError(
            f"model {model.name!r} has no path, and engine torch needs a folder",
            where=f"models.{model.name}",
            next_step="set its path to a HuggingFace folder, or engine: fake",
        )
    from kvasir.engine.torch_runner import TorchRunner

    blocks = capacity_of(deployment, pool).kv_blocks
    runner = TorchRunner(
        model.path, blocks_count=blocks, block_size=deployment.block_size, dtype=model.dtype,
        weights=model.weights, kv=model.kv, adapters_max=model.adapters_max,
        allocate=allocate,
    )  # fmt: skip
    if model.speculate is not None and pool.role != "prefill":
        runner.guesser = _guesser(model, model.speculate, runner.spec)
    return runner


def _guesser(model: ModelSpec, guess: SpeculateSpec, spec: RunnerSpec) -> Guesser:
    if guess.draft is None or model.path is None:
        return NgramGuesser(guess.ngram_min, guess.ngram_max)
    from kvasir.engine.draft import DraftModel

    return DraftModel(
        guess.draft, model.path, vocab=spec.vocab, rows_max=guess.rows_max, dtype=model.dtype
    )


def shelves_of(
    deployment: Deployment, config: WorkerConfig, spec: RunnerSpec
) -> dict[Tier, Open]:
    """How a worker opens each of its tiers. Raises ConfigError for a disk without a folder."""
    pool = deployment.pool_of(config.worker)
    rules = config.tiers.tiers if config.tiers is not None else ()
    nbytes = spec.block_size * spec.kv_token_bytes
    found: dict[Tier, Open] = {}
    for rule in rules:
        if rule.tier == "host":
            found["host"] = partial(HostShelves, rule.blocks, nbytes)
            continue
        assert pool.tiers is not None and pool.tiers.disk is not None
        if pool.tiers.disk.path is None:
            raise ConfigError(
                "a disk tier needs a folder", where=f"pools.{pool.name}.tiers.disk.path"
            )
        path = Path(pool.tiers.disk.path) / f"{config.worker}.kv"
        name = f"{spec.fingerprint}/{spec.block_size}"
        found["disk"] = partial(DiskShelves, path, rule.blocks, nbytes, name)
    return found


def _fake(
    deployment: Deployment, pool: PoolSpec, allocate: Allocate | None
) -> Runner:
    from kvasir.engine.fake import KV_TOKEN_BYTES, FakeRunner, Oracle

    spec = deployment.model_of(pool)
    model = step_model(deployment, pool, load_tables)
    capacity = capacity_of(deployment, pool)
    token_bytes = capacity.kv_token_bytes if spec.fake_kv else KV_TOKEN_BYTES
    if token_bytes % KV_TOKEN_BYTES:
        raise ConfigError(
            f"fake_kv: {token_bytes} bytes of KV a token are no multiple of {KV_TOKEN_BYTES}",
            where=f"models.{spec.name}",
        )
    runner = FakeRunner(
        blocks_count=capacity.kv_blocks, block_size=deployment.block_size,
        context_max=capacity.context_max, seconds=model.batch, vocab=shape_of(spec).vocab,
        eos_token_ids=_eos_ids(spec.path), kv_token_bytes=token_bytes,
        folder=Path(spec.path) if spec.path else None, adapters_max=spec.adapters_max,
        allocate=allocate,
    )  # fmt: skip
    if spec.speculate is not None:
        runner.guesser = Oracle(runner, spec.speculate.acceptance)
    return runner


def _eos_ids(folder: str | None) -> tuple[int, ...]:
    """What ends a text of this model, so that made-up tokens avoid it."""
    path = Path(folder or ".") / "config.json"
    found = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    return tuple(found) if isinstance(found, list) else (found,) if found is not None else ()
