"""Attention of rows of one token over paged KV: Triton kernels where Triton is, else plain torch.

Knows tensors and devices; must not know batches, layers or requests.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Final

import torch

SPLITS_MAX: Final = 64  # a merge reads them at once, as one tile
DOT_ROWS_MIN: Final = 16  # rows of the smallest matrix product that every tensor core has
PROCESSORS_REHEARSED: Final = 4  # where there is no GPU to count them


def splits_of(rows: int, kv_heads: int, processors: int) -> int:
    """Shares that each row's positions are cut into: a power of two, so that about two programs a
    multiprocessor run, never more. Does not look at lengths, which a captured graph cannot know."""
    wanted = max(1, 2 * processors // (rows * kv_heads))
    return min(1 << wanted.bit_length() - 1, SPLITS_MAX)


def tile_of(dim: int, itemsize: int) -> int:
    """Positions that a program reads at once, so that two stages of K and V fit into the 99 KiB of
    shared memory that small cards have."""
    return 64 if dim * itemsize <= 256 else 32 if dim * itemsize <= 512 else 16


@cache
def triton_runs(kind: str) -> bool:
    """Whether Triton's kernels run on this kind of device; on a CPU its interpreter runs them, if
    TRITON_INTERPRET is 1."""
    if find_spec("triton") is None:
        return False
    return kind == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def processors_of(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS_REHEARSED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def paged_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """[rows, heads, head_dim] in the dtype of `query`, which is [rows, heads, head_dim] too.

    Row i sees the first `lengths[i]` positions (int32 [rows], each at least 1) of the blocks
    `tables[i]` (int32 [rows, blocks]) in `key` and `value` [slots, kv_heads, head_dim]; of these
    the last `window`. `splits`: a power of two up to SPLITS_MAX; chosen by `splits_of` without.
    """
    run = _triton_decode if triton_runs(query.device.type) else reference_decode
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return run(query, key, value, tables, lengths, block_size, scale, window, softcap, splits)


def _triton_decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: torch.Tensor,
    lengths: torch.Tensor, block_size: int, scale: float, window: int | None,
    softcap: float | None, splits: int | None,
) -> torch.Tensor:  # fmt: skip
    from kvasir.engine.cuda import kernels

    rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    group, dim_pad = heads // kv_heads, 1 << (dim - 1).bit_length()
    if query.stride(2) != 1 or query.stride(1) != dim:
        query = query.contiguous()
    if splits is None:
        splits = splits_of(rows, kv_heads, processors_of(query.device))
    out = query.new_empty(rows, heads, dim)
    parts = out
    if splits > 1:
        parts = query.new_empty(rows, heads, splits, dim, dtype=torch.float32)
    lse = query.new_empty(rows, heads, splits, dtype=torch.float32)
    kernels.decode_shares[(rows, kv_heads, splits)](
        query, key, value, tables, lengths, parts, lse, scale, softcap or 1.0,
        query.stride(0), key.stride(0), tables.stride(0),
        GROUP=group, GROUP_PAD=1 if group == 1 else max(DOT_ROWS_MIN, _power_of_two(group)),
        DIM=dim, DIM_PAD=dim_pad, BLOCK=block_size, TILE=tile_of(dim_pad, key.element_size()),
        SPLITS=splits, WINDOW=window or 0, CAPPED=softcap is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        kernels.decode_merge[(rows * heads,)](
            parts, lse, out, DIM=dim, DIM_PAD=dim_pad, SPLITS=splits, num_warps=4
        )
    return out


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def reference_decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: torch.Tensor,
    lengths: torch.Tensor, block_size: int, scale: float, window: int | None,
    softcap: float | None, splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The same in plain torch, in float32: what the kernels are held to, and what runs without
    Triton. Gathers the whole width of `tables` for every row."""
    rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    positions = torch.arange(tables.shape[1] * block_size, device=query.device)
    slots = tables.long()[:, positions // block_size] * block_size + positions % block_size
    seen = positions < lengths.unsqueeze(1)
    if window is not None:
        seen &= positions >= lengths.unsqueeze(1) - window
    k, v = (plane[slots].float() for plane in (key, value))  # [rows, positions, kv_heads, dim]
    grouped = query.float().reshape(rows, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("rhgd,rphd->rhgp", grouped, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    mixed = torch.einsum("rhgp,rphd->rhgd", scores.softmax(dim=-1), v)
    return mixed.reshape(rows, heads, dim).to(query.dtype)
