"""Draws tokens from logits. Knows a request's sampling values; must not know text or neighbours.

Guides (penalties, bias, grammars; engine.guide) change logits first; then temperature, top-k, top-p
and min-p, in this order. One number in [0, 1) decides a draw: a hash of (seed, output index), or
without a seed of (request id, output index). It is looked up in the row's cumulative distribution,
in the order of token ids. So a request's text is the same alone, in any batch, and resumed
elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import torch

from kvasir.core.ids import RequestId
from kvasir.core.request import Sampling
from kvasir.engine.guide import Guide

NUCLEUS_GUESS = 1024  # tokens looked at first; a nucleus that holds more has all of them sorted

TEMPERATURE_MIN = 1e-30  # greedy in effect, and logits divided by it are finite in float32


class Draw(msgspec.Struct, frozen=True, gc=False):
    """Output token `index` of a request is wanted. `guide` has followed the tokens before it."""

    request_id: RequestId
    index: int
    sampling: Sampling
    guide: Guide | None = None


def draw(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token id per row of `logits`, float32 of shape [rows, vocab], which stays as it is."""
    logits = _guided(logits, draws)
    tokens = logits.argmax(dim=-1).cpu()
    warm = [i for i, one in enumerate(draws) if one.sampling.temperature > 0]
    if warm:
        tokens[warm] = _draw_warm(logits[warm].cpu(), [draws[i] for i in warm])
    return [int(token) for token in tokens.tolist()]


def uniform(draw: Draw, use: str = "") -> float:
    """The number in [0, 1) that decides this draw: 53 bits of BLAKE2b. Each `use` has its own."""
    seed = draw.sampling.seed
    name = f"request:{draw.request_id}" if seed is None else f"seed:{seed}"
    digest = hashlib.blake2b(f"{name}:{draw.index}{use}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _guided(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    rows = [(i, one.guide) for i, one in enumerate(draws) if one.guide is not None]
    if rows:
        logits = logits.clone()
    for i, guide in rows:
        guide.shape(logits[i])
    return logits


def _draw_warm(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    return pick(probs(logits, [one.sampling for one in draws]), [uniform(one) for one in draws])


def pick(odds: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """The inverse of each row's cumulative distribution at its number in [0, 1). `odds`: [rows,
    vocab], not normalised, each row with something above 0."""
    mass = odds.cumsum(dim=-1, dtype=torch.float64)
    total = mass[:, -1:]
    # A number below 1 with 53 bits times a total rounds to less than the total, so `at` is a token.
    at = torch.tensor(numbers, dtype=torch.float64).unsqueeze(-1) * total
    return torch.searchsorted(mass, at, right=True).squeeze(-1)


def probs(logits: torch.Tensor, sampling: Sequence[Sampling]) -> torch.Tensor:
    """What is left of each row's distribution, not normalised: temperature, top-k, top-p, min-p."""
    logits = logits / torch.tensor([[max(one.temperature, TEMPERATURE_MIN)] for one in sampling])
    vocab = logits.shape[-1]
    for i, one in enumerate(sampling):
        if 0 < one.top_k < vocab:
            row = logits[i]
            logits[i] = row.where(row >= row.topk(one.top_k).values[-1], float("-inf"))
    odds = logits.softmax(dim=-1)
    nucleus = [i for i, one in enumerate(sampling) if one.top_p < 1]
    if nucleus:
        top_p = torch.tensor([[sampling[i].top_p] for i in nucleus], dtype=torch.float64)
        part = odds[nucleus]
        odds[nucleus] = part.where(part >= _nucleus_floor(part, top_p), 0)
    for i, one in enumerate(sampling):
        if one.min_p > 0:
            odds[i] = odds[i].where(odds[i] >= one.min_p * odds[i].max(), 0)
    return odds


def _nucleus_floor(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Least probability in each row's nucleus, [rows, 1].

    The nucleus is the smallest set of most likely tokens whose mass reaches `top_p`, never empty
    (Holtzman et al., arXiv 1904.09751); tokens as likely as its last one are let in too.
    """
    top = probs.topk(min(NUCLEUS_GUESS, probs.shape[-1]), dim=-1).values
    if bool((top.sum(dim=-1, keepdim=True, dtype=torch.float64) < top_p).any()):
        top = probs.sort(dim=-1, descending=True).values
    before = top.cumsum(dim=-1, dtype=torch.float64) - top
    kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return top.gather(-1, kept - 1)
