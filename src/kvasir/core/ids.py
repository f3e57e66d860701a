"""Names of things. Knows nothing about what the things do.

Ids are plain strings so that they cost nothing on the wire and in a digest; the aliases say which
string is meant. A node keeps its id for life; each start of it is a new *incarnation*.
"""

from __future__ import annotations

from typing import Final

NodeId = str  # "conductor", "gateway-0", or a worker id
WorkerId = str  # "prefill-0"; a NodeId
RequestId = str  # unique for the lifetime of a conductor
TenantId = str
BlockKey = bytes  # 16 bytes, see core.keys
Incarnation = int  # starts at 1, +1 on every restart of the node
Epoch = int  # conductor's term; workers refuse older ones
StepId = int  # unique per worker incarnation
CacheId = str  # of a kept prefix; where a client sees it, nobody can guess it
BlockId = int  # physical block index inside one worker's pool

CONDUCTOR: Final[NodeId] = "conductor"


def prefix_id(request_id: RequestId) -> RequestId:
    """The name of the transfer of a request's prefix between two caches."""
    return f"{request_id}/prefix"
