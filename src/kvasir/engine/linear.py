"""Linear layers: y = x W^T + b for packed rows. Knows weights and the processor's kernels; must not
know models.

On a CPU oneDNN keeps the weight in the tiles of its own kernels, as vLLM's CPU backend does. Both
dtypes gain at every number of rows: 41.6 M parameters on one core of an EPYC (Zen 5) take, packed
and not,

    rows        1           8           32          128
    float32     5.0  12.0   7.7  19.6   16.0  38.7              CPU ms
    bfloat16    2.5   6.0   3.8   6.5    8.5  10.9  14.7  16.6
"""

from __future__ import annotations

from functools import partial
from typing import Final, Literal, Protocol

import torch
from torch.nn.functional import linear, pad

from kvasir.engine.quant import Int4, Int8

Kind = Literal["plain", "int8", "int4"]

ROWS_HINT: Final = 32  # oneDNN asks for rows when it packs; 1 and 128 give the same speed


class Linear(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, out] of `x`, [rows, in], in the weight's dtype."""


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None, kind: Kind = "plain") -> Linear:
    """A layer with `weight` [out, in] and `bias` [out], which it may copy and rearrange; of `kind`
    int8 and int4 (engine.quant) from weights in bfloat16."""
    if kind != "plain":
        return Int8(weight, bias) if kind == "int8" else Int4(weight, bias)
    if not packs(weight):
        return partial(linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
    return Packed(packed, bias)


def packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN has kernels of its own for this weight here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Packed:
    """`weight`: an opaque tensor in oneDNN's layout."""

    __slots__ = ("_bias", "_run", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self._run = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        run = rounded_rows(rows)
        if run > rows:
            x = pad(x, (0, 0, 0, run - rows))
        out: torch.Tensor = self._run(x, self._weight, self._bias, "none", (), "")
        return out if run == rows else out[:rows]


def rounded_rows(rows: int) -> int:
    """Rows that a packed layer is run with: `rows`, up to the next eighth of a power of two.

    oneDNN compiles a kernel for each number of rows, in about half a millisecond, and keeps a
    thousand of them: 0.6 MiB each, often more. Prompts of all lengths would fill that.
    """
    eighth = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // eighth) * eighth
