"""Rows that share leading blocks attend to them together, and get what they get alone."""

from __future__ import annotations

import os
from random import Random

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvasir.engine.attention import LayerCache, PagedBatch, Span  # noqa: E402
from kvasir.engine.shared import Branch, Part, branches_of, merge  # noqa: E402
from kvasir.engine.steps import BlockTable  # noqa: E402

SIZE = 16
LONG = 256 // SIZE  # blocks of the shortest prefix that counts


def leaf(row: int, first: int) -> Branch:
    return Branch((row,), first, None)


def blocks(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def test_torch_has_the_kernel_that_tells_the_log_sum_exp() -> None:
    query, kv = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 33, 16)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, lse = kernel(query, kv, kv, scale=0.3)
    expected = torch.logsumexp(query @ kv.transpose(2, 3) * 0.3, dim=-1)
    assert torch.allclose(lse, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "prefix", "grouped"),
    [(4, LONG, True), (3, LONG, False), (4, LONG - 1, False), (16, 3 * LONG, True)],
)
def test_enough_rows_and_tokens_make_a_group(rows: int, prefix: int, grouped: bool) -> None:
    tables = {row: blocks(0, prefix) + blocks(1000 + 10 * row, 2) for row in range(rows)}
    found = branches_of(tables, SIZE)
    if not grouped:
        assert found == tuple(leaf(row, 0) for row in range(rows))
        return
    every = tuple(range(rows))
    assert found == (Branch(every, 0, prefix, tuple(leaf(row, prefix) for row in every)),)


def test_the_whole_common_part_and_not_a_block_more() -> None:
    tables = {row: blocks(0, LONG + 5) for row in range(4)}
    tables[2] = [*blocks(0, LONG + 3), 77, 78]
    (branch,) = branches_of(tables, SIZE)
    assert (branch.first, branch.last) == (0, LONG + 3)


def test_groups_nest_and_strangers_stay_out() -> None:
    system, one, two = blocks(0, LONG), blocks(100, LONG), blocks(200, LONG)
    tables = {row: [*system, *(one if row % 2 else two), 900 + row] for row in range(8)}
    tables[20] = blocks(500, LONG)
    tables[21] = [*system, 800]
    group, stranger = branches_of(tables, SIZE)
    assert stranger == leaf(20, 0)
    assert sorted(group.rows) == [*range(8), 21] and group.last == LONG
    assert group.rows == tuple(row for below in group.below for row in below.rows)
    inner = [below for below in group.below if below.below]
    assert [sorted(below.rows) for below in inner] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert {(below.first, below.last) for below in inner} == {(LONG, 2 * LONG)}
    assert leaf(21, LONG) in group.below


def test_merging_parts_is_attention_over_both() -> None:
    query, kv = torch.randn(5, 3, 8), torch.randn(3, 60, 8)

    def part(low: int, high: int) -> Part:
        scores = torch.einsum("rhd,hld->rhl", query, kv[:, low:high])
        out = torch.einsum("rhl,hld->rhd", scores.softmax(-1), kv[:, low:high])
        return Part(out, scores.logsumexp(-1))

    whole, merged = part(0, 60), merge(part(0, 41), part(41, 60))
    assert torch.allclose(merged.out, whole.out, atol=1e-6)
    assert torch.allclose(merged.lse, whole.lse, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_attention_as_alone(kv_heads: int, dtype: str) -> None:
    """Decode rows of two documents under one system prompt, a stranger and a prefill chunk."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    cache = LayerCache(*(torch.randn(600 * SIZE, kv_heads, 8).to(kind) for _ in range(2)))
    tables = [
        [*blocks(0, LONG), *blocks(40 if row % 2 else 80, LONG + row % 2), 300 + 2 * row, 450 - row]
        for row in range(8)
    ]
    spans = [Span(2 * LONG * SIZE + SIZE + row, 1, table_of(t)) for row, t in enumerate(tables)]
    spans.insert(3, Span(20, 7, table_of(blocks(500, 3))))
    spans.append(Span(0, 1, table_of([520])))
    Random(1).shuffle(spans)
    tokens = sum(span.count for span in spans)
    query, key, value = (torch.randn(tokens, n, 8).to(kind) for n in (4, kv_heads, kv_heads))

    def attend(batch: list[Span]) -> torch.Tensor:
        mine = [i for i, span in enumerate(owners) if span in batch]
        paged = PagedBatch([cache], SIZE, batch, lambda layer: None)
        out = paged.attend(0, query[mine], key[mine], value[mine], 0.3, None)
        shared.append(paged.rows_shared)
        return out

    owners = [span for span in spans for _ in range(span.count)]
    shared: list[int] = []
    together = attend(spans)
    alone = torch.cat([attend([span]) for span in spans])
    assert shared == [8] + [0] * len(spans)
    noise = 1e-5 if dtype == "float32" else 0.02
    assert torch.allclose(together.float(), alone.float(), atol=noise)


def table_of(numbers: list[int]) -> BlockTable:
    table = BlockTable()
    table.extend(numbers)
    return table
