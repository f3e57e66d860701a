"""The exact rule for guesses that were drawn from a distribution (Leviathan et al., arXiv
2211.17192, algorithm 1; Chen et al., arXiv 2302.01318, algorithm 2).

Knows distributions and numbers; must not know models. A guess x ~ q is kept with min(1, p(x) /
q(x)); in place of the first that is not, a token is drawn from max(0, p - q); after the last, one
from p. What is drawn is distributed as p, whatever q is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from kvasir.core.request import Sampling
from kvasir.engine.sampler import Draw, pick, uniform

GUESS: Final = ":guess"  # uses of a draw's number: each is independent of the others
KEEP: Final = ":keep"
INSTEAD: Final = ":instead"


def weighs(sampling: Sampling) -> bool:
    """Whether guesses are weighed: only where nothing promises which text is drawn. How many tokens
    are guessed depends on the neighbours in the batch; what a seed names must not."""
    return sampling.temperature > 0 and sampling.seed is None


def weighed(
    p: torch.Tensor, q: torch.Tensor, guess: Sequence[int], draws: Sequence[Draw]
) -> list[int]:
    """The tokens that are kept, one more than the accepted guesses.

    `p`: [guesses + 1, vocab], the model's odds at each position; `q`: [guesses, vocab], those that
    each guess was drawn from, of no more tokens than `p` has; neither normalised. `draws`: one a
    row of `p`.
    """
    p = p.double() / p.sum(dim=-1, keepdim=True, dtype=torch.float64)
    q = q.double() / q.sum(dim=-1, keepdim=True, dtype=torch.float64)
    kept: list[int] = []
    for i, token in enumerate(guess):
        if uniform(draws[i], KEEP) * float(q[i, token]) < float(p[i, token]):
            kept.append(token)
            continue
        left = p[i].clone()
        left[: q.shape[-1]] -= q[i]
        left = left.clamp(min=0)
        return [*kept, _one(left if bool(left.any()) else p[i], draws[i], INSTEAD)]
    return [*kept, _one(p[len(guess)], draws[len(guess)], "")]


def _one(odds: torch.Tensor, draw: Draw, use: str) -> int:
    return int(pick(odds.unsqueeze(0), [uniform(draw, use)]))
