"""A codec in virtual time: bytes shrink on links that are shared, coding takes a worker's seconds,
and nothing is coded where that would be slower."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvasir.core.codec import PIECE_BYTES, Sent
from kvasir.core.events import KvCoded, Routed, Shipped
from kvasir.core.messages import Received, TransferReport
from kvasir.core.specs import Deployment
from kvasir.core.specs.deployment import TransportSpec
from kvasir.core.specs.faults import FaultSpec
from kvasir.cost.catalog import shape_of
from kvasir.cost.codec import KNOWN
from kvasir.runtime.verify import verify_dir
from kvasir.traces.record import Arrival
from kvasir.world.sim.coding import Meter, pieces
from kvasir.world.sim.faults import Faults
from kvasir.world.sim.run import simulate
from kvasir.world.sim.world import SimWorld
from tests.sims import Watched, arrivals, cluster, trace, watched

SLOW, GIGABIT, FAST = 12.5e6, 125e6, 1.25e9  # bytes a second: 100 Mb/s, 1 and 10 Gb/s
TOKENS = 1600


def coding(
    kind: str, nic: float, *, mode: str = "serial", count: int = 1, level_max: int = 2, **more: Any
) -> Deployment:
    transport = TransportSpec(kind="tcp", mode=mode, codec={"kind": kind, "level_max": level_max})
    topology = {"gpus_per_node": 1, "nic_bandwidth": nic}
    return cluster(
        count=count, shape="llama-3-8b", topology=topology, transport=transport, **more
    )


KV = TOKENS * shape_of(coding("off", SLOW).models[0]).kv_token_bytes


def one(kind: str, nic: float, **more: Any) -> Watched:
    return watched(coding(kind, nic, **more), [Arrival(0.0, TOKENS, 4)])


def shipped(world: Watched) -> Shipped:
    (event,) = world.events_of(Shipped)
    return event


def arrived_s(world: Watched) -> float:
    (at,) = [s.at for s in world.seen if isinstance(s.message, Received)]
    return at


@pytest.mark.parametrize("mode", ["serial", "streamed"])
def test_on_100_mbit_s_kv_comes_as_much_sooner_as_it_is_smaller(mode: str) -> None:
    raw, coded = one("off", SLOW, mode=mode), one("cachegen", SLOW, mode=mode)
    ratio = KNOWN["cachegen-2"].ratio
    event = shipped(coded)
    assert (event.bytes, event.codec) == (KV, "cachegen-2") and shipped(raw).bytes == KV
    assert event.wire_bytes == pytest.approx(KV * ratio, rel=1e-6)
    assert shipped(raw).seconds == pytest.approx(KV / SLOW, rel=1e-3)
    assert event.seconds == pytest.approx(KV * ratio / SLOW, rel=0.02)
    assert arrived_s(coded) < arrived_s(raw) / 3


def test_every_byte_on_the_wire_is_told_once() -> None:
    world = watched(coding("cachegen", SLOW, count=2, mode="streamed"), arrivals(30, rate=4))
    events = world.events_of(Shipped)
    wire = sum(e.wire_bytes or e.bytes for e in events)
    assert len({e.codec for e in events}) >= 1 and any(e.codec for e in events)
    assert sum(world.network.bytes_by_tier) == wire
    assert sum(m.wire_bytes for m in world.messages(Sent)) == wire
    assert sum(m.link_bytes for m in world.messages(Sent)) == wire, "of every link, once"
    assert sum(m.bytes for m in world.messages(TransferReport)) == wire
    assert not any(w.steps.outbound.coding.going for w in world.workers())  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "nic"), [("lossless", FAST), ("cachegen", 10 * FAST)])
def test_on_fast_links_bytes_go_as_they_are(kind: str, nic: float) -> None:
    raw, coded = one("off", nic), one(kind, nic)
    assert {e.codec for e in coded.events_of(KvCoded)} == {"raw"}
    assert shipped(coded) == shipped(raw), "no later, and not a byte fewer"


@pytest.mark.parametrize("nic", [SLOW, 60e6, GIGABIT, 300e6, 600e6, FAST, 10 * FAST])
def test_never_later_than_the_bytes_as_they_are(nic: float) -> None:
    raw = arrived_s(one("off", nic))
    for kind in ("lossless", "int8", "cachegen"):
        assert arrived_s(one(kind, nic)) <= raw * (1 + 1e-6), kind


def test_coding_takes_its_seconds() -> None:
    """The first piece is coded before a byte leaves, the last one decoded after all have come."""
    world = one("cachegen", SLOW)
    event, known = shipped(world), KNOWN["cachegen-2"]
    (prefilled,) = [s.at for s in world.seen if type(s.message).__name__ == "PrefillDone"]
    whole = arrived_s(world) - prefilled
    last = KV % PIECE_BYTES or PIECE_BYTES
    wire_s = event.wire_bytes / SLOW
    assert whole >= wire_s + PIECE_BYTES / known.encode_bytes_s + last / known.decode_bytes_s / 2


def test_a_choice_is_made_anew_when_a_link_turns_out_slower() -> None:
    """CacheGen's adaptation: the link loses nine tenths of its rate while KV goes as it is."""
    d = coding("cachegen", 400e6)
    steady = watched(d, [Arrival(0.0, 8 * TOKENS, 4)])
    fault = {"at_s": 1.0, "seconds": 1e3, "factor": 0.05}
    world = Slowing(d, [Arrival(0.0, 8 * TOKENS, 4)], **fault)
    world.run()
    world.check()
    choices = [e.codec for e in world.events_of(KvCoded)]
    assert {e.codec for e in steady.events_of(KvCoded)} == {choices[0]}
    assert choices[0] != choices[-1] == "cachegen-2"
    links = [e.link_bytes_s for e in world.events_of(KvCoded)]
    assert links[-1] < links[0] / 5
    assert shipped(world).codec == "+".join(sorted(set(choices)))


