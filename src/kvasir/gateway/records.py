"""The caches that clients made at one gateway, by name and tenant. Knows what they gave; must not
know where a prefix stands, or whether it still does."""

from __future__ import annotations

from typing import Any

import msgspec

from kvasir.core.errors import RequestError
from kvasir.core.ids import CacheId, TenantId


class NoCache(RequestError):
    """None of that name, or not this tenant's: which of them is not told."""

    status = 404
    kind = "not_found_error"


class Record(msgspec.Struct, frozen=True):
    """What a client gave and was told. `messages` of a chat, or none; `created_at` in Unix seconds.
    The tokens of full blocks are kept, `kept_tokens`; the few after them are computed each time."""

    id: CacheId
    tenant: TenantId
    model: str
    tokens: tuple[int, ...]
    kept_tokens: int
    messages: tuple[dict[str, Any], ...] | None
    created_at: int
    name: str | None = None
    metadata: dict[str, str] | None = None


class Records:
    """All caches that were made at one gateway, oldest first."""

    def __init__(self) -> None:
        self._all: dict[CacheId, Record] = {}

    def add(self, record: Record) -> None:
        self._all[record.id] = record

    def drop(self, cache: CacheId) -> None:
        self._all.pop(cache, None)

    def of(self, tenant: TenantId) -> list[Record]:
        return [record for record in self._all.values() if record.tenant == tenant]

    def all_ids(self) -> list[CacheId]:
        return list(self._all)

    def find(self, tenant: TenantId, cache: CacheId) -> Record:
        """Raises NoCache."""
        record = self._all.get(cache)
        if record is None or record.tenant != tenant:
            step = "GET /v1/caches lists yours; one whose time is over is gone"
            raise NoCache("no such cache", next_step=step)
        return record
