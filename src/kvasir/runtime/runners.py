"""A runner for a pool, by the deployment's engine. torch is imported only where it computes."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from kvasir.core.errors import ConfigError, ModelError
from kvasir.core.message import Tier
from kvasir.core.specs import Deployment, ModelSpec, PoolSpec
from kvasir.core.specs.speculate import SpeculateSpec
from kvasir.core.specs.tiers import ClusterTier
from kvasir.cost.catalog import shape_of
from kvasir.cost.pools import capacity_of, step_model
from kvasir.engine.base import Runner, RunnerSpec
from kvasir.engine.files import read_json
from kvasir.engine.parallel import cut
from kvasir.engine.peft import adapter_of
from kvasir.engine.speculate import NgramGuesser
from kvasir.engine.steps import Guesser
from kvasir.measure.calibration import load_tables
from kvasir.node.config import WorkerConfig
from kvasir.store.cluster import ClusterShelves, Connect
from kvasir.store.disk import DiskShelves
from kvasir.store.memory import HostShelves
from kvasir.transfer.arena import Arena
from kvasir.world.live.tiers import Open


def make_runner(
    deployment: Deployment, pool: PoolSpec, arena: Arena | None = None
) -> Runner:
    """With the adapters that its model names. `arena`: memory for its cache; its own without.
    Raises ModelError when the model folder or that of an adapter is missing or not usable,
    ConfigError for a pool that the engine cannot be, Unavailable when a rank does not start."""
    model = deployment.model_of(pool)
    make = _fake if deployment.engine == "fake" else _torch
    runner = make(deployment, pool, arena)
    for name, path in model.adapters.items():
        runner.adapters.load(adapter_of(name, path, model.path))
    return runner


def _torch(deployment: Deployment, pool: PoolSpec, arena: Arena | None) -> Runner:
    model = deployment.model_of(pool)
    if model.path is None:
        raise ModelError(
            f"model {model.name!r} has no path, and engine torch needs a folder",
            where=f"models.{model.name}",
            next_step="set its path to a HuggingFace folder, or engine: fake",
        )
    check_parallel(pool, model)
    from kvasir.engine.parallel.team import Team
    from kvasir.engine.torch_runner import TorchRunner

    blocks = capacity_of(deployment, pool).kv_blocks
    with ExitStack() as started:
        team = None
        if pool.tp > 1:
            arena = arena or Arena()
            team = Team(pool.tp, arena)
            started.callback(team.stop)
        runner = TorchRunner(
            model.path, blocks_count=blocks, block_size=deployment.block_size, dtype=model.dtype,
            weights=model.weights, kv=model.kv, adapters_max=model.adapters_max,
            allocate=arena.take if arena is not None else None, team=team,
        )  # fmt: skip
        started.pop_all()
    if runner.kernel is not None:
        print(f"{pool.name}: attention by the compiled kernel", file=sys.stderr, flush=True)
    if model.speculate is not None and pool.role != "prefill":
        runner.guesser = _guesser(model, model.speculate, runner.spec)
    return runner


def check_parallel(pool: PoolSpec, model: ModelSpec) -> None:
    """Raises ConfigError or ModelError, before a weight is read, for what several accelerators of
    the torch engine cannot compute together."""
    where = f"pools.{pool.name}"
    if pool.pp > 1:
        raise ConfigError(
            "engine torch has no pipeline parallel: the cost model and the simulator do",
            where=f"{where}.pp",
            next_step="set pp to 1, raise tp, or serve it with another engine",
        )
    if pool.tp == 1:
        return
    given = {
        "weights": model.weights != "plain",
        "adapters": bool(model.adapters),
        "allow_runtime_adapters": model.allow_runtime_adapters,
    }
    for name in (name for name, so in given.items() if so):
        raise ConfigError(
            f"{name} is not supported with tp {pool.tp}",
            where=f"{where}.tp, models.{model.name}.{name}",
            next_step=f"set tp to 1, or leave {name} out",
        )
    config = Path(model.path or "") / "config.json"
    cut.check(read_json(config), pool.tp, f"{where}.tp, {config}")


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
    """How a worker opens each of its tiers. Raises ConfigError for a disk without a folder, and for
    a store without an address or a client."""
    pool = deployment.pool_of(config.worker)
    rules = config.tiers.tiers if config.tiers is not None else ()
    nbytes = spec.block_size * spec.kv_token_bytes
    found: dict[Tier, Open] = {}
    for rule in rules:
        if rule.tier == "host":
            found["host"] = partial(HostShelves, rule.blocks, nbytes)
            continue
        assert pool.tiers is not None
        where, name = f"pools.{pool.name}.tiers", f"{spec.fingerprint}/{spec.block_size}"
        if rule.tier == "disk":
            assert pool.tiers.disk is not None
            if pool.tiers.disk.path is None:
                raise ConfigError("a disk tier needs a folder", where=f"{where}.disk.path")
            path = Path(pool.tiers.disk.path) / f"{config.worker}.kv"
            found["disk"] = partial(DiskShelves, path, rule.blocks, nbytes, name)
        else:
            assert pool.tiers.cluster is not None
            connect = client_of(pool.tiers.cluster, nbytes, where=f"{where}.cluster")
            wait_s = pool.tiers.cluster.timeout_s
            found["cluster"] = partial(ClusterShelves, connect, nbytes, name, wait_s)
    return found


def client_of(tier: ClusterTier, block_bytes: int, *, where: str) -> Connect:
    """How to reach a store. Raises ConfigError when it has no address, or its client is missing."""
    if tier.url is None:
        raise ConfigError("a cluster tier needs the address of a store", where=f"{where}.url")
    extra = "mooncake" if tier.url.startswith("mooncake") else "redis"
    if importlib.util.find_spec(extra) is None:
        raise ConfigError(
            f"the client of a {extra} store is not installed", where=f"{where}.url",
            next_step=f"pip install 'kvasir[{extra}]'",
        )  # fmt: skip
    if extra == "mooncake":
        from kvasir.store.mooncake import MooncakeStore

        return partial(MooncakeStore, tier.url, tier.lend_bytes, block_bytes, tier.timeout_s)
    from kvasir.store.redis import RedisStore

    return partial(RedisStore, tier.url, tier.timeout_s)


def _fake(deployment: Deployment, pool: PoolSpec, arena: Arena | None) -> Runner:
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
        allocate=arena.take if arena is not None else None,
    )  # fmt: skip
    if spec.speculate is not None:
        runner.guesser = Oracle(runner, spec.speculate.acceptance)
    return runner


def _eos_ids(folder: str | None) -> tuple[int, ...]:
    """What ends a text of this model, so that made-up tokens avoid it."""
    path = Path(folder or ".") / "config.json"
    found = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    return tuple(found) if isinstance(found, list) else (found,) if found is not None else ()
