"""Triton kernels of decode attention over paged KV. Knows addresses; no classes, no torch.

Flash-decoding (Dao, Haziza, Massa, Sizov, 2023): the positions that a row sees are cut into SPLITS
shares of whole tiles, each a program of its own with a softmax of its own; a second kernel weighs
the shares by their log-sum-exps. Query heads of one KV head are rows of one product, so K and V are
read once for all of them. Logarithms are to the base 2, which is what the hardware computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Both are read inside of kernels, which see constants only.
LOG2_E = tl.constexpr(1.4426950408889634)
NO = tl.constexpr(float("-inf"))


@triton.jit
def decode_shares(
    query, key, value, tables, lengths, out, lse, scale, cap,
    query_stride, slot_stride, table_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, kv_heads, SPLITS). `query`: [rows, kv_heads * GROUP, DIM]; `key`, `value`:
    [slots, kv_heads, DIM]; `tables`: int32 [rows, blocks]; `lengths`: int32 [rows].

    Writes `out` [rows, heads, SPLITS, DIM], normalised within each share, and `lse` [rows, heads,
    SPLITS], which is minus infinity where a share is empty. WINDOW 0: no window.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group, dim = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD)
    kept = (group < GROUP)[:, None] & (dim < DIM)[None, :]
    head = kv_head * GROUP + group

    length = tl.load(lengths + row)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    first = low // TILE
    share = tl.cdiv(tl.cdiv(length, TILE) - first, SPLITS)
    begin = (first + split * share) * TILE
    end = tl.minimum(begin + share * TILE, length)

    q = tl.load(
        query + row.to(tl.int64) * query_stride + head[:, None] * DIM + dim[None, :],
        mask=kept, other=0.0,
    )  # fmt: skip
    most = tl.full([GROUP_PAD], NO, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    mixed = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for at in range(begin, end, TILE):
        position = at + tl.arange(0, TILE)
        seen = (position >= low) & (position < end)
        block = tl.load(tables + row * table_stride + position // BLOCK, mask=seen, other=0)
        slot = block.to(tl.int64) * BLOCK + position % BLOCK
        place = slot[:, None] * slot_stride + kv_head * DIM + dim[None, :]
        there = seen[:, None] & (dim < DIM)[None, :]
        k = tl.load(key + place, mask=there, other=0.0)
        v = tl.load(value + place, mask=there, other=0.0)
        if GROUP_PAD == 1:
            score = tl.sum(k.to(tl.float32) * q.to(tl.float32), axis=1)[None, :]
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = score * scale
        if CAPPED:  # tanh(x) = 2 sigmoid(2 x) - 1
            score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)
        score = tl.where(seen[None, :], score * LOG2_E, NO)
        higher = tl.maximum(most, tl.max(score, axis=1))  # finite: a tile has something to see
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(weight, axis=1)
        if GROUP_PAD == 1:
            part = tl.sum(v.to(tl.float32) * tl.trans(weight), axis=0)[None, :]
        else:
            part = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        mixed = mixed * fade[:, None] + part
        most = higher

    some = total > 0
    total = tl.where(some, total, 1.0)
    mixed = mixed / total[:, None]
    rows_before = row.to(tl.int64) * tl.num_programs(1) * GROUP  # as heads
    target = (rows_before + head) * SPLITS + split
    tl.store(out + target[:, None] * DIM + dim[None, :], mixed.to(out.dtype.element_ty), mask=kept)
    tl.store(lse + target, tl.where(some, most + tl.log2(total), NO), mask=group < GROUP)


@triton.jit
def decode_merge(
    parts, lse, out,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows * heads,). `parts`, `lse`: what `decode_shares` wrote; SPLITS is a power of two.
    Writes `out` [rows, heads, DIM]."""
    at = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM_PAD)
    own = tl.load(lse + at * SPLITS + split)
    weight = tl.exp2(own - tl.max(own, axis=0))
    weight = weight / tl.sum(weight, axis=0)
    part = tl.load(
        parts + (at * SPLITS + split)[:, None] * DIM + dim[None, :],
        mask=(dim < DIM)[None, :], other=0.0,
    )  # fmt: skip
    mixed = tl.sum(part * weight[:, None], axis=0)
    tl.store(out + at * DIM + dim, mixed.to(out.dtype.element_ty), mask=dim < DIM)


