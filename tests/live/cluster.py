"""A live cluster in one process, for tests: the whole platform, its workers as threads.

Everything is what `kvasir serve` runs: nodes, hosts, wires over ipc, engine threads, KV transports.
Only the processes are missing, so a cluster stands in a tenth of a second and a test sees inside.

    async with cluster(deployment_of(folder, transport="tcp")) as c:
        answer = await c.ask(prompt, 24)
        await c.at_rest()
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import msgspec
import uvloop

from kvasir.core.effects import Step
from kvasir.core.events import AnyEvent
from kvasir.core.ids import CONDUCTOR, BlockKey, NodeId, RequestId, WorkerId
from kvasir.core.keys import block_keys, salt_of
from kvasir.core.messages import AnyMessage, Logprobs, Report, Start
from kvasir.core.request import Sampling
from kvasir.core.specs import (
    BatchSpec,
    Deployment,
    LimitsSpec,
    ModelShape,
    ModelSpec,
    PolicySpec,
    PoolSpec,
    RouteSpec,
    TransportSpec,
)
from kvasir.core.specs.tiers import TiersSpec
from kvasir.cost.pools import capacity_of
from kvasir.engine.base import Runner, Sampled, StepHooks, StepResult
from kvasir.engine.fake import BITS, SALTS, C, FakeRunner, M
from kvasir.gateway import platform as platform_module
from kvasir.gateway.platform import Platform
from kvasir.gateway.port import Ask, EndPiece, FailPiece, Pieces, PlacedPiece, TokensPiece
from kvasir.net.topology import Topology
from kvasir.node.build import worker_config
from kvasir.node.work import Work
from kvasir.node.worker import Worker
from kvasir.observe.metrics import Metrics
from kvasir.runtime.plan import address
from kvasir.runtime.runners import make_runner, shelves_of
from kvasir.world.live.host import Bus
from kvasir.world.live.wire import Wire
from kvasir.world.live.worker import LiveWorker

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
MODEL = "tiny"
SIZE = 16  # tokens of a block
LIMIT_S = 60.0  # what a wait for a condition may take before it is called a failure

Layout = dict[str, Any]  # values of `deployment_of`

T = TypeVar("T")
E = TypeVar("E", bound=AnyEvent)


def run(main: Coroutine[Any, Any, T]) -> T:
    return uvloop.run(main)


# --- deployments ----------------------------------------------------------------------------------


def deployment_of(
    folder: Path, *, prefill: int = 1, decode: int = 1, mixed: int = 0, transport: str = "shm",
    first_token: str = "prefill", chunk: int = 512, engine: str = "torch", kv_blocks: int = 256,
    prefill_blocks: int | None = None, batch_max: int = 64, bytes_per_s_max: float | None = None,
    steps_max: int = 256, route: dict[str, Any] | None = None,
    limits: dict[str, Any] | None = None, tiers: dict[str, Any] | None = None,
    tp: int = 1, prefill_tp: int | None = None,
) -> Deployment:  # fmt: skip
    """`mixed` > 0 leaves no other workers unless they are asked for. Beats are quick, waits long: a
    busy machine is late, not broken."""
    counts = {"prefill": 0 if mixed else prefill, "decode": 0 if mixed else decode, "mixed": mixed}
    pools = [
        PoolSpec(
            name=role, role=role, count=count, hardware="cpu", batch_max=batch_max,
            kv_blocks=(prefill_blocks or kv_blocks) if role == "prefill" else kv_blocks,
            tiers=TiersSpec(**tiers) if tiers is not None else None,
            tp=(prefill_tp or tp) if role == "prefill" else tp,
        )
        for role, count in counts.items() if count
    ]  # fmt: skip
    shape = ModelShape.from_hf(json.loads((folder / "config.json").read_bytes()))
    waits = {"beat_s": 0.1, "grace_s": 20.0, "dead_after_s": LIMIT_S, "prompt_wait_s": 2.0}
    return Deployment(
        models=(ModelSpec(name=MODEL, path=str(folder), shape=shape),),
        pools=tuple(pools),
        policy=PolicySpec(
            route=RouteSpec(**(route or {})),
            batch=BatchSpec(chunk_tokens=chunk, steps_max=steps_max),
        ),
        transport=TransportSpec(kind=transport, bytes_per_s_max=bytes_per_s_max),
        limits=LimitsSpec(**{**waits, **(limits or {})}),
        engine=engine,
        block_size=SIZE,
        first_token=first_token,
    )


# --- runners under observation --------------------------------------------------------------------


class Gate:
    """Stops an engine thread before each layer while it is shut. `let` opens it for some layers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._permits: float = float("inf")
        self.stopped = False  # an engine stands before it now

    def shut(self) -> None:
        with self._changed:
            self._permits = 0

    def let(self, layers: int) -> None:
        with self._changed:
            self._permits += layers
            self._changed.notify_all()

    def open(self) -> None:
        self.let(1 << 62)

    def wait(self) -> None:
        with self._changed:
            while self._permits <= 0:
                self.stopped = True
                self._changed.wait()
            self.stopped = False
            self._permits -= 1


