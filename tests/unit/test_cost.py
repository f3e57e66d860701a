"""Step times against hand-computed rooflines, known magnitudes and the fitted formula."""

import pytest

from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.specs import (
    HARDWARE,
    Deployment,
    HardwareSpec,
    ModelShape,
    ModelSpec,
    PoolSpec,
)
from kvasir.core.specs.deployment import FittedCost
from kvasir.cost.catalog import shape_of
from kvasir.cost.pools import capacity_of, step_model
from kvasir.cost.step import (
    HOP_S,
    Fitted,
    Roofline,
    StepCost,
    StepModel,
    Work,
    kv_blocks,
    kv_shards,
    work_of,
)

H100 = HARDWARE["h100"]
# Weights per layer: attention 2*8*8 + 2*8*4 = 192, MLP 3*8*16 = 384; head 32*8 = 256.
# KV per token: 2 layers * 2 * 1 head * 4 * 2 B = 32 B.
SMALL = ModelShape(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=32)
# 1000 flops and 1000 bytes a second, no overhead, everything reached.
UNIT = HardwareSpec(
    name="unit", flops=1e3, memory_bytes=10**6, memory_bandwidth=1e3, nvlink_bandwidth=100.0,
    nic_bandwidth=1.0, flops_efficiency=1.0, bandwidth_efficiency=1.0, step_overhead_s=0.0,
)  # fmt: skip


def bundled(name: str) -> ModelShape:
    return shape_of(ModelSpec(name=name))


def llama(tp: int = 4, pp: int = 1) -> Roofline:
    return Roofline(bundled("llama-3-70b"), H100, tp, pp)


# --- by hand --------------------------------------------------------------------------------------


def test_one_decode_row_reads_every_weight_and_its_context() -> None:
    """(2 * (192 + 384) + 256) * 2 B = 2816 B; flops are as many. Context: 32 B a position, against
    4 * 2 layers * 2 heads * 4 = 64 flops: the flops count."""
    cost = Roofline(SMALL, UNIT, 1, 1)
    assert cost.decode_line(1) == pytest.approx((2.816, 0.064))
    assert cost.batch([(1, 9)]) == pytest.approx(2.816 + 10 * 0.064)
    thin = UNIT.model_copy(update={"flops": 1e9})
    assert Roofline(SMALL, thin, 1, 1).decode_line(5) == pytest.approx((2.816, 0.032))


def test_prefill_takes_its_flops_and_the_head_only_one_position_a_row() -> None:
    """10 tokens: 2 * 2 * 576 * 10 = 23,040 flops, head 2 * 256 once, attention 64 * (1 + ... + 10).
    The head's 512 bytes take as long as its flops."""
    cost = Roofline(SMALL, UNIT, 1, 1)
    assert cost.batch([(10, 0)]) == pytest.approx(23.040 + 0.512 + 0.064 * 55)
    assert cost.batch([(10, 7)]) == pytest.approx(23.040 + 0.512 + 0.064 * (55 + 70))
    thin = UNIT.model_copy(update={"flops": 1e9})
    assert Roofline(SMALL, thin, 1, 1).batch([(10, 7)]) == pytest.approx(2.816 + 17 * 0.032)


def test_tensor_parallelism_divides_and_adds_all_reduces() -> None:
    """2 layers * 2 all-reduces of 8 * 2 B a token, each 2 (tp - 1) / tp over 100 B/s."""
    one, two = Roofline(SMALL, UNIT, 1, 1), Roofline(SMALL, UNIT, 2, 1)
    reduce_s = 4 * (16 / 100 + HOP_S)
    base_s, per_context_s = two.decode_line(1)
    assert base_s == pytest.approx(one.decode_line(1).base_s / 2 + reduce_s)
    assert per_context_s == pytest.approx(0.032), "64 flops on two, or 32 B copied on both"
    assert two.batch([(10, 0)]) == pytest.approx(
        one.batch([(10, 0)]) / 2 + 4 * (10 * 16 / 100 + HOP_S)
    )


def test_pipeline_stages_follow_one_another_with_a_hop_between() -> None:
    one, three = Roofline(SMALL, UNIT, 1, 1), Roofline(SMALL, UNIT, 1, 3)
    assert three.batch([(10, 0)]) == pytest.approx(
        one.batch([(10, 0)]) + 2 * (10 * 16 / 100 + HOP_S)
    )


def test_experts_are_read_when_a_token_picks_them() -> None:
    """4 experts, 1 a token, and one always on. Expert and shared MLP: 384 weights a layer."""
    shape = SMALL.model_copy(
        update={"experts": 4, "experts_per_token": 1, "shared_expert_intermediate": 16}
    )
    thin = UNIT.model_copy(update={"flops": 1e9})
    cost = Roofline(shape, thin, 1, 1)

    def base_s(experts: float) -> float:
        return 2e-3 * (2 * (192 + 384 + experts * 384) + 256)

    assert cost.decode_line(1).base_s == pytest.approx(base_s(1))
    assert cost.decode_line(2).base_s == pytest.approx(base_s(4 * (1 - 0.75**2)))
    assert cost.decode_line(1000).base_s == pytest.approx(base_s(4))
    busy = Roofline(shape, UNIT, 1, 1)
    assert busy.batch([(100, 0)]) == pytest.approx(  # compute: one expert and the shared one
        2 * 2 * (192 + 2 * 384) * 100 / 1e3 + 0.512 + 0.064 * 5050
    )


