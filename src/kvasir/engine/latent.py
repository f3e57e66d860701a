"""Multi-head latent attention (DeepSeek-V2, section 2.1) over a paged cache of latents.

Knows projections, latents and spans; must not know models or requests. A position's cache is its
normed latent and the rotated key that all heads share: 512 + 64 values a layer in DeepSeek-V3,
where keys and values of its 128 heads would be 40,960.

    cache, a layer   [blocks * block_size, 1, rank + rope]      one plane
    expanded         K = [W_uk c, k_rope], V = W_uv c           cheaper for many queries
    absorbed         q_nope W_uk against c, then W_uv           cheaper for few: nothing is expanded
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers import AttentionInterface

from kvasir.engine.attention import Latents, PagedBatch

NAME: Final = "kvasir_latent"  # as `attn_implementation`


class Up(NamedTuple):
    """One layer's up-projections: views of `kv_b_proj`, in its dtype.

    `both`: [heads * (nope + v), rank]; `key`: [heads, nope, rank]; `value`: [heads, v, rank].
    """

    both: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def of(cls, module: Any) -> Up:
        both, nope, v = module.kv_b_proj.weight, module.qk_nope_head_dim, module.v_head_dim
        key, value = both.view(module.num_heads, nope + v, -1).split([nope, v], dim=1)
        return cls(both, key, value)

    @property
    def heads(self) -> int:
        return int(self.key.shape[0])

    @property
    def nope(self) -> int:
        return int(self.key.shape[1])

    @property
    def v(self) -> int:
        return int(self.value.shape[1])

    @property
    def rank(self) -> int:
        return int(self.key.shape[2])


def latent_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    paged: PagedBatch,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer. Returns [1, tokens, heads, v].

    `query`: [1, heads, tokens, nope + rope]; `key`: the new latents (see `plug_into`),
    [1, 1, tokens, rank + rope]; `value` is not looked at.
    """
    up = Up.of(module)
    out = query.new_empty(query.shape[2], up.heads, up.v)
    rope = key.shape[3] - up.rank
    few: list[Latents] = []
    for one in paged.latents(module.layer_idx, key[0].transpose(0, 1)):
        if one.reach.causal or not absorbing_is_cheaper(one.count, one.reach.length, up, rope):
            out[one.rows] = _expanded(query[0, :, one.rows], one, up, scaling)
        else:
            few.append(one)
    if few:
        _absorbed(query[0], few, up, scaling, out)
    return out.unsqueeze(0), None


def absorbing_is_cheaper(count: int, length: int, up: Up, rope: int) -> bool:
    """Multiplications of one head for `count` queries over `length` positions, either way."""
    project, pairs = up.rank * (up.nope + up.v), count * length
    absorbed = count * project + pairs * (2 * up.rank + rope)
    expanded = length * project + pairs * (up.nope + rope + up.v)
    return absorbed <= expanded


def _expanded(query: torch.Tensor, one: Latents, up: Up, scale: float) -> torch.Tensor:
    """[count, heads, v] of one span. `query`: [heads, count, nope + rope]."""
    latent, rope = one.cached[:, : up.rank], one.cached[:, up.rank :]
    both = linear(latent, up.both).view(one.reach.length, up.heads, -1).transpose(0, 1)
    key = torch.cat((both[..., : up.nope], rope.expand(up.heads, -1, -1)), dim=-1)
    # The fused kernel takes K and V of one size only; padding costs less than all pairs' scores.
    value = pad(both[..., up.nope :], (0, max(0, key.shape[2] - up.v)))
    out = scaled_dot_product_attention(
        query[None], key[None], value[None], one.reach.mask, is_causal=one.reach.causal, scale=scale
    )
    return out[0, ..., : up.v].transpose(0, 1)


def _absorbed(
    query: torch.Tensor, few: Sequence[Latents], up: Up, scale: float, out: torch.Tensor
) -> None:
    """Writes the rows of `few` in `out`, [tokens, heads, v]. `query`: [heads, tokens, nope + rope].

    Each up-projection is read once for all rows together.
    """
    spans = [torch.arange(one.rows.start, one.rows.stop, device=out.device) for one in few]
    rows = torch.cat(spans)
    picked = query[:, rows]
    wide = torch.cat((picked[..., : up.nope] @ up.key, picked[..., up.nope :]), dim=-1)
    mixed = wide.new_empty(up.heads, len(rows), up.rank)
    at = 0
    for one in few:
        to = at + one.count
        mixed[:, at:to] = _over_latents(wide[:, at:to], one, up.rank, scale)
        at = to
    out[rows] = (mixed @ up.value.transpose(1, 2)).transpose(0, 1)


def _over_latents(wide: torch.Tensor, one: Latents, rank: int, scale: float) -> torch.Tensor:
    """[heads, count, rank]: every head attends to the same vectors, as keys and as values.

    In plain products, since vectors this long make the fused kernel 2 to 4 times slower in
    bfloat16 on a CPU; in float32 the two are alike.
    """
    heads, count, dim = wide.shape
    scores = (wide.reshape(-1, dim) @ one.cached.T).view(heads, count, -1).mul_(scale)
    if one.reach.mask is not None:
        scores += one.reach.mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(wide.dtype)
    return (weights.view(heads * count, -1) @ one.cached[:, :rank]).view(heads, count, rank)


def plug_into(model: Any) -> None:
    """Let a DeepSeek model of transformers hand latents to `latent_attention`.

    Its attention projects and rotates, then expands by `expand_kv` what a cache would hold: here
    nothing is expanded before the cache.
    """
    AttentionInterface.register(NAME, latent_attention)
    model.set_attn_implementation(NAME)
    for layer in model.model.layers:
        layer.self_attn.expand_kv = _joined


def _joined(latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For `expand_kv`: [1, 1, tokens, rank] and [1, 1, tokens, rope], as one, in place of both."""
    joined = torch.cat((latent, rope), dim=-1)
    return joined, joined
