"""Adapter folders for tests, written as PEFT's `save_pretrained` writes them, and merged by hand.

Knows the two files and the formula; shares no code with what reads them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PREFIX = "base_model.model."
ATTENTION = r"self_attn\.[qkvo]_proj"
MLP = r"mlp\.(gate|up|down)_proj"
EVERY = rf".*\.({ATTENTION}|{MLP})"


def write_adapter(
    folder: Path, base: Path, *, targets: str = EVERY, r: int = 4, alpha: float = 8.0,
    seed: int = 0, ranks: Callable[[str], int] | None = None, std: float = 0.2, **config: Any,
) -> Path:  # fmt: skip
    """Random A and B for every linear of `base` that `targets` matches; `ranks` by its name."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in linears(base).items():
        if re.fullmatch(targets, name):
            rank = ranks(name) if ranks else r
            for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                tensors[f"{PREFIX}{name}.lora_{half}.weight"] = std * torch.randn(
                    shape, generator=random
                )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "some/model",
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "lora_alpha": alpha, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA",
        "r": r, "rank_pattern": {}, "target_modules": targets, "task_type": "CAUSAL_LM",
        "use_dora": False, "use_rslora": False, "loftq_config": {}, "peft_version": "0.19.1",
    } | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2))
    return folder


def linears(base: Path) -> dict[str, tuple[int, int]]:
    """The base's matrices by module."""
    found = {}
    with safe_open(base / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            if len(shape) == 2:
                found[name.removesuffix(".weight")] = (shape[0], shape[1])
    return found


def merge(model: Any, folder: Path, scale: Callable[[str, int], float]) -> None:
    """W += scale(module, rank) * B A, into a transformers model."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                down = file.get_tensor(name)
                up = file.get_tensor(name.replace("lora_A", "lora_B"))
                weight = model.get_submodule(module).weight
                weight.data += scale(module, len(down)) * (up @ down)


def plain(alpha: float) -> Callable[[str, int], float]:
    return lambda module, rank: alpha / rank


def stabilised(alpha: float) -> Callable[[str, int], float]:
    """rsLoRA's."""
    return lambda module, rank: alpha / math.sqrt(rank)
