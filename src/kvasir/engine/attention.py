"""Paged KV and attention over it, plugged into transformers' attention interface.

Knows tensors, block tables and positions; must not know models, requests or sampling. Sequences are
packed into one row and attended one by one, never padded. A table whose blocks follow one another
in memory is read as a view, any other one is gathered block by block.

    packed tokens   | a a a a a a a | b | c c c |          (1, 11)
    positions       | 0 1 2 3 4 5 6 | 41| 9 10 11|
    cache, a layer  [blocks * block_size, kv_heads, head_dim], one tensor for K and one for V,
                    or one tensor of latents (engine.latent); of one byte a value and with
                    scales where KV is narrow (engine.narrow)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvasir.core.specs import LayerSpec
from kvasir.engine.narrow import Narrow, pack, unpack
from kvasir.engine.native.batch import NativeBatch
from kvasir.engine.native.kernel import Kernel
from kvasir.engine.shared import Branch, attend_branch, branches_of
from kvasir.engine.steps import BlockTable

if TYPE_CHECKING:
    from kvasir.engine.base import Allocate

NAME = "kvasir_paged"  # as `attn_implementation`


class LayerCache(NamedTuple):
    """One layer's K and V, each [blocks * block_size, kv_heads, head_dim]."""

    key: torch.Tensor
    value: torch.Tensor


class LatentCache(NamedTuple):
    """One layer's latents, [blocks * block_size, 1, head_dim]."""

    latent: torch.Tensor


def make_caches(
    layers: Sequence[LayerSpec],
    blocks_count: int,
    block_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    allocate: Allocate | None = None,
) -> list[LayerCache | LatentCache]:
    """Zeroed caches: one tensor per layer and plane, so that a block in it is one run of bytes.

    `dtype` is for layers that keep no scales; those with scales are of bytes. `allocate`: where
    from, on a CPU; torch's own memory without it.
    """
    slots = blocks_count * block_size

    def plane(layer: LayerSpec) -> torch.Tensor:
        width, kind = layer.head_dim, dtype
        if layer.scale_bytes:
            width, kind = layer.head_dim + layer.scale_bytes, torch.uint8
        shape = (slots, layer.kv_heads, width)
        if allocate is None or device != "cpu":
            return torch.zeros(shape, dtype=kind, device=device)
        return torch.from_numpy(allocate(math.prod(shape) * kind.itemsize)).view(kind).view(shape)

    return [
        LatentCache(plane(layer))
        if layer.kind == "latent"
        else LayerCache(plane(layer), plane(layer))
        for layer in layers
    ]


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's share of a packed batch: positions [start, start + count) of `table`."""

    start: int
    count: int
    table: BlockTable


class Reach(NamedTuple):
    """What one span attends to, in one kind of layer.

    Its KV is cache slots [first, first + length) when `blocks` is None; else those of `blocks`,
    one after the other, from offset `first` on. `mask` is [count, length], in the queries' dtype:
    0 where seen, else minus infinity.
    """

    first: int
    length: int
    blocks: torch.Tensor | None
    causal: bool
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Latents:
    """What one span sees of a layer of latents: `cached`, [reach.length, head_dim]. Its queries are
    `rows` of the packed batch."""

    rows: slice
    reach: Reach
    cached: torch.Tensor

    @property
    def count(self) -> int:
        return int(self.rows.stop - self.rows.start)


class Paged(Protocol):
    """A packed batch and the caches under it; travels through the model to its attention."""

    @property
    def end(self) -> int:
        """Above every position."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write new KV, then attend. Returns [tokens, heads, head_dim].

        `query`, `key`, `value`: [tokens, heads, head_dim], fewer heads in the latter two.
        `window`: a token sees itself and the window - 1 tokens before it; None: all before it.
        `softcap` c: a score x counts as c * tanh(x / c).
        """


