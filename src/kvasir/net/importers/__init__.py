"""Topologies from what clusters already know of themselves: text in, a `topology:` section out.

Knows three formats. Must not know where a text comes from; opens no file and runs no command.
"""

from collections.abc import Callable
from typing import Final

from kvasir.net.importers.kubernetes import from_kubernetes
from kvasir.net.importers.nvidia_smi import from_nvidia_smi
from kvasir.net.importers.slurm import from_slurm
from kvasir.net.importers.tree import Imported, Options

IMPORTERS: Final[dict[str, Callable[[str, str, Options], Imported]]] = {
    "nvidia-smi": from_nvidia_smi, "slurm": from_slurm, "k8s": from_kubernetes,
}  # fmt: skip

__all__ = ["IMPORTERS", "Imported", "Options"]
