"""Runs a HuggingFace model over paged KV. Knows tensors and a model folder; must not know who
asked. The contract is engine.base.Runner, the forward pass that of engine.decoder.

All rows of an iteration are packed into one sequence of tokens, so each linear layer runs once and
attention splits them again (engine.attention). Logits are computed for sampled positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from kvasir.core.effects import Step
from kvasir.core.errors import ModelError
from kvasir.core.ids import RequestId
from kvasir.core.request import Sampling, Steering
from kvasir.engine.adapters import Adapters
from kvasir.engine.attention import LayerCache, PagedBatch, Span, make_caches
from kvasir.engine.base import RunnerSpec, StepHooks, StepResult
from kvasir.engine.cuda.path import DevicePath
from kvasir.engine.decoder import decoder_of
from kvasir.engine.grammar import Grammars
from kvasir.engine.guide import Guide, needs_guide
from kvasir.engine.linear import Kind
from kvasir.engine.loader import Dtype, Loaded, load
from kvasir.engine.logprobs import logprobs_of
from kvasir.engine.lora import batch_of, read_lora
from kvasir.engine.narrow import Narrow
from kvasir.engine.native.kernel import Kernel, kernel_of
from kvasir.engine.rejection import weighed
from kvasir.engine.sampler import Draw, draw, probs
from kvasir.engine.steps import (
    DEFAULT_SAMPLING,
    AttemptRunner,
    Choice,
    Work,
    sampled_places,
    stop_tokens,
    verified,
)  # fmt: skip

if TYPE_CHECKING:
    from kvasir.engine.base import Allocate, Plane
    from kvasir.engine.parallel.team import Team


class TorchRunner(AttemptRunner):
    """`blocks_count` blocks of `block_size` tokens of KV, in the weights' dtype, or one byte a
    value (`kv`: engine.narrow). `weights` of linear layers may be rounded (engine.quant).

    `threads` is torch's own number of threads, for the whole process: one unless the cores are not
    shared, since its barriers cost more than they give (2-20 times slower under load). None leaves
    it alone. `fused`: compute the families that engine.decoder covers with its own layers; False
    runs transformers' modules. `adapters_max` LoRA adapters are held at most. `loaded`: a model
    that is in memory already, on `device`; its folder needs no weights then. On another device than
    "cpu" the cache is there too, and has no `planes`; `graphs`: decode by captured CUDA graphs.
    `rehearse`: take a device's way (engine.cuda) on the CPU, to try it there. `team`: ranks that
    compute together, on the CPU; `allocate` takes from their memory then. `native`: attend by the
    compiled kernel on a CPU, if it is built; True or a kernel: by that; False: by torch. Raises
    ModelError (see engine.loader.load), and Unavailable when a rank does not start.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        blocks_count: int,
        block_size: int = 16,
        dtype: Dtype | Literal["auto"] = "float32",
        weights: Kind = "plain",
        kv: Narrow | None = None,
        threads: int | None = 1,
        fused: bool = True,
        adapters_max: int = 8,
        device: str = "cpu",
        loaded: Loaded | None = None,
        allocate: Allocate | None = None,
        team: Team | None = None,
        graphs: bool = True,
        rehearse: bool = False,
        native: Kernel | bool | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.kernel = kernel_of(native) if device == "cpu" else None
        if loaded is None:
            loaded = load(Path(folder), dtype, weights, kv)
            loaded.model.to(device)
        if loaded.kv is not None and device != "cpu":
            raise ModelError(f"kv {loaded.kv} is not supported on {device}")
        if loaded.weights != "plain" and device != "cpu":
            raise ModelError(f"weights {loaded.weights} are not supported on {device}")
        self._dtype, self._narrow = loaded.model.dtype, loaded.kv
        reader = partial(read_lora, base=Path(folder))
        if device != "cpu":
            reader = partial(reader, dtype=self._dtype, device=device)
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
            ),
            Adapters(reader, adapters_max),
        )
        self._device, self._team, self.helpers = device, team, team
        keyed = all(layer.kind != "latent" for layer in loaded.layers)
        there = keyed and (device != "cpu" or rehearse)
        self._caches = make_caches(
            loaded.layers, blocks_count + there, block_size, self._dtype, device, allocate
        )
        self._own = self._caches  # the heads that are computed here
        if team is not None:
            assert device == "cpu" and not rehearse, "ranks share a cache on the CPU"
            self._own = team.begin(
                self._caches, block_size, self._dtype, loaded.kv, self.kernel
            )
        self.decoder = decoder_of(loaded, fused, team)
        if team is not None:
            team.ready()
        self.path: DevicePath | None = None
        if there:
            caches = [cache for cache in self._caches if isinstance(cache, LayerCache)]
            self.path = DevicePath(self.decoder, caches, self.spec, graphs, self._draw)
        self.rows_shared = 0  # times that a row attended to a prefix together with others
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
        if self._device != "cpu":
            raise ModelError(
                f"KV in the memory of {self._device} cannot leave it: no hand-over, tiers or peers",
                nearest="device cpu",
                next_step="serve on CPUs, or with vLLM on GPUs",
            )
        return [[self._bytes_of(plane) for plane in cache] for cache in self._caches]

    def _bytes_of(self, plane: torch.Tensor) -> Plane:
        own = plane[: self.spec.blocks_count * self.spec.block_size]  # no scratch block
        view: Plane = own.view(self.spec.blocks_count, -1).view(torch.uint8).numpy()
        return view

    def step(self, step: Step, hooks: StepHooks) -> StepResult:
        if self.path is not None:
            self.path.begin(step.steps)
        return super().step(step, hooks)

    @torch.inference_mode()
    def _compute(
        self, works: Sequence[Work], iteration: int, layer_done: Callable[[int], None]
    ) -> list[Sequence[Choice]]:
        if self.path is not None:
            return self.path.compute(works, iteration, layer_done)
        spans = [Span(work.start, work.count, work.attempt.table) for work in works]
        written = layer_done
        if self._team is not None:
            written = self._team.step(spans, self.spec.block_size, layer_done)
        batch = PagedBatch(
            self._own, self.spec.block_size, spans, written, self._narrow, self._dtype,
            self.kernel,
        )  # fmt: skip
        tokens = [token for work in works for token in work.new_tokens]
        positions = [p for work in works for p in range(work.start, work.end)]
        adapters = batch_of((work.attempt.adapter, work.count) for work in works)
        hidden = self.decoder.forward(
            torch.tensor(tokens, device=self._device),
            torch.tensor(positions, device=self._device),
            batch,
            adapters,
        )
        self.rows_shared += batch.rows_shared
        places = sampled_places(works)
        if not places:
            return []
        rows = hidden if len(places) == len(hidden) else hidden[places]
        return self._draw(self.decoder.logits(rows), [work for work in works if work.row.sample])

    def _draw(self, logits: torch.Tensor, works: Sequence[Work]) -> list[Sequence[Choice]]:
        """What the works keep. `logits` [rows, vocab]: of each work its last known position, and
        one more for each guess.

        All is drawn at once, but for the guesses of a row with a guide: what is allowed there
        depends on the tokens before, which must have been drawn. Guesses that say what they were
        drawn from are weighed.
        """
        draws: list[list[Draw]] = []
        for work in works:
            sampling = work.row.sampling or DEFAULT_SAMPLING
            guide = self._guide(work, sampling)
            count = 1 + len(work.guess)
            draws.append(
                [Draw(work.row.request_id, work.index + i, sampling, guide) for i in range(count)]
            )
        firsts = [0, *accumulate(len(of) for of in draws)]
        ahead = [
            0 if work.odds is not None else 1 if of[0].guide is not None else len(of)
            for work, of in zip(works, draws, strict=True)
        ]
        at = [first + i for first, n in zip(firsts, ahead, strict=False) for i in range(n)]
        one_by_one = len(at) < len(logits)
        chosen = iter(
            _choices(
                logits[at] if one_by_one else logits,
                [one for of, n in zip(draws, ahead, strict=True) for one in of[:n]],
            )
        )
        kept: list[Sequence[Choice]] = []
        for work, first, of, n in zip(works, firsts, draws, ahead, strict=False):
            known = [next(chosen) for _ in range(n)]
            if work.odds is not None:
                kept.append(_weighed(logits[first : first + len(of)], work, of))
            else:
                kept.append(verified(work.guess, partial(_choice, logits, first, of, known)))
        return kept

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


