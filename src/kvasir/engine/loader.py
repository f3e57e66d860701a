"""Loads a HuggingFace folder for the torch runner. Knows files and names; must not know caches.

Everything that can be wrong with a folder is a `ModelError` before a weight is used. Only
safetensors are read, no code of the folder is run, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
import xxhash
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from kvasir.core.errors import ModelError, nearest
from kvasir.core.specs import LayerSpec
from kvasir.engine import attention

Dtype = Literal["float32", "bfloat16"]

ARCHITECTURES: Final = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# These recompute their frequencies from the longest sequence of a batch: text would depend on it.
ROPE_BY_BATCH: Final = ("dynamic", "longrope")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES: Final = 1 << 20
HEADER_BYTES_MAX: Final = 100_000_000  # the format's own limit
# Old Llama folders store what is computed from the config.
UNUSED: Final = ("rotary_emb.inv_freq",)
NOT_IN_FINGERPRINT: Final = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class Loaded:
    """`model` is a transformers model in `torch.float32` or bfloat16, with paged attention."""

    model: Any
    layers: tuple[LayerSpec, ...]
    vocab: int
    context_max: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def load(folder: Path, dtype: Dtype = "float32") -> Loaded:
    """Read config, weights and generation config of `folder`.

    Raises ModelError for a missing or damaged file, an architecture outside ARCHITECTURES, weights
    that do not fit the config, a missing tokenizer, or an unknown `dtype`.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported", nearest=nearest(dtype, DTYPES))
    config, weights = check(folder)
    model = _load_model(folder, dtype)
    return Loaded(
        model=model,
        layers=_layers(model.config, dtype, folder),
        vocab=model.config.vocab_size,
        context_max=model.config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(folder, config),
        fingerprint=fingerprint(config, weights, dtype),
    )


def check(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The config and the weight files of a folder that can be loaded. Reads no weights.

    Raises ModelError.
    """
    if not folder.is_dir():
        raise ModelError("the model folder does not exist", where=str(folder))
    config = _read_json(folder / "config.json")
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {name!r} is not supported by the embedded engine",
            where=str(folder / "config.json"),
            nearest=nearest(str(name), ARCHITECTURES),
            next_step="serve it with another engine behind the worker protocol",
        )
    weights = _weight_files(folder)
    for file in weights:
        _check_complete(file)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            "the tokenizer is missing",
            where=str(folder / "tokenizer.json"),
            next_step="save it beside the weights with AutoTokenizer(...).save_pretrained",
        )
    return config, weights


def fingerprint(config: dict[str, Any], weights: list[Path], dtype: str) -> str:
    """32 hex digits that name config, weights and dtype. Reads every byte of the weights once."""
    kept = {key: config[key] for key in sorted(config) if key not in NOT_IN_FINGERPRINT}
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16)
    digest.update(dtype.encode())
    for path in sorted(weights, key=lambda path: path.name):
        content = xxhash.xxh3_128()
        with path.open("rb") as file:
            while part := file.read(CHUNK_BYTES):
                content.update(part)
        digest.update(content.digest())
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path.name} is missing", where=str(path.parent))
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path))
    return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"neither {WEIGHTS} nor {INDEX} is there",
            where=str(folder),
            next_step="convert the weights to safetensors; other formats are not read",
        )
    names = _read_json(folder / INDEX).get("weight_map")
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


def _check_complete(path: Path) -> None:
    """A safetensors file is: header length (8 bytes, little-endian), JSON header, tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(header_bytes) if 0 < header_bytes <= HEADER_BYTES_MAX else b""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items()
                if name != "__metadata__"]  # fmt: skip
        needed = 8 + header_bytes + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
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


def _load_model(folder: Path, dtype: Dtype) -> Any:
    attention.register()
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=DTYPES[dtype],
                attn_implementation=attention.NAME,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
            )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"transformers cannot load it: {first}", where=str(folder)) from error
    unused = {key for key in info["unexpected_keys"] if not key.endswith(UNUSED)}
    wrong_shape = {key[0] for key in info["mismatched_keys"]}
    for names, what in ((info["missing_keys"], "missing"), (wrong_shape, "of another shape"),
                        (unused, "not used by this architecture")):  # fmt: skip
        if names:
            raise ModelError(
                f"{len(names)} weights are {what}, among them {min(names)}",
                where=str(folder),
                next_step="check that config.json belongs to these weights",
            )
    return model.eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load report of transformers; what matters is raised here."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _layers(config: Any, dtype: Dtype, folder: Path) -> tuple[LayerSpec, ...]:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ROPE_BY_BATCH:
        raise ModelError(f"rope type {rope!r} is not supported", where=str(folder), nearest="yarn")
    window = getattr(config, "sliding_window", None)
    count = config.num_hidden_layers
    default = "sliding_attention" if window else "full_attention"
    types = getattr(config, "layer_types", None) or [default] * count
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(types) - set(windows)):
        raise ModelError(
            f"layer type {unknown[0]!r} is not supported",
            where=str(folder / "config.json"),
            nearest=nearest(unknown[0], windows),
        )
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads
    return tuple(
        LayerSpec(kv_heads=kv_heads, head_dim=dim, window=windows[one], dtype=dtype)
        for one in types
    )


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json decides where it says anything; one id or a list of them."""
    path = folder / "generation_config.json"
    generation = _read_json(path) if path.is_file() else {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