class Watched:
    """A runner that stops at `gate`, and tells `on_layer(step, layer)` when a layer's KV stands."""

    def __init__(self, runner: Any, gate: Gate, on_layer: Callable[[Step, int], None]) -> None:
        self._runner, self._gate, self._on_layer = runner, gate, on_layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self, step: Step, hooks: StepHooks) -> StepResult:
        self._gate.wait()
        result: StepResult = self._runner.step(step, _Hooks(self, step, hooks))
        return result


class _Hooks:
    def __init__(self, watched: Watched, step: Step, inner: StepHooks) -> None:
        self._watched, self._step, self._inner = watched, step, inner

    def layer_done(self, layer: int) -> None:
        self._watched._on_layer(self._step, layer)
        self._inner.layer_done(layer)
        if layer + 1 < len(self._watched.spec.layers):
            self._watched._gate.wait()

    def sampled(self, batch: Sequence[Sampled]) -> None:
        self._inner.sampled(batch)

    def cut(self) -> bool:
        return self._inner.cut()


def runner_of(deployment: Deployment, pool: PoolSpec) -> Runner:
    """As in a worker process; a fake one takes no time."""
    if deployment.engine == "torch":
        return make_runner(deployment, pool)
    capacity, model = capacity_of(deployment, pool), deployment.model_of(pool)
    return FakeRunner(
        blocks_count=capacity.kv_blocks, block_size=SIZE, folder=Path(model.path or ""),
        adapters_max=model.adapters_max,
    )  # fmt: skip


# --- the cluster ----------------------------------------------------------------------------------

Tap = Callable[[NodeId, NodeId, AnyMessage], bool]


class TappedBus(Bus):
    """`tap(src, dst, message)` is False: the message is lost."""

    tap: Tap | None = None

    def tell(self, src: NodeId, dst: NodeId, message: AnyMessage) -> None:
        if self.tap is None or self.tap(src, dst, message):
            super().tell(src, dst, message)


class Threads:
    """Stands in for `runtime.local.Fleet`: each worker has a bus and a wire in this process."""

    def __init__(
        self, deployment: Deployment, run_dir: str, fail: Callable[[BaseException], None]
    ) -> None:
        self._deployment, self._run_dir, self._fail = deployment, run_dir, fail
        self.gates = {worker: Gate() for worker in deployment.worker_ids()}
        self.workers: dict[WorkerId, LiveWorker] = {}
        self.buses: dict[WorkerId, TappedBus] = {}
        self.layers: list[tuple[WorkerId, Step, int, float]] = []
        self.runners = {w: self._watched(w) for w in deployment.worker_ids()}

    def _watched(self, worker: WorkerId) -> Watched:
        runner = runner_of(self._deployment, self._deployment.pool_of(worker))
        clock = asyncio.get_running_loop().time

        def on_layer(step: Step, layer: int) -> None:
            self.layers.append((worker, step, layer, clock()))

        return Watched(runner, self.gates[worker], on_layer)

    def start(self) -> None:
        for worker in self._deployment.worker_ids():
            self._start(worker)

    def _start(self, worker: WorkerId) -> None:
        d, runner, bus = self._deployment, self.runners[worker], TappedBus()
        capacity = msgspec.structs.replace(
            capacity_of(d, d.pool_of(worker)), kv_token_bytes=runner.spec.kv_token_bytes
        )
        location = Topology(d.topology).place(d)[worker]
        config = worker_config(d, worker, 1, location, capacity=capacity)
        live = LiveWorker(
            Worker(config), runner, bus, d.transport, self._run_dir, journal=None,
            on_failure=self._fail, observer=CONDUCTOR,
            shelves=shelves_of(d, config, runner.spec),
        )  # fmt: skip
        bus.wire = Wire(
            address(self._run_dir, worker), bus.deliver,
            lambda node: address(self._run_dir, node), d.limits.message_bytes_max,
        )  # fmt: skip
        self.workers[worker], self.buses[worker] = live, bus
        live.host.feed(Start())

    async def stop(self) -> None:
        for gate in self.gates.values():
            gate.open()
        for worker, live in self.workers.items():
            live.close()
            wire = self.buses[worker].wire
            assert wire is not None
            wire.close()


