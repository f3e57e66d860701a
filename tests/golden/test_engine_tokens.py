"""The torch runner gives the very tokens of transformers' `generate`: greedy, float32; with its own
fused layers and with transformers' modules, attended by torch and by the compiled kernel.

In float32 the top two logits are 500 times further apart than batching and chunking move them, so
equality is a sound test (in bfloat16 it is not: `generate` differs from itself in 2% of tokens).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvasir.core.keys import block_keys  # noqa: E402
from kvasir.core.request import Sampling  # noqa: E402
from kvasir.engine.decoder import FusedDecoder, TransformersDecoder  # noqa: E402
from kvasir.engine.native.kernel import Kernel  # noqa: E402
from kvasir.engine.tiny import EOS_TOKEN_ID, VOCAB, make_tiny, write_tokenizer  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from tests.engine_driver import (  # noqa: E402
    SALT,
    Driver,
    Hooks,
    Job,
    close,
    copy_blocks,
    row_of,
    scattered,
)
from tests.native import kernel  # noqa: E402

SIZE = 16
BLOCKS = 96
WINDOW = 20  # not a multiple of the block size
LENGTHS = (1, 15, 16, 17, WINDOW + 1, 31, 32, 33)
N = 16

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "vocab_size": VOCAB, "initializer_range": 0.12,
    "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None,
}  # fmt: skip


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 256}  # fmt: skip


def make_other(folder: Path, architecture: str) -> Path:
    """Mistral slides in every layer; this Qwen3 in its second one only; Qwen2 has biases."""
    if architecture == "mistral":
        config = transformers.MistralConfig(**SMALL, sliding_window=WINDOW)
        kind = transformers.MistralForCausalLM
    elif architecture == "qwen2":
        sizes = {**SMALL, "num_key_value_heads": 4}  # no heads share KV
        config = transformers.Qwen2Config(**sizes, rope_parameters=YARN)
        kind = transformers.Qwen2ForCausalLM
    else:
        config = transformers.Qwen3Config(
            **SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
        )
        kind = transformers.Qwen3ForCausalLM
    torch.manual_seed(1)
    model = kind(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder, 1024)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3": partial(make_tiny, architecture="qwen3"),
    "llama": partial(make_tiny, architecture="llama"),
    "mistral-window": partial(make_other, architecture="mistral"),
    "qwen3-mixed": partial(make_other, architecture="qwen3"),
    "qwen2-yarn": partial(make_other, architecture="qwen2"),
}
PLAIN = "-transformers"  # the same, computed by transformers' modules
NATIVE = "-native"  # the same, attended by the compiled kernel
OTHERS = ("qwen3", "qwen3-mixed", "qwen2-yarn")
LABS = (*MAKERS, *(name + way for way in (PLAIN, NATIVE) for name in OTHERS))

ONE = pytest.mark.parametrize("lab", ["qwen3"], indirect=True)  # what no shape changes
TWO = pytest.mark.parametrize("lab", ["qwen3", "llama"], indirect=True)
BOTH = pytest.mark.parametrize("lab", ["qwen3", "qwen3" + PLAIN], indirect=True)


@dataclass
class Lab:
    """A model folder, a runner on it, and transformers' own answers."""

    name: str
    folder: Path
    reference: Any
    runner: TorchRunner
    native: Kernel | bool = False

    def expected(self, prompt: list[int], n: int = N) -> list[int]:
        out = self.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        return [int(token) for token in out[0, len(prompt) :]]

    def driver(self) -> Driver:
        """The runner, forgetful of whatever an earlier test left: blocks full of rubbish."""
        for layer in self.runner.planes():
            for plane in layer:
                plane.view("float32")[:] = 7.0
        return Driver(self.runner)

    def another(self, **values: Any) -> TorchRunner:
        return TorchRunner(
            self.folder, blocks_count=BLOCKS, block_size=SIZE, native=self.native, **values
        )


