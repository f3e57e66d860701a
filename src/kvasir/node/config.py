"""What a worker decides by, as plain data: it stands in the header of the worker's journal."""

from __future__ import annotations

import msgspec

from kvasir.core.codec import CodecRules
from kvasir.core.ids import CONDUCTOR, NodeId, TenantId, WorkerId
from kvasir.core.messages import Capacity, Location
from kvasir.core.specs.deployment import TransferMode
from kvasir.policy.speculate import Drafting
from kvasir.policy.tiers import TierRules


class WorkerConfig(msgspec.Struct, frozen=True):
    """All that a worker decides by. Seconds."""

    worker: WorkerId
    incarnation: int
    roles: tuple[str, ...]
    model: str
    fingerprint: str
    capacity: Capacity
    location: Location = Location()
    pool: str = ""
    kv_events: bool = True
    conductor: NodeId = CONDUCTOR
    batch: str = "token_budget"
    evict: str = "lru"
    weights: tuple[tuple[TenantId, float], ...] = ()
    chunk_tokens: int = 8192
    steps_max: int = 256
    waiting_max: int = 4096
    transfer: TransferMode = "streamed"
    serial_tokens: int = 0
    beat_s: float = 1.0
    prompt_wait_s: float = 10.0
    kv_wait_s: float = 120.0
    lease_s: float = 120.0
    pinned_share_max: float = 0.25
    speculate: Drafting | None = None
    tiers: TierRules | None = None
    codec: CodecRules | None = None
    copies_share_max: float = 0.0  # of the pool; 0: none are taken
    tells_answers: bool = False