class Slowing(Watched):
    """Every link loses rate at some time."""

    def __init__(
        self, d: Deployment, of: list[Arrival], *, at_s: float, seconds: float, factor: float
    ) -> None:
        super().__init__(d, of)

        def slow() -> None:
            for link, capacity in enumerate(list(self.network.topology.capacities)):
                self.network.set_capacity(self.now, link, capacity * factor)

        self.schedule(at_s, slow)


def test_a_budget_takes_the_form_that_loses_least_and_keeps_it() -> None:
    """The first token waits for the KV. A budget is kept with a reserve for what comes later."""
    found = {}
    for ttft_s in (40.0, 9.5, 1.0):
        d = coding("cachegen", SLOW, first_token="decode", slo={"ttft_s": ttft_s})
        world = watched(d, [Arrival(0.0, TOKENS // 2, 4)])
        found[ttft_s] = world.events_of(KvCoded)[0].codec
    assert found == {40.0: "lossless", 9.5: "int8", 1.0: "cachegen-2"}


def test_off_is_what_it_was() -> None:
    """No choice, no message, no field: the same effects in the same order."""
    plain = simulate(cluster(count=2), trace(40))
    spelled = simulate(
        cluster(count=2, transport=TransportSpec(codec={"kind": "off", "level_max": 5})), trace(40)
    )
    assert plain.to_json() == spelled.to_json()
    world = watched(cluster(count=2), arrivals(40))
    assert not world.messages(Sent) and not world.events_of(KvCoded)


def test_the_conductor_says_what_the_network_should_give() -> None:
    world = one("cachegen", SLOW)
    first = world.events_of(KvCoded)[0]
    assert first.link_bytes_s == pytest.approx(SLOW, rel=1e-3)
    assert world.events_of(Routed)[0].transfer_estimate_s == pytest.approx(KV / SLOW, rel=1e-3)


def test_a_recording_verifies(tmp_path: Any) -> None:
    d = coding("cachegen", SLOW, mode="streamed", count=2)
    simulate(d, trace(12, rate=2.0), record=tmp_path)
    verdict = verify_dir(tmp_path)
    assert verdict.ok, "\n".join(verdict.lines)


@pytest.mark.parametrize("seed", range(12))
def test_faults(seed: int) -> None:
    """Deaths, losses and cancels at any time: all ends, and nothing is left over."""
    rng = random.Random(seed)
    spec = FaultSpec(loss=0.02, delay_s_max=0.02, deaths=3, down_s=0.3, cancel=0.1, until_s=3.0)
    d = coding(
        rng.choice(["lossless", "cachegen"]), rng.choice([SLOW, GIGABIT]), count=2,
        mode=rng.choice(["streamed", "serial"]), pool={"kv_blocks": 120},
        route={"decode_choice": rng.choice(["arrival", "prefill_end"])},
    )  # fmt: skip
    world = SimWorld(
        d, arrivals(40, seed), faults=Faults(spec, seed), after_event=SimWorld.check_touched
    )
    world.run()
    world.rest(30.0)
    assert not world.requests.lives
    world.check()
    assert not len(world.transfers)
    for worker in world.workers():
        assert worker.pool.held == 0 and not worker.quarantine
        assert not worker.steps.outbound.coding.going  # type: ignore[union-attr]
    for meter in world.transfers._meters.values():
        assert meter.flows == 0


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8])
def test_pieces_are_all_bytes_and_stand_one_after_another(count: int) -> None:
    found = pieces(1001, count, 2.0, 4.0)
    assert sum(p.kv_bytes for p in found) == 1001 and len(found) == count
    assert [p.ready_at for p in found] == pytest.approx(
        [2 + 2 * (i + 1) / count for i in range(count)], rel=1e-9
    )


def test_a_meter_counts_seconds_in_which_something_moves() -> None:
    meter = Meter()
    meter.begin(1.0)
    meter.begin(2.0)
    meter.end(3.0, 10)
    meter.end(4.0, 20)
    assert meter.read(9.0) == (30, 3.0)
    meter.begin(10.0)
    assert meter.read(12.0) == (0, 2.0)
    meter.end(13.0, 5)
    assert meter.read(20.0) == (5, 1.0)
