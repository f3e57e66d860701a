"""Reading the measured kernel tables that come with the package.

Knows where they lie. Must not know what they mean (`cost/tables.py`).
"""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files

import msgspec

from kvasir.cost.tables import Packed, SystemTables

SUFFIX = ".msgpack.gz"


def table_systems() -> tuple[str, ...]:
    """Names of the systems that have tables."""
    folder = files("kvasir.cost") / "data"
    names = (f.name for f in folder.iterdir())
    return tuple(sorted(n.removesuffix(SUFFIX) for n in names if n.endswith(SUFFIX)))


@cache
def load_tables(system: str) -> SystemTables | None:
    """The tables of `system` (`h100_sxm`), or of hardware so named (`h100`); None without any."""
    for name in (system, f"{system}_sxm"):
        if name in table_systems():
            packed = (files("kvasir.cost") / "data" / f"{name}{SUFFIX}").read_bytes()
            return SystemTables(msgspec.msgpack.decode(gzip.decompress(packed), type=Packed))
    return None
