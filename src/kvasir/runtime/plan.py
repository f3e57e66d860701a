"""What a worker process is told at its start: one JSON file in the run directory.

The run directory is private to the user (mode 0700): sockets and start files live there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from kvasir.core.ids import CONDUCTOR, NodeId, WorkerId
from kvasir.core.specs import Deployment, Endpoint
from kvasir.core.specs.endpoints import MAIN

GATEWAY: NodeId = "gateway-0"
ON_THIS_HOST: Final[Mapping[str, Endpoint]] = MappingProxyType({})
UNUSABLE = 78  # a worker's exit status: no other process could start either
LEFT = 79  # a worker's exit status: it was told to leave, and has


class StartFile(msgspec.Struct, frozen=True):
    """`deployment` is the resolved deployment as JSON."""

    deployment: str
    worker: WorkerId
    incarnation: int
    run_dir: str
    record: str | None = None

    @property
    def fault(self) -> Path:
        """Where the process says why it cannot start, in words for the user."""
        return Path(self.run_dir) / f"{self.worker}.{self.incarnation}.fault"

    def save(self) -> Path:
        path = Path(self.run_dir) / f"{self.worker}.{self.incarnation}.start.json"
        path.write_bytes(msgspec.json.encode(self))
        return path

    @classmethod
    def load(cls, path: Path) -> StartFile:
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def parsed(self) -> Deployment:
        return Deployment.model_validate_json(self.deployment)


def address(
    run_dir: str, node: NodeId, endpoints: Mapping[str, Endpoint] = ON_THIS_HOST
) -> str:
    """Where a node's process listens: gateway and conductor share one."""
    process = MAIN if node in (CONDUCTOR, GATEWAY) else node
    if process in endpoints and endpoints[process].control:
        return f"tcp://{endpoints[process].control}"
    return f"ipc://{run_dir}/{process}.ipc"