def test_latent_kv_is_copied_to_every_rank() -> None:
    deepseek = bundled("deepseek-v3")
    assert kv_shards(deepseek, 8) == 1 and kv_shards(bundled("llama-3-70b"), 16) == 8
    thin = H100.model_copy(update={"flops": 1e18})
    lines = [Roofline(deepseek, thin, tp, 1).decode_line(1) for tp in (1, 8)]
    assert lines[0].per_context_s == pytest.approx(lines[1].per_context_s)
    assert lines[0].per_context_s == pytest.approx(70_272 / (3.35e12 * 0.8))


def test_latent_attention_computes_in_its_own_dimensions() -> None:
    """Decode over the latent: 512 + 64 a head; prefill with keys of 192 and values of 128."""
    deepseek = bundled("deepseek-v3")
    slow = UNIT.model_copy(update={"memory_bandwidth": 1e12})
    cost = Roofline(deepseek, slow, 1, 1)
    assert cost.decode_line(1).per_context_s == pytest.approx(61 * 4 * 128 * 576 / 1e3)
    grown = cost.batch([(2, 1)]) - cost.batch([(2, 0)])  # two more pairs
    assert grown == pytest.approx(2 * 61 * 2 * 128 * (192 + 128) / 1e3)


def test_work_sums_are_exact_and_do_not_depend_on_chunks() -> None:
    assert work_of([(1, 7), (3, 2), (1, 0)]) == Work(5, 9, 5, (3 + 4 + 5))
    whole = work_of([(1000, 24)])
    parts = [work_of([(200, 24 + 200 * i)]) for i in range(5)]
    assert sum(p.prefill_pairs for p in parts) == whole.prefill_pairs
    assert sum(range(25, 1025)) == whole.prefill_pairs


# --- magnitudes -----------------------------------------------------------------------------------


def test_llama_3_70b_on_four_h100() -> None:
    """Weights alone are 13 ms a step; 8 Ki tokens are 1.1 PFLOP of linear layers."""
    cost = llama()
    assert 0.012 < cost.elapsed(8, 8 * 4096, 1) < 0.020
    assert 0.5 < cost.prefill_seconds(8192, 0, 8192) < 1.0
    assert cost.elapsed(64, 64 * 4096, 1) < 2 * cost.elapsed(1, 4096, 1), "batching pays"


def test_against_published_medians() -> None:
    """BLOOM-176B, TP 8, A100, prompt time (seed-systems reference, G10): within 30 %."""
    cost = Roofline(bundled("bloom-176b"), HARDWARE["a100"], 8, 1)
    for tokens, measured_s in ((512, 0.174), (1024, 0.288), (2048, 0.536)):
        assert cost.prefill_seconds(tokens, 0, 8192) == pytest.approx(measured_s, rel=0.3)


def test_prefill_seconds_is_the_sum_of_its_chunks() -> None:
    cost = llama()
    chunks = [(8192, 1000), (8192, 9192), (2616, 17384)]
    assert cost.prefill_seconds(20_000, 1000, 8192) == sum(cost.batch([c]) for c in chunks)
    assert cost.prefill_seconds(500, 500, 8192) == 0
    assert cost.prefill_seconds(8192, 4096, 8192) < cost.prefill_seconds(8192, 0, 8192)


def test_mixed_batches_cost_more_than_their_parts_alone_but_less_than_both() -> None:
    cost = llama()
    decode, prefill = [(1, 4096)] * 32, [(512, 0)]
    both = cost.batch(decode + prefill)
    assert max(cost.batch(decode), cost.batch(prefill)) < both
    assert both < cost.batch(decode) + cost.batch(prefill)


# --- closed forms ---------------------------------------------------------------------------------


def test_elapsed_and_its_inverse_by_hand() -> None:
    """base 0.1, 0.01 a position; 2 rows, context 10: 0.2, 0.22, 0.24 s."""
    cost = Fitted(FittedCost(overhead_s=0.06, per_token_s=0.02, per_context_s=0.01))
    assert [cost.iteration_seconds(2, 10, j) for j in range(3)] == pytest.approx([0.2, 0.22, 0.24])
    assert [cost.elapsed(2, 10, k) for k in range(4)] == pytest.approx([0, 0.2, 0.42, 0.66])
    found = [cost.steps_within(2, 10, s) for s in (-1.0, 0.0, 0.199, 0.21, 0.43, 0.65, 0.67)]
    assert found == [0, 0, 0, 1, 2, 2, 3]


def test_fitted_formula() -> None:
    cost = Fitted(
        FittedCost(overhead_s=1.0, per_token_s=0.1, per_attention_s=0.01, per_context_s=0.001)
    )
    assert cost.batch([(1, 99)]) == pytest.approx(1 + 0.1 + 0.1)
    assert cost.batch([(4, 10)]) == pytest.approx(1 + 0.4 + 0.01 * (11 + 12 + 13 + 14))
    assert cost.batch([(4, 10), (1, 99)]) == pytest.approx(1 + 0.5 + 0.5 + 0.1)
    assert cost.decode_line(3) == pytest.approx((1.3, 0.001))


