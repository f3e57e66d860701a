"""`nvidia-smi topo -m`: which accelerators of a node share NVLink, and which NICs are near them.

The matrix says how, not how fast: X self, NV# that many NVLinks, PIX and PXB over PCIe switches,
PHB over a host bridge, NODE within and SYS across NUMA nodes.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from kvasir.core.errors import ConfigError
from kvasir.core.specs.topology import TopologySpec
from kvasir.net.importers.tree import Imported, Options

NVLINK_BANDWIDTH: Final = 25e9  # of one link and way, V100 to H100 (NVLink 2 to 4)
PCIE_BANDWIDTH: Final = 25e9  # x16 of generation 4, what remains of 32 GB/s
NEARNESS: Final = ("PIX", "PXB", "PHB", "NODE", "SYS")
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;]*m")
_DEVICE: Final = re.compile(r"^(GPU\d+|NIC\d+|[a-z][a-z0-9_]*_\d+)$")
_CELL: Final = re.compile(r"^(X|NV\d+|PIX|PXB|PHB|NODE|SYS)$")


class _Matrix(NamedTuple):
    """How each row's device reaches each column's."""

    gpus: list[str]
    nics: list[str]
    cells: dict[tuple[str, str], str]


def from_nvidia_smi(text: str, where: str, options: Options) -> Imported:
    """One rack of `options.nodes` nodes like this one. Raises ConfigError that names the line."""
    matrix = _matrix(text, where)
    count = len(matrix.gpus)
    notes = [f"{count} accelerators, {len(matrix.nics)} NICs a node, {options.nodes} nodes a rack"]
    nvlink = _nvlink(matrix, notes)
    near = _nearest_nics(matrix)
    rails: int | None = None
    nic = options.nic_bandwidth
    if near and (len(near) % count == 0 or count % len(near) == 0):
        rails = min(len(near), count)
        nic *= len(near) // rails
        notes.append(f"rails: {', '.join(near)} are the nearest NICs; the rate of one is not in it")
    elif near:
        nic *= len(near) / count
        notes.append(f"{len(near)} NICs of {count} accelerators: no rails, an equal share for each")
    spec = TopologySpec(
        preset="fabric", gpus_per_node=count, nodes_per_rack=options.nodes, racks_per_pod=1,
        pods=1, nic_bandwidth=nic, nvlink_bandwidth=nvlink, rails=rails,
    )  # fmt: skip
    return Imported(spec, tuple(notes))


def _matrix(text: str, where: str) -> _Matrix:
    lines = [(n, _ESCAPE.sub("", raw)) for n, raw in enumerate(text.splitlines(), 1)]
    header = next(((n, line) for n, line in lines if line.split()[:1] == ["GPU0"]), None)
    if header is None:
        raise ConfigError(
            "no line of the matrix begins with GPU0", where=where,
            next_step="nvidia-smi topo -m > topo.txt",
        )  # fmt: skip
    columns = _devices(header[1])
    cells: dict[tuple[str, str], str] = {}
    for number, line in lines:
        words = line.split()
        if number <= header[0] or not words or words[0] not in columns:
            continue
        row = words[1 : 1 + len(columns)]
        for column, cell in zip(columns, row, strict=False):
            if not _CELL.match(cell):
                what = f"{words[0]} to {column} is {cell!r}, not X, NV#, {', '.join(NEARNESS)}"
                raise ConfigError(what, where=f"{where}:{number}")
            cells[words[0], column] = cell
        if len(row) < len(columns):
            what = f"{words[0]} has {len(row)} of {len(columns)} columns"
            raise ConfigError(what, where=f"{where}:{number}")
    gpus = [c for c in columns if c.startswith("GPU")]
    for gpu in gpus:
        if (gpu, gpu) not in cells:
            raise ConfigError(f"the row of {gpu} is missing", where=where)
    return _Matrix(gpus, [c for c in columns if c not in gpus], cells)


def _devices(header: str) -> list[str]:
    """The matrix's columns; what follows them is affinities."""
    found: list[str] = []
    for word in header.split():
        if not _DEVICE.match(word):
            break
        found.append(word)
    return found


def _nvlink(matrix: _Matrix, notes: list[str]) -> float:
    """Bytes per second of the weakest pair: a node is one tier 0 here."""
    pairs = [matrix.cells[a, b] for a in matrix.gpus for b in matrix.gpus if a != b]
    links = [int(cell[2:]) if cell.startswith("NV") else 0 for cell in pairs]
    if not links or min(links):
        count = min(links, default=0)
        notes.append(f"NVLink: {count} links of 25 GB/s each way (NVLink 5 of B200: 50; edit it)")
        return max(count, 1) * NVLINK_BANDWIDTH
    some = "some pairs have no NVLink" if any(links) else "no NVLink"
    notes.append(f"{some}: tier 0 has what PCIe 4 x16 leaves, 25 GB/s (edit it for generation 5)")
    return PCIE_BANDWIDTH


def _nearest_nics(matrix: _Matrix) -> list[str]:
    """NICs that are the nearest of some accelerator; others serve storage and management."""
    near: dict[str, None] = {}
    for gpu in matrix.gpus:
        ways = {nic: NEARNESS.index(matrix.cells[gpu, nic]) for nic in matrix.nics}
        if ways:
            near.update(dict.fromkeys(n for n, way in ways.items() if way == min(ways.values())))
    return [nic for nic in matrix.nics if nic in near]
