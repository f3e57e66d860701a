"""Folders that PEFT itself wrote: the tokens of its own model, or a refusal by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("peft") is None,
        reason="PEFT is not installed (pip install peft==0.21.2)",
    ),
]

N = 12
PROMPT = list(range(40, 77))

SERVED: dict[str, dict[str, Any]] = {
    "list": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "regex": {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True,
               "target_modules": ["q_proj", "o_proj", "gate_proj"]},
    "patterns": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"],
                 "rank_pattern": {"up_proj": 2},
                 "alpha_pattern": {"^model.layers.1.mlp.up_proj": 5,
                                   "layers.0.self_attn.q_proj": 20}},
    "layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "orthogonal": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj"],
                   "init_lora_weights": "orthogonal"},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "bias": ({"lora_bias": True}, "lora_bias"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kvasir.engine.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("base"), "llama")


def trained(base: Path, folder: Path, config: dict[str, Any]) -> list[int]:
    """Writes the folder; PEFT's own greedy tokens."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    random = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=random)
    model.save_pretrained(folder)
    ids = torch.tensor([PROMPT])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=N, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in out[0, len(PROMPT) :]]


@pytest.mark.parametrize("name", SERVED)
def test_the_tokens_of_peft(base: Path, tmp_path: Path, name: str) -> None:
    from kvasir.engine.peft import adapter_of
    from kvasir.engine.torch_runner import TorchRunner
    from tests.engine_driver import Driver, Job

    expected = trained(base, tmp_path, SERVED[name])
    runner = TorchRunner(base, blocks_count=8)
    runner.adapters.load(adapter_of(name, tmp_path, str(base)), ("r", 1))
    drive = Driver(runner)
    assert drive.run([drive.open(Job("r", PROMPT, N, list(range(8))))]) == [expected]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_lora(base: Path, tmp_path: Path, name: str) -> None:
    from kvasir.core.errors import ModelError
    from kvasir.engine.peft import read_peft

    config, said = REFUSED[name]
    trained(base, tmp_path, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config)
    with pytest.raises(ModelError, match=said):
        read_peft(tmp_path, base)
