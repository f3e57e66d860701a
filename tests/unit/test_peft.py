"""Adapter folders: what is read out of one; every wrong one is refused by name in five lines."""

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

from kvasir.core.errors import LINES_MAX, ModelError  # noqa: E402
from kvasir.engine import peft  # noqa: E402
from kvasir.engine.lora import AdapterBatch, Lora, Pair, batch_of, read_lora  # noqa: E402
from kvasir.engine.peft import adapter_of, read_peft  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from tests.adapters import ATTENTION, write_adapter  # noqa: E402

Q0 = "model.layers.0.self_attn.q_proj"
TENSOR = f"base_model.model.{Q0}.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base"))


def refused(folder: Path, base: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_peft(folder, base)
    assert len(str(caught.value).splitlines()) <= LINES_MAX
    assert str(folder) in caught.value.where
    return caught.value


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def scales(folder: Path, base: Path) -> dict[str, float]:
    return {f"{p.layer}.{p.module}": p.scale for p in read_peft(folder, base).pairs}


# --- what is read ---------------------------------------------------------------------------------


def test_every_linear_of_every_layer(tmp_path: Path, base: Path) -> None:
    found = scales(write_adapter(tmp_path, base, r=4, alpha=6), base)
    assert found == {f"{layer}.{module}": 1.5 for layer in (0, 1) for module in peft.MODULES}


def test_rank_stabilised(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path, base, targets=rf".*\.{ATTENTION}", r=16, alpha=8, use_rslora=True)
    assert set(scales(tmp_path, base).values()) == {2.0}


def test_a_rank_or_alpha_of_its_own(tmp_path: Path, base: Path) -> None:
    """The first pattern that matches counts; the end of a name has to begin at a dot."""
    write_adapter(
        tmp_path, base, r=4, alpha=8, ranks=lambda name: 2 if name.endswith("up_proj") else 4,
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.mlp.up_proj": 3, "up_proj": 5, "roj": 99, f"^{Q0}": 10,
                       "^layers.1.self_attn.q_proj": 99, "self_attn.k_proj$": 12},
    )  # fmt: skip
    found = scales(tmp_path, base)
    assert (found["1.up_proj"], found["0.up_proj"]) == (1.5, 2.5)
    assert (found["0.q_proj"], found["1.q_proj"], found["1.k_proj"]) == (2.5, 2.0, 3.0)
    assert found["0.down_proj"] == 2.0


def test_a_regular_expression_as_target_is_not_run(tmp_path: Path, base: Path) -> None:
    """What was trained, the weights say."""
    write_adapter(tmp_path, base, target_modules="(a+)+$")
    assert len(read_peft(tmp_path, base).pairs) == 14


def test_the_digest_names_the_content(tmp_path: Path, base: Path) -> None:
    one = adapter_of("x", write_adapter(tmp_path / "a", base, seed=1), str(base)).digest
    same = adapter_of("y", write_adapter(tmp_path / "b", base, seed=1), str(base)).digest
    weights = adapter_of("x", write_adapter(tmp_path / "c", base, seed=2), str(base)).digest
    config = adapter_of("x", write_adapter(tmp_path / "d", base, seed=1, alpha=9), str(base)).digest
    assert one == same and len({one, weights, config}) == 3


def test_a_base_in_several_files(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", shard_bytes_max=150_000)
    whole = make_tiny(tmp_path / "whole")
    assert len(list(base.glob("*.safetensors"))) > 1
    assert len(read_peft(write_adapter(tmp_path / "a", whole), base).pairs) == 14


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"something_new": 1}, "something_new"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"r": 0}, "r"),
        ({"r": "four"}, "r"),
        ({"r": 8}, "rank 4 and 4, adapter_config.json says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "says 2"),
        ({"rank_pattern": {".*q_proj": 4}}, "a module's name or the end of one"),
        ({"alpha_pattern": {"(a+)+b": 4}}, "a module's name or the end of one"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "not a finite number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "not a finite number"),
        ({"target_modules": 7}, "target_modules"),
    ],
)
def test_configs(tmp_path: Path, base: Path, values: dict[str, Any], said: str) -> None:
    edit(write_adapter(tmp_path, base), **values)
    assert said in refused(tmp_path, base).what


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b'{"a":' * 5000, b"7"])
def test_configs_that_are_none(tmp_path: Path, base: Path, data: bytes) -> None:
    (write_adapter(tmp_path, base) / "adapter_config.json").write_bytes(data)
    assert "adapter_config.json" in refused(tmp_path, base).what


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.pop(name)  # type: ignore[no-any-return]


