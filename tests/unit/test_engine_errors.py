"""Every wrong model folder is a ModelError that says what, where and what to try, in five lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from kvasir.core.errors import LINES_MAX, ModelError  # noqa: E402
from kvasir.engine.families import ARCHITECTURES  # noqa: E402
from kvasir.engine.tiny import EOS_TOKEN_ID, SPECIALS, VOCAB, make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402

SHIPPED = Path(__file__).parents[2] / "src" / "kvasir" / "models" / "tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "model", shard_bytes_max=150_000)


def error_of(folder: Path, **values: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        TorchRunner(folder, blocks_count=1, **values)
    assert len(str(caught.value).splitlines()) <= LINES_MAX
    return caught.value


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(config), encoding="utf-8")


def test_no_folder(tmp_path: Path) -> None:
    error = error_of(tmp_path / "nowhere")
    assert "does not exist" in error.what and error.where.endswith("nowhere")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "neither model.safetensors nor model.safetensors.index.json"),
        ("tokenizer.json", "the tokenizer is missing"),
    ],
)
def test_missing_files(folder: Path, name: str, what: str) -> None:
    (folder / name).unlink()
    assert what in str(error_of(folder))


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("Qwen4ForCausalLM", "Qwen3ForCausalLM"),
        ("LlamaForCasualLM", "LlamaForCausalLM"),
        ("T5", ", ".join(sorted(ARCHITECTURES))),
    ],
)
def test_unknown_architecture_names_the_nearest(folder: Path, asked: str, near: str) -> None:
    edit(folder, architectures=[asked])
    error = error_of(folder)
    assert asked in error.what and error.nearest == near


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "is not JSON" in error_of(folder).what
    (folder / "config.json").write_text("[]", encoding="utf-8")
    assert "is not a JSON object" in error_of(folder).what


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -1000])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    error = error_of(folder)
    assert "truncated" in error.what or "no readable safetensors header" in error.what
    assert error.where == str(path) and "again" in error.next_step


def test_weights_with_a_tail(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "too long" in error_of(folder).what


def test_shards_load_and_a_missing_one_is_named(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    TorchRunner(sharded, blocks_count=1)
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in error_of(sharded).what


def test_empty_index(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text('{"weight_map": {}}', encoding="utf-8")
    assert "names no file" in error_of(sharded).what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing, among them model.norm.weight"),
        (lambda w: w.update(extra=torch.zeros(3)), "not used by this architecture"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), "of another shape"),
    ],
)
def test_weights_that_do_not_fit(
    folder: Path, change: Callable[[dict[str, Any]], Any], what: str
) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    assert what in error_of(folder).what


def test_config_of_another_model(folder: Path) -> None:
    edit(folder, hidden_size=128)
    error_of(folder)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"hidden_act": "no_such_act"}, "no_such_act"),
    ],
)
def test_what_is_not_supported(folder: Path, values: dict[str, Any], what: str) -> None:
    edit(folder, **values)
    assert what in error_of(folder).what


def test_unknown_dtype(folder: Path) -> None:
    error = error_of(folder, dtype="bfloat32")
    assert error.nearest in ("bfloat16", "float32")


def test_no_eos_anywhere(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder, eos_token_id=None)
    assert TorchRunner(folder, blocks_count=1).spec.eos_token_ids == ()


# --- the shipped model -----------------------------------------------------------------------


def test_the_shipped_model_loads() -> None:
    spec = TorchRunner(SHIPPED, blocks_count=1).spec
    assert (spec.vocab, spec.eos_token_ids) == (VOCAB, (EOS_TOKEN_ID,))
    assert (SHIPPED / "model.safetensors").stat().st_size <= 400_000


def test_one_token_per_byte() -> None:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    text = "Grüße, <|im_end|> 漢字\n\t \0 x"
    ids = tokenizer.encode(text).ids
    head, tail = text.split("<|im_end|>")
    assert ids == [*head.encode(), EOS_TOKEN_ID, *tail.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == head + tail
    assert tokenizer.get_vocab_size() == VOCAB == 256 + len(SPECIALS)


def test_chat_template_is_chatml() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_id == EOS_TOKEN_ID


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        again = make_tiny(tmp_path / "again") / name
        assert again.read_bytes() == (make_tiny(tmp_path / "once") / name).read_bytes()
    other = make_tiny(tmp_path / "other", seed=1) / "model.safetensors"
    assert other.read_bytes() != (tmp_path / "once" / "model.safetensors").read_bytes()