# --- between the matrix products -----------------------------------------------------------------


@triton.jit
def add_norm(
    x, more, weight, out, eps,
    SIZE: tl.constexpr, PAD: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,). `x` [rows, SIZE] becomes x + more if ADDS; `out` is its root mean square norm
    times `weight` [SIZE]."""
    at = tl.arange(0, PAD)
    kept, place = at < SIZE, tl.program_id(0).to(tl.int64) * SIZE + at
    wide = tl.load(x + place, mask=kept, other=0.0).to(tl.float32)
    if ADDS:  # rounded before it is normed, as two operations would
        wide += tl.load(more + place, mask=kept, other=0.0).to(tl.float32)
        value = wide.to(x.dtype.element_ty)
        tl.store(x + place, value, mask=kept)
        wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    normed = normed * tl.load(weight + at, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=kept)


@triton.jit
def rotate_and_write(
    qkv, cos, sin, norm, slots, key, value, eps, rotation_stride,
    ROTATED: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, HEADS + 2 * KV_HEADS); ROTATED is HEADS + KV_HEADS. Heads of queries and keys
    in `qkv` [rows, HEADS + 2 * KV_HEADS, 2 * HALF] are normed with `norm` [ROTATED, 2 * HALF] if
    NORMED, and rotated where they stand: x cos + roll(x) sin (engine.decoder.Rope), `cos` and `sin`
    one row each a token. Keys and values go to their slots in `key` and `value`, too."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, HALF_PAD)
    kept = at < HALF
    here = qkv + (row * (ROTATED + KV_HEADS) + head) * (2 * HALF)
    low = tl.load(here + at, mask=kept, other=0.0)
    high = tl.load(here + HALF + at, mask=kept, other=0.0)
    there = tl.load(slots + row).to(tl.int64) * KV_HEADS * (2 * HALF)
    if head < ROTATED:
        a, b = low.to(tl.float32), high.to(tl.float32)
        if NORMED:
            own = norm + head * (2 * HALF) + at
            share = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / (2 * HALF) + eps)
            a = a * share * tl.load(own, mask=kept, other=0.0).to(tl.float32)
            b = b * share * tl.load(own + HALF, mask=kept, other=0.0).to(tl.float32)
        turn = row * rotation_stride + at
        low_cos = tl.load(cos + turn, mask=kept, other=0.0).to(tl.float32)
        low_sin = tl.load(sin + turn, mask=kept, other=0.0).to(tl.float32)
        high_cos = tl.load(cos + turn + HALF, mask=kept, other=0.0).to(tl.float32)
        high_sin = tl.load(sin + turn + HALF, mask=kept, other=0.0).to(tl.float32)
        low = (a * low_cos + b * low_sin).to(qkv.dtype.element_ty)
        high = (b * high_cos + a * high_sin).to(qkv.dtype.element_ty)
        tl.store(here + at, low, mask=kept)
        tl.store(here + HALF + at, high, mask=kept)
        if head >= HEADS:
            target = key + there + (head - HEADS) * (2 * HALF) + at
            tl.store(target, low, mask=kept)
            tl.store(target + HALF, high, mask=kept)
    else:
        target = value + there + (head - ROTATED) * (2 * HALF) + at
        tl.store(target, low, mask=kept)
        tl.store(target + HALF, high, mask=kept)


@triton.jit
def gated(both, out, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Grid: (rows, tiles). `out` [rows, SIZE] is silu(gate) * up of `both` [rows, 2 * SIZE]: gate,
    then up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    kept = at < SIZE
    gate = tl.load(both + row * 2 * SIZE + at, mask=kept, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * SIZE + SIZE + at, mask=kept, other=0.0).to(tl.float32)
    mixed = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + at, mixed.to(out.dtype.element_ty), mask=kept)
