"""Copies of cached blocks ahead of their use: which kinds, and how much of a network they may take.

Switches and limits. Must not know what a policy makes of them.
"""

from __future__ import annotations

from pydantic import Field

from kvasir.core.specs.base import Spec


class CopiesSpec(Spec):
    """Each kind is off unless it is switched on.

    `hot`: prefixes that many prompts begin with go to more workers: one copy for each
    `uses_per_copy` uses in about the last `half_life_s` seconds, up to `copies_max`. `next_turn`:
    what a session's next prompt will begin with goes to where that will be prefilled. `leaving`:
    what only a draining worker has goes to others.

    `bytes_per_s`: of all copies together, on average; those of a leaving worker do not wait for it.
    `at_once`: orders under way. `pool_share_max`: of a worker's blocks that copies may fill before
    anybody has used them. `blocks_max`, `sessions_max`: what the conductor remembers of recent
    prompts.
    """

    hot: bool = False
    next_turn: bool = False
    leaving: bool = False
    bytes_per_s: float = Field(default=1e9, gt=0)
    at_once: int = Field(default=8, gt=0)
    uses_per_copy: float = Field(default=4.0, gt=0)
    copies_max: int = Field(default=8, gt=0)
    half_life_s: float = Field(default=60.0, gt=0)
    pool_share_max: float = Field(default=0.25, gt=0, le=1)
    blocks_max: int = Field(default=1 << 18, gt=0)
    sessions_max: int = Field(default=4096, gt=0)

    @property
    def any(self) -> bool:
        return self.hot or self.next_turn or self.leaving
