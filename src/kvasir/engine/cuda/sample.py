"""Draws tokens where the logits are, without a look from the host: greedy, temperature, top-k,
top-p and min-p, for all rows at once. Knows sampling values; no guides, no log-probabilities.

What it draws is what engine.sampler draws from the same logits, which goes row by row and looks at
values on the way; on an accelerator each such look would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvasir.engine.cuda.batch import to_device
from kvasir.engine.sampler import TEMPERATURE_MIN, Draw, uniform


def draw_on_device(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """int64 [rows], one token for each row of `logits`, float32 [rows, vocab]. No draw has a guide,
    none asks for log-probabilities."""
    tokens = logits.argmax(dim=-1)
    warm = [i for i, one in enumerate(draws) if one.sampling.temperature > 0]
    if not warm:
        return tokens
    if len(warm) == len(draws):
        return _warm(logits, draws)
    rows = to_device(np.array(warm), logits.device)
    return tokens.index_copy_(0, rows, _warm(logits[rows], [draws[i] for i in warm]))


def _warm(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    odds = _odds(logits, draws)
    mass = odds.cumsum(dim=-1, dtype=torch.float64)
    at = _column([uniform(one) for one in draws], np.float64, logits.device) * mass[:, -1:]
    return torch.searchsorted(mass, at, right=True).squeeze(-1)


def _odds(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """As sampler.probs. What no row asks for is not computed."""
    device, vocab = logits.device, logits.shape[-1]
    wishes = [one.sampling for one in draws]
    heat = _column([max(one.temperature, TEMPERATURE_MIN) for one in wishes], np.float32, device)
    logits = logits / heat
    tops = [one.top_k if 0 < one.top_k < vocab else 0 for one in wishes]
    if any(tops):
        likeliest = logits.topk(max(tops), dim=-1).values
        least = likeliest.gather(-1, _column([max(k - 1, 0) for k in tops], np.int64, device))
        asked = _column([k > 0 for k in tops], np.bool_, device)
        logits = logits.masked_fill(asked & (logits < least), float("-inf"))
    odds = logits.softmax(dim=-1)
    if any(one.top_p < 1 for one in wishes):
        asked = _column([one.top_p < 1 for one in wishes], np.bool_, device)
        floor = _nucleus_floor(odds, _column([one.top_p for one in wishes], np.float64, device))
        odds = odds.masked_fill(asked & (odds < floor), 0.0)
    if any(one.min_p > 0 for one in wishes):
        least = _column([one.min_p for one in wishes], np.float32, device)
        odds = odds.masked_fill(odds < least * odds.amax(dim=-1, keepdim=True), 0.0)
    return odds


def _nucleus_floor(odds: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """As the sampler's of this name, which is quicker on a CPU; this one sorts every row whole."""
    top = odds.sort(dim=-1, descending=True).values
    before = top.cumsum(dim=-1, dtype=torch.float64) - top
    kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return top.gather(-1, kept - 1)


def _column(values: Sequence[float], kind: Any, device: torch.device) -> torch.Tensor:
    """[rows, 1]"""
    return to_device(np.array(values, kind)[:, None], device)
