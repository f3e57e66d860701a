"""Intervals against published quantiles of Student's t, and tables that say what is not chance."""

from __future__ import annotations

import pytest

from kvasir.measure.intervals import interval, paired, quantile


@pytest.mark.parametrize(
    ("degrees", "t", "tolerance"),
    [(1, 12.7062, 1e-4), (2, 4.3027, 1e-4), (3, 3.1824, 1e-2), (4, 2.7764, 3e-3),
     (9, 2.2622, 1e-4), (29, 2.0452, 1e-4)],
)  # fmt: skip
def test_quantile(degrees: int, t: float, tolerance: float) -> None:
    assert quantile(degrees) == pytest.approx(t, abs=tolerance)


def test_interval_of_known_samples() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.half == pytest.approx(2.7764 * 1.5811 / 5**0.5, rel=1e-3)
    assert interval([7.0]).half is None and not interval([7.0]).apart


def test_pairs_see_what_means_do_not() -> None:
    base = [10.0, 20.0, 30.0]
    better = [9.0, 18.9, 29.1]
    assert paired(better, base).apart
    assert not interval([b - 20.0 for b in better]).apart
