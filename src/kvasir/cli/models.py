"""A HuggingFace model folder as a deployment. Reads `config.json` and nothing of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

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


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        near = nearest(str(folder), _beside(folder.parent, folders=True))
        raise ModelError(
            f"no model folder {str(folder)!r}",
            nearest=near,
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
        nearest=nearest(name, _beside(folder, folders=False)),
        next_step="give a HuggingFace folder: config.json, tokenizer.json, *.safetensors",
    )


def _beside(folder: Path, *, folders: bool) -> list[str]:
    """Names in a folder; paths of its sub-folders when `folders`."""
    try:
        inside = [p for p, _ in zip(folder.iterdir(), range(NAMES_MAX), strict=False)]
    except OSError:
        return []
    return [str(p) if folders else p.name for p in inside if p.is_dir() == folders]
