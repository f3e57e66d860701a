"""Linear layers whose weights are 8 or 4 bits. Knows weights and torch's kernels; no models.

int8 has a scale for each output (symmetric, round to nearest); int4 a scale and a least value for
each 128 inputs of an output (asymmetric, as GPTQ and AWQ group them: arXiv 2210.17323, 2306.00978,
without their calibration). torch's CPU kernels take bfloat16 rows. What they are good for depends
on the number of rows, since they turn weights back into bfloat16 for each of them; 41.6 M
parameters on one core of an EPYC (Zen 5), CPU ms, beside bfloat16 packed by oneDNN:

    rows         1     4     8     16    32   128
    bfloat16    4.8   4.3   6.5   7.8  10.4  29
    int8        4.6   4.1   9.9    13    26    99
    int4        2.0   3.6   5.5   9.7    19    68

So int4 pays at 1 to 8 rows, and int8 saves memory alone. From ROWS_MAX rows on, int8 weights are
turned into bfloat16 once for all rows.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn.functional import linear, pad

GROUP: Final = 128  # inputs that share a scale in int4
OUTPUTS: Final = 16  # that the int4 kernel computes together
LEVELS: Final = 15  # 4 bits, from 0
MIDDLE: Final = 8  # torch's kernel takes the value of this level in place of the least one
INNER_TILES: Final = 8  # what the CPU packing does not use, but wants to be told
ROWS_MAX: Final = 16


class Int8:
    """`weight`: [out, in] int8; `scale`: [out]."""

    __slots__ = ("_bias", "_scale", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        wide = weight.float()
        scale = wide.abs().amax(dim=1).clamp(min=1e-12) / 127
        self._weight = (wide / scale[:, None]).round_().to(torch.int8)
        self._scale, self._bias = scale.to(weight.dtype), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) < ROWS_MAX:
            out = torch.ops.aten._weight_int8pack_mm(x, self._weight, self._scale)
        else:
            out = linear(x, self._weight.to(x.dtype)).mul_(self._scale)
        return out if self._bias is None else out.add_(self._bias)


class Int4:
    """Two weights a byte, in the layout of torch's kernel; [in / GROUP, out, 2] scales and middles.

    Inputs that do not fill the last group, and outputs that do not fill a tile, are padded with
    zeros.
    """

    __slots__ = ("_bias", "_outputs", "_packed", "_padding", "_scales")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._outputs, self._padding = len(weight), -weight.shape[1] % GROUP
        wide = pad(weight.float(), (0, self._padding, 0, -len(weight) % OUTPUTS))
        groups = wide.view(len(wide), -1, GROUP)
        least, most = groups.amin(dim=2), groups.amax(dim=2)
        scale = ((most - least) / LEVELS).clamp(min=1e-12)
        levels = ((groups - least[..., None]) / scale[..., None]).round_().clamp_(0, LEVELS)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            levels.to(torch.int32).view(wide.shape), INNER_TILES
        )
        middles = least + MIDDLE * scale
        self._scales = torch.stack((scale.t(), middles.t()), dim=2).to(weight.dtype).contiguous()
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._padding:
            x = pad(x, (0, self._padding))
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._packed, GROUP, self._scales
        )[:, : self._outputs]
        return out if self._bias is None else out.add_(self._bias)
