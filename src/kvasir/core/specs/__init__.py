"""What a user writes: one frozen spec for models, hardware, topology, pools, policy and workload.

`Deployment` is the whole of `kvasir.yaml`; `serve`, `simulate` and `plan` read the same one. Pure
data: nothing here opens a file.
"""

from kvasir.core.specs.deployment import (
    BatchSpec,
    Deployment,
    LimitsSpec,
    ModelSpec,
    PolicySpec,
    PoolSpec,
    Role,
    RouteSpec,
    TransportSpec,
)
from kvasir.core.specs.endpoints import Endpoint
from kvasir.core.specs.hardware import HARDWARE, HardwareSpec
from kvasir.core.specs.model import LayerSpec, ModelShape
from kvasir.core.specs.slo import SloSpec
from kvasir.core.specs.topology import TierSpec, TopologySpec
from kvasir.core.specs.workload import LengthSpec, WorkloadSpec

__all__ = [
    "HARDWARE", "BatchSpec", "Deployment", "Endpoint", "HardwareSpec", "LayerSpec", "LengthSpec",
    "LimitsSpec", "ModelShape", "ModelSpec", "PolicySpec", "PoolSpec", "Role", "RouteSpec",
    "SloSpec", "TierSpec", "TopologySpec", "TransportSpec", "WorkloadSpec",
]  # fmt: skip
