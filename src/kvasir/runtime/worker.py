"""A worker process, `python -m kvasir.runtime.worker START_FILE`: a node, a runner, a wire."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import uvloop

from kvasir.core.codec import Offer
from kvasir.core.errors import KvasirError
from kvasir.core.ids import CONDUCTOR
from kvasir.core.messages import Start
from kvasir.core.specs import Deployment, PoolSpec
from kvasir.cost.pools import capacity_of
from kvasir.engine.base import Runner
from kvasir.net.topology import Topology
from kvasir.node.build import worker_config
from kvasir.node.config import WorkerConfig
from kvasir.node.worker import Worker
from kvasir.runtime.plan import LEFT, UNUSABLE, StartFile, address
from kvasir.runtime.runners import make_runner, shelves_of
from kvasir.transfer.arena import arena_for
from kvasir.world.journal import Journal
from kvasir.world.live.host import Bus
from kvasir.world.live.wire import Wire
from kvasir.world.live.worker import LiveWorker

WATCH_S = 0.5  # how often a worker looks whether its parent and its ranks live
FAILED = 70  # exit status: the process cannot go on; another one may


def main(argv: list[str]) -> int:
    start = StartFile.load(Path(argv[1]))
    try:
        return uvloop.run(_serve(start))
    except KvasirError as error:
        start.fault.write_text(str(error))
        return UNUSABLE


async def _serve(start: StartFile) -> int:
    deployment = start.parsed()
    pool = deployment.pool_of(start.worker)
    arena = arena_for(deployment.transport.kind)
    runner = make_runner(deployment, pool, arena)
    config = _config(deployment, pool, start, runner)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def fail(error: BaseException) -> None:
        print(f"{start.worker}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if not ended.done():
            ended.set_result(FAILED)

    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: fail(context.get("exception") or RuntimeError(context["message"]))
    )
    bus = Bus()
    endpoints = deployment.endpoints
    kv_host = endpoints[start.worker].kv if start.worker in endpoints else ""
    worker = LiveWorker(
        Worker(config), runner, bus, deployment.transport, start.run_dir, kv_host=kv_host,
        journal=_journal(start, config, deployment.seed), on_failure=fail, observer=CONDUCTOR,
        shelves=shelves_of(deployment, config, runner.spec), arena=arena,
        on_quit=lambda: _end(ended, LEFT),
    )  # fmt: skip
    bus.wire = Wire(
        address(start.run_dir, start.worker, endpoints), bus.deliver,
        lambda node: address(start.run_dir, node, endpoints), deployment.limits.message_bytes_max,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(name, _end, ended)
    loop.add_signal_handler(signal.SIGTERM, _leave, worker, deployment.limits.drain_s, ended)
    worker.host.feed(Start())
    watch = asyncio.create_task(_watch(ended, os.getppid(), runner, fail))
    status = await ended
    watch.cancel()
    worker.close()
    bus.wire.close()
    return status


def _config(
    deployment: Deployment, pool: PoolSpec, start: StartFile, runner: Runner
) -> WorkerConfig:
    capacity = msgspec.structs.replace(
        capacity_of(deployment, pool),
        kv_token_bytes=runner.spec.kv_token_bytes,
        context_max=runner.spec.context_max,
    )
    location = Topology(deployment.topology).place(deployment)[start.worker]
    return worker_config(
        deployment, start.worker, start.incarnation, location,
        fingerprint=runner.spec.fingerprint, capacity=capacity,
        offers=_offers(deployment, runner),
    )  # fmt: skip


def _offers(deployment: Deployment, runner: Runner) -> tuple[Offer, ...]:
    if deployment.transport.codec.kind == "off":
        return ()  # and nothing of the codec is imported
    from kvasir.runtime.coding import offers_here

    return offers_here(deployment, runner.spec)


def _journal(start: StartFile, config: WorkerConfig, seed: int) -> Journal | None:
    if start.record is None:
        return None
    name = start.worker if start.incarnation == 1 else f"{start.worker}.{start.incarnation}"
    sink = (Path(start.record) / f"{name}.jsonl").open("wb", buffering=0)
    return Journal(sink, name, "worker", msgspec.to_builtins(config), seed)


def _end(ended: asyncio.Future[int], status: int = 0) -> None:
    if not ended.done():
        ended.set_result(status)


def _leave(worker: LiveWorker, within_s: float, ended: asyncio.Future[int]) -> None:
    """What a supervisor says before it takes a process away; said twice, it does not wait."""
    if worker.leaving:
        _end(ended)
    worker.leave(within_s)


async def _watch(
    ended: asyncio.Future[int], parent: int, runner: Runner, fail: Callable[[BaseException], None]
) -> None:
    """A worker never outlives the process that started it, nor those that compute for it."""
    while os.getppid() == parent:
        try:
            runner.check()
        except KvasirError as error:
            fail(error)
        await asyncio.sleep(WATCH_S)
    _end(ended)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
