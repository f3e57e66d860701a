"""KV on the simulated network: exact times alone, fair shares together, and no byte unaccounted."""

import heapq
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.effects import Fetch, Send
from kvasir.core.events import Shipped
from kvasir.core.messages import KvWant, Location, Received, SendOver, StepDone
from kvasir.core.specs import ModelSpec, TopologySpec
from kvasir.cost.catalog import shape_of
from kvasir.net.maxmin import flow_of, solve
from kvasir.net.topology import Route, Topology
from kvasir.traces.record import Arrival
from kvasir.world.sim.network import SimNetwork
from kvasir.world.sim.transfers import Transfers
from tests.sims import BLOCK, Watched, arrivals, cluster, watched

LATENCY_S = 10e-6
NIC = 1e9
SPEC = TopologySpec(preset="fabric", gpus_per_node=2, nodes_per_rack=2, racks_per_pod=2, pods=2,
                    nic_bandwidth=NIC, nvlink_bandwidth=8e9)  # fmt: skip
# Two GPUs a node, two nodes a rack, two racks a pod.
PLACES = {"a": 0, "a2": 1, "rack": 2, "pod": 4, "pod2": 6, "core": 8, "core2": 12}


class Clock:
    """A heap of what comes next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def __call__(self, at: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, action))

    def run(self) -> None:
        while self._heap:
            self.now, _, action = heapq.heappop(self._heap)
            action()


class Bench:
    """Transfers between places, and when each was over."""

    def __init__(self, layers: int = 4) -> None:
        self.clock = Clock()
        self.network = SimNetwork(Topology(SPEC), self.clock)
        where = {name: Location((gpu,)) for name, gpu in PLACES.items()}
        self.transfers = Transfers(
            self.network, self.clock, where, self.told, layers, lambda: self.clock.now
        )
        self.received: dict[str, tuple[float, Received]] = {}
        self.sent: dict[str, tuple[float, bool]] = {}

    def told(self, worker: str, message: Received | SendOver) -> None:
        if isinstance(message, Received):
            assert message.request_id not in self.received, "told twice"
            self.received[message.request_id] = (self.clock.now, message)
        else:
            assert message.request_id not in self.sent, "told twice"
            self.sent[message.request_id] = (self.clock.now, message.ok)

    def fetch(self, name: str, source: str, target: str) -> None:
        self.transfers.fetch(self.clock.now, target, Fetch(name, 1, source, 0, (0,), 0, 1e9))

    def send(self, name: str, source: str, target: str, nbytes: int, step: int | None = None,
             last: bool = True) -> None:  # fmt: skip
        part = Send(name, 1, target, 0, (0,), nbytes, 1e9, step, last)
        self.transfers.send(self.clock.now, source, part)

    def ship(self, at: float, name: str, source: str, target: str, nbytes: int) -> None:
        def begin() -> None:
            self.fetch(name, source, target)
            self.send(name, source, target, nbytes)

        self.clock(at, begin)

    def run(self) -> dict[str, float]:
        """When each transfer that arrived whole was there."""
        self.clock.run()
        self.network.check()
        assert len(self.transfers) == 0
        return {name: at for name, (at, message) in self.received.items() if message.ok}


# --- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "bandwidth"), [("a2", 8e9), ("rack", NIC), ("pod", NIC), ("core", NIC)]
)
def test_alone_it_takes_latency_plus_bytes_over_bandwidth(target: str, bandwidth: float) -> None:
    latency_s = Topology(SPEC).route(Location((0,)), Location((PLACES[target],))).latency_s
    bench = Bench()
    bench.ship(2.0, "r", "a", target, 300_000_000)
    expected = latency_s + 300_000_000 / bandwidth
    assert bench.run()["r"] == pytest.approx(2.0 + expected, rel=1e-12)
    _, received = bench.received["r"]
    assert received.seconds == pytest.approx(expected, rel=1e-9)
    assert received.bytes == 300_000_000
    assert bench.sent["r"] == (bench.received["r"][0], True)


def test_two_from_one_source_share_its_nic() -> None:
    """1 and 3 GB at 1 GB/s: half each until 2 s, then the larger one has all of it."""
    bench = Bench()
    bench.ship(0.0, "small", "a", "pod", 10**9)
    bench.ship(0.0, "large", "a", "core", 3 * 10**9)
    ends = bench.run()
    assert ends["small"] == pytest.approx(2.0 + LATENCY_S, rel=1e-9)
    assert ends["large"] == pytest.approx(4.0 + LATENCY_S, rel=1e-9)


def test_two_to_one_target_share_its_nic() -> None:
    bench = Bench()
    bench.ship(0.0, "one", "pod", "a", 10**9)
    bench.ship(1.0, "other", "core", "a", 10**9)
    ends = bench.run()  # 1 s alone: nothing is left of the first when the second comes
    assert ends["one"] == pytest.approx(1.0 + LATENCY_S, rel=1e-6)
    assert ends["other"] == pytest.approx(2.0 + LATENCY_S, rel=1e-6)
    late = Bench()
    late.ship(0.0, "one", "pod", "a", 10**9)
    late.ship(0.5, "other", "core", "a", 10**9)
    ends = late.run()
    assert ends["one"] == pytest.approx(1.5 + LATENCY_S, rel=1e-6)
    assert ends["other"] == pytest.approx(2.0 + LATENCY_S, rel=1e-6)


def test_those_that_share_no_link_do_not_meet() -> None:
    bench = Bench()
    bench.ship(0.0, "one", "a", "pod", 10**9)
    bench.ship(0.0, "other", "core", "core2", 10**9)
    assert list(bench.run().values()) == pytest.approx([1.0 + LATENCY_S] * 2, rel=1e-9)


shipments = st.lists(
    st.tuples(
        st.integers(0, 40).map(lambda n: n / 16),
        st.sampled_from(sorted(PLACES)), st.sampled_from(sorted(PLACES)),
        st.integers(1, 2 * 10**9),
    ).filter(lambda s: s[1] != s[2]),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=60)
@given(shipments)
def test_ends_are_those_of_max_min_fair_shares(rows: list[tuple[float, str, str, int]]) -> None:
    """Against fluid flows that are moved from one change to the next, one by one."""
    bench = Bench()
    for i, (at, source, target, nbytes) in enumerate(rows):
        bench.ship(at, f"r{i}", source, target, nbytes)
    ends = bench.run()
    expected = fluid(rows)
    assert ends.keys() == expected.keys()
    for name, end_s in expected.items():
        assert ends[name] == pytest.approx(end_s, rel=1e-7, abs=1e-7), name
    for _, message in bench.received.values():
        assert message.bytes == rows[int(message.request_id[1:])][3]


def fluid(rows: list[tuple[float, str, str, int]]) -> dict[str, float]:
    topology = Topology(SPEC)
    pending: list[tuple[float, str, Route, float]] = []
    for i, (at, source, target, nbytes) in enumerate(rows):
        route = topology.route(Location((PLACES[source],)), Location((PLACES[target],)))
        pending.append((at + route.latency_s, f"r{i}", route, float(nbytes)))
    pending.sort(key=lambda p: p[0])
    now, moving, ends = 0.0, dict[str, tuple[Route, float]](), dict[str, float]()
    while pending or moving:
        rates = solve(topology.capacities, [flow_of(route) for route, _ in moving.values()])
        times = {n: left / rate for (n, (_, left)), rate in zip(moving.items(), rates, strict=True)}
        next_end = min(times.values(), default=float("inf"))
        next_start = pending[0][0] - now if pending else float("inf")
        step_s = min(next_end, next_start)
        now += step_s
        first = min(times, key=lambda n: times[n], default="")
        moving = {n: (route, left - rate * step_s)
                  for (n, (route, left)), rate in zip(moving.items(), rates, strict=True)}
        if next_end <= next_start:
            ends[first] = now
            del moving[first]
        else:
            _, name, route, nbytes = pending.pop(0)
            moving[name] = (route, nbytes)
    return ends


# --- with a step ----------------------------------------------------------------------------------

LAYERS = shape_of(ModelSpec(name="m", shape="llama-3-8b")).layers
TOKEN_BYTES = shape_of(ModelSpec(name="m", shape="llama-3-8b")).kv_token_bytes


def run_one(tokens: int, choice: Any, wire_s: float, *, busy: bool = True, **more: Any) -> Watched:
    """A request whose KV takes `wire_s` alone; `busy`: prefill has another, tiny one before it."""
    d = cluster(
        count=1, shape="llama-3-8b", route={"decode_choice": choice},
        topology={"gpus_per_node": 1, "nic_bandwidth": tokens * TOKEN_BYTES / wire_s}, **more,
    )  # fmt: skip
    first = [Arrival(0.0, 1, 1)] if busy else []
    world = watched(d, [*first, Arrival(0.0, tokens, 4)])
    (shipped,) = world.events_of(Shipped)
    assert shipped.bytes == tokens * TOKEN_BYTES
    return world


def visible_s(world: Watched) -> float:
    """From the end of prefill to the last byte."""
    prefilled = [s.at for s in world.seen if isinstance(s.message, StepDone) and "p" in s.node]
    (received,) = [s.at for s in world.seen if isinstance(s.message, Received) and s.message.ok]
    return received - prefilled[-1]


PREFILL_S = 2e-3 + 2e-5 * 1600
RATIOS = [0.01, 0.3, 0.9, 1.0, 1.1, 3.0, 30.0]


def hidden_but(wire_s: float) -> float:
    """What layer-wise sending leaves to see (netkv-and-network: L layers, prefill Tp, wire T)."""
    return max(wire_s / LAYERS, wire_s - PREFILL_S * (LAYERS - 1) / LAYERS)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_streamed_transfer_hides_behind_prefill(ratio: float) -> None:
    """T on the wire beside a prefill of Tp in L layers leaves max(T/L, T - Tp (L-1)/L)."""
    wire_s = ratio * PREFILL_S
    found = visible_s(run_one(1600, "arrival", wire_s))
    assert found == pytest.approx(hidden_but(wire_s), abs=3 * LATENCY_S)


def test_it_hides_on_an_idle_cluster_too() -> None:
    found = visible_s(run_one(1600, "arrival", PREFILL_S, busy=False))
    assert found == pytest.approx(hidden_but(PREFILL_S), abs=3 * LATENCY_S)


@pytest.mark.parametrize("ratio", RATIOS)
def test_it_shows_when_decode_is_chosen_after_prefill(ratio: float) -> None:
    """All of it, and the messages that ask for it."""
    found = visible_s(run_one(1600, "prefill_end", ratio * PREFILL_S))
    assert found == pytest.approx(ratio * PREFILL_S, rel=1e-9, abs=5e-4)


def test_chunks_leave_as_they_are_made() -> None:
    """Four chunks: the last layer of the last chunk is left when prefill is over."""
    world = run_one(1600, "arrival", 0.02, batch={"chunk_tokens": 400})
    steps = [s for s in world.seen if isinstance(s.message, StepDone) and s.node == "prefill-0"]
    assert len(steps) == 5
    assert visible_s(world) == pytest.approx(0.02 / 4 / LAYERS, abs=3 * LATENCY_S)


# --- ends that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["a", "pod"])
def test_a_released_transfer_is_over_for_both_sides(side: str) -> None:
    bench = Bench()
    bench.ship(0.0, "r", "a", "pod", 10**9)
    bench.ship(0.0, "other", "a", "core", 10**9)
    bench.clock(0.5, lambda: bench.transfers.release(side, "r", 1))
    assert list(bench.run()) == ["other"]
    at, message = bench.received["r"]
    assert at == 0.5 and not message.ok
    assert bench.sent["r"] == (0.5, False)
    assert bench.sent["other"][0] == pytest.approx(1.25, rel=1e-4), "it has the link for itself"


def test_a_released_transfer_is_nobody_elses() -> None:
    bench = Bench()
    bench.ship(0.0, "r", "a", "pod", 10**9)
    bench.clock(0.5, lambda: bench.transfers.release("core", "r", 1))
    assert "r" in bench.run()


@pytest.mark.parametrize("dead", ["a", "pod"])
def test_with_a_worker_its_transfers_end(dead: str) -> None:
    bench = Bench()
    bench.ship(0.0, "r", "a", "pod", 10**9)
    bench.ship(0.0, "other", "core", "core2", 10**9)
    bench.clock(0.5, lambda: bench.transfers.worker_died(dead))
    assert list(bench.run()) == ["other"]
    assert bench.received["r"] == (0.5, Received("r", 1, False, reason="peer lost"))


def test_what_nobody_expects_is_not_sent() -> None:
    bench = Bench()
    bench.send("r", "a", "pod", 10**9)
    bench.fetch("r2", "a", "pod")
    bench.send("r2", "a", "core", 10**9)  # to somebody else
    assert bench.sent == {"r": (0.0, False), "r2": (0.0, False)}
    assert sum(bench.network.bytes_by_tier) == 0


# --- accounts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["arrival", "prefill_end"])
@pytest.mark.parametrize("preset", ["paper", "fabric"])
def test_every_byte_is_accounted_for(preset: str, choice: Any) -> None:
    """Bytes by tier = bytes shipped = (block-rounded prompt - what decode has) x bytes a token."""
    d = cluster(
        count=3, shape="llama-3-8b",
        topology={"preset": preset, "gpus_per_node": 2, "nodes_per_rack": 2},
        route={"name": "least_loaded", "decode_choice": choice},
    )  # fmt: skip
    # One that ends with its first token ends where it prefills; what was streamed by then is waste.
    requests = [r for r in arrivals(60, rate=400.0) if r.output_tokens > 1]
    world = watched(d, requests)
    shipped = world.events_of(Shipped)
    assert len(shipped) == len(requests)

    by_tier = [0] * 4
    for s in shipped:
        tier = world.network.topology.tier(world.locations[s.source], world.locations[s.target])
        by_tier[tier] += s.bytes
    assert world.network.bytes_by_tier == by_tier
    assert sum(b > 0 for b in by_tier) == 3, "same node, same rack, same pod"

    hits = {w.request_id: w.first_block for w in world.messages(KvWant)}
    assert sum(hits.values()) > 0
    block_bytes = BLOCK * TOKEN_BYTES
    for s in shipped:
        blocks = -(-requests[int(s.request_id[1:])].input_tokens // BLOCK)
        assert s.bytes == (blocks - hits[s.request_id]) * block_bytes


def test_switches_count_what_moves_over_them() -> None:
    """1 GB in 1 s of a 2 s window: each NIC way has half of it, and the uplinks carry it too."""
    bench = Bench()
    bench.ship(0.0, "r", "a", "pod", 10**9)
    bench.run()
    used = bench.network.utilisation(2.0)
    nics = sum(link.capacity for link in bench.network.topology.links if link.tier == 1)
    assert used[1] == pytest.approx(2 * 10**9 / (2.0 * nics))
    assert used[0] == 0 < used[2] and used[3] == 0
    assert bench.network.utilisation(3.0) == (0.0,) * 4, "a new window"
