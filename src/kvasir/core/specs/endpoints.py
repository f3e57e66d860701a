"""Where processes are when not all are plain children on one host: addresses, and what starts them.

Knows text; opens no socket. The simulator takes no notice of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from pydantic import Field, field_validator

from kvasir.core.errors import nearest
from kvasir.core.specs.base import Spec, wrong

MAIN: Final = "main"  # the process of gateway and conductor


class Endpoint(Spec):
    """Of one worker, or of `main`, the process of gateway and conductor, which has only `control`.

    `control`: host:port where its messages come in, over TCP; every other process dials it, so the
    port is a fixed one. Empty: a socket file in the run directory, on one host. `kv`: the host
    whose address KV comes in at, on any port (not with transport shm; empty: loopback). `command`
    stands before the worker's own and has to become it, as `ip netns exec NAME` does.

    Neither is encrypted nor asks who is there: give addresses that only these processes reach.
    """

    control: str = ""
    kv: str = ""
    command: tuple[str, ...] = Field(default=(), max_length=64)

    @field_validator("control")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value and not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"{value!r} is not host:port, with a port of 1 to 65535")
        return value


def check_endpoints(
    endpoints: Mapping[str, Endpoint], workers: Iterable[str], transport: str
) -> None:
    """Raises for a name that is nobody's, and for addresses that could not work together."""
    known = [MAIN, *workers]
    for name, own in endpoints.items():
        if name not in known:
            what = f"no worker {name!r} in the pools"
            raise wrong(what, "endpoints", name, near=nearest(name, known))
        if name == MAIN and (own.kv or own.command):
            raise wrong("main takes no KV and starts by itself: only control", "endpoints", name)
        if own.kv and transport == "shm":
            what = f"kv is an address of transport tcp, this is {transport}"
            raise wrong(what, "endpoints", name, "kv")
    controls = {name: own.control for name, own in endpoints.items() if own.control}
    for name in known if controls else ():
        if name not in controls:
            raise wrong(f"all processes have a control address or none: not {name}", "endpoints")
        if list(controls.values()).count(controls[name]) > 1:
            what = f"{controls[name]} is there twice"
            raise wrong(what, "endpoints", name, "control")