class Heard(Metrics):
    """Metrics that keep the events too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.events: list[AnyEvent] = []

    def see(self, event: AnyEvent) -> None:
        self.events.append(event)
        super().see(event)


@dataclass
class Answer:
    """What a client got. `end` is None for a request that failed or was left."""

    request_id: RequestId
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    path: str = ""
    prefill: WorkerId = ""
    end: EndPiece | None = None
    fail: FailPiece | None = None

    @property
    def report(self) -> Report:
        assert self.end is not None and self.end.report is not None, self
        return self.end.report

    @property
    def reason(self) -> str:
        return self.end.reason if self.end is not None else "failed"


class Cluster:
    def __init__(self, platform: Platform, threads: Threads) -> None:
        self.platform, self.threads = platform, threads
        self.desk, self.conductor = platform.desk, platform.conductor
        self.workers, self.gates = threads.workers, threads.gates
        self._ids = itertools.count(1)

    # --- asking -----------------------------------------------------------------------------------

    def submit(
        self, prompt: Sequence[int], n: int, *, sampling: Sampling = GREEDY, name: str = "",
        **more: Any,
    ) -> tuple[RequestId, Pieces]:  # fmt: skip
        request_id = name or f"r{next(self._ids)}"
        return request_id, self.desk.submit(
            Ask(request_id, MODEL, tuple(prompt), n, sampling, **more)
        )

    async def ask(self, prompt: Sequence[int], n: int, **more: Any) -> Answer:
        return await collect(*self.submit(prompt, n, **more))

    # --- looking ----------------------------------------------------------------------------------

    def node(self, worker: WorkerId) -> Worker:
        node = self.workers[worker].host.node
        assert isinstance(node, Worker)
        return node

    def events(self, kind: type[E]) -> list[E]:
        heard: Any = self.platform.metrics
        return [event for event in heard.events if isinstance(event, kind)]

    async def until(
        self, condition: Callable[[], Any], what: Callable[[], Any] | None = None
    ) -> None:
        """Waits for a condition, LIMIT_S at most; `what` shows what it waits for."""
        what = what or self.counts
        loop = asyncio.get_running_loop()
        limit = loop.time() + LIMIT_S
        while not condition():
            assert loop.time() < limit, f"still not so after {LIMIT_S} s: {what()}"
            await asyncio.sleep(0.001)

    def works(self, worker: WorkerId) -> dict[RequestId, Work]:
        return self.node(worker).works

    async def at_rest(self) -> None:
        """Waits until nothing is held anywhere; then every invariant holds."""
        await self.until(lambda: not self.counts(), self.counts)
        await self.until(lambda: not self._attempts(), self._attempts)
        for live in self.workers.values():
            self.node(live.id).check()
            live.sender.check()
            live.receiver.check()
        self.conductor.check()
        self.platform.requests.check()
        for worker in self.workers:  # what the conductor believes to be cached is
            pools = {"device": self.node(worker).pool, **self.node(worker).blocks.below}
            for tier, pool in pools.items():
                await self.until(
                    lambda w=worker, t=tier, p=pool: self.conductor.index.blocks_of(w, t)  # type: ignore[misc]
                    == p.cached_keys
                )

    def counts(self) -> dict[str, int]:
        """Everything that is held and is not zero."""
        c = self.conductor
        found: dict[str, int] = {
            "gateway.lives": len(self.platform.requests.lives),
            "gateway.open": self.desk.open_count,
            "conductor.placements": len(c.placements),
            "conductor.queue": len(c.queue) + len(c.choosing),
        }
        for member in c.members.values():
            found[f"conductor.{member.id}.holds"] = len(member.holds)
            found[f"conductor.{member.id}.blocks"] = member.blocks_reserved
            found[f"conductor.{member.id}.inbound"] = c.oracle.inbound(member.id).transfers
        for worker, live in self.workers.items():
            node = self.node(worker)
            held = {
                "works": len(node.works), "quarantine": len(node.quarantine),
                "blocks": node.pool.held, "step": int(node.steps.step is not None),
                "prompts": len(live._prompts), "openings": len(live._openings),
                "sampled": len(live._sampled), "streams": len(live.engine._waiting),
                "sending": len(live._sending), "expected": waiting(live.receiver, "_expected"),
                "loads": len(node.tiers.reading) + (not live.tiers.idle),
                "copies": sum(len(s.writing) for s in node.tiers.states.values()),
                "open": waiting(live.sender, "_open_now"),
            }  # fmt: skip
            found |= {f"{worker}.{name}": count for name, count in held.items()}
        return {name: count for name, count in found.items() if count}

    def _attempts(self) -> dict[WorkerId, int]:
        """Attempts that runners still know; engine threads close them a little later."""
        left = {w: len(r._attempts) for w, r in self.threads.runners.items()}
        return {w: count for w, count in left.items() if count}

    # --- meddling ---------------------------------------------------------------------------------

    def feed_conductor(self, message: AnyMessage) -> None:
        self.platform.bus.hosts[CONDUCTOR].feed(message)

    def tap(self, node: NodeId, tap: Tap) -> None:
        """Messages from a node that `tap` refuses are lost; conductor and gateway share a bus."""
        bus = self.threads.buses.get(node, self.platform.bus)
        assert isinstance(bus, TappedBus)
        bus.tap = tap


async def collect(request_id: RequestId, pieces: Pieces) -> Answer:
    answer = Answer(request_id)
    async for piece in pieces:
        take(answer, piece)
    return answer


def take(answer: Answer, piece: Any) -> None:
    match piece:
        case PlacedPiece():
            answer.path, answer.prefill = piece.path, piece.prefill
        case TokensPiece():
            answer.tokens += piece.tokens
            answer.logprobs += piece.logprobs
        case EndPiece():
            answer.end = piece
        case FailPiece():
            answer.fail = piece


@contextlib.asynccontextmanager
async def cluster(deployment: Deployment) -> AsyncIterator[Cluster]:
    """Ready when it is entered. The first thing that goes wrong on the loop or in an engine (a
    test's time limit is one of them) ends the test: it is raised where the cluster was entered."""
    run_dir = tempfile.mkdtemp(prefix="kvasir-test-")
    wrong: list[BaseException] = []
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def fail(error: BaseException) -> None:
        wrong.append(error)
        task.cancel()

    loop.set_exception_handler(
        lambda _, context: fail(context.get("exception") or AssertionError(context["message"]))
    )
    with mock.patch.multiple(platform_module, Metrics=Heard, Bus=TappedBus):
        platform = Platform(deployment, {}, run_dir, None)
    threads = Threads(deployment, run_dir, fail)
    platform.fleet = threads  # type: ignore[assignment]
    found = Cluster(platform, threads)
    try:
        platform.start()
        await found.until(lambda: platform.health().ready)
        yield found
    except asyncio.CancelledError:
        if not wrong:
            raise
    finally:
        if wrong:
            print(f"at the end: {found.counts()}")
        await platform.close()
        shutil.rmtree(run_dir, ignore_errors=True)
    if wrong:
        raise wrong[0]


# --- what fake runners' caches must hold ----------------------------------------------------------


def wrong_blocks(c: Cluster, texts: Sequence[Sequence[int]]) -> list[str]:
    """Cached blocks of fake runners whose bytes are not those of the tokens that their key names.
    A key that none of `texts` (prompt and output) has is wrong too."""
    salt = salt_of(f"{MODEL}@", None, "default")
    true: dict[BlockKey, list[int]] = {}
    for text in texts:
        kv = hashes(text)
        for i, key in enumerate(block_keys(text, SIZE, salt)):
            true[key] = kv[i * SIZE : (i + 1) * SIZE]
    wrong = []
    for worker in c.workers:
        pool, words = c.node(worker).pool, c.threads.runners[worker]._words
        for key in pool.all_keys():
            (block,) = pool.match([key])
            found = words[:, block * SIZE : (block + 1) * SIZE, 0].tolist()
            if key not in true or found != [[h ^ salt for h in true[key]] for salt in SALTS]:
                wrong.append(f"{worker} block {block}")
    return wrong


def hashes(tokens: Sequence[int]) -> list[int]:
    """engine.fake's h of every position."""
    found, running = [], 0
    for token in tokens:
        running = (running * M + (token + 1) * C) & BITS
        found.append(running)
    return found


def waiting(end: Any, name: str) -> int:
    """Transfers that one end of a transport, of one stream or several, still has."""
    return sum(len(getattr(one, name)) for one in getattr(end, "_ends", [end]))
