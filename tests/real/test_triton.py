"""The Triton kernels against plain torch: compiled on a GPU, else run on the CPU by Triton's
interpreter, which is numpy under the same code (and says nothing of speed)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = importlib.util.find_spec("triton") is not None
if TRITON and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not TRITON,
        reason="Triton is not installed (pip install triton==3.7.1)",
    ),
]

from kvasir.engine.cuda import stack  # noqa: E402
from kvasir.engine.cuda.decode import (  # noqa: E402
    paged_decode,
    reference_decode,
    tile_of,
    triton_runs,
)
from kvasir.engine.layers import HeadNorm, Norm  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from tests.engine_driver import Driver, Job  # noqa: E402

BLOCK = 16
LENGTHS = (1, 15, 16, 17, 64, 65, 130, 301)
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def paged(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, lengths: tuple[int, ...]):
    """Ragged rows on scattered blocks; slots that nobody may read hold what would be seen."""
    generator = torch.Generator().manual_seed(heads * dim)
    width = -(-max(lengths) // BLOCK)
    rows, blocks = len(lengths), len(lengths) * width
    tables = torch.randperm(blocks, generator=generator).view(rows, width).int()
    shape = (blocks * BLOCK, kv_heads, dim)
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    for i, length in enumerate(lengths):
        unseen = torch.arange(length, width * BLOCK)
        slots = tables[i].long()[unseen // BLOCK] * BLOCK + unseen % BLOCK
        key[slots], value[slots] = float("nan"), float("nan")
    query = torch.randn(rows, heads, dim, generator=generator).to(dtype)
    every = (query, key, value, tables, torch.tensor(lengths, dtype=torch.int32))
    return tuple(one.to(DEVICE) for one in every)


def held_to_the_reference(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32,
                          lengths: tuple[int, ...] = LENGTHS, **options) -> None:  # fmt: skip
    assert triton_runs(DEVICE)
    query, key, value, tables, at = paged(heads, kv_heads, dim, dtype, lengths)
    got = paged_decode(query, key, value, tables, at, block_size=BLOCK, **options)
    options.pop("splits", None)
    expected = reference_decode(
        query.float(), key.nan_to_num(), value.nan_to_num(), tables, at, BLOCK,
        options.get("scale") or dim**-0.5, options.get("window"), options.get("softcap"),
    )  # fmt: skip
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() < CLOSE[dtype]


@pytest.mark.parametrize("splits", [1, 2, 8, None])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1), (6, 2)])
def test_ragged_rows(heads: int, kv_heads: int, dim: int, splits: int | None) -> None:
    held_to_the_reference(heads, kv_heads, dim, splits=splits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_half_precision(dtype: torch.dtype, kv_heads: int) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16 and kv_heads < 8:
        pytest.skip("the interpreter's matrix product takes no bfloat16; needs a GPU")
    held_to_the_reference(8, kv_heads, 128, dtype, splits=2)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [1, 16, 40, 1000])
def test_windows(window: int, splits: int) -> None:
    held_to_the_reference(4, 2, 64, window=window, splits=splits)


@pytest.mark.parametrize("dim", [16, 80, 96, 256])
def test_head_sizes(dim: int) -> None:
    held_to_the_reference(4, 2, dim, splits=2)


def test_scales_and_caps() -> None:
    held_to_the_reference(4, 2, 64, scale=0.3, softcap=3.0, splits=2)
    held_to_the_reference(4, 4, 64, scale=0.3, softcap=3.0, splits=1)


def test_more_shares_than_tiles() -> None:
    """Empty shares weigh nothing."""
    held_to_the_reference(8, 2, 64, lengths=(1, tile_of(64, 4) + 1), splits=64)


def test_a_query_between_other_columns() -> None:
    """As the fused layers hand it over: a view of a wider matrix."""
    query, key, value, tables, at = paged(4, 2, 64, torch.float32, (33, 7))
    wide = torch.cat((query, torch.full_like(query, 9.0)), dim=1)
    view = wide.split((4, 4), dim=1)[0]
    got = paged_decode(view, key, value, tables, at, block_size=BLOCK)
    assert torch.equal(got, paged_decode(query, key, value, tables, at, block_size=BLOCK))


# --- between the matrix products -------------------------------------------------------------


def layer_like(heads: int, kv_heads: int, dim: int, weight: object | None) -> SimpleNamespace:
    norm = None if weight is None else Norm(weight, 1e-6)
    return SimpleNamespace(heads=heads, kv_heads=kv_heads, dim=dim, qk_norm=norm)


@pytest.mark.parametrize("size", [64, 96, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_and_norm(size: int, dtype: torch.dtype) -> None:
    x, more, weight = (torch.randn(n, size, device=DEVICE).to(dtype) for n in (3, 3, 1))
    norm = Norm(weight[0], 1e-5)
    before, total = x.clone(), x + more
    noise = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(stack.add_norm(x, None, norm), norm(before), atol=noise, rtol=noise)
    assert torch.equal(x, before)
    assert torch.allclose(stack.add_norm(x, more, norm), norm(total), atol=noise, rtol=noise)
    assert torch.allclose(x, total, atol=0, rtol=noise)  # the interpreter cuts off, not rounds


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_rotate_and_write(dim: int, normed: bool) -> None:
    heads, kv_heads, tokens = 4, 2, 5
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=DEVICE)
    cos, sin = torch.randn(tokens, 2, dim, device=DEVICE).split(1, dim=1)
    weight = torch.randn(heads + kv_heads, dim, device=DEVICE) if normed else None
    layer = layer_like(heads, kv_heads, dim, weight)
    slots = torch.tensor([40, 3, 17, 16, 0], device=DEVICE)
    key, value = (torch.zeros(48, kv_heads, dim, device=DEVICE) for _ in range(2))
    query, k, v = qkv.clone().split((heads, kv_heads, kv_heads), dim=1)
    both = torch.cat((query, k), dim=1)
    if weight is not None:
        both = HeadNorm(weight, 1e-6)(both)
    both = both * cos + both.roll(dim // 2, -1) * sin
    stack.rotate_and_write(qkv, (cos, sin), layer, slots, key, value)
    assert torch.allclose(qkv[:, : heads + kv_heads], both, atol=1e-5)
    assert torch.equal(qkv[:, heads + kv_heads :], v)
    assert torch.equal(key[slots], qkv[:, heads : heads + kv_heads])
    assert torch.equal(value[slots], v)
    assert not key[1].any() and not value[47].any()


@pytest.mark.parametrize("size", [96, stack.GATED_TILE + 8])
def test_gate_and_up(size: int) -> None:
    both = torch.randn(3, 2 * size, device=DEVICE)
    expected = torch.nn.functional.silu(both[:, :size]) * both[:, size:]
    assert torch.allclose(stack.gated(both), expected, atol=1e-6)


# --- all of it -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_tokens_of_the_cpus_own_way(kind: str, tmp_path: Path) -> None:
    """Prompts in chunks, decode rows, and both in one batch."""
    folder = make_tiny(tmp_path, kind, context_max=128)
    outputs = []
    for device, rehearse in (("cpu", False), (DEVICE, True)):
        runner = TorchRunner(folder, blocks_count=20, device=device, rehearse=rehearse)
        drive = Driver(runner)
        jobs = [
            Job(f"j{i}", [7 * i + at for at in range(3 + 11 * i)], 5, [3 * i + 1, 3 * i, 3 * i + 2])
            for i in range(3)
        ]
        outputs.append(drive.run([drive.open(job) for job in jobs], chunk=9, steps=3))
    assert outputs[0] == outputs[1]
    assert runner.path.decoding.ahead > 0


# --- machine code ----------------------------------------------------------------------------

CARDS = {"A100": 80, "L4": 89, "H100": 90}  # compute capability


@pytest.mark.parametrize("card", CARDS)
def test_the_kernels_compile_for_cards_that_are_not_here(card: str) -> None:
    """In a process of its own, since the interpreter takes the place of the compiler here."""
    code = f"from tests.triton_cards import compile_all; compile_all({CARDS[card]})"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=100)
