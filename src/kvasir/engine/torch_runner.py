"""Runs a HuggingFace model over paged KV, on the CPU. Knows tensors and a model folder; must not
know who asked. The contract is engine.base.Runner.

All rows of an iteration are packed into one sequence of tokens, so each linear layer runs once and
attention splits them again (engine.attention). Logits are computed for sampled positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvasir.engine.attention import PagedBatch, Span, make_caches
from kvasir.engine.base import RunnerSpec
from kvasir.engine.loader import DTYPES, Dtype, load
from kvasir.engine.sampler import Draw, draw
from kvasir.engine.steps import DEFAULT_SAMPLING, AttemptRunner, Work

if TYPE_CHECKING:
    from kvasir.engine.base import Plane


class TorchRunner(AttemptRunner):
    """`blocks_count` blocks of `block_size` tokens of KV, in the weights' dtype.

    `threads` is torch's own number of threads, for the whole process: one unless the cores are not
    shared, since its barriers cost more than they give (2-20 times slower under load). None leaves
    it alone. Raises ModelError (see engine.loader.load).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        blocks_count: int,
        block_size: int = 16,
        dtype: Dtype = "float32",
        threads: int | None = 1,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = load(Path(folder), dtype)
        super().__init__(
            RunnerSpec(
                layers=loaded.layers,
                block_size=block_size,
                blocks_count=blocks_count,
                kv_token_bytes=sum(layer.token_bytes for layer in loaded.layers),
                vocab=loaded.vocab,
                context_max=loaded.context_max,
                eos_token_ids=loaded.eos_token_ids,
                fingerprint=loaded.fingerprint,
            )
        )
        self._body, self._head = loaded.model.model, loaded.model.lm_head
        self._caches = make_caches(loaded.layers, blocks_count, block_size, DTYPES[dtype])

    def planes(self) -> list[list[Plane]]:
        """Per layer K and V, uint8 [blocks, bytes per block]: views, not copies."""
        return [[self._bytes_of(plane) for plane in cache] for cache in self._caches]

    def _bytes_of(self, plane: torch.Tensor) -> Plane:
        view: Plane = plane.view(self.spec.blocks_count, -1).view(torch.uint8).numpy()
        return view

    @torch.inference_mode()
    def _compute(
        self, works: Sequence[Work], iteration: int, layer_done: Callable[[int], None]
    ) -> list[int]:
        spans = [Span(work.start, work.count, work.attempt.table) for work in works]
        batch = PagedBatch(self._caches, self.spec.block_size, spans, layer_done)
        tokens = [token for work in works for token in work.new_tokens]
        positions = [p for work in works for p in range(work.start, work.end)]
        hidden = self._body(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            paged=batch,
        ).last_hidden_state[0]
        lasts, draws = _draws(works)
        if not draws:
            return []
        return draw(self._head(hidden[lasts]).float(), draws)


def _draws(works: Sequence[Work]) -> tuple[list[int], list[Draw]]:
    """Where in the packed batch the sampled positions stand, and what to draw there."""
    lasts: list[int] = []
    draws: list[Draw] = []
    at = 0
    for work in works:
        at += work.count
        if work.row.sample:
            lasts.append(at - 1)
            sampling = work.row.sampling or DEFAULT_SAMPLING
            draws.append(Draw(work.row.request_id, work.index, sampling))
    return lasts, draws
