"""Measured step times: the packed tables, what lies between and beyond them, what is said of it."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvasir.cost
from kvasir.core.errors import ConfigError
from kvasir.core.specs import HARDWARE, Deployment, ModelSpec, PoolSpec
from kvasir.core.specs.deployment import MeasuredCost
from kvasir.core.specs.model import ModelShape
from kvasir.cost.catalog import shape_of
from kvasir.cost.measured import Engine, Measured, kv_tokens, weight_bytes
from kvasir.cost.operators import Experts, Operators
from kvasir.cost.pools import capacity_of, step_model
from kvasir.cost.step import Roofline
from kvasir.cost.tables import (
    Curve,
    Packed,
    Source,
    SystemTables,
    Table,
    bracket,
    decode,
    encode,
    settle,
)
from kvasir.measure.calibration import load_tables, table_systems

DATA = Path(kvasir.cost.__file__).parent / "data"
CODE = 2e-4  # what rounding to a code may cost


def tables(system: str = "h100") -> SystemTables:
    found = load_tables(system)
    assert found is not None
    return found


def model(name: str = "llama-3-70b", tp: int = 4, engine: Engine | None = None,
          hardware: str = "h100", **cost: object) -> Measured:  # fmt: skip
    spec = MeasuredCost.model_validate({"gemm": "fp8"} | cost)
    shape = shape_of(ModelSpec(name=name))
    return Measured(shape, HARDWARE[hardware], tp, 1, spec, load_tables(hardware), engine)


# --- the package's files --------------------------------------------------------------------------


def test_tables_ship_with_the_package_small_and_with_their_licence() -> None:
    assert table_systems() == ("a100_sxm", "b200_sxm", "h100_sxm", "h200_sxm")
    assert sum(f.stat().st_size for f in DATA.iterdir()) < 6_000_000
    source = (DATA / "SOURCE.md").read_text()
    assert "Apache-2.0" in source and "NVIDIA" in source
    assert all("Apache-2.0" in tables(system).source for system in table_systems())


def test_a_system_is_found_by_its_hardware_and_others_are_not() -> None:
    assert load_tables("h100") is not None and tables("h100").system == "h100_sxm"
    assert load_tables("tpu") is None


# As the source's csv files have them, milliseconds.
def test_points_are_as_measured() -> None:
    gemm = tables("h200").gemm("bfloat16", 5120, 5120)
    assert gemm is not None and gemm.source is Source.MEASURED
    assert gemm.curve(16384) == pytest.approx(1.2922959857516818e-3, rel=CODE)
    fp8 = tables("h200").gemm("fp8", 65536, 12288)
    assert fp8 is not None and fp8.curve(32768) == pytest.approx(43.273640950520836e-3, rel=CODE)
    (heads,) = [c for b, c in tables("h200").by_batch(
        "prefill_attention", ("bfloat16", 64, 8, 64, 0)) if b == 64]  # fmt: skip
    assert heads(128) == pytest.approx(0.1678933302561442e-3, rel=CODE)
    reduce = tables("h200").curve("all_reduce", (2,))
    assert reduce is not None and reduce(128) == pytest.approx(4.377920031547546e-6, rel=CODE)
    key = ("int4_wo", 7168, 2048, 8, 384, 1, 1, "power_law_1.2")
    moe = tables("h200").curve("moe", key)
    assert moe is not None and moe(192) == pytest.approx(2.7640384674072265e-3, rel=CODE)


# --- between and beyond ---------------------------------------------------------------------------


@given(st.floats(2e-7, 9.0))
def test_codes_round_within_their_step(seconds: float) -> None:
    assert decode(encode(seconds)) == pytest.approx(seconds, rel=CODE)


def test_codes_have_bounds() -> None:
    for seconds in (0.9e-7, 11.0):
        with pytest.raises(ValueError, match="not between"):
            encode(seconds)


def test_a_disturbed_point_counts_as_the_larger_problem() -> None:
    assert settle([5, 9, 0, 6, 7]) == [5, 6, 0, 6, 7]


def test_a_curve_is_linear_between_logarithms() -> None:
    curve = Curve([(1.0, 2.0), (4.0, 8.0), (16.0, 16.0)])
    assert (curve(1), curve(2), curve(4), curve(8)) == pytest.approx((2, 4, 8, 8 * math.sqrt(2)))
    assert curve(0.5) == pytest.approx(2), "kernels have a floor"
    assert curve(64) == pytest.approx(32), "as between the last two"
    asked = [curve.source(x) for x in (4, 5, 17, 0.5)]
    assert asked == [Source.MEASURED, Source.INTERPOLATED, Source.OUTSIDE, Source.OUTSIDE]


def test_beyond_its_end_a_curve_grows_at_most_in_proportion() -> None:
    assert Curve([(1.0, 1.0), (2.0, 8.0)])(4) == pytest.approx(16)
    assert Curve([(1.0, 2.0), (2.0, 1.0)])(4) == pytest.approx(1)


def test_brackets() -> None:
    axis = (2, 8, 32)
    assert bracket(axis, 8)[:3] == (1, 1, 0.0)
    assert bracket(axis, 4) == (0, 1, pytest.approx(0.5), Source.INTERPOLATED)
    assert bracket(axis, 128) == (1, 2, pytest.approx(2), Source.OUTSIDE)
    assert bracket(axis, 1) == (0, 0, 0.0, Source.OUTSIDE)


def test_a_product_between_measured_widths_lies_between_their_times() -> None:
    low, mid, high = (tables().gemm("fp8", n, 8192) for n in (12288, 14336, 16384))
    assert low is not None and mid is not None and high is not None
    assert mid.source is Source.INTERPOLATED
    for m in (1, 100, 5000):
        assert low.curve(m) <= mid.curve(m) <= high.curve(m)
    wide = tables().gemm("fp8", 131072, 8192)
    assert wide is not None and wide.source is Source.OUTSIDE


def test_missing_corners_are_left_out() -> None:
    codes = [100, 200, 0, 200, 100, 200, 100, 300]  # n 2, k 2, m 2; one point is missing
    packed = Packed("toy", "", (Table("gemm", ("f",), ("n", "k", "m"), ((2, 8), (2, 8), (1, 4)),
                                      (("fp8",),), b"".join(c.to_bytes(2, "little")
                                                            for c in codes)),))  # fmt: skip
    found = SystemTables(packed).gemm("fp8", 4, 4)
    assert found is not None and found.curve.range == (4.0, 4.0)


@pytest.mark.parametrize("system", ["a100", "h100", "h200", "b200"])
def test_steps_grow_with_tokens_rows_and_context(system: str) -> None:
    form = "bfloat16" if system == "a100" else "fp8"
    cost = model("llama-3.1-8b", 1, hardware=system, gemm=form)
    tokens = [cost.batch([(n, 0)]) for n in range(64, 9000, 97)]
    assert all(b >= a * 0.999 for a, b in pairwise(tokens))
    contexts = [cost.iteration_seconds(8, 8 * c) for c in range(1, 40_000, 331)]
    assert all(b >= a for a, b in pairwise(contexts))
    rows = [cost.iteration_seconds(b, b * 2048) for b in range(1, 300, 7)]
    assert all(b >= a * 0.999 for a, b in pairwise(rows))


# --- the sum --------------------------------------------------------------------------------------


def test_a_step_is_its_operators() -> None:
    """Without what an engine adds: 80 layers of four products, two all-reduces, attention."""
    bare = Engine(step_s=0, row_s=0, host_step_s=0, host_row_s=0, layer_s=0, kernel=1)
    h100, cost = tables(), model(engine=bare)
    products = [h100.gemm("fp8", n, k) for n, k in
                ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168))]  # fmt: skip
    head = h100.gemm("bfloat16", 32064, 8192)
    reduce = h100.curve("all_reduce", (4,))
    assert head is not None and reduce is not None
    kernels = sum(p.curve(16) for p in products if p is not None) + 2 * reduce(16 * 8192)
    (attention,) = [c for b, c in h100.by_batch("decode_attention", ("bfloat16", 16, 2, 128, 0))
                    if b == 16]  # fmt: skip
    least = 80 * (kernels + attention(1024)) + head.curve(16)
    assert least < cost.batch([(1, 1023)] * 16) < 1.1 * least


def test_the_host_works_beside_the_accelerator_or_before_it() -> None:
    beside, before = model(asynchronous=True), model(asynchronous=False)
    e = Engine()
    extra = e.host_step_s + 64 * e.host_row_s
    rows = [(1, 4095)] * 64
    assert before.batch(rows) == pytest.approx(beside.batch(rows) + extra)
    slow = model(engine=Engine(host_step_s=1.0))
    assert slow.batch([(1, 1)]) == pytest.approx(1.0 + e.host_row_s)


def test_a_chunk_costs_what_is_new_in_it() -> None:
    cost = model()
    whole = cost.batch([(8192, 0)])
    halves = cost.batch([(4096, 0)]) + cost.batch([(4096, 4096)])
    assert cost.batch([(4096, 4096)]) > cost.batch([(4096, 0)])
    assert whole < halves < 1.2 * whole
    mixed = cost.batch([(512, 0)] + [(1, 4096)] * 32)
    assert max(cost.batch([(512, 0)]), cost.batch([(1, 4096)] * 32)) < mixed


def test_copied_attention_has_its_share_of_the_sequences() -> None:
    one, four = (model("minimax-m2.5", 4, hardware="h200", gemm="fp8_block", ep=4, dp=dp)
                 for dp in (1, 4))  # fmt: skip
    grown = [m.iteration_seconds(64, 64 * 8192) - m.iteration_seconds(64, 64) for m in (one, four)]
    assert 0.3 < grown[1] / grown[0] < 3
    assert kv_tokens(shape_of(ModelSpec(name="minimax-m2.5")), HARDWARE["h200"], 4, 1,
                     MeasuredCost(gemm="fp8_block", ep=4, dp=4), 0.9) > 100_000  # fmt: skip


def test_windows_bound_what_decode_reads() -> None:
    """gpt-oss: half of its layers see 128 positions."""
    half = model("gpt-oss-120b", 1, hardware="h200", gemm="bfloat16", moe="w4a16_mxfp4")
    shape = shape_of(ModelSpec(name="gpt-oss-120b"))
    assert (shape.window, shape.global_layers, shape.layers) == (128, 18, 36)
    all_layers = shape.model_copy(update={"window": None})
    full = Measured(all_layers, HARDWARE["h200"], 1, 1,
                    MeasuredCost(moe="w4a16_mxfp4"), load_tables("h200"))  # fmt: skip
    grown = [m.iteration_seconds(32, 32 * 32768) - m.iteration_seconds(32, 32 * 256)
             for m in (half, full)]  # fmt: skip
    assert grown[0] == pytest.approx(grown[1] / 2, rel=0.05)


# --- what is said of it ---------------------------------------------------------------------------


def sources(cost: Measured) -> dict[str, Source]:
    return {part.operator: part.source for part in cost.parts}


def test_each_operator_says_how_it_was_found() -> None:
    said = sources(model())
    assert said["qkv"] is said["all-reduce"] is said["decode attention"] is Source.MEASURED
    assert said["down"] is Source.INTERPOLATED or said["gate and up"] is Source.INTERPOLATED
    assert sources(model(tp=1))["head"] is Source.OUTSIDE, "a vocabulary beyond the widest product"


def test_without_tables_everything_is_a_roofline() -> None:
    said = sources(model(hardware="a40"))
    assert set(said.values()) == {Source.ROOFLINE}
    bare = Engine(step_s=0, row_s=0, host_step_s=0, host_row_s=0, layer_s=0, kernel=1)
    shape, hardware = shape_of(ModelSpec(name="llama-3-70b")), HARDWARE["h100"]
    ours = Measured(shape, hardware, 4, 1, MeasuredCost(), None, bare)
    other = Roofline(shape, hardware.model_copy(update={"step_overhead_s": 0.0}), 4, 1)
    for rows in ([(1, 1023)] * 8, [(4096, 0)]):
        assert ours.batch(rows) == pytest.approx(other.batch(rows), rel=0.15)


def test_unmeasured_experts_take_the_efficiency_of_the_nearest() -> None:
    ops = Operators(tables("b200"), HARDWARE["b200"])
    shape = Experts("fp8_block", 3072, 1536, 8, 256, 8, 1)  # measured at tp 4, not at 8
    eight = ops.experts("experts", shape, "power_law_1.2")
    assert ops.parts[-1].source is Source.OUTSIDE
    four = ops.experts("experts", shape._replace(tp=4), "power_law_1.2")
    assert ops.parts[-1].source is Source.MEASURED
    assert 0.4 * four.seconds(4096) < eight.seconds(4096) < four.seconds(4096)


def test_shares_say_how_the_time_of_an_iteration_is_found() -> None:
    """All from tables inside their range but the odd projection; past it `outside` grows; without
    tables everything is a roofline."""
    shares = model(tp=4).shares([(1, 1023)] * 8)
    known = shares.measured + shares.interpolated
    assert 0.8 < known < 1 and shares.roofline > 0, "what moves between operators has no table"
    parts = (shares.measured, shares.interpolated, shares.outside, shares.roofline)
    assert sum(parts) == pytest.approx(1)
    far = model(tp=4).shares([(1, 4_000_000)] * 8)
    assert far.outside > shares.outside + 0.3
    bare = Measured(shape_of(ModelSpec(name="llama-3-70b")), HARDWARE["h100"], 4, 1,
                    MeasuredCost(), None)  # fmt: skip
    assert bare.shares([(512, 0), (1, 100)]).roofline == 1.0


def test_a_norm_over_all_heads_costs_an_all_reduce_more() -> None:
    """MiniMax's; nothing when attention is on one accelerator."""
    shape = shape_of(ModelSpec(name="minimax-m2.5"))
    plain = shape.model_copy(update={"architecture": "llama"})
    cost = MeasuredCost(gemm="fp8_block")

    def step(which: ModelShape, tp: int) -> float:
        return Measured(which, HARDWARE["h200"], tp, 1, cost, tables("h200")).batch([(1, 9)] * 8)

    assert step(shape, 1) == step(plain, 1)
    more = (step(shape, 4) - step(plain, 4)) / shape.layers
    assert 8e-6 < more < 30e-6


