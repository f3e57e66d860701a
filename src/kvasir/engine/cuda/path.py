"""What a TorchRunner does otherwise on an accelerator: decode iterations by engine.cuda.decoding,
everything else packed, tokens drawn where the logits are. Knows works and layers; must not know
steps' rows that are over, or who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvasir.engine.attention import LayerCache, Span
from kvasir.engine.base import RunnerSpec
from kvasir.engine.cuda.batch import device_batch, to_device
from kvasir.engine.cuda.decode import triton_runs
from kvasir.engine.cuda.decoding import Decoding
from kvasir.engine.cuda.sample import draw_on_device
from kvasir.engine.decoder import Decoder, FusedDecoder
from kvasir.engine.guide import needs_guide
from kvasir.engine.lora import batch_of
from kvasir.engine.sampler import Draw
from kvasir.engine.steps import DEFAULT_SAMPLING, Choice, Work, sampled_places

DrawOnHost = Callable[[torch.Tensor, Sequence[Work]], list[Sequence[Choice]]]


class DevicePath:
    """`caches` have a block more than `spec.blocks_count`: the scratch block of captured graphs.

    `draw(logits, works)` draws on the host, for works that are not plain: with a guide, guesses or
    log-probabilities; `logits` are there already.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[LayerCache],
        spec: RunnerSpec,
        graphs: bool,
        draw: DrawOnHost,
    ) -> None:
        self._decoder, self._caches, self._spec = decoder, caches, spec
        self._draw, self._device = draw, caches[0].key.device
        self._steps = 1
        self.decoding: Decoding | None = None
        self.set_graphs(graphs)

    def set_graphs(self, graphs: bool) -> None:
        """Capture and replay graphs from now on, or start kernels one by one. Without Triton a GPU
        has neither: the reference reads the whole width of a table."""
        kind, spec = self._device.type, self._spec
        if kind != "cpu" and not triton_runs(kind):
            return
        capture = graphs and kind == "cuda" and isinstance(self._decoder, FusedDecoder)
        self.decoding = Decoding(
            self._decoder, self._caches, spec.block_size, spec.blocks_count, spec.context_max,
            capture,
        )  # fmt: skip

    def begin(self, steps: int) -> None:
        """A step of so many iterations at most comes next."""
        self._steps = steps
        if self.decoding is not None:
            self.decoding.forget()

    def compute(
        self, works: Sequence[Work], iteration: int, layer_done: Callable[[int], None]
    ) -> list[Sequence[Choice]]:
        """As engine.steps.AttemptRunner._compute. All layers are told at the end, once the device
        has written them."""
        if self.decoding is not None and self.decoding.takes(works):
            choices = self._decode(self.decoding, works, iteration)
        else:
            choices = self._packed(works)
        for layer in range(len(self._caches)):
            layer_done(layer)
        return choices

    def _decode(
        self, decoding: Decoding, works: Sequence[Work], iteration: int
    ) -> list[Sequence[Choice]]:
        if all(_plain(work) for work in works):
            more = iteration + 1 < self._steps
            return [[Choice(token)] for token in decoding.tokens(works, more)]
        return self._draw(decoding.logits(works).cpu(), works)

    def _packed(self, works: Sequence[Work]) -> list[Sequence[Choice]]:
        spans = [Span(work.start, work.count, work.attempt.table) for work in works]
        tokens = np.array([token for work in works for token in work.new_tokens])
        positions = np.concatenate([np.arange(work.start, work.end) for work in works])
        hidden = self._decoder.forward(
            to_device(tokens, self._device),
            to_device(positions, self._device),
            device_batch(self._caches, self._spec.block_size, spans),
            batch_of(((work.attempt.adapter, work.count) for work in works), self._device),
        )
        drawing = [work for work in works if work.row.sample]
        if not drawing:
            if self._device.type == "cuda":  # else the step would seem to be over
                torch.cuda.current_stream(self._device).synchronize()
            return []
        places = to_device(np.array(sampled_places(works)), self._device)
        logits = self._decoder.logits(hidden.index_select(0, places))
        if not all(_plain(work) for work in drawing):
            return self._draw(logits.cpu(), drawing)
        draws = [
            Draw(work.row.request_id, work.index, work.row.sampling or DEFAULT_SAMPLING)
            for work in drawing
        ]
        return [[Choice(int(token))] for token in draw_on_device(logits, draws).tolist()]


def _plain(work: Work) -> bool:
    sampling = work.row.sampling or DEFAULT_SAMPLING
    guided = needs_guide(sampling, work.attempt.steering)
    return not guided and not work.guess and sampling.logprobs is None
