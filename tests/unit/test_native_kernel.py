"""The compiled kernel gives what attention is, computed in float64: over any blocks, windows,
chunks and heads; and it is never asked for what lies outside the cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvasir.core.errors import ModelError  # noqa: E402
from kvasir.engine.attention import LayerCache, PagedBatch, Span  # noqa: E402
from kvasir.engine.narrow import pack, unpack  # noqa: E402
from kvasir.engine.native import build as builder  # noqa: E402
from kvasir.engine.native.kernel import Kernel, Plan, Seen, kernel_of  # noqa: E402
from kvasir.engine.steps import BlockTable  # noqa: E402
from tests.native import MACHINES, kernel  # noqa: E402

SIZE, BLOCKS = 16, 128
SLOTS = SIZE * BLOCKS
# Positions before, and of a span itself: single tokens and chunks around blocks and tiles of 64.
SPANS = ((0, 1), (0, 5), (63, 1), (64, 1), (65, 2), (200, 1), (37, 70), (0, 130), (300, 9), (15, 1))
SHAPES = ((8, 4, 64), (7, 1, 128), (2, 2, 96), (16, 1, 32), (4, 2, 256))  # heads, KV heads, size
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # outputs are about 1


class Case(NamedTuple):
    query: Any
    key: Any
    value: Any
    seen: list[Seen]


def case_of(shape: tuple[int, int, int], dtype: Any, spans: Sequence[tuple[int, int]]) -> Case:
    """Scattered blocks; queries that are a part of a larger tensor, as the engine's are; keys of
    some heads of a wider cache; and NaN in every slot that nobody may read."""
    heads, kv_heads, dim = shape
    torch.manual_seed(0)
    free = list(range(BLOCKS))
    Random(0).shuffle(free)
    places = [0, *accumulate(count for _, count in spans)]
    wide = torch.randn(SLOTS, kv_heads + 2, dim).to(dtype)
    key, value = wide[:, 1 : 1 + kv_heads], torch.randn(SLOTS, kv_heads, dim).to(dtype)
    seen, read = [], torch.zeros(SLOTS, dtype=torch.bool)
    for at, (start, count) in zip(places, spans, strict=False):
        blocks = [free.pop() for _ in range(-(-(start + count) // SIZE))]
        seen.append(Seen(at, start, count, blocks))
        read[slots_of(seen[-1])] = True
    wide[~read], value[~read] = torch.nan, torch.nan
    query = torch.randn(places[-1], heads + 3, dim).to(dtype)[:, :heads] * 2
    return Case(query, key, value, seen)


def slots_of(one: Seen) -> list[int]:
    reach = one.fixed or one.start + one.count
    return [one.blocks[p // SIZE] * SIZE + p % SIZE for p in range(reach)]


def expected(
    case: Case, window: int | None = None, softcap: float | None = None
) -> tuple[Any, Any]:
    """Outputs and logarithms of the sums of exponentials, in float64."""
    query, key, value = (one.double() for one in case[:3])
    out, lse = torch.zeros_like(query), query.new_zeros(query.shape[:2])
    shared = query.shape[1] // key.shape[1]
    for one in case.seen:
        slots, rows = slots_of(one), slice(one.at, one.at + one.count)
        k, v = (plane[slots].repeat_interleave(shared, 1) for plane in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[rows], k) * query.shape[2] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if one.fixed is None:
            own = torch.arange(one.start, one.start + one.count)[:, None]
            other = torch.arange(len(slots))[None]
            hidden = (other > own) | (other <= own - (window or len(slots)))
            scores.masked_fill_(hidden, float("-inf"))
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        lse[rows] = scores.logsumexp(-1).T
    return out, lse


def attended(
    of: Kernel, case: Case, window: int | None = None, softcap: float | None = None
) -> tuple[Any, Any]:
    out = torch.full(case.query.shape, 9.0, dtype=case.query.dtype)
    lse = torch.full(out.shape[:2], 9.0)
    plan = Plan(case.seen, SIZE, SLOTS, len(out), window)
    of.attend(plan, case.query, case.key, case.value, out, None, softcap, lse)
    return out, lse


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(machine: str, dtype: Any, shape: tuple[int, int, int]) -> None:
    case = case_of(shape, dtype, SPANS)
    for window, softcap in ((None, None), (20, None), (100, None), (None, 30.0)):
        out, lse = attended(kernel(machine), case, window, softcap)
        right, right_lse = expected(case, window, softcap)
        assert (out - right).abs().max() < NEAR[dtype], (window, softcap)
        assert (lse - right_lse).abs().max() < 1e-3 * NEAR[dtype] ** 0.5, (window, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_that_rows_see_whole(dtype: Any) -> None:
    case = case_of((8, 4, 64), dtype, [(100, 1), (150, 7), (130, 1)])
    seen = [replace(one, start=0, fixed=100 - 20 * i) for i, one in enumerate(case.seen)]
    case = case._replace(seen=seen)
    out, lse = attended(kernel(), case)
    right, right_lse = expected(case)
    assert (out - right).abs().max() < NEAR[dtype] and (lse - right_lse).abs().max() < 1e-4


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [2, 16])
def test_narrow_keys_and_values(machine: str, dtype: Any, group: int) -> None:
    """int8 with scales beside the values: the same as over what they stand for."""
    case = case_of((2 * group, 2, 64), dtype, SPANS)
    planes = [torch.nan_to_num(one) for one in (case.key, case.value)]
    kept = [pack(plane, "int8") for plane in planes]
    whole = [unpack(plane, "int8", dtype) for plane in kept]
    out, _ = attended(kernel(machine), case._replace(key=kept[0], value=kept[1]))
    right, _ = expected(case._replace(key=whole[0], value=whole[1]))
    assert (out - right).abs().max() < NEAR[dtype]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_for_bit_in_any_company(machine: str, dtype: Any) -> None:
    case = case_of((8, 4, 64), dtype, SPANS)
    together, _ = attended(kernel(machine), case)
    for one in case.seen:
        alone, _ = attended(kernel(machine), case._replace(seen=[one]))
        rows = slice(one.at, one.at + one.count)
        assert torch.equal(alone[rows], together[rows])


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_for_bit_in_any_chunks(dtype: Any, window: int | None) -> None:
    """Chunks of two tokens and more: single tokens are summed in another order."""
    case = case_of((8, 4, 64), dtype, [(0, 300)])
    whole, _ = attended(kernel(), case, window)
    for chunk in (2, 7, 64, 150):
        starts = range(0, 300, chunk)
        seen = [Seen(p, p, min(chunk, 300 - p), case.seen[0].blocks) for p in starts]
        assert all(one.count > 1 for one in seen)
        chunked, _ = attended(kernel(), case._replace(seen=seen), window)
        assert torch.equal(chunked, whole), chunk


def test_threads_change_nothing() -> None:
    case = case_of((8, 4, 64), torch.float32, SPANS)
    single, _ = attended(kernel(), case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several, _ = attended(kernel(), case)
        one = case._replace(seen=case.seen[5:6])  # fewer spans than threads: heads apart
        alone, _ = attended(kernel(), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(several, single)
    at = case.seen[5].at
    assert torch.equal(alone[at], single[at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_and_far_ones(dtype: Any) -> None:
    """Scores of some hundreds overflow no exponential; what is out of sight weighs nothing."""
    case = case_of((8, 4, 64), dtype, [(200, 1), (0, 150)])
    case = case._replace(query=case.query * 40)
    out, _ = attended(kernel(), case)
    assert torch.isfinite(out).all()
    assert (out - expected(case)[0]).abs().max() < 5 * NEAR[dtype]


# --- what a batch asks ---------------------------------------------------------------------------


def table_of(blocks: list[int]) -> BlockTable:
    table = BlockTable()
    table.extend(blocks)
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_the_same_batch_by_torch(
    dtype: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested shared prefixes, chunks and rows for themselves: written, then attended."""
    torch.manual_seed(0)
    prefix, deeper = list(range(17)), list(range(20, 37))
    tables = [[*prefix, *deeper, 40 + i] for i in range(4)] + [[*prefix, 50 + i] for i in range(3)]
    spans = [Span(len(one) * SIZE - 3 - i, 1, table_of(one)) for i, one in enumerate(tables)]
    spans.insert(2, Span(20, 30, table_of(list(range(60, 64)))))
    spans.append(Span(7, 1, table_of([70])))
    tokens = sum(span.count for span in spans)
    cached = [torch.randn(SLOTS, 2, 32).to(dtype) for _ in range(2)]
    query, key, value = (torch.randn(tokens, heads, 32).to(dtype) for heads in (4, 2, 2))
    attend, calls = Kernel.attend, []
    monkeypatch.setattr(Kernel, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k))
    outs, counts = [], []
    for which in (None, kernel()):
        caches = [LayerCache(*(plane.clone() for plane in cached))]
        batch = PagedBatch(caches, SIZE, spans, lambda _: None, kernel=which)
        outs.append(batch.attend(0, query, key, value, None, window))
        counts.append((batch.rows_shared, len(calls)))
    # Of the kernel one call for rows for themselves, and one for each level of what is shared.
    assert counts == ([(7, 0), (7, 4)] if window is None else [(0, 0), (0, 1)])
    assert (outs[0] - outs[1]).abs().max() < NEAR[dtype]


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Seen(0, 0, 17, [3]), "beyond the block table"),
        (Seen(0, 16, 1, [3]), "beyond the block table"),
        (Seen(0, 0, 1, [3], fixed=17), "beyond the block table"),
        (Seen(0, 0, 1, [BLOCKS]), "a block not in"),
        (Seen(0, 0, 1, [-1]), "a block not in"),
        (Seen(0, 0, 0, [3]), "nothing to see"),
        (Seen(0, -1, 1, [3]), "nothing to see"),
        (Seen(0, 0, 1, [3], fixed=0), "nothing to see"),
        (Seen(19, 0, 2, [3]), "rows not in the batch"),
        (Seen(-1, 0, 2, [3]), "rows not in the batch"),
    ],
)
def test_nothing_outside_is_asked_for(one: Seen, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        Plan([Seen(0, 0, 1, [0]), one], SIZE, SLOTS, 20, None)


def test_other_tensors_than_planned_are_refused() -> None:
    case = case_of((4, 2, 32), torch.float32, [(5, 1)])
    plan = Plan(case.seen, SIZE, SLOTS, 1, None)
    out = torch.empty(1, 4, 32)
    for query, key, value, to in (
        (case.query, case.key[:-1], case.value[:-1], out),
        (case.query, case.key[:, :1], case.value, out),
        (case.query.repeat(2, 1, 1), case.key, case.value, out.repeat(2, 1, 1)),
        (case.query, case.key, case.value, out.bfloat16()),
        (case.query, case.key.transpose(1, 2), case.value.transpose(1, 2), out),
    ):
        with pytest.raises(AssertionError):
            kernel().attend(plan, query, key, value, to, None)


@pytest.mark.parametrize(
    ("heads", "dim", "dtype", "narrow", "taken"),
    [
        (8, 64, torch.float32, None, True), (8, 16, torch.float32, None, True),
        (8, 256, torch.bfloat16, None, True), (8, 64, torch.bfloat16, "int8", True),
        (8, 16, torch.bfloat16, None, False), (8, 80, torch.bfloat16, None, False),
        (8, 512, torch.float32, None, False), (8, 64, torch.float16, None, False),
        (8, 64, torch.float32, "fp8", False), (3, 64, torch.float32, None, False),
    ],
)  # fmt: skip
def test_what_it_takes(heads: int, dim: int, dtype: Any, narrow: Any, taken: bool) -> None:
    width = dim if narrow is None else dim + 2
    plane = torch.empty(16, 2, width, dtype=dtype if narrow is None else torch.uint8)
    assert kernel().takes(torch.empty(1, heads, dim, dtype=dtype), plane, narrow) is taken


# --- building ------------------------------------------------------------------------------------


def test_nothing_is_built_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_CACHE", str(tmp_path))
    assert kernel_of(None) is None and kernel_of(False) is None
    with pytest.raises(ModelError, match="not built") as raised:
        kernel_of(True)
    assert builder.COMMAND in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_built_one_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_CACHE", str(tmp_path))
    built = kernel().path
    path = builder.library()
    assert path.name == built.name and path.parent == tmp_path / "native"
    path.parent.mkdir()
    path.write_bytes(built.read_bytes())
    found = kernel_of(None)
    assert found is not None and found.path == path and builder.build() == path
    assert kernel_of(False) is None
    monkeypatch.setattr(builder, "FLAGS", (*builder.FLAGS, "-g"))
    assert kernel_of(None) is None  # of other flags


@pytest.mark.parametrize(
    ("compiler", "said"), [("", "needs a C\\+\\+ compiler"), ("false", "could not compile")]
)
def test_without_a_compiler_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, said: str
) -> None:
    monkeypatch.setenv("KVASIR_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "" if not compiler else os.environ["PATH"])
    with pytest.raises(ModelError, match=said) as raised:
        builder.build()
    assert len(str(raised.value).splitlines()) <= 5
    assert kernel_of(None) is None
