"""Attention of rows whose contexts begin with the same blocks (Hydragen, arXiv 2402.05099, section
3): the common part once, with all of their queries together, what follows row by row, merged by
log-sum-exp. Knows block numbers and tensors; must not know caches, requests or keys.

Groups nest: rows that share a system prompt may share a document after it, four by four.

    blocks of a  | 7 8 9 | 12 13 | 20        7 8 9 is read once for a, b and c,
    blocks of b  | 7 8 9 | 12 13 | 30        12 13 once for a and b,
    blocks of c  | 7 8 9 | 40                20, 30 and 40 each for its own row
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch

ROWS_MIN: Final = 4  # fewer rows, or fewer tokens, do not pay for the merge
TOKENS_MIN: Final = 256


class Branch(NamedTuple):
    """`rows` read blocks [first, last) of their tables together: they are the same ones. What
    follows is in `below`, whose rows in order are `rows`. A leaf is one row up to its end."""

    rows: tuple[int, ...]
    first: int
    last: int | None
    below: tuple[Branch, ...] = ()


class Part(NamedTuple):
    """Attention over a part of the context: `out` [rows, heads, head_dim], normalised within the
    part, and `lse` [rows, heads], the float32 logarithm of its sum of exponentials."""

    out: torch.Tensor
    lse: torch.Tensor


Read = Callable[[Branch], tuple[torch.Tensor, torch.Tensor]]


def branches_of(tables: Mapping[int, list[int]], block_size: int) -> tuple[Branch, ...]:
    """How rows share. `tables`: the blocks that each row has in full, its own last one left out.

    Rows that share nothing are leaves from block 0.
    """
    return _branches(list(tables), tables, 0, -(-TOKENS_MIN // block_size))


def _branches(
    rows: Sequence[int], tables: Mapping[int, list[int]], first: int, blocks_min: int
) -> tuple[Branch, ...]:
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row in rows:
        groups[tuple(tables[row][first : first + blocks_min])].append(row)
    found: list[Branch] = []
    for head, group in groups.items():
        if len(head) < blocks_min or len(group) < ROWS_MIN:
            found += [Branch((row,), first, None) for row in group]
            continue
        last = _common([tables[row] for row in group], first + blocks_min)
        below = _branches(group, tables, last, blocks_min)
        found.append(Branch(tuple(row for one in below for row in one.rows), first, last, below))
    return tuple(found)


def _common(tables: Sequence[list[int]], known: int) -> int:
    """How many leading blocks all tables have in common, `known` at least."""
    low, high = min(tables), max(tables)
    for at in range(known, min(len(low), len(high))):
        if low[at] != high[at]:
            return at
    return min(len(low), len(high))


def attend_branch(branch: Branch, query: torch.Tensor, read: Read, scale: float | None) -> Part:
    """Attention of the branch's rows, in their order, over all of their contexts.

    `query`: [batch rows, heads, head_dim]; `read(branch)`: K and V of the branch's own blocks,
    [1, kv_heads, length, head_dim] each.
    """
    own = _flash(query[list(branch.rows)], *read(branch), scale)
    if not branch.below:
        return own
    below = [attend_branch(one, query, read, scale) for one in branch.below]
    return merge(own, Part(torch.cat([p.out for p in below]), torch.cat([p.lse for p in below])))


def merge(a: Part, b: Part) -> Part:
    """Attention over both parts. With weights exp(lse): a / (a + b) is sigmoid(a - b)."""
    share = torch.sigmoid(a.lse - b.lse).unsqueeze(-1)
    out = torch.lerp(b.out.float(), a.out.float(), share).to(a.out.dtype)
    return Part(out, torch.logaddexp(a.lse, b.lse))


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> Part:
    """No mask: every query sees all of `key`. Heads and rows that share a KV head are its queries.

    torch's own `scaled_dot_product_attention` keeps the log-sum-exp to itself; this is what it
    calls on a CPU.
    """
    rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(rows, kv_heads, -1, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
    if rows == 1:  # few queries are quicker in float32, see engine.attention
        grouped, key, value = grouped.float(), key.float(), value.float()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped, key, value, scale=scale
    )
    return Part(
        out.to(query.dtype).view(kv_heads, rows, -1, dim).transpose(0, 1).reshape(rows, heads, dim),
        lse.view(kv_heads, rows, -1).transpose(0, 1).reshape(rows, heads),
    )
