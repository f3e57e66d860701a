"""Under an adapter the runner gives the very tokens of transformers with the weights merged.

Float32, greedy, as in test_engine_tokens. However a batch is put together, chunked, resumed or
handed over, each sequence has the tokens of its own adapter.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvasir.core.errors import ModelError  # noqa: E402
from kvasir.core.request import Adapter, Sampling  # noqa: E402
from kvasir.engine.peft import adapter_of  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from tests import families  # noqa: E402
from tests.adapters import (  # noqa: E402
    ATTENTION,
    MLP,
    merge,
    plain,
    stabilised,
    write_adapter,
)
from tests.engine_driver import Driver, Job, close, copy_blocks, scattered  # noqa: E402

SIZE, BLOCKS, N = 16, 96, 12
BASE = ""  # the name of no adapter
NAMES = ("norse", "saga", "edda")
LENGTHS = {BASE: 17, "norse": 33, "saga": 16, "edda": 40}


def edda_scale(module: str, rank: int) -> float:
    """down_proj of layer 1 has an alpha of its own."""
    return (24.0 if module == "model.layers.1.mlp.down_proj" else 6.0) / rank


@dataclass
class Lab:
    """A model, its adapters, runners on it, and the answers of transformers with merged weights."""

    folder: Path
    adapters: dict[str, Adapter]
    golden: dict[str, list[int]]
    fused: bool
    runner: TorchRunner

    def another(self, **values: Any) -> TorchRunner:
        return TorchRunner(
            self.folder, blocks_count=BLOCKS, block_size=SIZE, fused=self.fused, **values
        )

    def open(self, drive: Driver, name: str, first: int = 0) -> Job:
        """A job under that adapter."""
        free = list(range(first, first + 6))
        return self.ready(drive, Job(name or "base", prompt_of(LENGTHS[name]), N, free), name)

    def ready(self, drive: Driver, job: Job, name: str) -> Job:
        if name:
            drive.runner.adapters.load(self.adapters[name], (job.name, job.attempt))
        return drive.open(job)


def prompt_of(length: int) -> list[int]:
    return [random.Random(f"{length}:{i}").randrange(256) for i in range(length)]


def expected(
    folder: Path, name: str, adapter: Path, scale: Callable[[str, int], float]
) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = None
    if name:
        merge(model, adapter, scale)
    prompt = torch.tensor([prompt_of(LENGTHS[name])])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=N, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in out[0, prompt.shape[1] :]]


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen3-modules"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """`modules`: transformers' own linears, with hooks."""
    kind, _, modules = request.param.partition("-")
    root = tmp_path_factory.mktemp(request.param)
    folder = make_tiny(root / "model", kind)
    write_adapter(root / "norse", folder, seed=1, alpha=8, r=4)
    write_adapter(
        root / "saga", folder, targets=rf".*\.{ATTENTION}", seed=2, alpha=3, r=8, use_rslora=True,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    write_adapter(
        root / "edda", folder, targets=rf"model\.layers\.1\.{MLP}", seed=3, alpha=6, r=3,
        ranks=lambda module: 5 if module.endswith("up_proj") else 3, rank_pattern={"up_proj": 5},
        alpha_pattern={"^model.layers.1.mlp.down_proj": 24},
    )  # fmt: skip
    scales = {BASE: plain(0), "norse": plain(8), "saga": stabilised(3), "edda": edda_scale}
    golden = {name: expected(folder, name, root / name, scales[name]) for name in LENGTHS}
    adapters = {name: adapter_of(name, root / name, str(folder)) for name in NAMES}
    runner = TorchRunner(folder, blocks_count=BLOCKS, block_size=SIZE, fused=not modules)
    return Lab(folder, adapters, golden, not modules, runner)


def finish(lab: Lab, names: list[str], chunk: int = 512) -> dict[str, list[int]]:
    drive = Driver(lab.runner)
    jobs = [lab.open(drive, name, first=6 * i) for i, name in enumerate(names)]
    try:
        return dict(zip(names, drive.run(jobs, chunk), strict=True))
    finally:
        close(drive.runner, jobs)
        lab.runner.adapters.check()


def test_adapters_change_the_text(lab: Lab) -> None:
    """Else equal tokens would say nothing."""
    plainly = {}
    for name in NAMES:
        drive = Driver(lab.runner)
        job = drive.open(Job("plain", prompt_of(LENGTHS[name]), N, list(range(6))))
        plainly[name] = drive.run([job])[0]
        close(lab.runner, [job])
    assert all(plainly[name] != lab.golden[name] for name in NAMES)


@pytest.mark.parametrize("name", LENGTHS, ids=lambda name: name or "base")
def test_alone(lab: Lab, name: str) -> None:
    assert finish(lab, [name]) == {name: lab.golden[name]}


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_three_adapters_and_the_base_in_one_batch(lab: Lab, chunk: int) -> None:
    assert finish(lab, list(LENGTHS), chunk) == lab.golden


def test_sequences_of_one_adapter_need_not_be_neighbours(lab: Lab) -> None:
    drive = Driver(lab.runner)
    jobs = []
    for i, name in enumerate(["norse", BASE, "norse", "saga", "norse"]):
        job = Job(f"{name}{i}", prompt_of(LENGTHS[name]), N, list(range(6 * i, 6 * i + 6)))
        jobs.append(lab.ready(drive, job, name))
    outputs = drive.run(jobs)
    close(lab.runner, jobs)
    golden = lab.golden
    assert outputs == [golden["norse"], golden[BASE], golden["norse"], golden["saga"],
                       golden["norse"]]  # fmt: skip


def test_a_prefix_hit_under_the_same_adapter(lab: Lab) -> None:
    drive = Driver(lab.runner)
    first = lab.open(drive, "norse")
    drive.run([first])
    again = Job("again", prompt_of(33), N, list(range(10, 16)), computed=32, held=2)
    lab.runner.adopt("again", 1, [0, 1])
    assert drive.run([lab.ready(drive, again, "norse")]) == [lab.golden["norse"]]
    close(lab.runner, [first, again])


def test_kv_of_another_adapter_gives_other_tokens(lab: Lab) -> None:
    """Which is why block keys are salted with the adapter's digest."""
    drive = Driver(lab.runner)
    base = drive.open(Job("base", prompt_of(33), N, list(range(6))))
    drive.run([base])
    wrong = Job("wrong", prompt_of(33), N, list(range(10, 16)), computed=32, held=2)
    lab.runner.adopt("wrong", 1, [0, 1])
    assert drive.run([lab.ready(drive, wrong, "norse")]) != [lab.golden["norse"]]
    close(lab.runner, [base, wrong])


@pytest.mark.parametrize("name", NAMES)
def test_prefill_here_decode_there(lab: Lab, name: str) -> None:
    p, d = Driver(lab.another()), Driver(lab.another())
    job = lab.open(p, name)
    p.step([job])
    copy_blocks(p.runner, d.runner, ((b, b) for b in range(job.held)))
    other = Job(name, job.prompt, N, list(range(job.held, 6)), computed=job.computed,
                held=job.held, output=list(job.output))  # fmt: skip
    d.runner.adopt(name, 1, list(range(job.held)))
    assert d.run([lab.ready(d, other, name)]) == [lab.golden[name]]


def test_preempted_and_computed_again(lab: Lab) -> None:
    drive = Driver(lab.runner)
    job = lab.open(drive, "edda")
    for _ in range(4):
        drive.step([job])
    job.computed, job.held, job.fresh, job.free = 0, 0, True, scattered(range(20, 26))
    assert drive.run([job]) == [lab.golden["edda"]]
    close(lab.runner, [job])


def test_evicted_and_read_again(lab: Lab) -> None:
    runner = lab.another(adapters_max=1)
    for name in ("norse", "saga", "norse"):
        drive = Driver(runner)
        job = lab.open(drive, name)
        assert drive.run([job]) == [lab.golden[name]]
        close(runner, [job])
        runner.adapters.check()


def test_bfloat16_is_near(lab: Lab) -> None:
    """No equality is asked of it, only that most tokens agree for a while."""
    runner = lab.another(dtype="bfloat16")
    firsts = []
    for name in LENGTHS:
        drive = Driver(runner)
        job = lab.open(drive, name)
        job.sampling = Sampling(temperature=0.0, ignore_eos=True)
        firsts.append(drive.run([job])[0][0] == lab.golden[name][0])
        close(runner, [job])
    assert sum(firsts) >= len(LENGTHS) - 1


# --- other families -------------------------------------------------------------------------------

OTHERS = {"mixtral": ATTENTION, "qwen3-moe": rf"{ATTENTION}|mlp\.(up|down)_proj",
          "qwen2-moe": ATTENTION, "gemma2": rf"{ATTENTION}|{MLP}"}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_that_transformers_computes(tmp_path: Path, name: str) -> None:
    """Attention and dense layers; experts are refused (tests/unit/test_peft.py)."""
    base = families.make(tmp_path / "base", name)
    folder = write_adapter(tmp_path / "a", base, targets=rf".*\.({OTHERS[name]})", seed=4)
    reference = families.reference_of(base)
    prompt = prompt_of(33)
    plainly = families.generated(reference, prompt)
    merge(reference, folder, plain(8))
    runner = TorchRunner(base, blocks_count=16, block_size=SIZE)
    drive = Driver(runner)
    one, two = (Job(job, prompt, N, list(range(8 * i, 8 * i + 8))) for i, job in enumerate("ab"))
    runner.adapters.load(adapter_of(name, folder, str(base)), ("a", 1))
    outputs = drive.run([drive.open(one), drive.open(two)])
    assert outputs == [families.generated(reference, prompt), plainly]
    assert outputs[0] != outputs[1]


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_latent_attention_takes_none(tmp_path: Path, name: str) -> None:
    base = families.make(tmp_path / "base", name)
    folder = write_adapter(tmp_path / "a", base, targets=r".*\.o_proj")
    with pytest.raises(ModelError, match="latent attention"):
        adapter_of(name, folder, str(base))
