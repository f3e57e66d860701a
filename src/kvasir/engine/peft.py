"""A LoRA adapter's folder as PEFT saves it: what it changes, how strongly, and whether it fits.

Knows names, shapes and scales. Must not know torch, so that a gateway can refuse a folder too.

    W' = W + scale * B A        A [r, in], B [out, r]     (arXiv 2106.09685, section 4.1)
    scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732)
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping
from os.path import isdir, isfile
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from kvasir.core.errors import ModelError, nearest
from kvasir.core.request import Adapter
from kvasir.engine.files import (
    Shapes,
    json_object,
    read_json,
    shapes_in,
    tensor_shapes,
    weight_files,
)  # fmt: skip

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES_MAX: Final = 1 << 20
WEIGHTS_BYTES_MAX: Final = 1 << 30
MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What adapter_config.json may say besides _Config, because it changes nothing once trained.
# `target_modules` chose what was trained; which modules those are, the weights say themselves.
_TELLS: Final = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
})  # fmt: skip
# These start from other base weights than the folder's.
_PLAIN_STARTS: Final = (True, False, "gaussian", "eva", "orthogonal")
_PREFIX: Final = "base_model.model."
_TENSOR: Final = re.compile(r"(?P<target>.+)\.lora_(?P<half>[AB])\.weight")
_TARGET: Final = re.compile(r"(?:.+\.)?layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<module>\w+)")
_SIMPLE: Final = re.compile(r"\^?[\w.]+\$?")


class Pair(NamedTuple):
    """One changed linear: names of its tensors in the file, and by how much B A counts."""

    layer: int
    module: str
    down: str
    up: str
    scale: float


class PeftFolder(NamedTuple):
    """`weights` is the content of the safetensors file; `digest`, 32 hex digits, names the content
    of both files."""

    digest: str
    pairs: tuple[Pair, ...]
    weights: bytes


class _Config(msgspec.Struct, frozen=True):
    peft_type: str
    r: Annotated[int, Meta(gt=0)]
    lora_alpha: float
    target_modules: str | list[str] = ""
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def scale(self, target: str, rank: int) -> float:
        alpha = _by_pattern(self.alpha_pattern, target, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft(folder: Path, base: Path, known: str = "") -> PeftFolder:
    """Read both files, each once, and check them against the weights in the folder `base`.

    `known`: the digest that they must have. Raises ModelError: a file that is missing, damaged, too
    large or another; another method than plain LoRA; a module or shape that the base does not have.
    """
    if not isdir(folder):  # False too for a path that cannot be, where is_dir raises
        raise ModelError("the adapter's folder does not exist", where=str(folder))
    raw = _content(folder / CONFIG, CONFIG_BYTES_MAX)
    config = _config(json_object(raw, folder / CONFIG), folder / CONFIG)
    weights = _content(folder / WEIGHTS, WEIGHTS_BYTES_MAX)
    shapes = shapes_in(io.BytesIO(weights), len(weights), folder / WEIGHTS)
    digest = hashlib.blake2b(len(raw).to_bytes(8, "little") + raw, digest_size=16)
    digest.update(weights)
    if known not in ("", digest.hexdigest()):
        what = "the adapter's files have changed since it was loaded"
        raise ModelError(what, where=str(folder), next_step="load it again")
    pairs = _pairs(config, shapes, _base_shapes(base), folder)
    return PeftFolder(digest.hexdigest(), pairs, weights)


def adapter_of(name: str, folder: str | Path, base: str | None) -> Adapter:
    """The adapter in `folder`, as it is now. Raises ModelError when it does not fit the base."""
    where = Path(folder).resolve()
    return Adapter(name, str(where), read_peft(where, Path(base or "")).digest)


def _content(path: Path, limit: int) -> bytes:
    if not isfile(path):
        near = sorted(one.name for one in path.parent.glob("adapter_*"))
        raise ModelError(
            f"{path.name} is missing",
            where=str(path.parent),
            nearest=nearest(path.name, near) if near else "",
            next_step="a folder that PEFT's save_pretrained wrote; only safetensors are read",
        )
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from None
    if len(data) > limit:
        raise ModelError(f"{path.name} is over the limit of {limit} bytes", where=str(path))
    return data


# --- the config -----------------------------------------------------------------------------------


def _config(given: Mapping[str, Any], path: Path) -> _Config:
    """Refuses by name whatever changes the arithmetic and is not known here."""
    said = {key: value for key, value in given.items() if value is not None}
    if said.get("peft_type") != "LORA":
        what = f"peft_type {said.get('peft_type')!r} is not supported"
        raise ModelError(what, where=str(path), nearest="LORA")
    known = {*_TELLS, *_Config.__struct_fields__}
    for key, value in said.items():
        if key not in known and value not in (False, 0, "", [], {}):
            what = f"an adapter with {key} is not supported"
            raise ModelError(what, where=str(path), next_step="plain LoRA, or merge it first")
    try:
        config = msgspec.convert(said, _Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path.name}: {error}", where=str(path)) from None
    if config.bias != "none":
        raise ModelError(f"bias {config.bias!r} is not supported", where=str(path), nearest="none")
    if config.init_lora_weights not in _PLAIN_STARTS:
        what = f"init_lora_weights {config.init_lora_weights!r} changes the base's own weights"
        step = "convert it as PEFT does when it saves (path_initial_model_for_weight_conversion)"
        raise ModelError(what, where=str(path), next_step=step)
    if not all(map(math.isfinite, (config.lora_alpha, *config.alpha_pattern.values()))):
        raise ModelError("lora_alpha is not a finite number", where=str(path))
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not _SIMPLE.fullmatch(pattern):
            what = f"a pattern must be a module's name or the end of one, not {pattern[:60]!r}"
            raise ModelError(what, where=str(path))
    return config


def _by_pattern(patterns: Mapping[str, Any], target: str, default: Any) -> Any:
    """The value of the first pattern that is the target, or the end of it after a dot; with ^ it
    has to be all of it (PEFT, `get_pattern_key`)."""
    for pattern, value in patterns.items():
        name = pattern.removesuffix("$")
        whole = name.startswith("^")
        if target == name[1:] if whole else f".{target}".endswith(f".{name}"):
            return value
    return default


# --- the weights ----------------------------------------------------------------------------------


def _base_shapes(base: Path) -> Shapes:
    shapes: Shapes = {}
    for file in weight_files(base):
        shapes.update(tensor_shapes(file))
    if any(".kv_a_proj" in name for name in shapes):
        what = "adapters on a model with latent attention (MLA) are not supported"
        raise ModelError(what, where=str(base))
    return shapes


def _pairs(config: _Config, shapes: Shapes, base: Shapes, folder: Path) -> tuple[Pair, ...]:
    """Every tensor of the file, in pairs A and B of one linear of the base each."""
    halves: dict[str, dict[str, str]] = {}
    for name in shapes:
        found = _TENSOR.fullmatch(name)
        if found is None:
            what = f"the tensor {name[:120]!r} is no part of plain LoRA"
            raise ModelError(what, where=str(folder / WEIGHTS))
        target = found["target"].removeprefix(_PREFIX)
        halves.setdefault(target, {})[found["half"]] = name
    if not halves:
        raise ModelError("the adapter holds no weights", where=str(folder / WEIGHTS))
    pairs = []
    for target, names in sorted(halves.items()):
        if len(names) < 2:
            have = next(iter(names.values()))
            raise ModelError(f"{have!r} has no other half", where=str(folder / WEIGHTS))
        fits = _Fit(config, target, shapes[names["A"]], shapes[names["B"]], folder)
        pairs.append(fits.pair(names["A"], names["B"], base))
    return tuple(pairs)


class _Fit(NamedTuple):
    """One pair against the base."""

    config: _Config
    target: str
    down: tuple[int, ...]
    up: tuple[int, ...]
    folder: Path

    def pair(self, down: str, up: str, base: Shapes) -> Pair:
        found = _TARGET.fullmatch(self.target)
        if found is None or found["module"] not in MODULES:
            last = self.target.rpartition(".")[2]
            raise ModelError(
                f"an adapter of {self.target[:120]!r} is not supported",
                where=str(self.folder / WEIGHTS),
                nearest=nearest(last, MODULES),
            )
        rank = _by_pattern(self.config.rank_pattern, self.target, self.config.r)
        weight = base.get(f"{self.target}.weight")
        if weight is None:
            raise self._another(f"the base has no {self.target!r}")
        if len(self.down) != 2 or len(self.up) != 2 or (self.up[0], self.down[1]) != weight:
            mine = f"{(self.up or (0,))[0]} x {(self.down or (0,))[-1]}"
            theirs = " x ".join(map(str, weight))
            what = f"{self.target} is {theirs} in the base, and {mine} in the adapter"
            raise self._another(what)
        if self.down[0] != rank or self.up[1] != rank:
            what = f"{self.target} has rank {self.down[0]} and {self.up[1]}, {CONFIG} says {rank}"
            raise ModelError(what, where=str(self.folder))
        scale = self.config.scale(self.target, rank)
        return Pair(int(found["layer"]), found["module"], down, up, scale)

    def _another(self, what: str) -> ModelError:
        named = read_json(self.folder / CONFIG).get("base_model_name_or_path")
        return ModelError(
            f"the adapter is for another base: {what}",
            where=str(self.folder),
            next_step=f"serve it on the model that it was trained on ({str(named)[:80]!r})",
        )