class PagedBatch:
    """A `Paged` that attends sequence by sequence, on a CPU; also to latents, on any device.

    `written(layer)` is called when the layer's KV of all spans stands in the cache. `end` is above
    every position. `narrow`: how the caches keep values of `dtype`, if not as they are. `kernel`:
    attends on a CPU in the place of torch, wherever it can.
    """

    def __init__(
        self,
        caches: Sequence[LayerCache | LatentCache],
        block_size: int,
        spans: Sequence[Span],
        written: Callable[[int], None],
        narrow: Narrow | None = None,
        dtype: torch.dtype | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        self._caches, self._block_size, self._spans = caches, block_size, spans
        self._written, self._narrow = written, narrow
        self._device, self._dtype = caches[0][0].device, dtype or caches[0][0].dtype
        slots = [slot for span in spans for slot in slots_of(span, block_size)]
        self._slots = torch.tensor(slots, device=self._device)
        self._reaches: dict[int | None, list[Reach]] = {}
        self._offsets = [0, *accumulate(span.count for span in spans)]  # of spans, in the batch
        self._branches: tuple[Branch, ...] | None = None
        self._branch_reaches: dict[tuple[int, int], Reach] = {}
        self._native: NativeBatch | None = None
        if kernel is not None and self._device.type == "cpu":
            self._native = NativeBatch(kernel, spans, self._offsets, block_size)
        self.end = max(span.start + span.count for span in spans)
        self.rows_shared = 0  # that attended to a common prefix together

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """As `Paged.attend`."""
        cache = self._caches[layer]
        assert isinstance(cache, LayerCache), f"layer {layer} keeps latents"
        self._write(layer, key, value)
        plain = window is None and softcap is None
        if self._native is not None and self._native.takes(query, cache.key, self._narrow):
            shared = self._shared() if plain else ()
            return self._native.attend(cache, query, scale, window, softcap, shared)
        parts = self._together(cache, query, scale) if plain else {}
        if softcap is None and not parts and len(query) == len(self._spans):
            reaches = self._reaches_in(window)
            seen = [(self._read(cache.key, at), self._read(cache.value, at)) for at in reaches]
            return _attend_singles(query, seen, scale)
        for at, to, reach in zip(
            self._offsets, self._offsets[1:], self._reaches_in(window), strict=False
        ):
            if at not in parts:
                k, v = self._read(cache.key, reach), self._read(cache.value, reach)
                if softcap is None:
                    parts[at] = _attend_one(query[at:to], k, v, reach, scale)
                else:
                    parts[at] = _attend_capped(query[at:to], k, v, reach, scale, softcap)
        return parts[0] if len(parts) == 1 else torch.cat([parts[at] for at in sorted(parts)])

    def _together(
        self, cache: LayerCache, query: torch.Tensor, scale: float | None
    ) -> dict[int, torch.Tensor]:
        """Rows that are better computed together, by their places in the packed batch."""
        parts: dict[int, torch.Tensor] = {}
        if self._device.type == "cpu":
            for branch in self._shared():
                part = attend_branch(branch, query, partial(self._read_branch, cache), scale)
                parts.update(zip(branch.rows, part.out.split(1), strict=True))
        return parts

    def _singles(self) -> dict[int, Span]:
        """Spans of one token, by their places in the packed batch."""
        places = zip(self._offsets, self._spans, strict=False)
        return {at: span for at, span in places if span.count == 1}

    def _shared(self) -> tuple[Branch, ...]:
        """Decode rows that read a long prefix together, by their places in the packed batch."""
        if self._branches is None:
            tables = {
                at: span.table.blocks[: span.start // self._block_size]
                for at, span in self._singles().items()
            }
            every = branches_of(tables, self._block_size)
            self._branches = tuple(branch for branch in every if branch.below)
            self.rows_shared = sum(len(branch.rows) for branch in self._branches)
        return self._branches

    def _read_branch(self, cache: LayerCache, branch: Branch) -> tuple[torch.Tensor, torch.Tensor]:
        key = (branch.rows[0], branch.first)
        reach = self._branch_reaches.get(key)
        if reach is None:
            span = self._spans[self._offsets.index(branch.rows[0])]
            low, size = branch.first * self._block_size, self._block_size
            end = span.start + 1 if branch.last is None else branch.last * size
            reach = Reach(*_place(span.table, low, end, size, self._device), False, None)
            self._branch_reaches[key] = reach
        return self._read(cache.key, reach), self._read(cache.value, reach)

    def latents(self, layer: int, latent: torch.Tensor) -> list[Latents]:
        """Write new latents, [tokens, 1, head_dim]. Returns what each span sees of them all."""
        cache = self._caches[layer]
        assert isinstance(cache, LatentCache), f"layer {layer} keeps keys and values"
        self._write(layer, latent)
        seen, at = [], 0
        for span, reach in zip(self._spans, self._reaches_in(None), strict=True):
            rows = slice(at, at := at + span.count)
            seen.append(Latents(rows, reach, self._read(cache.latent, reach)[0, 0]))
        return seen

    def _write(self, layer: int, *new: torch.Tensor) -> None:
        for plane, rows in zip(self._caches[layer], new, strict=True):
            kept = rows if self._narrow is None else pack(rows, self._narrow)
            plane.index_copy_(0, self._slots, kept)
        self._written(layer)

    def _reaches_in(self, window: int | None) -> list[Reach]:
        """One for each span. Worked out once for all layers of a kind."""
        reaches = self._reaches.get(window)
        if reaches is None:
            like = torch.empty(0, dtype=self._dtype, device=self._device)
            reaches = [reach_of(span, self._block_size, window, like) for span in self._spans]
            self._reaches[window] = reaches
        return reaches

    def _read(self, plane: torch.Tensor, reach: Reach) -> torch.Tensor:
        """[1, kv_heads, length, head_dim]"""
        if reach.blocks is not None:
            blocks = plane.view(-1, self._block_size, *plane.shape[1:])
            plane = blocks.index_select(0, reach.blocks).flatten(0, 1)
        if self._narrow is not None:
            packed = plane[reach.first : reach.first + reach.length]
            return unpack(packed, self._narrow, self._dtype).transpose(0, 1).unsqueeze(0)
        heads, dim = plane.shape[1:]
        token = plane.stride(0)  # more than heads * dim where other ranks have heads too
        return plane.as_strided(  # one call for slice, transpose and unsqueeze: a third of the time
            (1, heads, reach.length, dim), (0, dim, token, 1),
            plane.storage_offset() + reach.first * token,
        )  # fmt: skip


def slots_of(span: Span, block_size: int) -> list[int]:
    """Cache slots of the span's positions, in order."""
    blocks = span.table.blocks
    positions = range(span.start, span.start + span.count)
    return [blocks[p // block_size] * block_size + p % block_size for p in positions]


def reach_of(span: Span, block_size: int, window: int | None, like: torch.Tensor) -> Reach:
    """Which cached positions the span sees: up to each token's own, and not before its window.

    `like`: a tensor of the queries' dtype and device.
    """
    start, count, table = span.start, span.count, span.table
    end = start + count
    low = max(0, start - window + 1) if window else 0
    windowed = window is not None and end > window and count > 1
    causal = count > 1 and start == 0 and not windowed
    mask = None if count == 1 or causal else _mask(start, count, low, window, like)
    return Reach(*_place(table, low, end, block_size, like.device), causal, mask)


class Place(NamedTuple):
    """The first three fields of a `Reach`."""

    first: int
    length: int
    blocks: torch.Tensor | None


def _place(table: BlockTable, low: int, end: int, block_size: int, device: torch.device) -> Place:
    """Where positions [low, end) are kept."""
    first_block, last_block = low // block_size, -(-end // block_size)
    blocks = table.blocks[first_block:last_block]
    if last_block <= table.run or blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        return Place(blocks[0] * block_size + low % block_size, end - low, None)
    return Place(low % block_size, end - low, torch.tensor(blocks, device=device))


def _mask(
    start: int, count: int, low: int, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    seen_from = torch.arange(start, start + count, device=like.device).unsqueeze(1)
    seen = torch.arange(low, start + count, device=like.device).unsqueeze(0)
    hidden = seen > seen_from
    if window is not None:
        hidden |= seen <= seen_from - window
    return like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _attend_singles(
    query: torch.Tensor, seen: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float | None
) -> torch.Tensor:
    """[rows, heads, head_dim] of rows of one token; `query` likewise; K and V that each row sees.

    A single token needs no mask, so heads that share KV can be queries of one head: the cache is
    read once, 6 times faster than enable_gqa in bfloat16 on a CPU. In float32, which bfloat16 is
    widened to, a CPU's kernel takes half the time (850 tokens of 4 heads: 114 us against 216).
    """
    rows, heads, dim = query.shape
    kv_heads = seen[0][0].shape[1]
    grouped = query.float().reshape(rows, 1, kv_heads, heads // kv_heads, dim)
    outs = [
        scaled_dot_product_attention(one, key.float(), value.float(), scale=scale)
        for one, (key, value) in zip(grouped.unbind(), seen, strict=True)
    ]
    out = outs[0] if rows == 1 else torch.cat(outs)
    return out.reshape(rows, heads, -1).to(query.dtype)


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, reach: Reach, scale: float | None
) -> torch.Tensor:
    """[tokens, heads, head_dim] of one span; `query` likewise."""
    if len(query) == 1:
        return _attend_singles(query, [(key, value)], scale)
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0), key, value, reach.mask,
        is_causal=reach.causal, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    reach: Reach,
    scale: float | None,
    softcap: float,
) -> torch.Tensor:
    """[tokens, heads, head_dim] of one span, in plain operations: no fused kernel caps scores."""
    count, heads, dim = query.shape
    kv_heads = key.shape[1]
    # Heads that share KV are rows of one product: broadcasting would copy K and V for each.
    grouped = query.transpose(0, 1).reshape(kv_heads, -1, dim)
    scores = grouped @ key[0].transpose(1, 2)
    scores.mul_((dim**-0.5 if scale is None else scale) / softcap).tanh_().mul_(softcap)
    mask = _mask(0, count, 0, None, query) if reach.causal else reach.mask
    if mask is not None:
        scores.view(heads, count, -1).add_(mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value[0]).view(heads, count, -1).transpose(0, 1)


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    paged: PagedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer; `paged` came through the model's keyword arguments.

    `query`, `key`, `value`: [1, heads, tokens, head_dim]. Returns [1, tokens, heads, head_dim].
    """
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    out = paged.attend(module.layer_idx, q, k, v, scaling, sliding_window, softcap)
    return out.unsqueeze(0), None


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers.

    An implementation without an entry in its mask interface gets no mask built at all, which is
    what is wanted here (transformers.masking_utils, `_preprocess_mask_arguments`).
    """
    from transformers import AttentionInterface  # slow to import, and ranks do without it

    AttentionInterface.register(NAME, paged_attention)
