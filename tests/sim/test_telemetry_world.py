"""Telemetry as the conductor gets it in a whole run, and news that lag."""

from kvasir.core.messages import KvEvents, Load, NetReading
from kvasir.core.specs.faults import FaultSpec
from kvasir.world.sim.faults import Faults
from kvasir.world.sim.run import simulate
from kvasir.world.sim.world import MESSAGE_S
from tests.sims import Watched, arrivals, cluster, trace, watched

PERIOD_S, DELAY_S = 0.05, 0.12


def readings(world: Watched) -> list[tuple[float, NetReading]]:
    return [(s.at, s.message) for s in world.seen if isinstance(s.message, NetReading)]


def test_readings_arrive_late_and_in_order() -> None:
    d = cluster(topology={"telemetry": {"period_s": PERIOD_S, "delay_s": DELAY_S}})
    found = readings(watched(d, arrivals(60)))
    assert len(found) > 3
    for i, (at, reading) in enumerate(found, 1):
        assert abs(reading.measured_at - i * PERIOD_S) < 1e-9
        assert abs(at - reading.measured_at - DELAY_S - MESSAGE_S) < 1e-9


def test_bad_telemetry_changes_decisions_and_never_the_bytes_of_a_seed() -> None:
    bad = {"period_s": 0.1, "delay_s": 0.05, "loss": 0.3, "error": 0.4}

    def run(telemetry: dict[str, float], seed: int) -> bytes:
        d = cluster(count=3, shape="llama-3-8b",
                    topology={"telemetry": telemetry, "nic_bandwidth": 1e9,
                              "rack_oversubscription": 8, "gpus_per_node": 1})  # fmt: skip
        return simulate(d, trace(60), seed=seed).to_json()

    assert run(bad, 1) == run(bad, 1)
    assert run(bad, 1) != run({"period_s": 0.1}, 1)


def test_news_lag() -> None:
    d = cluster()
    spec = FaultSpec(kv_event_lag_s=0.2, load_lag_s=0.1)
    plain, late = (
        watched(d, arrivals(80), faults=faults) for faults in (None, Faults(spec, 0))
    )
    for kind, lag_s in ((KvEvents, 0.2), (Load, 0.1)):
        first = [min(s.at for s in w.seen if isinstance(s.message, kind)) for w in (plain, late)]
        assert abs(first[1] - first[0] - lag_s) < 1e-9
