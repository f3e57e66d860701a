"""A packed batch on a device: new KV is written into its slots, rows of one token attend by the
decode kernel, prompts' chunks by a ragged one. Nothing is looked up on the host once it is made.

Knows tensors, block tables and positions; must not know models, requests or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from kvasir.engine.attention import LayerCache, Span
from kvasir.engine.cuda.decode import paged_decode
from kvasir.engine.cuda.prefill import Ragged, attend_ragged


class Singles(NamedTuple):
    """Rows of one token: their places in the packed batch (None: it has no others), the int32
    tables [rows, blocks] and how many positions each sees, int32 [rows]."""

    places: torch.Tensor | None
    tables: torch.Tensor
    lengths: torch.Tensor


class Prompts(NamedTuple):
    """Chunks of prompts: their tokens' places in the packed batch (None: it has no others) and the
    slots of all positions that they see (None: their own, nothing was cached before)."""

    places: torch.Tensor | None
    slots: torch.Tensor | None
    spans: Ragged


class Places(NamedTuple):
    """Where a layer's new KV goes: `slots`, int64 [tokens], of its caches."""

    slots: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class DeviceBatch:
    """What a decoder hands its Q, K and V to (engine.attention.Paged). `slots`: int64 [tokens],
    where each token's KV goes. `end` is above every position."""

    def __init__(
        self,
        caches: Sequence[LayerCache],
        block_size: int,
        slots: torch.Tensor,
        singles: Singles | None,
        prompts: Prompts | None,
        end: int,
    ) -> None:
        self._caches, self._block_size, self._slots = caches, block_size, slots
        self._singles, self._prompts, self.end = singles, prompts, end

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
        """As engine.attention.Paged.attend."""
        slots, keys, values = self.places(layer)
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return self.seen(layer, query, key, value, scale, window, softcap)

    def places(self, layer: int) -> Places:
        return Places(self._slots, *self._caches[layer])

    def seen(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        scale: float | None, window: int | None, softcap: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`attend`, once KV is written."""
        cache = self._caches[layer]
        parts = []
        if self._singles is not None:
            places, tables, lengths = self._singles
            mine = query if places is None else query[places]
            part = paged_decode(
                mine, cache.key, cache.value, tables, lengths, block_size=self._block_size,
                scale=scale, window=window, softcap=softcap,
            )  # fmt: skip
            parts.append((places, part))
        if self._prompts is not None:
            places, slots, spans = self._prompts
            if slots is not None:
                key, value = cache.key.index_select(0, slots), cache.value.index_select(0, slots)
            elif places is not None:
                key, value = key[places], value[places]
            mine = query if places is None else query[places]
            part = attend_ragged(mine, key, value, spans, scale, window, softcap)
            parts.append((places, part))
        if len(parts) == 1:
            return parts[0][1]
        out = torch.empty_like(query)
        for places, part in parts:
            out.index_copy_(0, places, part)
        return out


def device_batch(
    caches: Sequence[LayerCache], block_size: int, spans: Sequence[Span]
) -> DeviceBatch:
    """The batch of these spans, one after the other, on the caches' device."""
    device = caches[0].key.device
    firsts = [0, *accumulate(span.count for span in spans)]
    placed = list(zip(firsts, spans, strict=False))
    ones = [(at, span) for at, span in placed if span.count == 1]
    chunks = [(at, span) for at, span in placed if span.count > 1]
    slots = [slots_of(span, block_size)[span.start :] for span in spans]
    return DeviceBatch(
        caches, block_size, to_device(np.concatenate(slots), device),
        _singles(ones, bool(chunks), device) if ones else None,
        _prompts(chunks, bool(ones), block_size, device) if chunks else None,
        max(span.start + span.count for span in spans),
    )  # fmt: skip


def _singles(ones: Sequence[tuple[int, Span]], mixed: bool, device: torch.device) -> Singles:
    tables = tables_of([span.table.blocks for _, span in ones])
    return Singles(
        to_device(np.array([at for at, _ in ones]), device) if mixed else None,
        to_device(tables, device),
        to_device(np.array([span.start + 1 for _, span in ones], np.int32), device),
    )


def _prompts(
    chunks: Sequence[tuple[int, Span]], mixed: bool, block_size: int, device: torch.device
) -> Prompts:
    places = np.concatenate([np.arange(at, at + span.count) for at, span in chunks])
    seen = [slots_of(span, block_size) for _, span in chunks]
    cached = any(span.start for _, span in chunks)
    queries = (0, *accumulate(span.count for _, span in chunks))
    keys = (0, *accumulate(len(one) for one in seen))
    offsets = [to_device(np.array(at, np.int32), device) for at in (queries, keys)]
    return Prompts(
        to_device(places, device) if mixed else None,
        to_device(np.concatenate(seen), device) if cached else None,
        Ragged(queries, keys, *offsets),
    )


def slots_of(span: Span, block_size: int) -> np.ndarray:
    """Cache slots of all positions up to the span's end, int64."""
    end = span.start + span.count
    blocks = np.array(span.table.blocks[: -(-end // block_size)], np.int64)
    return (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)[:end]


def tables_of(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [rows, most blocks], filled up with block 0, which nobody reads there."""
    found = np.zeros((len(tables), max(len(one) for one in tables)), np.int32)
    for row, blocks in zip(found, tables, strict=True):
        row[: len(blocks)] = blocks
    return found


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device. On a GPU through pinned memory, so that the host does not wait; torch
    keeps that memory until the copy is over."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
