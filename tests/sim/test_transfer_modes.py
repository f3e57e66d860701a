"""`transport.mode`: when KV leaves, and when the decode side takes it, seen in virtual time."""

from typing import Any, ClassVar

import pytest

from kvasir.core.effects import Send
from kvasir.core.messages import Received, StepDone
from kvasir.core.specs.deployment import TransportSpec
from kvasir.core.specs.faults import FaultSpec
from kvasir.node.work import Stage
from kvasir.traces.record import Arrival
from kvasir.world.sim.faults import Faults
from kvasir.world.sim.world import Host, SimWorld
from tests.sim.test_network_world import PREFILL_S, TOKEN_BYTES, hidden_but
from tests.sims import Watched, arrivals, cluster, watched

TOKENS = 1600


class Modes(Watched):
    """Keeps whether each part of a transfer streamed with a step, and the blocks taken at once."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.streamed: list[bool] = []
        self.inbound_most = 0
        super().__init__(*args, **more)

    def _send_kv(self, host: Host, effect: Send) -> None:
        self.streamed.append(effect.step is not None)
        super()._send_kv(host, effect)

    _perform: ClassVar[dict[Any, Any]] = {**SimWorld._perform, Send: _send_kv}

    def deliver(self, host: Host, event: Any) -> None:
        super().deliver(host, event)
        for worker in self.workers():
            taken = [len(w.blocks) for w in worker.works.values() if w.stage is Stage.KV]
            self.inbound_most = max(self.inbound_most, sum(taken) - max(taken, default=0))


def run(tokens: int, choice: str, wire_s: float, **transport: Any) -> Modes:
    d = cluster(
        count=1, shape="llama-3-8b", route={"decode_choice": choice},
        topology={"gpus_per_node": 1, "nic_bandwidth": tokens * TOKEN_BYTES / wire_s},
        transport=TransportSpec(**transport),
    )  # fmt: skip
    world = Modes(d, [Arrival(0.0, 1, 1), Arrival(0.0, tokens, 4)])
    world.run()
    world.check()
    assert not world.requests.lives
    return world


def visible_s(world: Watched) -> float:
    """From the end of prefill to the last byte."""
    prefilled = [s.at for s in world.seen if isinstance(s.message, StepDone) and "p" in s.node]
    (received,) = [s.at for s in world.seen if isinstance(s.message, Received) and s.message.ok]
    return received - prefilled[-1]


def test_serial_hides_nothing_though_the_decode_worker_is_known_early() -> None:
    streamed = run(TOKENS, "arrival", PREFILL_S)
    serial = run(TOKENS, "arrival", PREFILL_S, mode="serial")
    assert visible_s(streamed) == pytest.approx(hidden_but(PREFILL_S), abs=1e-4)
    assert visible_s(serial) == pytest.approx(PREFILL_S, abs=1e-4)
    assert serial.streamed == [False]


@pytest.mark.parametrize(("threshold", "streams"), [(TOKENS, True), (TOKENS + 1, False)])
def test_prompts_below_the_threshold_go_serially(threshold: int, streams: bool) -> None:
    world = run(TOKENS, "arrival", PREFILL_S, serial_tokens=threshold)
    assert any(world.streamed) is streams


def test_pull_takes_no_more_than_a_twentieth_ahead_and_streaming_does() -> None:
    """20 prompts at once, of 25 blocks each, for one decode worker of 600 blocks: 30 may wait."""
    found = {}
    for mode in ("serial", "pull"):
        d = cluster(
            count=1, shape="llama-3-8b", route={"decode_choice": "prefill_end"},
            pool={"kv_blocks": 600}, topology={"gpus_per_node": 1, "nic_bandwidth": 1e9},
            transport=TransportSpec(mode=mode),
        )  # fmt: skip
        world = Modes(d, [Arrival(0.0, 400, 20) for _ in range(20)])
        world.run()
        world.check()
        assert len(world.ended) == 20 and set(world.ended.values()) == {"length"}
        found[mode] = world.inbound_most
    assert found["pull"] < 30 < found["serial"]


@pytest.mark.parametrize("mode", ["serial", "pull"])
@pytest.mark.parametrize("seed", range(5))
def test_a_mode_survives_faults(mode: str, seed: int) -> None:
    d = cluster(
        count=2, route={"decode_choice": "prefill_end"}, pool={"kv_blocks": 60},
        transport=TransportSpec(mode=mode),
    )  # fmt: skip
    spec = FaultSpec(loss=0.01, delay_s_max=0.01, deaths=3, down_s=0.5, cancel=0.1, until_s=3.0)
    world = watched(d, arrivals(40), faults=Faults(spec, seed))
    assert len(world.ended) == 40
