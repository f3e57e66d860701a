"""Bundled model shapes against published sizes."""

import json
from importlib.resources import files

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.specs import ModelShape, ModelSpec
from kvasir.cost.catalog import CATALOG, shape_of

# KV bytes per token at 16 bits: 2 * layers * kv_heads * head_dim * 2, MLA layers * (512 + 64) * 2
# (seed-systems reference, G3).
KV_TOKEN_BYTES = {
    "opt-13b": 819_200, "opt-66b": 2_359_296, "opt-175b": 4_718_592, "bloom-176b": 4_014_080,
    "llama-1-30b": 1_597_440, "llama-2-7b": 524_288, "llama-2-13b": 819_200,
    "llama-2-70b": 327_680, "llama-3-70b": 327_680, "llama-3.1-70b": 327_680,
    "qwen2.5-72b": 327_680, "llama-3-8b": 131_072, "llama-3.1-8b": 131_072, "mistral-7b": 131_072,
    "mixtral-8x7b": 131_072, "llama-3.1-405b": 516_096, "qwen3-235b-a22b": 192_512,
    "falcon-180b": 163_840, "codellama-34b": 196_608, "deepseek-v2": 69_120,
    "deepseek-v3": 70_272, "kimi-k2": 70_272,
}  # fmt: skip

# Parameters as the makers state them, billions. MLA models are taken as if every layer had experts.
PARAMETERS = {
    "opt-13b": 13, "opt-66b": 66, "opt-175b": 175, "bloom-176b": 176, "falcon-180b": 180,
    "llama-1-30b": 32.5, "llama-2-7b": 6.74, "llama-2-13b": 13.0, "llama-2-70b": 69.0,
    "llama-3-8b": 8.03, "llama-3-70b": 70.6, "llama-3.1-405b": 405, "codellama-34b": 33.7,
    "mistral-7b": 7.25, "mixtral-8x7b": 46.7, "qwen2.5-72b": 72.7, "qwen3-0.6b": 0.596,
    "qwen3-32b": 32.8, "qwen3-235b-a22b": 235, "deepseek-v2": 236, "deepseek-v3": 671,
    "kimi-k2": 1000,
}  # fmt: skip


def bundled(name: str) -> ModelShape:
    return shape_of(ModelSpec(name=name))


@pytest.mark.parametrize("name", KV_TOKEN_BYTES)
def test_kv_bytes_per_token(name: str) -> None:
    assert bundled(name).kv_token_bytes == KV_TOKEN_BYTES[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    rel = 0.06 if bundled(name).kv_latent else 0.015
    assert bundled(name).parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=rel)


def test_active_parameters_of_mixtures() -> None:
    """A22B, and 37B of DeepSeek-V3; embeddings are looked up, not multiplied."""
    active = {n: bundled(n).linear_weights(active=True) / 1e9 for n in CATALOG}
    assert active["qwen3-235b-a22b"] == pytest.approx(22, rel=0.05)
    assert active["deepseek-v3"] == pytest.approx(37, rel=0.05)
    assert active["mixtral-8x7b"] == pytest.approx(12.9, rel=0.05)


def test_distserve_and_mooncake_figures() -> None:
    """512 tokens of OPT-66B are 1.125 GiB, 128 Ki tokens of Llama-3-70B 40 GiB."""
    assert 512 * bundled("opt-66b").kv_token_bytes == 1.125 * 2**30
    assert 128 * 1024 * bundled("llama-3-70b").kv_token_bytes == 40 * 2**30


def test_every_bundled_shape_reads() -> None:
    for name in CATALOG:
        assert bundled(name).layers > 0


def test_tiny_is_the_model_that_comes_with_the_package() -> None:
    config = json.loads((files("kvasir") / "models" / "tiny" / "config.json").read_text("utf-8"))
    assert bundled("tiny") == ModelShape.from_hf(config)


def test_a_shape_is_inline_or_named_by_shape_or_by_name() -> None:
    inline = bundled("tiny").model_copy(update={"layers": 3})
    assert shape_of(ModelSpec(name="mine", shape=inline)) is inline
    assert shape_of(ModelSpec(name="mine", shape="Llama-3-8B")) == bundled("llama-3-8b")
    assert shape_of(ModelSpec(name="llama-2-7b", shape="tiny")) == bundled("tiny")


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        shape_of(ModelSpec(name="mine", shape="lama-3-70b"))
    assert error.value.nearest == "llama-3-70b"
