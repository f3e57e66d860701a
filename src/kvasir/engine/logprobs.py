"""Log-probabilities of drawn tokens, where they were asked for. Knows logits; no text, no request.

They are the model's own: natural logarithm of the softmax of its logits, before temperature,
penalties, bias or grammar (what vLLM calls `raw_logprobs`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvasir.core.messages import Logprobs


def logprobs_of(
    logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int | None]
) -> list[Logprobs | None]:
    """For each row of `logits` ([rows, vocab], float32) and the token drawn from it: None where
    `tops` is None, else its log-probability beside those of the `tops` likeliest tokens."""
    found: list[Logprobs | None] = [None] * len(tokens)
    asked = [(i, top) for i, top in enumerate(tops) if top is not None]
    if not asked:
        return found
    logs = logits[[i for i, _ in asked]].log_softmax(dim=-1)
    for row, (i, top) in zip(logs, asked, strict=True):
        best = row.topk(min(top, len(row)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found[i] = Logprobs(float(row[tokens[i]]), tuple(pairs))
    return found
