"""Where a phase of a request runs. One file a family; `ROUTES` names them for both worlds."""

from __future__ import annotations

from typing import Final

from kvasir.policy.route.balance import cache_load, least_loaded, round_robin
from kvasir.policy.route.chance import power_of_two, random_worker
from kvasir.policy.route.dynamo import dynamo
from kvasir.policy.route.hashing import consistent_hash
from kvasir.policy.route.joint import netkv_joint
from kvasir.policy.route.llmd import llm_d
from kvasir.policy.route.mooncake import mooncake
from kvasir.policy.route.netkv import netkv_by
from kvasir.policy.route.preble import preble
from kvasir.policy.route.session import session_over
from kvasir.policy.route.sglang import sglang
from kvasir.policy.route.splitwise import jsq, splitwise
from kvasir.policy.route.view import Choice, Route, RouteMemory, RouteView, WorkerView

ROUTES: Final[dict[str, Route]] = {
    "random": random_worker,
    "round_robin": round_robin,
    "power_of_two": power_of_two,
    "least_loaded": least_loaded,
    "jsq": jsq,
    "cache_load": cache_load,
    "consistent_hash": consistent_hash,
    "splitwise": splitwise,
    "preble": preble,
    "sglang": sglang,
    "dynamo": dynamo,
    "llm_d": llm_d,
    "mooncake": mooncake,
    "netkv_static": netkv_by("static"),
    "netkv_self": netkv_by("self"),
    "netkv": netkv_by(None),
    "netkv_path": netkv_by("path"),
    "netkv_joint": netkv_joint,
    "exact_maxmin": netkv_by("exact_maxmin"),
}
ROUTES["session"] = session_over(ROUTES)

__all__ = ["ROUTES", "Choice", "Route", "RouteMemory", "RouteView", "WorkerView"]