def shaped(*shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.update({TENSOR: torch.zeros(shape)})


def named(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.update(
        {f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(259, 4)}
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(TENSOR), "has no other half"),
        (shaped(4, 32), f"for another base: {Q0} is 64 x 64 in the base, and 64 x 32"),
        (shaped(64), "for another base"),
        (shaped(), "for another base"),
        (shaped(3, 64), "rank 3 and 4"),
        (named("base_model.model.model.layers.2.self_attn.q_proj"), "the base has no 'model.lay"),
        (named("base_model.model.lm_head"), "an adapter of 'lm_head' is not supported"),
        (named("base_model.model.model.layers.0.mlp.experts.0.up_proj"), "is not supported"),
        (lambda w: w.update(x=torch.zeros(1)), "'x' is no part of plain LoRA"),
        (lambda w: w.update({TENSOR.replace("lora_A.weight", "lora_magnitude_vector"):
                             torch.zeros(64)}), "no part of plain LoRA"),
        (lambda w: w.clear(), "holds no weights"),
    ],
)  # fmt: skip
def test_weights(
    tmp_path: Path, base: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    path = write_adapter(tmp_path, base) / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    assert said in refused(tmp_path, base).what


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(tmp_path: Path, base: Path, kept: int) -> None:
    path = write_adapter(tmp_path, base) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    error = refused(tmp_path, base)
    assert "truncated" in error.what or "no readable safetensors header" in error.what


def test_missing_files_and_the_nearest(tmp_path: Path, base: Path) -> None:
    assert "does not exist" in refused(tmp_path / "no", base).what
    assert "does not exist" in refused(tmp_path / ("x" * 4000), base).what
    folder = write_adapter(tmp_path / "a", base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    error = refused(folder, base)
    assert "adapter_model.safetensors is missing" in error.what
    assert "adapter_model.bin" in error.nearest and "only safetensors" in error.next_step


def test_files_over_the_limit(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path, base)
    for limit in ("CONFIG_BYTES_MAX", "WEIGHTS_BYTES_MAX"):
        with monkeypatch.context() as patch:
            patch.setattr(peft, limit, 100)
            assert "over the limit of 100 bytes" in refused(tmp_path, base).what


def test_another_base_is_told_with_the_name_of_its_own(tmp_path: Path, base: Path) -> None:
    wide = make_tiny(tmp_path / "wide", hidden=128)
    folder = write_adapter(tmp_path / "a", wide, base_model_name_or_path="org/wide")
    error = refused(folder, base)
    assert "is for another base" in error.what and "org/wide" in error.next_step


def test_latent_attention_takes_none(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "a", base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] = torch.zeros(2, 2)
    latent = tmp_path / "latent"
    latent.mkdir()
    save_file(weights, latent / "model.safetensors")
    with pytest.raises(ModelError, match="latent attention"):
        read_peft(folder, latent)


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, base: Path, value: float) -> None:
    path = write_adapter(tmp_path, base) / "adapter_model.safetensors"
    weights = load_file(path)
    weights[TENSOR][1, 3] = value
    save_file(weights, path)
    with pytest.raises(ModelError, match="not finite"):
        read_lora(adapter_of("x", tmp_path, str(base)), base, torch.float32)


def test_integers_are_no_weights(tmp_path: Path, base: Path) -> None:
    path = write_adapter(tmp_path, base) / "adapter_model.safetensors"
    weights = load_file(path)
    weights[TENSOR] = weights[TENSOR].to(torch.int32)
    save_file(weights, path)
    with pytest.raises(ModelError, match="not finite"):
        read_lora(adapter_of("x", tmp_path, str(base)), base, torch.float32)


def test_files_that_changed_since(tmp_path: Path, base: Path) -> None:
    adapter = adapter_of("x", write_adapter(tmp_path, base, seed=1), str(base))
    read_lora(adapter, base, torch.float32)
    write_adapter(tmp_path, base, seed=2)
    with pytest.raises(ModelError, match="have changed"):
        read_lora(adapter, base, torch.float32)


def test_tokens_without_an_adapter_are_not_touched() -> None:
    """And a linear that an adapter does not change is not either."""
    random = torch.Generator().manual_seed(0)
    a, b = (
        Lora({(0, "q_proj"): Pair(torch.randn(2, 6, generator=random),
                                  torch.randn(2, 5, generator=random))})
        for _ in range(2)
    )  # fmt: skip
    x, before = torch.randn(9, 6, generator=random), torch.randn(9, 5, generator=random)
    batch = batch_of([(a, 2), (None, 1), (b, 1), (a, 3), (None, 2)])
    assert isinstance(batch, AdapterBatch)
    out = before.clone()
    batch.add(0, "q_proj", x, out)
    assert torch.equal(out[[2, 7, 8]], before[[2, 7, 8]])
    for rows, lora in (([0, 1, 4, 5, 6], a), ([3], b)):
        pair = lora.pairs[0, "q_proj"]
        added = x[rows] @ pair.down.T @ pair.up
        assert torch.allclose(out[rows] - before[rows], added, atol=1e-5)
    same = out.clone()
    batch.add(1, "q_proj", x, out)
    batch.add(0, "k_proj", x, out)
    assert torch.equal(out, same)
    assert batch_of([(None, 4), (None, 1)]) is None
