"""The forward pass: tokens and positions in, hidden states and logits out. Knows layers; must not
know requests, blocks or sampling.

`TransformersDecoder` runs transformers' own modules, of any family. `FusedDecoder` computes the
same for plain dense families with fewer and larger operations (engine.layers): packed rows without
a batch dimension, one matrix for Q, K and V and one for gate and up, norm and rotation of Q and K
in one go, rotations looked up. Its layers may be shared by several ranks (`Team`).
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch.nn.functional import embedding

from kvasir.core.errors import ModelError
from kvasir.engine.attention import Paged
from kvasir.engine.cuda.decode import triton_runs
from kvasir.engine.cuda.stack import DeviceStack
from kvasir.engine.families import FUSED, FUSED_ACTIVATIONS
from kvasir.engine.layers import (
    Layer,
    LayerWeights,
    Matrix,
    Norm,
    Rotation,
    Stack,
    linear_from,
)
from kvasir.engine.loader import Loaded
from kvasir.engine.lora import AdapterBatch, LinearHooks

ROPE_ROWS: Final = 4096  # positions looked up at first; doubled when a sequence goes beyond


class Decoder(Protocol):
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        paged: Paged,
        adapters: AdapterBatch | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm, [tokens, hidden], of int64 `tokens` at `positions`.

        KV goes into `paged`, whose spans say which tokens belong together.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab] of `hidden`, [rows, hidden]."""


class Team(Protocol):
    """Ranks that hold a part each of every layer and of the head, and compute in step
    (engine.parallel); as the first of them sees the others."""

    def deal(self, layer: LayerWeights) -> LayerWeights:
        """Give the others their parts of the next layer; returns the own one."""

    def deal_head(self, head: Matrix) -> Matrix:
        """The same for the head, whose outputs are cut; after the last layer."""

    def share(self, x: torch.Tensor, rotation: Rotation) -> None:
        """Give what goes into the first layer, [tokens, hidden], and its rotation."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, which may be written over."""

    def ask(self, hidden: torch.Tensor) -> torch.Tensor:
        """Give what goes into the head, [rows, hidden], and return it."""

    def joined(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] of the own part's outputs and the others'."""


def decoder_of(loaded: Loaded, fused: bool = True, team: Team | None = None) -> Decoder:
    """The fused decoder for models that it covers, unless told otherwise; else transformers'.

    A fused decoder takes the weights out of `loaded.model`, which is of no use afterwards. Raises
    ModelError when the weights are to be rounded, or shared by a `team`, and the family has no
    fused decoder.
    """
    if fused and fusible(loaded.model) and (team is None or loaded.weights == "plain"):
        return FusedDecoder(loaded, team)
    if team is not None:
        name = type(loaded.model).__name__
        raise ModelError(
            f"tensor parallel is not supported for this {name} with {loaded.weights} weights",
            nearest=", ".join(FUSED),
        )
    if loaded.weights != "plain":
        raise ModelError(
            f"weights {loaded.weights} are not supported for {type(loaded.model).__name__}",
            nearest=", ".join(FUSED),
        )
    return TransformersDecoder(loaded.model)


def fusible(model: Any) -> bool:
    """A dense family whose rotation covers the whole head and depends on the position alone."""
    if type(model).__name__ not in FUSED or model.config.hidden_act not in FUSED_ACTIVATIONS:
        return False
    head_dim = model.model.layers[0].self_attn.head_dim
    return 2 * len(model.model.rotary_emb.inv_freq) == int(head_dim)


class TransformersDecoder:
    """transformers' modules; `engine.attention` stands in for theirs."""

    def __init__(self, model: Any) -> None:
        self._body, self._head = model.model, model.lm_head
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._hooks: LinearHooks | None = None  # from the first batch with an adapter on

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        paged: Paged,
        adapters: AdapterBatch | None = None,
    ) -> torch.Tensor:
        if adapters is not None and self._hooks is None:
            self._hooks = LinearHooks(self._body)
        if self._hooks is not None:
            self._hooks.batch = adapters
        out = self._body(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, paged=paged
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._head(hidden).float()
        return out if self._softcap is None else torch.tanh(out / self._softcap) * self._softcap


# --- fused --------------------------------------------------------------------------------------


class Rope:
    """Cosines and sines by position, for whole heads: x cos + roll(x) sin.

    Rolling a head by half its width swaps its halves; the sign that one of them then needs
    (RoFormer, arXiv 2104.09864, section 3.4) is in the sines.
    """

    def __init__(self, module: Any, dtype: torch.dtype, rows_max: int) -> None:
        self._module, self._dtype, self._rows_max = module, dtype, rows_max
        self._table = self._make(min(ROPE_ROWS, rows_max))

    def at(self, positions: torch.Tensor, end: int) -> Rotation:
        """Two [tokens, 1, dim]; every position is below `end`."""
        if end > len(self._table):
            self._table = self._make(min(max(end, 2 * len(self._table)), self._rows_max))
        cos, sin = self._table.index_select(0, positions).split(1, dim=1)
        return cos, sin

    def _make(self, rows: int) -> torch.Tensor:
        """[rows, 2, dim]"""
        device = self._module.inv_freq.device
        like = torch.empty(1, dtype=self._dtype, device=device)
        cos, sin = self._module(like, torch.arange(rows, device=device)[None])
        half = sin.shape[-1] // 2
        return torch.stack((cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)), 1)


class FusedDecoder:
    """Llama, Qwen2, Qwen3 and Mistral, from the weights of a transformers model.

    `loaded.model` loses its layers one by one, so that no more than one is held twice. With a
    `team` this is its first rank, which alone has embedding, rotations and the last norm.
    """

    def __init__(self, loaded: Loaded, team: Team | None = None) -> None:
        model = loaded.model
        body, kind, self._team = model.model, loaded.weights, team
        self._embedding = body.embed_tokens.weight.detach()
        self._rope = Rope(body.rotary_emb, self._embedding.dtype, loaded.context_max)
        self._norm = Norm(body.norm.weight.detach(), body.norm.variance_epsilon)
        modules, layers = list(body.layers), list[Layer]()
        body.layers = torch.nn.ModuleList()
        for spec in loaded.layers:
            weights = LayerWeights.of(modules.pop(0), spec.window)
            layers.append(Layer.of(weights if team is None else team.deal(weights), kind))
        self._stack: Stack | DeviceStack = Stack(layers, None if team is None else team.sum)
        if team is None and triton_runs(self._embedding.device.type):
            self._stack = DeviceStack(layers)
        head = Matrix.of(model.lm_head)
        self._head = linear_from(kind, head if team is None else team.deal_head(head))

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        paged: Paged,
        adapters: AdapterBatch | None = None,
    ) -> torch.Tensor:
        x = embedding(tokens, self._embedding)
        rotation = self._rope.at(positions, paged.end)
        if self._team is not None:
            assert adapters is None, "other ranks know no adapters"
            self._team.share(x, rotation)
        return self._norm(self._stack(x, rotation, paged, adapters))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = self._head(hidden if self._team is None else self._team.ask(hidden))
        return (own if self._team is None else self._team.joined(own)).float()
