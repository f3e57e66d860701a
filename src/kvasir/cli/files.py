"""Deployments by name or path. The only place where `kvasir.yaml` is read from a disk."""

from __future__ import annotations

from importlib.resources import files
from itertools import islice
from pathlib import Path

from kvasir.core.errors import ConfigError, nearest
from kvasir.core.specs import Deployment
from kvasir.core.specs.parse import TEXT_CHARS_MAX, parse_deployment

HERE = Path("kvasir.yaml")
NEIGHBOURS_MAX = 500


def bundled() -> dict[str, str]:
    """Name to YAML text of the deployments that come with the package."""
    folder = files("kvasir") / "deployments"
    found = (f for f in folder.iterdir() if f.name.endswith(".yaml"))
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in found}


def load_deployment(name_or_path: str | Path) -> Deployment:
    """A bundled deployment by name, else the file at that path; policy names are checked.

    A model with a folder and no shape gets the shape of the folder's `config.json`.

    Raises ConfigError: no such name or file, unreadable, or wrong inside.
    """
    from kvasir.cli.models import with_shapes
    from kvasir.cost.catalog import CATALOG
    from kvasir.policy.admit import ADMITS
    from kvasir.policy.batch import BATCHES
    from kvasir.policy.evict import EVICTS
    from kvasir.runtime.policies import ready, route_names

    name = str(name_or_path)
    own = bundled()
    text = own[name] if name in own else _read(Path(name), list(own))
    deployment = parse_deployment(
        text,
        name,
        known_routes=route_names(),
        known_batches=BATCHES,
        known_admits=ADMITS,
        known_evicts=EVICTS,
        known_shapes=CATALOG,
    )
    ready(deployment.policy.route)
    return with_shapes(deployment)


def chosen(name_or_path: str | None, otherwise: str) -> str:
    """What a command line that may leave the deployment out means: ./kvasir.yaml, then a name."""
    if name_or_path is not None:
        return name_or_path
    return str(HERE) if HERE.is_file() else otherwise


def _read(path: Path, names: list[str]) -> str:
    if path.is_dir():
        inside = path / HERE
        step = str(inside) if inside.is_file() else f"kvasir serve {path} (if it is a model folder)"
        raise ConfigError("a folder is not a deployment", where=str(path), next_step=step)
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(TEXT_CHARS_MAX + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"no deployment is called {str(path)!r}, and no file is there",
            nearest=nearest(str(path), [*names, *_neighbours(path)]),
            next_step="kvasir config show local > kvasir.yaml (a deployment to start from)",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", where=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _neighbours(path: Path) -> list[str]:
    """YAML files beside a path that does not exist."""
    try:
        beside = list(islice(path.parent.iterdir(), NEIGHBOURS_MAX))
    except OSError:
        return []
    return [str(p) for p in beside if p.suffix in (".yaml", ".yml")]
