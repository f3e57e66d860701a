"""`kvasir config`: check a deployment, show every value in force, print the schema."""

from __future__ import annotations

from cyclopts import App

app = App(name="config")


@app.command
def validate(deployment: str | None = None, /) -> None:
    """Check a deployment: exit 0, or say what is wrong and on which line.

    Parameters
    ----------
    deployment
        A file, or the name of a bundled deployment (default: ./kvasir.yaml).
    """
    from kvasir.cli.files import chosen, load_deployment

    name = chosen(deployment, "kvasir.yaml")
    found = load_deployment(name)
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
