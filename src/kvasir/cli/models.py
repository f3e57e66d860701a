"""Model folders of a deployment. Reads `config.json` and nothing of the weights.

A path is a folder, or the name of the model that comes with the package (`tiny`).
"""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Final

from kvasir.cli.files import bundled
from kvasir.core.errors import ModelError, nearest
from kvasir.core.specs import Deployment, ModelShape, ModelSpec
from kvasir.core.units import GIB

KV_BYTES_MAX: Final = 4 * GIB  # of each worker, as long as --prefill and --decode share one host
CONFIG_BYTES_MAX: Final = 4 * 1024 * 1024
NAMES_MAX: Final = 500


def with_model(base: Deployment, folder: Path) -> Deployment:
    """`base` with the folder's model in place of its own, and KV blocks that keep to 4 GiB.

    Raises ModelError: no folder, no or wrong `config.json`, no `tokenizer.json`.
    """
    shape = ModelShape.from_hf(_config(folder), where=str(folder / "config.json"))
    _need(folder, "tokenizer.json")
    fits = KV_BYTES_MAX // (base.block_size * shape.kv_token_bytes)
    if not fits:
        raise ModelError("one block of KV is over 4 GiB", where=str(folder / "config.json"))
    pools = tuple(
        p.model_copy(update={"model": "", "kv_blocks": min(p.kv_blocks or fits, fits)})
        for p in base.pools
    )
    blocks = min(p.kv_blocks or fits for p in pools)
    model = ModelSpec(
        name=folder.resolve().name,
        path=str(folder),
        shape=shape,
        max_context=min(shape.max_context, blocks * base.block_size),
    )
    return base.model_copy(update={"name": model.name, "models": (model,), "pools": pools})


def with_folders(deployment: Deployment) -> Deployment:
    """Every model with a folder that can be served and with the shape that its config gives.

    Raises ModelError.
    """
    found = [_found(m) for m in deployment.models]
    if deployment.engine == "torch":
        for model in found:
            _need_weights(Path(model.path or ""))
    return _with_models(deployment, found)


def with_shapes(deployment: Deployment) -> Deployment:
    """Shapes from the folders of models that give a path and no shape, where there is a folder.

    Raises ModelError for a `config.json` that is wrong.
    """
    there = [bool(m.path) and model_folder(m.path or "").is_dir() for m in deployment.models]
    pairs = zip(deployment.models, there, strict=True)
    return _with_models(deployment, [_shaped(m, m.path or "") if is_ else m for m, is_ in pairs])


def model_folder(path: str) -> Path:
    """The package's own model of that name, else the path."""
    own = Path(str(files("kvasir") / "models" / path))
    return own if path and path == own.name and own.is_dir() else Path(path)


def _with_models(deployment: Deployment, models: list[ModelSpec]) -> Deployment:
    return deployment.model_copy(update={"models": tuple(models)})


def _found(model: ModelSpec) -> ModelSpec:
    if model.path is None:
        raise ModelError(
            f"model {model.name!r} has no path, so there is nothing to serve",
            next_step="set its `path` to a HuggingFace folder",
        )
    folder = model_folder(model.path)
    _config(folder)
    _need(folder, "tokenizer.json")
    return _shaped(model, model.path).model_copy(update={"path": str(folder)})


def _shaped(model: ModelSpec, path: str) -> ModelSpec:
    if model.shape is not None:
        return model
    folder = model_folder(path)
    shape = ModelShape.from_hf(_config(folder), where=str(folder / "config.json"))
    return model.model_copy(update={"shape": shape})


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(
            f"no model folder {str(folder)!r}",
            nearest=nearest(str(folder), [*bundled(), *_models_beside(folder)]),
            next_step="give a HuggingFace folder: config.json, tokenizer.json, *.safetensors",
        )
    path = _need(folder, "config.json")
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(CONFIG_BYTES_MAX))
    except (OSError, ValueError) as error:
        what = " ".join(f"cannot be read: {error}".split())
        raise ModelError(what, where=str(path)) from None
    if not isinstance(config, dict):
        raise ModelError("not a JSON object", where=str(path))
    return config


def _need(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    raise ModelError(
        f"no {name} in the model folder",
        where=str(folder),
        nearest=nearest(name, [p.name for p in _inside(folder) if p.is_file()]),
        next_step="give a HuggingFace folder: config.json, tokenizer.json, *.safetensors",
    )


def _need_weights(folder: Path) -> None:
    if not (folder / "model.safetensors.index.json").is_file():
        _need(folder, "model.safetensors")


def _models_beside(folder: Path) -> list[str]:
    return [str(p) for p in _inside(folder.parent) if (p / "config.json").is_file()]


def _inside(folder: Path) -> list[Path]:
    """Up to NAMES_MAX entries; none when the folder cannot be listed."""
    try:
        return list(islice(folder.iterdir(), NAMES_MAX))
    except OSError:
        return []
