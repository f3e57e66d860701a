"""A packed batch as the kernel wants it: worked out once, attended in every layer. Knows spans and
block tables; must not know layers, models or requests.

Rows that share a long prefix (engine.shared) are computed level by level, one call a level:

    level 0    | a b c on 7 8 9           | d e on 1 2 3      together
    level 1    | a b on 12 13 | c on 40   | d on 5 | e on 6   together, or a row for itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvasir.engine.native.kernel import Kernel, Plan, Seen
from kvasir.engine.shared import Branch, Part, merge

if TYPE_CHECKING:
    from kvasir.engine.attention import LayerCache, Span
    from kvasir.engine.narrow import Narrow


@dataclass(frozen=True, slots=True)
class Level:
    """`rows` of the batch attend by `plan`, packed in that order; those at `deeper` of them go on
    in the next level."""

    rows: torch.Tensor
    plan: Plan
    deeper: torch.Tensor


class NativeBatch:
    """`places`: where in the packed batch each of `spans` begins. `shared`: those of its rows of
    one token that read a prefix together."""

    def __init__(
        self, kernel: Kernel, spans: Sequence[Span], places: Sequence[int], block_size: int
    ) -> None:
        self._kernel, self._block_size = kernel, block_size
        self._spans = dict(zip(places, spans, strict=False))
        self._tokens = sum(span.count for span in spans)
        self._plans: dict[tuple[int | None, bool], Plan | None] = {}
        self._levels: list[Level] | None = None

    def takes(self, query: torch.Tensor, plane: torch.Tensor, narrow: Narrow | None) -> bool:
        return self._kernel.takes(query, plane, narrow)

    def attend(
        self,
        cache: LayerCache,
        query: torch.Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        shared: Sequence[Branch],
    ) -> torch.Tensor:
        """[tokens, heads, head_dim], contiguous; `query` likewise."""
        out = torch.empty(query.shape, dtype=query.dtype)
        plan = self._plan(window, shared, len(cache.key))
        if plan is not None:
            self._kernel.attend(plan, query, cache.key, cache.value, out, scale, softcap)
        if shared:
            levels = self._levels_of(shared, len(cache.key))
            out.index_copy_(0, levels[0].rows, self._together(levels, cache, query, scale).out)
        return out

    def _plan(self, window: int | None, shared: Sequence[Branch], slots: int) -> Plan | None:
        """Of all rows that read for themselves."""
        key = (window, bool(shared))
        if key not in self._plans:
            others = {row for branch in shared for row in branch.rows}
            seen = [
                Seen(at, span.start, span.count, span.table.blocks)
                for at, span in self._spans.items()
                if at not in others
            ]
            size = self._block_size
            self._plans[key] = Plan(seen, size, slots, self._tokens, window) if seen else None
        return self._plans[key]

    def _together(
        self, levels: Sequence[Level], cache: LayerCache, query: torch.Tensor, scale: float | None
    ) -> Part:
        """Attention of all rows of the first level, in its order."""
        below: Part | None = None
        for level in reversed(levels):
            asked = query[level.rows]
            part = Part(torch.empty_like(asked), torch.empty(asked.shape[:2]))
            self._kernel.attend(
                level.plan, asked, cache.key, cache.value, part.out, scale, lse=part.lse
            )
            if below is not None:
                merged = merge(Part(part.out[level.deeper], part.lse[level.deeper]), below)
                for to, new in zip(part, merged, strict=True):
                    to.index_copy_(0, level.deeper, new)
            below = part
        assert below is not None
        return below

    def _levels_of(self, shared: Sequence[Branch], slots: int) -> list[Level]:
        if self._levels is None:
            self._levels, branches = [], list(shared)
            while branches:
                self._levels.append(self._level(branches, slots))
                branches = [one for branch in branches for one in branch.below]
        return self._levels

    def _level(self, branches: Sequence[Branch], slots: int) -> Level:
        seen, rows, deeper, size = list[Seen](), list[int](), list[int](), self._block_size
        for branch in branches:
            span = self._spans[branch.rows[0]]
            blocks = span.table.blocks[branch.first : branch.last]
            at, count = len(rows), len(branch.rows)
            start = span.start - branch.first * size  # of a row that reads to its own end
            fixed = None if branch.last is None else len(blocks) * size
            seen.append(Seen(at, 0 if fixed else start, count, blocks, fixed))
            if branch.below:
                deeper += range(at, at + count)
            rows += branch.rows
        plan = Plan(seen, size, slots, len(rows), None)
        return Level(torch.tensor(rows), plan, torch.tensor(deeper, dtype=torch.long))
