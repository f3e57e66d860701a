"""How long one iteration takes, by a profile of whole iterations: a paper's, or one's own.

Knows curves over tokens and over sequences, and DistServe's two fits. Must not know where a profile
comes from, requests, or policy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.specs.deployment import ProfileCost
from kvasir.cost.published import DISTSERVE, SPLITWISE, Coefficients, Key, Points
from kvasir.cost.step import DecodeLine, Row, StepModel

MS = 1e-3


class Polyline:
    """Seconds over a count: straight between points, and on along the outer two beyond them."""

    __slots__ = ("_xs", "_ys")

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        assert len(points) > 1, "a line needs two points"
        self._xs = [x for x, _ in points]
        self._ys = [y for _, y in points]

    def __call__(self, x: float) -> float:
        i = min(max(bisect_right(self._xs, x), 1), len(self._xs) - 1)
        slope = (self._ys[i] - self._ys[i - 1]) / (self._xs[i] - self._xs[i - 1])
        return self._ys[i - 1] + slope * (x - self._xs[i - 1])


class Interpolated(StepModel):
    """Splitwise's model (ISCA 2024): prompts by tokens, decode by sequences.

    `prefill`: seconds of a batch of prompts over its new tokens. `decode`: seconds of an iteration
    over its sequences. A batch of both takes `mixed` times what its tokens would as prompts.
    Context has no part in it: neither what a decode row reads nor what stands before a chunk.
    """

    def __init__(
        self,
        prefill: Sequence[tuple[float, float]],
        decode: Sequence[tuple[float, float]],
        mixed: float,
    ) -> None:
        super().__init__()
        self._prefill, self._decode, self._mixed = Polyline(prefill), Polyline(decode), mixed

    def batch(self, rows: Sequence[Row]) -> float:
        """As `StepModel.batch`."""
        assert rows, "a batch without rows"
        decoding = sum(new == 1 for new, _ in rows)
        if decoding == len(rows):
            return self._decode(decoding)
        seconds = self._prefill(sum(new for new, _ in rows))
        return seconds * self._mixed if decoding else seconds

    def _line(self, batch_size: int) -> DecodeLine:
        return DecodeLine(self._decode(batch_size), 0.0)


class TwoPhases(StepModel):
    """DistServe's model (OSDI 2024, appendix A, as its simulator fits it): a fit for each phase.

    prefill = a + b * tokens + c * sum of squared prompt lengths
    decode  = a + b * total context + c * sequences, another fit from `large_from` sequences on

    A chunk counts for the squares that it adds. DistServe never runs both phases in one batch; here
    such a batch takes the prefill and the decode rows' own terms, its weights being read once.
    """

    def __init__(self, fits: Coefficients) -> None:
        super().__init__()
        self._fits = fits

    def batch(self, rows: Sequence[Row]) -> float:
        """As `StepModel.batch`."""
        assert rows, "a batch without rows"
        contexts = [before + 1 for new, before in rows if new == 1]
        if len(contexts) == len(rows):
            return self.iteration_seconds(len(rows), sum(contexts))
        tokens = sum(new for new, _ in rows if new > 1)
        squares = sum((before + new) ** 2 - before**2 for new, before in rows if new > 1)
        fixed, per_token, per_square = self._fits.prefill
        ms = fixed + per_token * tokens + per_square * squares
        if contexts:
            _, per_context, per_row = self._decode(len(contexts))
            ms += per_context * sum(contexts) + per_row * len(contexts)
        return ms * MS

    def _line(self, batch_size: int) -> DecodeLine:
        fixed, per_context, per_row = self._decode(batch_size)
        return DecodeLine((fixed + per_row * batch_size) * MS, per_context * MS)

    def _decode(self, batch_size: int) -> tuple[float, float, float]:
        small = batch_size < self._fits.large_from
        return self._fits.decode if small else self._fits.decode_large


def profiled(cost: ProfileCost, shape: str, hardware: str, tp: int, where: str) -> StepModel:
    """The model of a pool's own curves, or of the published profile of its shape, hardware and tp.

    Raises ConfigError naming the nearest one that was published.
    """
    if cost.source is None:
        return Interpolated(cost.prefill, cost.decode, cost.mixed)
    key = (shape, hardware, tp)
    if cost.source == "distserve" and key in DISTSERVE:
        return TwoPhases(DISTSERVE[key])
    if cost.source == "splitwise" and key in SPLITWISE:
        sweep = SPLITWISE[key]
        return Interpolated(_seconds(sweep.prefill_ms), _seconds(sweep.decode_ms), cost.mixed)
    published = DISTSERVE if cost.source == "distserve" else SPLITWISE
    raise ConfigError(
        f"{cost.source} has published no profile of {_named(key)}",
        where=where,
        nearest=nearest(_named(key), map(_named, published)),
        next_step="change model, hardware or tp, or give the pairs `prefill` and `decode`",
    )


def _seconds(points: Points) -> tuple[tuple[int, float], ...]:
    return tuple((x, ms * MS) for x, ms in points)


def _named(key: Key) -> str:
    shape, hardware, tp = key
    return f"{shape} on {hardware}, tp {tp}"
