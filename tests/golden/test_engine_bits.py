"""Fewer bits: bfloat16, weights of 8 and 4 bits, KV of one byte. Not the same tokens, but how near.

Next to each other stand the logits of one text, position by position: in float32, and with fewer
bits. Bounded are the divergence of the distributions, and where the likeliest token may change:
only where float32's two likeliest are nearer than three times the noise. Random weights have no
use for the range that 4 bits lack, so int4 is far off: no margin is clear, but chance is 1 in 257.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvasir.core.errors import ModelError  # noqa: E402
from kvasir.core.specs.model import LayerSpec  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from tests.engine_driver import GREEDY, Driver, Job  # noqa: E402

BLOCKS, LENGTH = 64, 120
_names = count()


class Watched(TorchRunner):
    """Keeps the logits that it draws from."""

    def _draw(self, logits: Any, works: Any) -> Any:
        self.logits = logits.clone()
        return super()._draw(logits, works)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny(tmp_path_factory.mktemp("bits"), "qwen3", layers=4, hidden=128, head_dim=32)


def text() -> list[int]:
    rng = torch.Generator().manual_seed(5)
    found: list[int] = torch.randint(0, 256, (LENGTH,), generator=rng).tolist()
    return found


def logits_of(folder: Path, chunk: int = 1, **values: Any) -> Any:
    """[positions, vocab] after each token of one text from the 20th on, one forward each."""
    runner = Watched(folder, blocks_count=BLOCKS, **values)
    tokens, found = text(), []
    driver = Driver(runner)
    for end in range(20, LENGTH):
        job = driver.open(Job(f"r{next(_names)}", tokens[:end], 1, list(range(BLOCKS))))
        while not job.output:
            driver.step([job], chunk=chunk if end - job.computed > 64 else 64)
            if job.computed >= end:
                break
        found.append(runner.logits[0])
        runner.close(job.name, job.attempt)
    return torch.stack(found).float()


@pytest.fixture(scope="module")
def exact(folder: Path) -> Any:
    return logits_of(folder, chunk=64)


KINDS: dict[str, tuple[dict[str, Any], float]] = {  # and the most that the mean divergence may be
    "bfloat16": ({"dtype": "bfloat16"}, 2e-3),
    "int8 weights": ({"dtype": "bfloat16", "weights": "int8"}, 4e-3),
    "int4 weights": ({"dtype": "bfloat16", "weights": "int4"}, 0.3),
    "int8 KV": ({"kv": "int8"}, 1e-3),
    "fp8 KV": ({"kv": "fp8"}, 2e-2),
    "all at once": ({"dtype": "bfloat16", "weights": "int8", "kv": "int8"}, 6e-3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_stay_close_to_float32(folder: Path, exact: Any, kind: str) -> None:
    values, most = KINDS[kind]
    got = logits_of(folder, chunk=64, **values)
    noise = (got - exact).square().mean().sqrt()
    assert noise > 0, "nothing was rounded"
    told, wanted = got.log_softmax(-1), exact.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - told)).sum(-1)
    assert 0 <= divergence.mean() < most, float(divergence.mean())
    top = exact.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > 3 * noise
    same = got.argmax(-1) == exact.argmax(-1)
    if kind == "int4 weights":
        assert same.float().mean() > 0.3
    else:
        assert clear.sum() > len(exact) / 2, "few margins are over the noise: little was compared"
    assert bool(same[clear].all()), f"{int((~same[clear]).sum())} of {int(clear.sum())}"


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_narrow_kv_is_the_same_in_chunks_and_beside_others(folder: Path, kv: str) -> None:
    """What is read is what was written, whoever wrote it and when."""
    prompts = [text()[:90], text()[30:50], text()[10:60]]

    def run(chunk: int, together: bool) -> list[list[int]]:
        driver = Driver(TorchRunner(folder, blocks_count=BLOCKS, kv=kv))  # type: ignore[arg-type]
        free = list(range(BLOCKS))
        jobs = [driver.open(Job(f"r{next(_names)}", p, 12, free, sampling=GREEDY)) for p in prompts]
        for group in [jobs] if together else [[job] for job in jobs]:
            while any(not job.end for job in group):
                driver.step([job for job in group if not job.end], chunk=chunk)
        return [job.output for job in jobs]

    alone = run(512, together=False)
    assert alone == run(512, together=True) == run(7, together=True)
    assert len({token for output in alone for token in output}) > 5


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_a_block_holds_its_scales(folder: Path, kv: str) -> None:
    """Blocks that are carried to another cache, byte by byte, mean the same there."""
    prompt = text()[:64]
    first, other = (
        TorchRunner(folder, blocks_count=BLOCKS, kv=kv)  # type: ignore[arg-type]
        for _ in range(2)
    )
    spec = first.spec
    assert spec.kv_token_bytes == 4 * 2 * 2 * (32 + 2) == spec.layers[0].token_bytes * 4
    here, there = Driver(first), Driver(other)
    job = here.open(Job("a", prompt, 8, list(range(BLOCKS))))
    here.step([job])
    for ours, theirs in zip(first.planes(), other.planes(), strict=True):
        for plane, copy in zip(ours, theirs, strict=True):
            copy[10:14] = plane[: 64 // 16]
    moved = there.open(Job("a", prompt, 8, list(range(14, BLOCKS)), output=list(job.output)))
    other.adopt("a", moved.attempt, [10, 11, 12, 13])
    moved.held, moved.computed = 4, 64
    for driver, one in ((here, job), (there, moved)):
        while not one.end:
            driver.step([one])
    assert job.output == moved.output


def test_a_fingerprint_tells_bits_apart(folder: Path) -> None:
    every: list[dict[str, Any]] = [{}, {"dtype": "auto"}, *(values for values, _ in KINDS.values())]
    prints = [TorchRunner(folder, blocks_count=1, **one).spec.fingerprint for one in every]
    assert prints[0] == prints[1], "the folder is in float32"
    assert len(set(prints)) == len(prints) - 1


def test_what_does_not_go_together_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="need dtype bfloat16"):
        TorchRunner(folder, blocks_count=1, weights="int4")
    with pytest.raises(ModelError, match="not supported for"):
        TorchRunner(folder, blocks_count=1, dtype="bfloat16", weights="int8", fused=False)


def test_the_accounts_of_one_byte() -> None:
    assert LayerSpec(kv_heads=8, head_dim=128, dtype="int8", scale_bytes=2).token_bytes == 2080
    assert LayerSpec(kv_heads=8, head_dim=128, dtype="bfloat16").token_bytes == 4096