@pytest.fixture(scope="module", params=LABS)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    name = request.param.removesuffix(PLAIN).removesuffix(NATIVE)
    fused, native = name + PLAIN != request.param, name + NATIVE == request.param and kernel()
    folder = MAKERS[name](tmp_path_factory.mktemp(name))
    runner = TorchRunner(folder, blocks_count=BLOCKS, block_size=SIZE, fused=fused, native=native)
    assert isinstance(runner.decoder, FusedDecoder if fused else TransformersDecoder)
    return Lab(name, folder, reference_of(folder), runner, native)


def reference_of(folder: Path) -> Any:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    reference.generation_config.eos_token_id = None
    return reference


@pytest.fixture(scope="module")
def golden(lab: Lab) -> dict[int, list[int]]:
    """transformers' answer to the prompt of each length."""
    return {length: lab.expected(prompt_of(length)) for length in LENGTHS}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed}:{length}:{i}").randrange(256) for i in range(length)]


def job_of(length: int, name: str = "", first: int = 0, blocks: int = 6) -> Job:
    return Job(name or f"r{length}", prompt_of(length), N, list(range(first, first + blocks)))


def finish(drive: Driver, jobs: list[Job], chunk: int = 512, steps: int = 8) -> list[list[int]]:
    for job in jobs:
        drive.open(job)
    try:
        return drive.run(jobs, chunk, steps)
    finally:
        close(drive.runner, jobs)


# --- alone, chunked, batched -----------------------------------------------------------------


def test_the_reference_says_something(golden: dict[int, list[int]]) -> None:
    assert all(len(set(tokens)) >= 5 for tokens in golden.values())


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
@pytest.mark.parametrize("length", LENGTHS)
def test_alone_and_chunked(lab: Lab, golden: dict[int, list[int]], length: int, chunk: int) -> None:
    assert finish(lab.driver(), [job_of(length)], chunk) == [golden[length]]


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
@pytest.mark.parametrize("steps", [1, 64])
def test_batched(lab: Lab, golden: dict[int, list[int]], chunk: int, steps: int) -> None:
    jobs = [job_of(length, first=6 * i) for i, length in enumerate(LENGTHS)]
    assert finish(lab.driver(), jobs, chunk, steps) == [golden[length] for length in LENGTHS]


def test_prefill_chunks_beside_decode_rows(lab: Lab, golden: dict[int, list[int]]) -> None:
    drive = lab.driver()
    early, late = job_of(17), job_of(33, first=10)
    drive.open(early)
    drive.step([early])
    drive.step([early], steps=3)
    drive.open(late)
    assert drive.run([early, late], chunk=5) == [golden[17], golden[33]]
    close(drive.runner, [early, late])


@pytest.mark.parametrize("chunk", [7, 512])
def test_scattered_blocks(lab: Lab, golden: dict[int, list[int]], chunk: int) -> None:
    free = scattered(range(BLOCKS))
    jobs = [job_of(length) for length in LENGTHS]
    for i, job in enumerate(jobs):
        job.free = free[i * 6 : i * 6 + 6]
    jobs[0].free.sort()  # contiguous and scattered tables in one batch
    assert finish(lab.driver(), jobs, chunk) == [golden[length] for length in LENGTHS]


def test_long_context_in_one_run_and_in_pieces(lab: Lab) -> None:
    prompt = prompt_of(400, seed=5)
    whole = lab.expected(prompt)
    for free in (list(range(BLOCKS)), scattered(range(BLOCKS)), [*range(9, 20), *range(40, 90)]):
        job = Job("long", prompt, N, free)
        assert finish(lab.driver(), [job], chunk=150) == [whole]


