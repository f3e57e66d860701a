"""Attention of prompts' chunks, of any lengths and after any context, in one call where a kernel is
that takes ragged lengths: flash-attn's own, else the one inside torch; else span by span.

Knows packed tensors and their offsets; must not know caches, layers or requests.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

FLASH_DIM_MAX: Final = 256
FLASH_CAPABILITY: Final = (8, 0)  # Ampere


class Ragged(NamedTuple):
    """Spans one after the other. Span i's queries are rows [queries[i], queries[i + 1]) and the
    last positions of its keys, rows [keys[i], keys[i + 1]); both begin with 0. The tensors are the
    same as int32, on the device."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    queries_at: torch.Tensor
    keys_at: torch.Tensor

    @property
    def queries_max(self) -> int:
        return max(b - a for a, b in pairwise(self.queries))

    @property
    def keys_max(self) -> int:
        return max(b - a for a, b in pairwise(self.keys))


def attend_ragged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Ragged,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """[tokens, heads, head_dim], causal. `query`: likewise; `key`, `value`: [keys, kv_heads,
    head_dim]. `window`, `softcap`: as engine.attention.Paged.attend."""
    way = way_of(query, softcap)
    run = {"flash_attn": _flash_attn, "torch": _torch_flash, "by span": by_span}[way]
    return run(query, key, value, spans, scale, window, softcap)


def way_of(query: torch.Tensor, softcap: float | None = None) -> str:
    """Which of the three computes it. Flash kernels take half precision on Ampere and later."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not half or not query.is_cuda or query.shape[-1] > FLASH_DIM_MAX or query.shape[-1] % 8:
        return "by span"
    if torch.cuda.get_device_capability(query.device) < FLASH_CAPABILITY:
        return "by span"
    if _flash_attn_function() is not None:
        return "flash_attn"
    built_in = softcap is None and torch.backends.cuda.is_flash_attention_available()
    return "torch" if built_in else "by span"


@cache
def _flash_attn_function() -> Any:
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Ragged,
    scale: float | None, window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Dao, FlashAttention-2 (arXiv 2307.08691). Its causal mask is aligned with the last key."""
    out: torch.Tensor = _flash_attn_function()(
        query, key, value, spans.queries_at, spans.keys_at, spans.queries_max, spans.keys_max,
        softmax_scale=scale, causal=True, softcap=softcap or 0.0,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return out


def _torch_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Ragged,
    scale: float | None, window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """The same kernel as torch ships it; what its `varlen_attn` calls, whose arguments changed from
    release to release."""
    sides: dict[str, int] = {}
    if window is not None:
        sides = {"window_size_left": window - 1, "window_size_right": 0}
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, spans.queries_at, spans.keys_at, spans.queries_max, spans.keys_max,
        0.0, window is None, False, scale=scale, **sides,
    )[0]  # fmt: skip
    return out


def by_span(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Ragged,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """In torch's plain operations: any device, dtype and cap."""
    parts = []
    for (a, b), (c, d) in zip(pairwise(spans.queries), pairwise(spans.keys), strict=True):
        seen_from = torch.arange(d - c - (b - a), d - c, device=query.device).unsqueeze(1)
        at = torch.arange(d - c, device=query.device)
        seen = at <= seen_from
        if window is not None:
            seen &= at > seen_from - window
        q, k, v = (one.transpose(0, 1) for one in (query[a:b], key[c:d], value[c:d]))
        if softcap is None:
            out = scaled_dot_product_attention(
                q[None], k[None], v[None], seen, scale=scale, enable_gqa=True
            )[0]
        else:
            out = _capped(q, k, v, seen, scale, softcap)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor,
    scale: float | None, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """[heads, count, head_dim]: a score x counts as softcap * tanh(x / softcap)."""
    heads, count, dim = query.shape
    grouped = query.reshape(key.shape[0], -1, dim)
    scores = (grouped @ key.transpose(1, 2)).float() * (dim**-0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(heads, count, -1).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(dim=-1).to(query.dtype).view(grouped.shape[0], -1, key.shape[1])
    return (weights @ value).view(heads, count, dim)
