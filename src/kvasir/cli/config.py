"""`kvasir config`: check a deployment, show every value in force, print the schema, import a
topology."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

app = App(name="config")
CHARS_MAX = 64 * 1024 * 1024
Count = Annotated[int, Parameter(validator=Number(gte=1))]


@app.command
def validate(deployment: str | None = None, /) -> None:
    """Check a deployment: exit 0, or say what is wrong and on which line. Instances must fit the
    topology, and faults name what is there.

    Parameters
    ----------
    deployment
        A file, or the name of a bundled deployment (default: ./kvasir.yaml).
    """
    from kvasir.cli.files import chosen, load_deployment

    name = chosen(deployment, "kvasir.yaml")
    from kvasir.world.sim.faults import check

    found = load_deployment(name)
    check(found)
    pools = ", ".join(f"{p.count} {p.role}" for p in found.pools)
    gpus = sum(p.count * p.gpus for p in found.pools)
    print(f"{name}: valid ({found.name}: {pools}; {gpus} accelerators)")


@app.command
def show(deployment: str | None = None, /) -> None:
    """Print a deployment with every default filled in, as YAML.

    Parameters
    ----------
    deployment
        A file, or the name of a bundled deployment (default: ./kvasir.yaml, else local).
    """
    from kvasir.cli.files import chosen, load_deployment
    from kvasir.core.specs.parse import resolved

    print(resolved(load_deployment(chosen(deployment, "local"))), end="")


@app.command
def schema() -> None:
    """Print the JSON Schema of kvasir.yaml, for editors."""
    import json

    from kvasir.core.specs.parse import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command(name="import-topology")
def import_topology(
    file: str,
    /,
    *,
    source: Annotated[Literal["nvidia-smi", "slurm", "k8s"], Parameter(name="--from")],
    gpus_per_node: Count = 8,
    nic_bandwidth: str = "12.5 GB/s",
    oversubscription: Annotated[float, Parameter(validator=Number(gte=1))] = 1.0,
    nodes: Count = 1,
    labels: str | None = None,
) -> None:
    """Print the `topology:` section of a cluster, from what it knows of itself.

    Parameters
    ----------
    file
        Output of `nvidia-smi topo -m`, a `topology.conf`, or `kubectl get nodes -o json`; - for
        stdin.
    source
        What the file is.
    gpus_per_node
        Accelerators of a Slurm node.
    nic_bandwidth
        Of one NIC (nvidia-smi), or of an accelerator's share of its node's link.
    oversubscription
        Of each level of switches, where no speed is given.
    nodes
        Nodes of a rack like the one that nvidia-smi looked at.
    labels
        Labels of Kubernetes nodes, from the rack up, with commas between.
    """
    from kvasir.core.errors import ConfigError
    from kvasir.core.units import parse_rate
    from kvasir.net.importers import IMPORTERS, Options

    try:
        rate = parse_rate(nic_bandwidth)
    except ValueError as error:
        step = "--nic-bandwidth '400 Gb/s'"
        raise ConfigError(f"--nic-bandwidth: {error}", next_step=step) from None
    options = Options(gpus_per_node, rate, oversubscription, nodes)
    if labels is not None:
        options = options._replace(labels=tuple(labels.split(",")))
    print(IMPORTERS[source](_text(file), file, options).yaml(), end="")


def _text(file: str) -> str:
    """Of a file, or of stdin. Raises ConfigError."""
    import sys
    from pathlib import Path

    from kvasir.core.errors import ConfigError

    try:
        if file == "-":
            return sys.stdin.read(CHARS_MAX)
        with Path(file).open(encoding="utf-8") as opened:
            return opened.read(CHARS_MAX)
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", where=file) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=file) from None
