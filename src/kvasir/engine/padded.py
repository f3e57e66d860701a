"""Attention of all decode rows in one call, their KV gathered and padded to the longest. For
devices where starting a kernel costs more than padding; a CPU goes row by row. Knows tensors and
block tables; must not know models or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention


class Padded(NamedTuple):
    """Which rows of the batch, [rows]; the cache slots that each may read, [rows, longest]; and
    whether it may, [rows, 1, 1, longest]."""

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


def padded(
    rows: Sequence[int],
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    block_size: int,
    device: torch.device,
) -> Padded:
    """`rows[i]` of the batch sees the first `lengths[i]` positions of `tables[i]`."""
    longest = max(lengths)
    blocks_count = -(-longest // block_size)
    blocks = torch.tensor(
        [[*table[:blocks_count], *[0] * (blocks_count - len(table))] for table in tables],
        device=device,
    )
    positions = torch.arange(longest, device=device)
    slots = blocks[:, positions // block_size] * block_size + positions % block_size
    seen = positions < torch.tensor(lengths, device=device).unsqueeze(1)
    return Padded(torch.tensor(rows, device=device), slots, seen[:, None, None])


def attend_padded(
    of: Padded, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """[rows, heads, head_dim]. `query`: [tokens, heads, head_dim]; `key`, `value`: a layer's cache,
    [slots, kv_heads, head_dim]."""
    out = scaled_dot_product_attention(
        query[of.rows].unsqueeze(2), key[of.slots].transpose(1, 2),
        value[of.slots].transpose(1, 2), of.mask, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return out.squeeze(2)
