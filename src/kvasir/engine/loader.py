"""Loads a HuggingFace folder for the torch runner. Knows files and names; must not know caches.

Everything that can be wrong with a folder is a `ModelError` before a weight is used. Only
safetensors are read, no code of the folder is run, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
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
from kvasir.engine import attention, families, latent
from kvasir.engine.files import read_json, tensor_shapes, weight_files
from kvasir.engine.linear import Kind
from kvasir.engine.narrow import SCALE_BYTES, Narrow

Dtype = Literal["float32", "bfloat16"]

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHUNK_BYTES: Final = 1 << 20
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
    weights: Kind = "plain"
    kv: Narrow | None = None


def load(
    folder: Path,
    dtype: Dtype | Literal["auto"] = "float32",
    weights: Kind = "plain",
    kv: Narrow | None = None,
) -> Loaded:
    """Read config, weights and generation config of `folder`.

    `dtype` auto: the one that its config names. `weights` int8 or int4: linear layers are rounded
    so (engine.quant), when a decoder is made of them. `kv`: one byte a value (engine.narrow).
    Raises ModelError for a missing or damaged file, a family or variant that is not computed
    (engine.families), weights that do not fit the config, a missing tokenizer, or an unknown dtype.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ModelError(f"dtype {dtype!r} is not supported", nearest=nearest(dtype, DTYPES))
    config, files = check(folder)
    if dtype == "auto":
        dtype = _own_dtype(config)
    if weights != "plain" and dtype != "bfloat16":
        raise ModelError(f"weights {weights} need dtype bfloat16, not {dtype}", where=str(folder))
    model = _load_model(folder, dtype)
    layers = families.layers_of(model.config, dtype, str(folder / "config.json"))
    return Loaded(
        model=model,
        layers=_narrowed(layers, kv, folder) if kv is not None else layers,
        vocab=model.config.vocab_size,
        context_max=model.config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(folder, config),
        fingerprint=fingerprint(config, files, "+".join([dtype, *_kinds(weights, kv)])),
        weights=weights,
        kv=kv,
    )


def _kinds(weights: Kind, kv: Narrow | None) -> list[str]:
    """What makes KV differ beside the dtype."""
    return [f"{name} {kind}" for name, kind in (("weights", weights), ("kv", kv))
            if kind not in ("plain", None)]  # fmt: skip


def _own_dtype(config: dict[str, Any]) -> Dtype:
    """What the weights were saved in; half precision is computed in bfloat16."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return "float32" if named in ("float32", "float64") else "bfloat16"


def _narrowed(layers: Sequence[LayerSpec], kv: Narrow, folder: Path) -> tuple[LayerSpec, ...]:
    if any(layer.kind == "latent" for layer in layers):
        what = f"kv {kv} is not supported for layers that keep latents"
        raise ModelError(what, where=str(folder), next_step="leave kv out")
    one_byte = {"dtype": "int8" if kv == "int8" else "float8_e4m3fn", "scale_bytes": SCALE_BYTES}
    return tuple(layer.model_copy(update=one_byte) for layer in layers)


def check(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The config and the weight files of a folder that can be loaded. Reads no weights.

    Raises ModelError.
    """
    if not folder.is_dir():
        raise ModelError("the model folder does not exist", where=str(folder))
    config = read_json(folder / "config.json")
    families.check(config, str(folder / "config.json"))
    weights = weight_files(folder)
    for file in weights:
        tensor_shapes(file)
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
    if families.is_latent(model.config):
        latent.plug_into(model)
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


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json decides where it says anything; one id or a list of them."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
