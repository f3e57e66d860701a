"""What a result says of its step times: how they were found, by pool and phase."""

import json
from typing import Any

import pytest
from msgspec.structs import replace

from kvasir.core.specs.deployment import MeasuredCost
from kvasir.core.specs.hardware import HARDWARE
from kvasir.cost.catalog import shape_of
from kvasir.cost.measured import Measured
from kvasir.measure.calibration import calibration_of, load_tables, models_of, notes_of
from kvasir.runtime.runners import make_runner
from kvasir.world.sim.run import Result, simulate
from tests.sims import cluster, trace

MEASURED = {"cost": {"kind": "measured", "gemm": "fp8"}, "hardware": "h100", "tp": 2}


def run(**pool: Any) -> Result:
    d = cluster(shape="llama-3-8b", count=1, pool=pool)
    return simulate(d, trace(20))


def test_shares_of_measured_pools_are_in_the_result_and_said() -> None:
    result = run(**MEASURED)
    prefill, decode = json.loads(result.to_json())["calibration"]
    assert (prefill["pool"], decode["pool"]) == ("prefill", "decode")
    assert prefill["cost"] == decode["cost"] == "measured"
    assert prefill["decode"] is None and decode["prefill"] is None, "a phase that nobody runs here"
    shares = decode["decode"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["measured"] > 0.5 > shares["roofline"] > 0
    said = [note for note in result.notes if note.startswith("step times")]
    assert len(said) == 2 and "% measured" in said[0] and "roofline" in said[0]


def test_hardware_without_tables_says_that_nothing_was_measured() -> None:
    result = run(cost="measured", hardware="a40", tp=1, memory_fraction=0.95)
    assert all(s.roofline == 1 for c in result.calibration for s in (c.prefill, c.decode) if s)
    assert any("100% roofline" in note for note in result.notes)


OTHERS = [(None, "roofline", 1.0), ({"overhead_s": 1e-3}, "fitted", None)]


@pytest.mark.parametrize(("cost", "name", "roofline"), OTHERS)
def test_pools_of_other_costs_are_named(cost: Any, name: str, roofline: float | None) -> None:
    result = run(cost=cost, hardware="h100")
    assert {c.cost for c in result.calibration} == {name}
    (prefill, _) = result.calibration
    assert (prefill.prefill and prefill.prefill.roofline) == roofline
    (said,) = notes_of(result.calibration)
    assert said.startswith("step times of prefill, decode: ") and name in said


def test_longer_contexts_than_were_measured_are_outside() -> None:
    """The same pools; what changes is the load."""
    d = cluster(shape="llama-3-8b", count=1, pool=MEASURED)
    short = simulate(d, trace(20)).summary
    long = replace(short, input_tokens=200_000 * short.completed)
    near, far = calibration_of(d, short), calibration_of(d, long)
    assert near[1].decode is not None and far[1].decode is not None
    assert far[1].decode.outside > near[1].decode.outside


def test_a_fake_engine_takes_as_long_as_the_simulator_says() -> None:
    d = cluster(shape="llama-3-8b", count=1, pool=MEASURED, engine="fake")
    pool = d.pools[0]
    shape, spec = shape_of(d.models[0]), MeasuredCost(gemm="fp8")
    tabled = Measured(shape, HARDWARE["h100"], 2, 1, spec, load_tables("h100"))
    bare = Measured(shape, HARDWARE["h100"], 2, 1, spec, None)
    assert models_of(d)[pool.name].batch([(512, 0)]) == tabled.batch([(512, 0)])
    assert tabled.batch([(512, 0)]) != pytest.approx(bare.batch([(512, 0)]), rel=0.02)
    runner = make_runner(d, pool)
    asked = runner._seconds  # type: ignore[attr-defined]  # what a step waits for
    assert asked([(512, 0)]) == tabled.batch([(512, 0)])