def _choice(
    logits: torch.Tensor, first: int, draws: Sequence[Draw], known: Sequence[Choice], i: int
) -> Choice:
    """A row's i-th draw; its logits begin at `first`."""
    if i < len(known):
        return known[i]
    return _choices(logits[first + i : first + i + 1], [draws[i]])[0]


def _weighed(logits: torch.Tensor, work: Work, draws: Sequence[Draw]) -> list[Choice]:
    """What a row keeps of guesses that were drawn from odds; `logits` [guesses + 1, vocab]."""
    p = probs(logits.cpu(), [one.sampling for one in draws])
    tokens = weighed(p, work.odds, work.guess, draws)
    return _told(logits[: len(tokens)], draws[: len(tokens)], tokens)


def _choices(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Draw from `logits`, [rows, vocab], and say what was asked about each token."""
    return _told(logits, draws, draw(logits, draws))


def _told(logits: torch.Tensor, draws: Sequence[Draw], tokens: list[int]) -> list[Choice]:
    logprobs = logprobs_of(logits, tokens, [one.sampling.logprobs for one in draws])
    for one, token in zip(draws, tokens, strict=True):
        if one.guide is not None:
            one.guide.take(token)
    ends = [one.guide.end() if one.guide is not None else "" for one in draws]
    return [Choice(*choice) for choice in zip(tokens, logprobs, ends, strict=True)]
