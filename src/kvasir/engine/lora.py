"""LoRA adapters as tensors, and the sum of what several of them add to one packed batch.

Knows linears by layer and name, and which tokens are whose. Must not know requests, names or files
beyond the two that hold an adapter. Tokens without an adapter are not touched.

    packed tokens   | a a a a a a a | b | c c c |      a and c under one adapter, b under none
    groups            { adapter: rows 0-6, 8-10 }      two small matmuls a group and linear
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import safetensors.torch
import torch
from torch.nn.functional import linear

from kvasir.core.errors import ModelError
from kvasir.core.request import Adapter
from kvasir.engine.peft import MODULES, read_peft

LINEAR: Final = re.compile(rf"layers\.(\d+)\.(?:self_attn|mlp)\.({'|'.join(MODULES)})")


# Up to so many rows a bfloat16 matmul on CPU costs what its set-up does (14 us), and float32 less.
FLOAT_ROWS_MAX: Final = 8


class Pair(NamedTuple):
    """`down` [rank, in] and `up` [rank, out], scaled: a row x gains x down^T up."""

    down: torch.Tensor
    up: torch.Tensor

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, out] of `x` [rows, in]."""
        dtype = self.down.dtype if len(x) <= FLOAT_ROWS_MAX else x.dtype
        return linear(x.to(dtype), self.down.to(dtype)) @ self.up.to(dtype)


class Lora(NamedTuple):
    """One adapter: its pairs by (layer, module)."""

    pairs: dict[tuple[int, str], Pair]


def read_lora(
    adapter: Adapter,
    base: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Lora:
    """The adapter's tensors in `dtype`: the model's on a GPU, float32 on CPU.

    Raises ModelError as `read_peft` does, for files that are others than `adapter.digest` names,
    and for values that are not finite.
    """
    found = read_peft(Path(adapter.path), base, adapter.digest)
    tensors = safetensors.torch.load(found.weights)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            what = f"{name} holds values that are not finite numbers"
            raise ModelError(what, where=adapter.path)

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype).contiguous()

    return Lora({
        (pair.layer, pair.module): Pair(
            placed(tensors[pair.down]), placed((tensors[pair.up].float() * pair.scale).T)
        )
        for pair in found.pairs
    })  # fmt: skip


class Group(NamedTuple):
    """An adapter's tokens in a packed batch: one stretch, or an index."""

    adapter: Lora
    rows: slice | torch.Tensor


class AdapterBatch:
    """The adapters of one packed batch."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups

    def add(self, layer: int, module: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add to `out` [tokens, out], in place, what each token's adapter makes of `x` [tokens, in]
        in that linear: one of peft.MODULES."""
        for adapter, rows in self._groups:
            pair = adapter.pairs.get((layer, module))
            if pair is None:
                continue
            if isinstance(rows, slice):
                out[rows].add_(pair.delta(x[rows]))
            else:
                out.index_add_(0, rows, pair.delta(x.index_select(0, rows)).to(out.dtype))


def batch_of(
    parts: Iterable[tuple[Lora | None, int]], device: str | torch.device = "cpu"
) -> AdapterBatch | None:
    """Of a packed batch whose sequences have these adapters and so many tokens each, in order.

    None: no sequence has one.
    """
    stretches: dict[int, list[tuple[int, int]]] = {}
    loras: dict[int, Lora] = {}
    at = 0
    for lora, count in parts:
        if lora is not None:
            loras[id(lora)] = lora
            mine = stretches.setdefault(id(lora), [])
            first = mine.pop()[0] if mine and mine[-1][1] == at else at
            mine.append((first, at + count))
        at += count
    if not loras:
        return None
    return AdapterBatch([Group(loras[key], _rows(each, device)) for key, each in stretches.items()])


def _rows(
    stretches: Sequence[tuple[int, int]], device: str | torch.device
) -> slice | torch.Tensor:
    if len(stretches) == 1:
        return slice(*stretches[0])
    return torch.tensor([i for first, end in stretches for i in range(first, end)], device=device)


class LinearHooks:
    """Adds the adapters of `batch` after each linear of a model whose linears are modules."""

    def __init__(self, body: Any) -> None:
        self.batch: AdapterBatch | None = None
        for name, module in body.named_modules():
            found = LINEAR.fullmatch(name)
            if found is not None:
                module.register_forward_hook(partial(self._after, int(found[1]), found[2]))

    def _after(
        self, layer: int, name: str, module: Any, given: tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> None:
        """`given` and `out` are [1, tokens, width]."""
        if self.batch is not None:
            self.batch.add(layer, name, given[0][0], out[0])