@TWO
def test_more_than_a_hundred_sequences_in_a_row(lab: Lab) -> None:
    """Four at once on twenty blocks, which change hands all the time; steps end with a row."""
    drive = lab.driver()
    rng = random.Random(3)
    free = list(range(20))
    held: dict[str, list[int]] = {}
    live: list[Job] = []
    for number in range(108):
        rng.shuffle(free)
        name, blocks = f"s{number}", [free.pop() for _ in range(5)]
        held[name] = blocks
        prompt = prompt_of(rng.randrange(1, 60), seed=number)
        live.append(drive.open(Job(name, prompt, rng.randrange(1, 8), list(blocks))))
        while len(live) == 4:
            drive.step(live, chunk=16, steps=4)
            for job in [job for job in live if job.end]:
                assert job.output == lab.expected(job.prompt, job.n), job.name
                close(drive.runner, [job])
                live.remove(job)
                free += held.pop(job.name)
    close(drive.runner, live)


# --- prefix hits, transfers, recomputation ----------------------------------------------------


@pytest.mark.parametrize("hits", [1, 2])
def test_prefix_hit(lab: Lab, golden: dict[int, list[int]], hits: int) -> None:
    drive = lab.driver()
    first = job_of(33)
    finish(drive, [first])
    again = job_of(33, "again", first=20)
    again.computed, again.held = hits * SIZE, hits
    drive.runner.adopt("again", 1, list(range(hits)))
    assert finish(drive, [again], chunk=7) == [golden[33]]


def test_hits_named_by_the_first_row(lab: Lab, golden: dict[int, list[int]]) -> None:
    """A fresh row may bring hit blocks and new blocks together."""
    drive = lab.driver()
    finish(drive, [job_of(33)])
    again = job_of(33, "again")
    again.free, again.computed, again.fresh = [0, 1, 50, 51, 52], 2 * SIZE, True
    assert finish(drive, [again]) == [golden[33]]


