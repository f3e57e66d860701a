"""Files of a model folder, as JSON and headers. Knows names, sizes and shapes; must not know torch.

Everything that can be wrong with a file is a `ModelError` before a tensor is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO, Final

from kvasir.core.errors import ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES_MAX: Final = 100_000_000  # the format's own limit

Shapes = dict[str, tuple[int, ...]]  # by tensor's name


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelError."""
    if not path.is_file():
        raise ModelError(f"{path.name} is missing", where=str(path.parent))
    return json_object(path.read_bytes(), path)


def json_object(data: bytes, path: Path) -> dict[str, Any]:
    """What `path` holds. Raises ModelError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path))
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's weights. Raises ModelError."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"neither {WEIGHTS} nor {INDEX} is there",
            where=str(folder),
            next_step="convert the weights to safetensors; other formats are not read",
        )
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError("weight_map names no file", where=str(folder / INDEX))
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(
                f"{file.name}, named by {INDEX}, is missing",
                where=str(folder),
                next_step="fetch the missing file again",
            )
    return files


def tensor_shapes(path: Path) -> Shapes:
    """What a safetensors file holds. Raises ModelError, as `shapes_in` does."""
    with path.open("rb") as file:
        return shapes_in(file, path.stat().st_size, path)


def shapes_in(file: BinaryIO, size: int, path: Path) -> Shapes:
    """Header length (8 bytes, little-endian), JSON header, tensors: `size` bytes in all.

    Raises ModelError for a header that cannot be read, and for a size that is not as it says.
    """
    header_bytes = int.from_bytes(file.read(8), "little")
    header = file.read(header_bytes) if 0 < header_bytes <= HEADER_BYTES_MAX else b""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        needed = 8 + header_bytes + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path.name} has no readable safetensors header",
            where=str(path),
            next_step="fetch the file again",
        ) from error
    if size != needed:
        raise ModelError(
            f"{path.name} is {'truncated' if size < needed else 'too long'}: "
            f"{size} bytes, its header says {needed}",
            where=str(path),
            next_step="fetch the file again",
        )
    return shapes
