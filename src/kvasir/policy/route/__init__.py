"""Where a phase of a request runs. One file a family; `ROUTES` names them for both worlds."""

from __future__ import annotations

from typing import Final

from kvasir.policy.route.balance import cache_load, least_loaded, round_robin
from kvasir.policy.route.netkv import netkv
from kvasir.policy.route.view import Choice, Route, RouteMemory, RouteView, WorkerView

ROUTES: Final[dict[str, Route]] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "cache_load": cache_load,
    "netkv": netkv,
}

__all__ = ["ROUTES", "Choice", "Route", "RouteMemory", "RouteView", "WorkerView"]
