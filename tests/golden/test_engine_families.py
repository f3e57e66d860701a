"""Layer kinds beyond plain attention, against transformers' `generate`: greedy, float32.

Mixtures of experts, latent attention (its cache holds latents, not keys), softcaps and mixes of
sliding and full layers. Each family: alone and chunked, batched, with prefix hits, handed over.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvasir.core.request import Sampling  # noqa: E402
from kvasir.core.specs import LayerSpec, ModelShape  # noqa: E402
from kvasir.engine.decoder import TransformersDecoder  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from tests.engine_driver import Driver, Job, close, copy_blocks, scattered  # noqa: E402
from tests.families import (  # noqa: E402
    FAMILIES,
    LATENTS,
    LENGTHS,
    WINDOW,
    N,
    answers,
    logs_of,
    make,
    prompt_of,
    reference_of,
)

SIZE = 16
BLOCKS = 64


@dataclass
class Lab:
    """A model folder, a runner on it, and transformers' own answers."""

    name: str
    folder: Path
    runner: TorchRunner
    reference: Any
    golden: dict[int, list[int]]

    def driver(self) -> Driver:
        """The runner, its blocks full of rubbish."""
        for layer in self.runner.planes():
            for plane in layer:
                plane.view("float32")[:] = 7.0
        return Driver(self.runner)

    def another(self, **values: Any) -> TorchRunner:
        return TorchRunner(self.folder, blocks_count=BLOCKS, block_size=SIZE, **values)


@pytest.fixture(scope="module", params=FAMILIES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = make(tmp_path_factory.mktemp(request.param), request.param)
    reference = reference_of(folder)
    runner = TorchRunner(folder, blocks_count=BLOCKS, block_size=SIZE)
    assert isinstance(runner.decoder, TransformersDecoder)
    return Lab(request.param, folder, runner, reference, answers(reference))


def job_of(length: int, name: str = "", first: int = 0, blocks: int = 6) -> Job:
    return Job(name or f"r{length}", prompt_of(length), N, list(range(first, first + blocks)))


def finish(drive: Driver, jobs: list[Job], chunk: int = 512, steps: int = 8) -> list[list[int]]:
    for job in jobs:
        drive.open(job)
    try:
        return drive.run(jobs, chunk, steps)
    finally:
        close(drive.runner, jobs)


# --- the same tokens, whatever way ------------------------------------------------------------


def test_the_reference_says_something(lab: Lab) -> None:
    assert all(len(set(lab.golden[length])) >= 4 for length in LENGTHS[1:])
    assert len({token for tokens in lab.golden.values() for token in tokens}) >= 20


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("length", [1, 17, 61])
def test_alone_and_chunked(lab: Lab, length: int, chunk: int) -> None:
    assert finish(lab.driver(), [job_of(length)], chunk) == [lab.golden[length]]


@pytest.mark.parametrize(("chunk", "steps"), [(7, 1), (16, 64), (512, 64)])
def test_batched(lab: Lab, chunk: int, steps: int) -> None:
    jobs = [job_of(length, first=6 * i) for i, length in enumerate(LENGTHS)]
    assert finish(lab.driver(), jobs, chunk, steps) == list(lab.golden.values())


def test_log_probabilities(lab: Lab) -> None:
    """Equal tokens do not show a cap on the logits, which keeps their order."""
    job = job_of(33)
    job.sampling = Sampling(temperature=0.0, ignore_eos=True, logprobs=8)
    finish(lab.driver(), [job])
    logs = logs_of(lab.reference, job.prompt, job.output)
    for row, one in zip(logs, job.drawn, strict=True):
        assert one.logprobs is not None
        told = {one.token: one.logprobs.drawn, **dict(one.logprobs.top)}
        mine, theirs = torch.tensor(list(told.values())), row[list(told)]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_scattered_blocks_and_chunks_beside_decode_rows(lab: Lab) -> None:
    drive, free = lab.driver(), scattered(range(BLOCKS))
    early, late = job_of(17), job_of(61)
    early.free, late.free = free[:6], free[6:12]
    drive.open(early)
    drive.step([early])
    drive.step([early], steps=3)
    drive.open(late)
    assert drive.run([early, late], chunk=5) == [lab.golden[17], lab.golden[61]]
    close(drive.runner, [early, late])


@pytest.mark.parametrize("hits", [1, 3])
def test_prefix_hit(lab: Lab, hits: int) -> None:
    drive = lab.driver()
    finish(drive, [job_of(61)])
    again = job_of(61, "again", first=20)
    again.computed, again.held = hits * SIZE, hits
    drive.runner.adopt("again", 1, list(range(hits)))
    assert finish(drive, [again], chunk=7) == [lab.golden[61]]


@pytest.mark.parametrize("length", [16, 33])
def test_handed_over(lab: Lab, length: int) -> None:
    """The source draws token 0; its blocks, layer by layer, are all that the target knows."""
    p, d = lab.driver(), Driver(lab.another())
    source, target = p.open(job_of(length)), job_of(length, first=40)
    p.step([source])
    target.computed, target.held = length, -(-length // SIZE)
    table = scattered(range(50, 50 + target.held))
    copy_blocks(p.runner, d.runner, zip(range(target.held), table, strict=True))
    close(p.runner, [source])
    d.runner.adopt(target.name, 1, table)
    target.output = list(source.output)
    assert d.run([d.open(target)]) == [lab.golden[length]]


def test_bfloat16_says_nearly_the_same(lab: Lab) -> None:
    """Of the first tokens, most are those of float32."""
    drive = Driver(lab.another(dtype="bfloat16"))
    jobs = [job_of(length, first=6 * i) for i, length in enumerate(LENGTHS)]
    for job in jobs:
        drive.open(job)
        drive.step([job], chunk=512)
    alike = [job.output[0] == lab.golden[len(job.prompt)][0] for job in jobs]
    assert sum(alike) >= len(LENGTHS) - 2


# --- what is kept -----------------------------------------------------------------------------


def test_cache_holds_what_the_spec_says(lab: Lab) -> None:
    spec, planes = lab.runner.spec, lab.runner.planes()
    assert sum(p.nbytes for layer in planes for p in layer) == spec.kv_token_bytes * SIZE * BLOCKS
    config = json.loads((lab.folder / "config.json").read_text(encoding="utf-8"))
    assert ModelShape.from_hf(config).kv_token_bytes == spec.kv_token_bytes
    assert [len(layer) for layer in planes] == [1 if lab.name in LATENTS else 2] * len(spec.layers)


@pytest.mark.parametrize("lab", LATENTS, indirect=True)
def test_latent_layers_keep_rank_and_rope(lab: Lab) -> None:
    one = LayerSpec(kind="latent", kv_heads=1, head_dim=32 + 8, dtype="float32")
    assert lab.runner.spec.layers == (one,) * 3
    assert lab.runner.spec.kv_token_bytes == 40 * 3 * 4


@pytest.mark.parametrize(
    ("lab", "windows"),
    [
        ("mixtral-window", [WINDOW] * 3),
        ("gemma2", [WINDOW, None, WINDOW]),
        ("gemma3", [WINDOW, None] * 2),
    ],
    indirect=["lab"],
)
def test_windows(lab: Lab, windows: list[int | None]) -> None:
    assert [one.window for one in lab.runner.spec.layers] == windows
