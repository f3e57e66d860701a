"""Weights of 8 and 4 bits: how far off, and that rows do not depend on their neighbours."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")

from kvasir.engine.quant import GROUP, LEVELS, ROWS_MAX, Int4, Int8  # noqa: E402

OUT, IN = 90, 320  # fills neither the last tile of 16 nor the third group of 128


def weight_and_rows(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=rng) * 0.05
    bias, x = torch.randn(OUT, generator=rng), torch.randn(rows, IN, generator=rng)
    return weight.bfloat16(), bias.bfloat16(), x.bfloat16()


@pytest.mark.parametrize("rows", [1, 3, ROWS_MAX - 1, ROWS_MAX, 70])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("kind", "step"), [(Int8, 2 / 254), (Int4, 1 / LEVELS)])
def test_each_output_is_within_half_a_step_of_each_weight(
    kind: type[Int8 | Int4], step: float, rows: int, biased: bool
) -> None:
    """Rounding moves a weight by half a step of its group's range, and bfloat16 adds its own."""
    weight, bias, x = weight_and_rows(rows)
    got = kind(weight, bias if biased else None)(x).float()
    wide = weight.float()
    exact = x.float() @ wide.t() + (bias.float() if biased else 0)
    if kind is Int8:
        ranges = wide.abs().amax(1, keepdim=True).expand_as(wide)
    else:
        groups = list(wide.split(GROUP, dim=1))
        ranges = torch.cat([
            (p.amax(1, keepdim=True).clamp(min=0) - p.amin(1, keepdim=True).clamp(max=0))
            .expand_as(p) for p in groups
        ], dim=1)  # fmt: skip
    rounding = x.float().abs() @ (ranges * step / 2).t()
    own = 2**-7 * (x.float().abs() @ wide.abs().t() + ranges.amax() + exact.abs())
    assert bool(((got - exact).abs() <= rounding + own).all())
    assert bool((got != exact).any()), "nothing was rounded"


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_a_row_is_the_same_beside_others(kind: type[Int8 | Int4]) -> None:
    weight, _, x = weight_and_rows(ROWS_MAX - 1)
    layer = kind(weight, None)
    assert torch.allclose(layer(x)[:1].float(), layer(x[:1]).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_a_row_of_zeros_stays_one(kind: type[Int8 | Int4]) -> None:
    weight, _, x = weight_and_rows(2)
    weight[5] = 0
    assert torch.equal(kind(weight, None)(x)[:, 5], torch.zeros(2).bfloat16())
