"""Who a caller is, by API key. Knows digests of keys; must not know what a tenant may do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from kvasir.core.errors import Unauthorised
from kvasir.core.ids import TenantId
from kvasir.core.specs.tenants import TenantSpec

ANYBODY: Final[TenantId] = "default"
BEARER: Final = "bearer "


class Tenants:
    """Where a deployment names no tenants, everybody is one tenant, with any key or none."""

    def __init__(self, tenants: Sequence[TenantSpec] = ()) -> None:
        self._open = not tenants
        self._names = {key: tenant.name for tenant in tenants for key in tenant.keys_sha256}

    @property
    def named(self) -> bool:
        """Whether callers are told apart."""
        return not self._open

    def who(self, authorization: str | None) -> TenantId:
        """The tenant of an `authorization` header. Raises Unauthorised."""
        if self._open:
            return ANYBODY
        given = authorization or ""
        scheme, key = given[: len(BEARER)], given[len(BEARER) :].strip()
        digest = hashlib.sha256(key.encode("latin-1")).hexdigest()
        name = self._names.get(digest) if scheme.lower() == BEARER and key else None
        if name is None:
            raise Unauthorised(
                "no tenant has this API key" if key else "an API key is needed",
                next_step="the header `authorization: Bearer KEY`, with a tenant's key",
            )
        return name
