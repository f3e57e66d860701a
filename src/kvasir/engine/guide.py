"""What one text's own tokens, and its client's wishes, do to its logits. Knows one row; must not
know batches, seeds or text.

    repetition -> presence, frequency -> bias -> no stop before min_tokens -> grammar

Everything is rebuilt from the tokens, so a text goes on alike after preemption, a hand-over, or
another worker's death.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvasir.core.messages import TextEnd
from kvasir.core.request import Sampling, Steering
from kvasir.engine.grammar import Matcher

NO = float("-inf")


def needs_guide(sampling: Sampling, steering: Steering | None) -> bool:
    return steering is not None or sampling.min_tokens > 0 or _penalised(sampling)


def _penalised(sampling: Sampling) -> bool:
    additive = sampling.presence_penalty or sampling.frequency_penalty
    return bool(additive) or sampling.repetition_penalty != 1


class Guide:
    """Follows one attempt. `stops`: tokens that end its text. `matcher` stands at its beginning."""

    __slots__ = ("_bias", "_counts", "_drawn", "_known", "_matcher", "_sampling", "_stops")

    def __init__(
        self, sampling: Sampling, stops: Sequence[int], vocab: int,
        bias: Sequence[tuple[int, float]] = (), matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        self._sampling, self._matcher = sampling, matcher
        self._stops = torch.tensor(sorted({t for t in stops if t < vocab}), dtype=torch.long)
        self._bias = _sparse(bias)
        self._drawn = 0
        self._known: torch.Tensor | None = None  # [vocab]: is in prompt or output
        self._counts: torch.Tensor | None = None  # [vocab]: how often in the output
        if _penalised(sampling):
            self._known = torch.zeros(vocab, dtype=torch.bool)
            self._counts = torch.zeros(vocab)

    def follow(self, tokens: Sequence[int], drawn: int) -> None:
        """Of `tokens`, prompt and output, the last `drawn` are output; some were followed before.

        The prompt must be the same each time.
        """
        if self._known is not None and self._drawn == 0:
            self._known[torch.tensor(tokens[: len(tokens) - drawn], dtype=torch.long)] = True
        for token in tokens[len(tokens) - drawn + self._drawn :]:
            self.take(token)

    def take(self, token: int) -> None:
        """The next token of the output."""
        self._drawn += 1
        if self._matcher is not None:
            self._matcher.take(token)
        if self._known is not None and self._counts is not None:
            self._known[token] = True
            self._counts[token] += 1

    def end(self) -> TextEnd:
        """Whether the grammar says that the text is over."""
        return self._matcher.end() if self._matcher is not None else ""

    def shape(self, logits: torch.Tensor) -> None:
        """Change the logits of the next token, float32 [vocab], in place. Some are left finite."""
        sampling = self._sampling
        if self._known is not None and self._counts is not None:
            r = sampling.repetition_penalty
            weak = torch.where(logits > 0, logits / r, logits * r)
            torch.where(self._known, weak, logits, out=logits)
            logits -= sampling.frequency_penalty * self._counts
            logits -= sampling.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            ids, values = self._bias
            logits[ids] += values
        if self._drawn < sampling.min_tokens and len(self._stops) < len(logits):
            logits[self._stops] = NO
        if self._matcher is not None:
            allowed = torch.from_numpy(self._matcher.allowed())
            logits.masked_fill_(~allowed, NO)
            if not allowed.any():  # the text has failed; whatever is drawn ends it
                logits[self._stops[:1] if len(self._stops) else [0]] = 0.0


def _sparse(bias: Sequence[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not bias:
        return None
    return torch.tensor([token for token, _ in bias]), torch.tensor([float(v) for _, v in bias])