def test_a_long_prefix_in_common(lab: Lab) -> None:
    """Five rows on the same seventeen blocks, one on blocks of its own: read together and alone."""
    drive, prefix = lab.driver(), prompt_of(17 * SIZE, seed=9)
    first = Job("first", prefix + prompt_of(20), N, list(range(20)))
    jobs = [Job(f"j{i}", prefix + prompt_of(5 + 7 * i, seed=i), N, []) for i in range(4)]
    expected = [lab.expected(job.prompt) for job in [first, *jobs]]
    drive.open(first)
    drive.step([first])
    for i, job in enumerate(jobs):
        job.computed, job.held, job.free = 17 * SIZE, 17, list(range(20 + 3 * i, 23 + 3 * i))
        drive.runner.adopt(job.name, 1, list(range(17)))
        drive.step([drive.open(job)], chunk=64)
    alone = Job("alone", first.prompt, N, list(range(40, 60)))
    drive.step([drive.open(alone)])
    before = lab.runner.rows_shared
    assert drive.run([first, *jobs, alone]) == [*expected, expected[0]]
    windows = {layer.window for layer in lab.runner.spec.layers}
    assert lab.runner.rows_shared - before == (5 * (N - 1) if None in windows else 0)
    close(drive.runner, [first, *jobs, alone])


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("length", [1, 16, 17, 33])
def test_handed_over(lab: Lab, golden: dict[int, list[int]], length: int, first_token: str) -> None:
    """KV computed on one runner, copied by whole blocks, continued on another one.

    `prefill`: the source draws token 0 from the last prompt position. `decode`: the source stops a
    token short of that, and the target computes the last position and draws.
    """
    p, d = lab.driver(), Driver(lab.another())
    source = p.open(job_of(length))
    target = job_of(length, first=40)
    if first_token == "prefill":
        p.step([source])
        target.computed = length
    elif length > 1:
        source.prompt = source.prompt[:-1]
        p.prefill(source)
        target.computed = length - 1
    target.held = -(-target.computed // SIZE)
    table = scattered(range(60, 60 + target.held))
    copy_blocks(p.runner, d.runner, zip(range(target.held), table, strict=True))
    close(p.runner, [source])
    d.runner.adopt(target.name, 1, table)
    d.open(target)
    for token in source.output:
        d.runner.append(target.name, 1, token)
    target.output = list(source.output)
    assert d.run([target])[0] == golden[length]


def test_shipping_layer_by_layer(lab: Lab, golden: dict[int, list[int]]) -> None:
    """`layer_done` means what it says: a copy made inside it holds the layer's whole KV."""
    p, d = lab.driver(), Driver(lab.another())
    source, target = job_of(33), job_of(33, first=40)

    def ship(layer: int) -> None:
        for plane, to in zip(p.runner.planes()[layer], d.runner.planes()[layer], strict=True):
            to[70:73] = plane[0:3]

    hooks = Hooks(on_layer=ship)
    p.step([p.open(source)], hooks=hooks)
    assert hooks.layers == [0, 1]
    close(p.runner, [source])
    d.runner.adopt(target.name, 1, [70, 71, 72])
    target.computed, target.held, target.output = 33, 3, list(source.output)
    d.open(target)
    assert d.run([target])[0] == golden[33]


def test_recomputed_after_close(lab: Lab, golden: dict[int, list[int]]) -> None:
    """A lost attempt goes on as the next one: prompt and emitted tokens, other blocks, no KV."""
    drive = lab.driver()
    lost = drive.open(job_of(31))
    drive.step([lost])
    drive.step([lost], steps=9)
    close(drive.runner, [lost])
    again = job_of(31, lost.name, first=30)
    again.attempt, again.output = 2, list(lost.output)
    assert finish(drive, [again], chunk=16) == [golden[31]]


def test_preempted_and_recomputed(lab: Lab, golden: dict[int, list[int]]) -> None:
    drive = lab.driver()
    job = drive.open(job_of(17))
    drive.step([job])
    drive.step([job], steps=9)
    job.computed, job.held, job.fresh, job.free = 0, 0, True, scattered(range(30, 36))
    lab.driver()  # what the old blocks held is gone, and they are not written again
    assert drive.run([job], chunk=7) == [golden[17]]
    for layer in lab.runner.planes():
        assert all((plane[:6].view("float32") == 7.0).all() for plane in layer)
    close(drive.runner, [job])


def test_tied_embeddings(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "qwen3", tied=True, initializer_range=0.2)
    lab = Lab("tied", folder, reference_of(folder), TorchRunner(folder, blocks_count=BLOCKS))
    assert finish(lab.driver(), [job_of(17)]) == [lab.expected(prompt_of(17))]


# --- ends, spec, dtype -----------------------------------------------------------------------


@ONE
def test_eos_ends_where_generate_ends(
    lab: Lab, golden: dict[int, list[int]], tmp_path: Path
) -> None:
    """generation_config.json overrides config.json and may hold a list."""
    folder = shutil.copytree(lab.folder, tmp_path / "model")
    eos = golden[16][9]
    text = json.dumps({"eos_token_id": [300, eos]})
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    drive = Driver(TorchRunner(folder, blocks_count=8))
    assert drive.runner.spec.eos_token_ids == (300, eos)
    job = drive.open(job_of(16))
    job.sampling = Sampling(temperature=0.0)
    stopped = golden[16][: golden[16].index(eos) + 1]
    assert drive.run([job]) == [stopped] and job.end == "stop"


def test_spec_and_planes(lab: Lab) -> None:
    spec, planes = lab.runner.spec, lab.runner.planes()
    assert (spec.vocab, spec.block_size, spec.blocks_count) == (VOCAB, SIZE, BLOCKS)
    kv_heads = 4 if lab.name == "qwen2-yarn" else 2
    assert spec.kv_token_bytes == 2 * 2 * kv_heads * 16 * 4  # layers, planes, heads, dim, bytes
    shape = (BLOCKS, SIZE * kv_heads * 16 * 4)
    assert [[plane.shape for plane in layer] for layer in planes] == [[shape] * 2] * 2
    windows = {"mistral-window": [WINDOW, WINDOW], "qwen3-mixed": [None, WINDOW]}
    assert [one.window for one in spec.layers] == windows.get(lab.name, [None, None])
    planes[1][0][5] = 9
    assert (lab.runner.planes()[1][0][5] == 9).all()


@ONE
def test_fingerprint_names_config_weights_and_dtype(lab: Lab, tmp_path: Path) -> None:
    same = lab.another().spec.fingerprint
    assert same == lab.runner.spec.fingerprint
    folder = shutil.copytree(lab.folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    prints = {same, TorchRunner(folder, blocks_count=1).spec.fingerprint}
    prints.add(lab.another(dtype="bfloat16").spec.fingerprint)
    config = json.loads((lab.folder / "config.json").read_text(encoding="utf-8"))
    config["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    prints.add(TorchRunner(folder, blocks_count=1).spec.fingerprint)
    assert len(prints) == 4


@ONE
def test_bfloat16_is_near_and_hands_over_bit_for_bit(
    lab: Lab, golden: dict[int, list[int]]
) -> None:
    """No equality with float32 is asked of bfloat16, only that most first tokens agree."""
    p, d = (Driver(lab.another(dtype="bfloat16")) for _ in range(2))
    assert p.runner.spec.kv_token_bytes * 2 == lab.runner.spec.kv_token_bytes
    jobs = [job_of(length, first=6 * i) for i, length in enumerate(LENGTHS)]
    for job in jobs:
        p.step([p.open(job)])
    first = [golden[length][0] == job.output[0] for length, job in zip(LENGTHS, jobs, strict=True)]
    assert sum(first) >= len(LENGTHS) - 2
    copy_blocks(p.runner, d.runner, ((block, block) for block in range(BLOCKS)))
    for length, job in zip(LENGTHS, jobs, strict=True):
        other = job_of(length, first=job.free[0])
        other.computed, other.held, other.output = job.computed, job.held, list(job.output)
        d.runner.adopt(other.name, 1, list(range(job.free[0] - job.held, job.free[0])))
        assert d.run([d.open(other)]) == p.run([job])


@ONE
def test_sampled_text_is_the_same_in_any_company(lab: Lab) -> None:
    def drawn(company: int, chunk: int, emitted: int = 0) -> list[int]:
        drive = lab.driver()
        jobs = [job_of(17 + i, f"j{i}", first=6 * i) for i in range(company)]
        for job in jobs:
            job.sampling = Sampling(temperature=0.9, top_p=0.95, ignore_eos=True)
        jobs[0].output = alone[:emitted] if emitted else []
        return finish(drive, jobs, chunk)[0]

    alone = drawn(1, 512)
    assert alone == drawn(1, 7) == drawn(9, 16) == drawn(3, 512, emitted=11)
    assert len(set(alone)) > 5


@BOTH
def test_only_rows_that_sample_reach_the_head(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = lab.runner.decoder.logits

    def counted(hidden: Any) -> Any:
        rows.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(lab.runner.decoder, "logits", counted)
    drive = lab.driver()
    jobs = [job_of(33), job_of(1, first=10), job_of(16, first=20)]
    for job in jobs:
        drive.open(job)
    result = drive.step(jobs, chunk=16)
    assert [row.sampled for row in result.rows] == [0, 1, 1] and rows == [2]
    close(drive.runner, jobs)


@ONE
def test_keys_continue_the_prompts_own(lab: Lab) -> None:
    drive = lab.driver()
    job = job_of(15)
    result = drive.step([drive.open(job)])
    assert row_of(result).keys == ()
    drive.run([job])
    known = job.prompt + job.output
    assert tuple(job.keys) == block_keys(known, SIZE, SALT)[: (len(known) - 1) // SIZE]
    close(drive.runner, [job])
