"""Whose cached blocks go first when tenants share a cache. Knows counts and weights; no blocks.

Weighted max-min fairness: whoever holds most for their weight gives up first. That tenant holds at
least its fair share, so nobody within theirs loses more than one block to another; and what others
do not use anybody may.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvasir.core.ids import TenantId


def furthest_over(blocks: Mapping[TenantId, int], weights: Mapping[TenantId, float]) -> TenantId:
    """The tenant with most `blocks` for its weight, which is 1 unless given; `blocks` names one or
    more."""
    return max(blocks, key=lambda tenant: (blocks[tenant] / weights.get(tenant, 1.0), tenant))
