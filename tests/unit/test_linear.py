"""Packed linear layers: the same numbers as torch's own, from few compiled kernels."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import linear  # noqa: E402

from kvasir.engine.linear import linear_of, packs, rounded_rows  # noqa: E402


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17, 31, 33, 100, 257, 300])
def test_any_number_of_rows(rows: int) -> None:
    weight, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(rows, 40)
    found = linear_of(weight.clone(), bias)(x)
    torch.testing.assert_close(found, linear(x, weight, bias), rtol=1e-4, atol=1e-5)


def test_few_kernels_serve_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 8)
    if not packs(weight):
        pytest.skip("oneDNN packs nothing here")
    layer, seen = linear_of(weight, None), set[int]()
    run = layer._run  # type: ignore[attr-defined]
    layer._run = lambda x, *more: (seen.add(len(x)), run(x, *more))[1]  # type: ignore[attr-defined]
    for rows in range(1, 2049):
        layer(torch.zeros(rows, 8))
    assert len(seen) == 72
    assert all(rows <= rounded_rows(rows) <= 1.125 * rows for rows in range(1, 5000))
    assert [rounded_rows(rows) for rows in (1, 8, 15, 16)] == [1, 8, 15, 16]
