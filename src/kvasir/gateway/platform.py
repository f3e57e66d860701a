"""The whole platform in one command: gateway and conductor here, workers as processes.

They speak messages only, also inside this process. Knows how the parts are put together; decides
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvloop

from kvasir.core import effects as fx
from kvasir.core.errors import ConfigError, ModelError
from kvasir.core.ids import CONDUCTOR, WorkerId
from kvasir.core.messages import Start
from kvasir.core.specs import Deployment
from kvasir.core.specs.endpoints import MAIN
from kvasir.gateway.app import make_app
from kvasir.gateway.desk import LiveDesk
from kvasir.gateway.port import Health, Text, WorkerState
from kvasir.gateway.serve import serve_http
from kvasir.gateway.served import Served
from kvasir.gateway.tokenize import TextModel
from kvasir.measure.calibration import models_of
from kvasir.node.build import build_requests
from kvasir.node.conductor import Conductor
from kvasir.observe.metrics import Holding, Metrics
from kvasir.runtime.local import Fleet
from kvasir.runtime.plan import GATEWAY, address
from kvasir.world.journal import Journal
from kvasir.world.live.host import Bus, Host
from kvasir.world.live.telemetry import Telemetry
from kvasir.world.live.wire import Wire

GAUGES_S = 0.5
Say = Callable[[str], None]


class Platform:
    """Built on a running loop by `open_platform`. `desk`, `metrics` and `fleet` are its handles."""

    def __init__(
        self, deployment: Deployment, texts: dict[str, Text], run_dir: str, record: Path | None
    ) -> None:
        self.deployment = deployment
        self.failed: dict[WorkerId, str] = {}  # workers given up, and what the user can mend
        self.left: set[WorkerId] = set()  # on purpose
        self.metrics = Metrics([m.name for m in deployment.models])
        self.bus = Bus()
        self.bus.observe = self.metrics.see
        self._sinks: list[Any] = []
        self.conductor = Conductor(deployment, models_of(deployment))
        self._conductor_host = Host(
            CONDUCTOR, self.conductor, self.bus,
            self._journal(record, CONDUCTOR, "conductor", deployment.model_dump(mode="json")),
            {fx.Note: lambda effect: self.metrics.see(effect.event)},
        )  # fmt: skip
        self.requests = build_requests(deployment, GATEWAY, 1)
        limits = {"gateway": GATEWAY, "limits": deployment.limits.model_dump(mode="json")}
        self.desk = LiveDesk(
            deployment, self.requests, self.bus, texts, Served(deployment.models), self.health,
            journal=self._journal(record, GATEWAY, "gateway", limits), observe=self.metrics.see,
        )  # fmt: skip
        self.fleet = Fleet(
            deployment, run_dir, record, on_gone=self._gone, on_lost=self.failed.__setitem__,
            on_left=self.left.add,
        )
        self.telemetry = Telemetry(deployment.topology, self._conductor_host.feed)
        endpoints = deployment.endpoints
        self.wire = self.bus.wire = Wire(
            address(run_dir, MAIN, endpoints), self.bus.deliver,
            lambda node: address(run_dir, node, endpoints), deployment.limits.message_bytes_max,
        )  # fmt: skip

    def _journal(
        self, record: Path | None, name: str, kind: str, config: dict[str, Any]
    ) -> Journal | None:
        if record is None:
            return None
        record.mkdir(parents=True, exist_ok=True)
        self._sinks.append((record / f"{name}.jsonl").open("wb", buffering=0))
        return Journal(self._sinks[-1], name, kind, config, self.deployment.seed)

    def _gone(self, event: Any) -> None:
        self.wire.forget(event.worker)
        self._conductor_host.feed(event)

    def start(self) -> None:
        self._conductor_host.feed(Start())
        self.desk.host.feed(Start())
        self.fleet.start()
        self.telemetry.start()

    def health(self) -> Health:
        members = self.conductor.members
        states: dict[WorkerId, WorkerState] = {}
        for worker in self.deployment.worker_ids():
            lost: WorkerState = "gone" if worker in self.failed else "starting"
            away: WorkerState = "left" if worker in self.left else lost
            states[worker] = "ready" if worker in members else away
        return Health(all(s in ("ready", "left") for s in states.values()), states)

    def gauges(self) -> None:
        """Copy what the nodes hold into the gauges."""
        usage, holdings = {}, {}
        for member in self.conductor.members.values():
            load = member.load
            if load is not None:
                held = member.blocks_total - load.kv_blocks_free - load.pinned
                usage[member.id] = held / member.blocks_total
                holdings[member.id] = Holding(
                    held, load.leases, load.quarantined, len(member.holds), load.pinned
                )
        queued = len(self.conductor.queue) + len(self.conductor.choosing)
        self.metrics.gauges(queued, len(self.requests.lives) - queued, usage)
        self.metrics.holdings(holdings)
        index = self.conductor.index
        self.metrics.prefix_index(index.blocks, index.blocks_refused)

    async def watch(self, say: Say) -> None:
        """Refresh gauges; end when a worker cannot be kept alive."""
        while not self.failed:
            self.gauges()
            await asyncio.sleep(GAUGES_S)
        for worker, fault in self.failed.items():
            if fault:
                raise ModelError(f"{worker}: {fault}")
        raise ConfigError(
            f"{', '.join(sorted(self.failed))} ended again and again; its last words are above",
            next_step="read them, or try --engine fake",
        )

    async def close(self) -> None:
        await self.fleet.stop()
        self.telemetry.close()
        self.desk.host.close()
        self._conductor_host.close()
        self.wire.close()
        for sink in self._sinks:
            sink.close()


@contextlib.asynccontextmanager
async def open_platform(
    deployment: Deployment, *, record: Path | None = None
) -> AsyncIterator[Platform]:
    """A running platform without HTTP; workers may still be starting. Ends all that it started.

    Raises ModelError for a model without a tokenizer, and for an adapter that does not fit.
    """
    texts: dict[str, Text] = {}
    for model in deployment.models:
        if model.path is None:
            raise ConfigError(f"model {model.name!r} has no path", where=f"models.{model.name}")
        texts[model.name] = TextModel.load(model.path)
    run_dir = tempfile.mkdtemp(prefix="kvasir-")
    try:
        platform = Platform(deployment, texts, run_dir, record)
        try:
            platform.start()
            yield platform
        finally:
            await platform.close()
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def run(deployment: Deployment, *, host: str, port: int, record: Path | None) -> None:
    """Serve until SIGINT or SIGTERM. Prints a line to try when every worker is ready."""
    uvloop.run(_run(deployment, host, port, record))


async def _run(deployment: Deployment, host: str, port: int, record: Path | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    async with open_platform(deployment, record=record) as platform:
        app = make_app(
            platform.desk, platform.metrics, deployment.limits, tenants=deployment.tenants,
            caches=deployment.caches,
        )  # fmt: skip
        bound: asyncio.Future[int] = loop.create_future()
        tasks = [
            asyncio.create_task(serve_http(app, host, port, on_bound=bound.set_result)),
            asyncio.create_task(platform.watch(_say)),
            asyncio.create_task(_announce(platform, host, bound)),
            asyncio.create_task(_until(stop)),
        ]
        try:
            await _first_end(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _first_end(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for the stop signal or for the first failure, which is raised."""
    waiting = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if tasks[-1] in done:
            return


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


async def _announce(platform: Platform, host: str, bound: asyncio.Future[int]) -> None:
    port = await bound
    began = time.monotonic()
    count = len(platform.health().workers)
    _say(f"kvasir: listening on http://{host}:{port}, {count} workers start")
    while not platform.health().ready:
        await asyncio.sleep(0.05)
    model = platform.deployment.models[0].name
    _say(f"kvasir: ready in {time.monotonic() - began:.1f} s. Try:\n")
    _say(
        f"curl http://{host}:{port}/v1/chat/completions -H 'content-type: application/json' "
        f'-d \'{{"model": "{model}", '
        '"messages": [{"role": "user", "content": "What is Python?"}], '
        '"max_tokens": 64, "kvasir": {"timing": true}}\'\n'
    )


def _say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
