"""The simulated world: hosts with nodes, a heap of what comes next, and effects in virtual time.

Which world it is, no node can tell: it performs the same effects as the live one. Deterministic:
the heap breaks ties by order of insertion, and all randomness is in `faults`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from typing import Any, ClassVar

import msgspec

from kvasir.core import effects as fx
from kvasir.core.caches import Mark
from kvasir.core.copies import Leave
from kvasir.core.ids import CONDUCTOR, BlockKey, NodeId, RequestId, WorkerId
from kvasir.core.message import Message
from kvasir.core.messages import (
    Alarm,
    AnyMessage,
    Arrive,
    Done,
    Drawn,
    Hangup,
    Location,
    Lost,
    Start,
    StepDone,
    Tokens,
    WorkerGone,
)  # fmt: skip
from kvasir.core.request import Request, Sampling
from kvasir.core.specs import Deployment
from kvasir.cost.catalog import shape_of
from kvasir.cost.step import StepModel
from kvasir.measure.calibration import models_of
from kvasir.net.topology import Topology
from kvasir.node import Node
from kvasir.node.build import build_requests, worker_config
from kvasir.node.conductor import Conductor
from kvasir.node.request import Requests
from kvasir.node.worker import Worker
from kvasir.traces.record import Arrival
from kvasir.world.journal import Journal
from kvasir.world.sim.executor import Executor, Outcome
from kvasir.world.sim.faults import Death, Faults
from kvasir.world.sim.network import SimNetwork
from kvasir.world.sim.record import Recorder
from kvasir.world.sim.telemetry import Telemetry
from kvasir.world.sim.tiers import SimTiers
from kvasir.world.sim.traffic import befall
from kvasir.world.sim.transfers import Running, Transfers

GATEWAY = "gateway-0"
MESSAGE_S = 100e-6  # one control message, one way
PERFORMS = (
    fx.Tell, fx.Step, fx.Cut, fx.Send, fx.Fetch, fx.Store, fx.Ask, fx.Reopen, fx.Restore,
    fx.Release, fx.Quit, fx.Timer, fx.Reply, fx.Refuse, fx.Note,
)  # fmt: skip
CLOSES = (Hangup, Lost, Alarm)
Journals = Callable[[NodeId, str, dict[str, Any]], Journal]


@dataclass(slots=True, eq=False)
class Host:
    """One incarnation of a node; a restart is a new host, and what came for the old one is void."""

    id: NodeId
    incarnation: int
    node: Node
    executor: Executor | None
    journal: Journal | None
    alive: bool = True


class SimWorld:
    """Build, `run`, look at `recorder`. `check` is called after every event when given."""

    def __init__(
        self, deployment: Deployment, arrivals: Iterable[Arrival], *, faults: Faults | None = None,
        journals: Journals | None = None, after_event: Callable[[SimWorld], None] | None = None,
        again: Callable[[float], Arrival | None] | None = None,
        models: Mapping[str, StepModel] | None = None, seed: int = 0,
        answers: Sequence[tuple[BlockKey, ...]] | None = None,
    ) -> None:  # fmt: skip
        """`answers`: by arrival, the keys of the blocks that its answer fills."""
        fx.require("the simulator", PERFORMS, ())
        self.deployment = deployment
        self.recorder = Recorder(
            deployment.first_token, each_itl=deployment.slo.itl_p99_s is not None
        )
        self.now = 0.0
        self.events = 0
        self.touched: Node | None = None  # the node that handled the last event
        self.hosts: dict[NodeId, Host] = {}
        self.emitted: dict[RequestId, int] = {}
        self.ended: dict[RequestId, str] = {}
        self._faults = faults
        self._seed = seed
        self._journals = journals
        self._after_event = after_event
        self._heap: list[tuple[float, int, Host | None, Any]] = []
        self._serial = 0
        self._outputs: dict[RequestId, int] = {}
        self._answers = answers
        self._arrivals = iter(arrivals)
        self._again = again
        self._arrived = 0
        self._more = True
        topology = Topology(deployment.topology)
        self.locations: dict[WorkerId, Location] = topology.place(deployment)
        self.network = SimNetwork(topology, self.schedule)
        layers = shape_of(deployment.models[0]).layers
        self.transfers = Transfers(
            self.network, self.schedule, self.locations, self._local, layers, lambda: self.now
        )
        self.tiers = SimTiers(self.schedule, self._local, lambda: self.now)
        self._models = models or models_of(deployment)
        self._start_nodes()

    # --- building ---------------------------------------------------------------------------------

    def _start_nodes(self) -> None:
        d = self.deployment
        self._boot(CONDUCTOR, 1, "conductor", Conductor(d, self._models), d.model_dump(mode="json"))
        for worker in d.worker_ids():
            self.boot_worker(worker, 1)
        limits = {"gateway": GATEWAY, "limits": d.limits.model_dump(mode="json")}
        self._boot(GATEWAY, 1, "gateway", build_requests(d, GATEWAY, 1), limits)
        if d.topology.telemetry is not None:
            tell = partial(self.send, CONDUCTOR)
            Telemetry(d.topology.telemetry, self.network, self.schedule, tell, self._seed)
        self._next_arrival()
        if self._faults is not None:
            self._befall_network(self._faults)
            workers = d.worker_ids()
            for death in self._faults.deaths(workers, self._faults.spec.until_s):
                self.schedule(death.at, lambda death=death: self._die(death))  # type: ignore[misc]
            for one in self._faults.spec.departures:
                leave = Leave(one.worker, one.within_s)
                self.schedule(one.at_s, partial(self.send, CONDUCTOR, leave))

    def _befall_network(self, faults: Faults) -> None:
        links, traffic = faults.spec.links, faults.spec.traffic
        if links or traffic:
            for location in self.locations.values():
                self.network.route(location, location)  # its links have names from here on
            befall(self.network, self.schedule, links, traffic, faults.seed)

    def boot_worker(self, worker: WorkerId, incarnation: int) -> None:
        config = worker_config(
            self.deployment, worker, incarnation, self.locations[worker],
            fingerprint=self.deployment.models[0].name,
        )  # fmt: skip
        model = self._models[config.pool]
        names = self.deployment.slo.itl_p99_s is not None
        guess = self.deployment.model_of(self.deployment.pool_of(worker)).speculate
        executor = Executor(
            model, self._outputs.__getitem__, names=names,
            acceptance=guess.acceptance if guess is not None else 0.0,
            answers=self._answer if self._answers is not None else None,
        )  # fmt: skip
        self._boot(worker, incarnation, "worker", Worker(config), msgspec.to_builtins(config),
                   executor)  # fmt: skip
        self.tiers.boot(worker, config)
        self.transfers.boot(worker, config.codec)

    def _answer(self, request_id: RequestId) -> tuple[BlockKey, ...]:
        assert self._answers is not None
        return self._answers[int(request_id.removeprefix("r"))]

    def _boot(
        self, node_id: NodeId, incarnation: int, kind: str, node: Node, config: dict[str, Any],
        executor: Executor | None = None,
    ) -> None:  # fmt: skip
        name = node_id if incarnation == 1 else f"{node_id}.{incarnation}"
        journal = self._journals(name, kind, config) if self._journals else None
        host = Host(node_id, incarnation, node, executor, journal)
        self.hosts[node_id] = host
        self._push(self.now, host, Start())

    # --- the loop ---------------------------------------------------------------------------------

    def run(self, until: float = float("inf")) -> None:
        """Until every request has ended, or virtual time `until`."""
        heap, lives = self._heap, self.requests.lives
        while heap and (self._more or lives):
            if heap[0][0] > until:
                return
            self._turn()

    def rest(self, seconds: float) -> None:
        """Let `seconds` more pass, so that what was on its way arrives."""
        until = self.now + seconds
        while self._heap and self._heap[0][0] <= until:
            self._turn()

    @property
    def requests(self) -> Requests:
        node = self.hosts[GATEWAY].node
        assert isinstance(node, Requests)
        return node

    @property
    def conductor(self) -> Conductor:
        node = self.hosts[CONDUCTOR].node
        assert isinstance(node, Conductor)
        return node

    def workers(self) -> list[Worker]:
        """Living workers' nodes."""
        return [h.node for h in self.hosts.values() if isinstance(h.node, Worker)]

    def _turn(self) -> None:
        self.now, _, host, what = heappop(self._heap)
        self.events += 1
        if host is None:
            what()
        elif host.alive:
            self.deliver(host, what)
        if self._after_event is not None:
            self._after_event(self)

    def deliver(self, host: Host, event: AnyMessage) -> None:
        """One input to one node, and everything that it decides."""
        if type(event) in CLOSES:
            self._catch_up(event)
        node = self.touched = host.node
        effects = node.handle(self.now, event)
        if host.journal is not None:
            host.journal.add(self.now, event, effects)
        perform = self._perform
        for effect in effects:
            perform[type(effect)](self, host, effect)

    def _catch_up(self, event: AnyMessage) -> None:
        """A client reads its tokens as they are drawn; here they are told in bulk, at the latest
        before the gateway handles what may end or move a request."""
        request_id = getattr(event, "request_id", None) or event.name.partition(":")[2]  # type: ignore[union-attr]
        life = self.requests.lives.get(request_id)
        if life is None:
            return
        for host in list(self.hosts.values()):
            if host.executor is not None:
                drawn = host.executor.drawn((request_id, life.attempt))
                if drawn:
                    self.deliver(self.hosts[GATEWAY], Tokens(drawn))

    def schedule(self, at: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._heap, (at, self._serial, None, action))

    def _push(self, at: float, host: Host, event: Message) -> None:
        self._serial += 1
        heappush(self._heap, (at, self._serial, host, event))

    # --- effects ----------------------------------------------------------------------------------

    def _tell(self, host: Host, effect: fx.Tell) -> None:
        if self._faults is not None:
            self.send(effect.to, effect.message)
        else:
            self.schedule_message(self.now + MESSAGE_S, effect.to, effect.message)

    def send(self, to: NodeId, message: AnyMessage) -> None:
        """A message between two nodes: late, perhaps lost, void if the receiver is gone by then."""
        at = self.now + MESSAGE_S
        if self._faults is not None:
            if self._faults.lost(self.now):
                return
            at += self._faults.delay(self.now, message)
        self.schedule_message(at, to, message)

    def schedule_message(self, at: float, to: NodeId, message: AnyMessage) -> None:
        host = self.hosts.get(to)
        if host is not None:
            if type(message) is Done:
                self.recorder.done(message)
            self._serial += 1
            heappush(self._heap, (at, self._serial, host, message))

    def _local(self, worker: WorkerId, message: Message) -> None:
        """What a worker's own transport and tiers tell it: never lost."""
        host = self.hosts.get(worker)
        if host is not None:
            self._push(self.now, host, message)

    def _step(self, host: Host, effect: fx.Step) -> None:
        executor = host.executor
        assert executor is not None
        self._told(executor, executor.begin(self.now, effect))
        self.transfers.step_begins(self.now, host.id, effect.id, executor.ends_at)
        self._await_step(host, executor)
        if effect.steps > 1 and executor.joins:
            self._await_first_tokens(host, executor, effect)

    def _await_first_tokens(self, host: Host, executor: Executor, step: fx.Step) -> None:
        """Rows that join a run of steps stream their first token when it is drawn, not at the end
        of the run."""

        def drawn() -> None:
            if executor.step is step and host.alive:
                self._tokens(executor.first_drawn())

        self.schedule(self.now + executor.first_s, drawn)

    def _tokens(self, drawn: tuple[Drawn, ...]) -> None:
        if drawn:
            self.send(GATEWAY, Tokens(drawn))

    def _told(self, executor: Executor, drawn: tuple[Drawn, ...]) -> None:
        """Rows that left their batch between two steps."""
        for one in drawn:
            self.recorder.left(one.request_id, executor.ended)
        self._tokens(drawn)

    def _await_step(self, host: Host, executor: Executor) -> None:
        version = executor.version

        def over() -> None:
            if executor.version == version and host.alive:
                self._step_over(host, executor)

        self.schedule(executor.ends_at, over)

    def _step_over(self, host: Host, executor: Executor) -> None:
        step = executor.step
        assert step is not None
        outcome = executor.finish()
        self._emit(outcome)
        done = StepDone(step.id, outcome.steps, outcome.rows, outcome.first_s)
        self.deliver(host, done)

    def _emit(self, outcome: Outcome) -> None:
        self._tokens(outcome.drawn)
        self.recorder.step(outcome)

    def _cut(self, host: Host, effect: fx.Cut) -> None:
        executor = host.executor
        assert executor is not None
        if executor.cut(self.now, effect.step) is not None:
            self._await_step(host, executor)

    def _send_kv(self, host: Host, effect: fx.Send) -> None:
        executor = host.executor
        assert executor is not None
        running = None
        if executor.step is not None:
            running = Running(executor.step.id, executor.started, executor.ends_at)
        self.transfers.send(self.now, host.id, effect, running)

    def _fetch_kv(self, host: Host, effect: fx.Fetch) -> None:
        self.transfers.fetch(self.now, host.id, effect)

    def _release(self, host: Host, effect: fx.Release) -> None:
        if host.executor is not None:
            key = (effect.request_id, effect.attempt)
            self._told(host.executor, host.executor.release(key))
        self.transfers.release(host.id, effect.request_id, effect.attempt)
        self.tiers.release(host.id, effect.request_id, effect.attempt)

    def _quit(self, host: Host, effect: fx.Quit) -> None:
        """It holds nothing: there is nothing to tell of its end."""
        assert host.executor is not None and host.executor.step is None, host.id
        host.alive = False
        del self.hosts[host.id]
        self.transfers.worker_died(host.id)
        self.tiers.died(host.id)

    def _store(self, host: Host, effect: fx.Store) -> None:
        self.tiers.store(host.id, effect)

    def _ask(self, host: Host, effect: fx.Ask) -> None:
        self.tiers.ask(host.id, effect)

    def _reopen(self, host: Host, effect: fx.Reopen) -> None:
        self.tiers.reopen(host.id, effect)

    def _restore(self, host: Host, effect: fx.Restore) -> None:
        self.tiers.restore(host.id, effect)

    def _timer(self, host: Host, effect: fx.Timer) -> None:
        self._push(effect.at, host, Alarm(effect.name))

    def _reply(self, host: Host, effect: fx.Reply) -> None:
        """The client's side: tokens in order, each once."""
        seen = self.emitted.get(effect.request_id, 0)
        assert effect.first == seen, (effect.request_id, effect.first, seen)
        assert effect.request_id not in self.ended, effect.request_id
        self.emitted[effect.request_id] = seen + effect.count
        if effect.end is not None:
            self.ended[effect.request_id] = effect.end
            self._ended_arrival()

    def _refuse(self, host: Host, effect: fx.Refuse) -> None:
        pass  # the Reply that closes it follows

    def _note(self, host: Host, effect: fx.Note) -> None:
        self.recorder.event(self.now, effect.event)

    _perform: ClassVar[dict[type[fx.Effect], Callable[[SimWorld, Host, Any], None]]] = {
        fx.Tell: _tell, fx.Step: _step, fx.Cut: _cut, fx.Send: _send_kv, fx.Fetch: _fetch_kv,
        fx.Store: _store, fx.Ask: _ask, fx.Reopen: _reopen, fx.Restore: _restore,
        fx.Release: _release, fx.Quit: _quit, fx.Timer: _timer, fx.Reply: _reply,
        fx.Refuse: _refuse, fx.Note: _note,
    }  # fmt: skip

    # --- what happens by itself -------------------------------------------------------------------

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._more = False
        else:
            self.schedule(arrival.at_s, lambda: self._arrive(arrival))

    def _arrive(self, arrival: Arrival) -> None:
        d = self.deployment
        request = Request(
            id=f"r{self._arrived}",
            model=d.models[0].name,
            prompt_tokens=arrival.input_tokens,
            max_tokens=arrival.output_tokens,
            keys=arrival.keys(d.block_size),
            gateway=GATEWAY,
            session=arrival.session,
            adapter=arrival.adapter,
            tenant=arrival.tenant or "default",
            arrival_s=self.now,
            sampling=Sampling(temperature=0.0, ignore_eos=True),
        )
        self._arrived += 1
        self.arrive(request, arrival.output_tokens)
        self._next_arrival()

    def arrive(self, request: Request, output_tokens: int, marks: tuple[Mark, ...] = ()) -> None:
        """A request comes now, and will draw so many tokens."""
        self._outputs[request.id] = output_tokens
        self.deliver(self.hosts[GATEWAY], Arrive(request, marks))
        hangup_s = self._faults.hangup() if self._faults is not None else None
        if hangup_s is not None:
            self._push(self.now + hangup_s, self.hosts[GATEWAY], Hangup(request.id))

    def _ended_arrival(self) -> None:
        """A closed loop answers each end with the next request."""
        arrival = self._again(self.now) if self._again is not None else None
        if arrival is not None:
            self._more = True
            self.schedule(arrival.at_s, lambda: self._arrive(arrival))

    def _die(self, death: Death) -> None:
        host = self.hosts.get(death.worker)
        if host is None or host.executor is None:
            return
        outcome = host.executor.crash(self.now)
        if outcome is not None:
            self._emit(outcome)
        for request_id in host.executor.requests:
            self.recorder.left(request_id, host.executor.ended)
        host.alive = False
        del self.hosts[death.worker]
        self.transfers.worker_died(death.worker)
        self.tiers.died(death.worker)
        self.send(CONDUCTOR, WorkerGone(death.worker, host.incarnation, "died"))
        self.schedule(
            death.back_at, lambda: self.boot_worker(death.worker, host.incarnation + 1)
        )

    def check_touched(self) -> None:
        """Invariants of what the last event can have changed: one node, and the network."""
        if self.touched is not None:
            self.touched.check()
            self.touched = None
        self.network.check()

    def check(self) -> None:
        """Every node's own invariants, and the network's."""
        for host in self.hosts.values():
            host.node.check()
        self.network.check()