def test_fitted_curve_rows_and_prompt_context() -> None:
    """Straight between two pairs, constant before the first, at the last slope after the last."""
    cost = Fitted(
        FittedCost(
            overhead_s=1.0, per_token_s=0.0, per_row_s=0.01, per_prompt_context_s=0.001,
            curve=((2, 5.0), (4, 6.0), (14, 16.0)),
        )
    )  # fmt: skip
    for batch, seconds in ((1, 5), (2, 5), (3, 5.5), (4, 6), (9, 11), (14, 16), (20, 22)):
        assert cost.decode_line(batch).base_s == pytest.approx(1 + seconds + 0.01 * batch), batch
    assert cost.batch([(3, 10)]) == pytest.approx(1 + 5.5 + 0.01 + 0.013)
    assert cost.batch([(3, 10), (1, 99)]) == pytest.approx(1 + 6 + 0.02 + 0.013)
    only = Fitted(FittedCost(overhead_s=0, per_token_s=0, curve=((8, 2.0),)))
    assert only.batch([(1, 0)]) == only.batch([(500, 0)]) == 2


@pytest.mark.parametrize("curve", [((4, 1.0), (4, 2.0)), ((4, 1.0), (8, 0.9)), ((0, 1.0),)])
def test_a_fitted_curve_grows(curve: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match=r"must grow|greater than 0"):
        FittedCost(curve=curve)


def test_steps_must_take_time() -> None:
    with pytest.raises(ConfigError, match="no time"):
        Fitted(FittedCost(overhead_s=0, per_token_s=0, per_context_s=1))


@pytest.mark.parametrize("cost", [llama(), Fitted(FittedCost(per_context_s=1e-8))])
def test_a_decode_batch_is_on_its_line(cost: StepModel) -> None:
    contexts = [17, 4000, 1, 250]
    rows = [(1, c - 1) for c in contexts]
    assert cost.batch(rows) == cost.elapsed(4, sum(contexts), 1)
    assert cost.cost(rows) == StepCost(cost.batch(rows), None)


def test_a_batch_needs_rows() -> None:
    with pytest.raises(AssertionError):
        llama().batch([])
    with pytest.raises(AssertionError):
        llama().decode_line(0)


# --- memory and choice ----------------------------------------------------------------------------


def test_kv_blocks_fill_what_weights_leave() -> None:
    """Llama-3-70B, TP 4: 77.3 GB usable - 35.3 GB weights over 81,920 B a token and GPU."""
    shape = bundled("llama-3-70b")
    usable = int(80 * 2**30 * 0.9)
    expected = (usable - shape.weight_bytes // 4) // (16 * 81_920)
    assert kv_blocks(shape, H100, 4, 1, 16, 0.9) == expected == 32_068
    assert kv_blocks(shape, H100, 8, 1, 512, 0.9) > 2 * kv_blocks(shape, H100, 4, 1, 512, 0.9)
    assert kv_blocks(shape, H100, 2, 4, 16, 0.9) == kv_blocks(shape, H100, 8, 1, 16, 0.9)
    first_stage = (usable - -(-shape.weight_bytes // 3)) // (16 * 27 * 4096)  # 27 of 80 layers
    assert kv_blocks(shape, H100, 1, 3, 16, 0.9) == first_stage


def test_weights_that_do_not_fit_say_both_numbers() -> None:
    with pytest.raises(ConfigError) as error:
        kv_blocks(bundled("llama-3-70b"), H100, 1, 1, 16, 0.9)
    assert "141.1 GB" in str(error.value) and "77.3 GB" in str(error.value)
    assert len(str(error.value).splitlines()) <= LINES_MAX


def test_a_pool_has_its_fitted_cost_or_the_roofline() -> None:
    fitted = PoolSpec(name="p", role="prefill", count=1, cost=FittedCost(overhead_s=0.5))
    plain = PoolSpec(name="d", role="decode", count=1, tp=4)
    deployment = Deployment(models=(ModelSpec(name="llama-3-70b"),), pools=(fitted, plain))
    assert step_model(deployment, fitted).decode_line(1).base_s == pytest.approx(0.5 + 20e-6)
    assert step_model(deployment, plain).decode_line(8) == llama().decode_line(8)


def test_capacity_is_what_is_given_or_what_fits() -> None:
    given = PoolSpec(name="p", role="prefill", count=1, kv_blocks=77)
    fits = PoolSpec(name="d", role="decode", count=1, tp=4)
    model = ModelSpec(name="llama-3-70b", max_context=131072)
    deployment = Deployment(models=(model,), pools=(given, fits))
    assert capacity_of(deployment, given).kv_blocks == 77
    capacity = capacity_of(deployment, fits)
    assert (capacity.kv_blocks, capacity.block_size) == (32_068, 16)
    assert (capacity.kv_token_bytes, capacity.context_max) == (327_680, 131072)