# --- pools ----------------------------------------------------------------------------------------


def deployment(**pool: object) -> Deployment:
    spec = {"name": "p", "role": "mixed", "count": 1, "tp": 4, "cost": "measured"} | pool
    return Deployment(models=(ModelSpec(name="llama-3-70b"),),
                      pools=(PoolSpec.model_validate(spec),))  # fmt: skip


def test_a_pool_asks_for_tables_by_name() -> None:
    d = deployment()
    cost = step_model(d, d.pools[0], load_tables)
    assert isinstance(cost, Measured) and sources(cost)["qkv"] is Source.MEASURED
    alone = step_model(d, d.pools[0])
    assert isinstance(alone, Measured) and sources(alone)["qkv"] is Source.ROOFLINE
    fp8 = deployment(cost={"kind": "measured", "gemm": "fp8"})
    assert step_model(fp8, fp8.pools[0], load_tables).decode_line(8) < cost.decode_line(8)


def test_memory_counts_weights_in_their_format() -> None:
    shape = shape_of(ModelSpec(name="llama-3-70b"))
    half = weight_bytes(shape, MeasuredCost(gemm="fp8"), 4) / weight_bytes(shape, MeasuredCost(), 4)
    assert 0.5 < half < 0.53, "embedding and head stay in bfloat16"
    d = deployment(cost={"kind": "measured", "gemm": "fp8", "kv": "fp8"})
    plain = deployment()
    held, before = (capacity_of(x, x.pools[0]).kv_blocks for x in (d, plain))
    assert held > 2 * before
    with pytest.raises(ConfigError, match="no room for KV"):
        small = deployment(tp=1)
        capacity_of(small, small.pools[0])
