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

from kvasir.core.ids import RequestId
from kvasir.core.request import Sampling, Steering
from kvasir.engine.attention import PagedBatch, Span, make_caches
from kvasir.engine.base import RunnerSpec
from kvasir.engine.grammar import Grammars
from kvasir.engine.guide import Guide, needs_guide
from kvasir.engine.loader import DTYPES, Dtype, load
from kvasir.engine.logprobs import logprobs_of
from kvasir.engine.sampler import Draw, draw
from kvasir.engine.steps import DEFAULT_SAMPLING, AttemptRunner, Choice, Work, stop_tokens

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
        tokenizer = Path(folder) / "tokenizer.json"
        self._grammars = Grammars(tokenizer, loaded.vocab, loaded.eos_token_ids)

    def open(
        self,
        request_id: RequestId,
        attempt: int,
        tokens: Sequence[int],
        keys_count: int,
        salt: bytes,
        steering: Steering | None = None,
    ) -> None:
        super().open(request_id, attempt, tokens, keys_count, salt, steering)
        if steering is not None and steering.grammar is not None:
            self._grammars.prepare(steering.grammar)  # while the prompt is computed

    def planes(self) -> list[list[Plane]]:
        """Per layer K and V, uint8 [blocks, bytes per block]: views, not copies."""
        return [[self._bytes_of(plane) for plane in cache] for cache in self._caches]

    def _bytes_of(self, plane: torch.Tensor) -> Plane:
        view: Plane = plane.view(self.spec.blocks_count, -1).view(torch.uint8).numpy()
        return view

    @torch.inference_mode()
    def _compute(
        self, works: Sequence[Work], iteration: int, layer_done: Callable[[int], None]
    ) -> list[Choice]:
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
        lasts, draws = self._draws(works)
        return _choices(self._head(hidden[lasts]).float(), draws) if draws else []

    def _draws(self, works: Sequence[Work]) -> tuple[list[int], list[Draw]]:
        """Where in the packed batch the sampled positions stand, and what to draw there."""
        lasts: list[int] = []
        draws: list[Draw] = []
        at = 0
        for work in works:
            at += work.count
            if work.row.sample:
                lasts.append(at - 1)
                sampling = work.row.sampling or DEFAULT_SAMPLING
                guide = self._guide(work, sampling)
                draws.append(Draw(work.row.request_id, work.index, sampling, guide))
        return lasts, draws

    def _guide(self, work: Work, sampling: Sampling) -> Guide | None:
        """The attempt's guide, if it needs one, up to the token that is drawn now."""
        attempt, spec = work.attempt, self.spec
        steering = attempt.steering
        if attempt.guide is None and needs_guide(sampling, steering):
            steering = steering or Steering()
            grammar = steering.grammar
            matcher = self._grammars.matcher(grammar) if grammar is not None else None
            stops = stop_tokens(sampling, spec.eos_token_ids)
            attempt.guide = Guide(sampling, stops, spec.vocab, steering.logit_bias, matcher)
        if attempt.guide is not None:
            attempt.guide.follow(attempt.tokens, work.index)
        return attempt.guide


def _choices(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Draw from `logits`, [rows, vocab], and say what was asked about each token."""
    tokens = draw(logits, draws)
    logprobs = logprobs_of(logits, tokens, [one.sampling.logprobs for one in draws])
    for one, token in zip(draws, tokens, strict=True):
        if one.guide is not None:
            one.guide.take(token)
    ends = [one.guide.end() if one.guide is not None else "" for one in draws]
    return [Choice(*choice) for choice in zip(tokens, logprobs, ends, strict=True)]
