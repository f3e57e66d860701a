"""What an accelerator computes otherwise, on a CPU: the same batches, draws and steps, with plain
torch in the kernels' place (tests/real/test_triton.py holds the kernels to it)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
torch.set_num_threads(1)

from kvasir.core.effects import Step  # noqa: E402
from kvasir.core.errors import ModelError  # noqa: E402
from kvasir.core.request import Sampling, Steering  # noqa: E402
from kvasir.engine.attention import LayerCache, PagedBatch, Span  # noqa: E402
from kvasir.engine.cuda import decode  # noqa: E402
from kvasir.engine.cuda.batch import device_batch  # noqa: E402
from kvasir.engine.cuda.decode import reference_decode, splits_of, tile_of  # noqa: E402
from kvasir.engine.cuda.decoding import Captured, Decoding  # noqa: E402
from kvasir.engine.cuda.prefill import way_of  # noqa: E402
from kvasir.engine.cuda.sample import draw_on_device  # noqa: E402
from kvasir.engine.sampler import Draw, draw  # noqa: E402
from kvasir.engine.steps import BlockTable  # noqa: E402
from kvasir.engine.tiny import VOCAB, make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from tests.engine_driver import Driver, Hooks, Job, close, scattered  # noqa: E402

SIZE = 16
BLOCKS = 60
N = 24


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    decode.triton_runs.cache_clear()
    yield
    decode.triton_runs.cache_clear()


# --- attention -------------------------------------------------------------------------------


def table_of(numbers: list[int]) -> BlockTable:
    table = BlockTable()
    table.extend(numbers)
    return table


def test_the_reference_is_attention_position_by_position() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(30 * SIZE, 2, 8, generator=generator) for _ in range(2))
    query = torch.randn(3, 4, 8, generator=generator)
    tables, lengths, window = [[3, 4, 9], [7, 0, 0], [20, 1, 0]], [41, 1, 32], 20
    found = reference_decode(
        query, key, value, torch.tensor(tables, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32), SIZE, 0.3, window, 5.0,
    )  # fmt: skip
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        seen = range(max(0, length - window), length)
        slots = [table[p // SIZE] * SIZE + p % SIZE for p in seen]
        for head in range(4):
            scores = torch.stack([query[row, head] @ key[s, head // 2] * 0.3 for s in slots])
            weights = (torch.tanh(scores / 5.0) * 5.0).softmax(0)
            expected = sum(w * value[s, head // 2] for w, s in zip(weights, slots, strict=True))
            assert torch.allclose(found[row, head], expected, atol=1e-5)


SPANS = {
    "decode rows": [(40, 1), (0, 1), (17, 1)],
    "whole prompts": [(0, 33), (0, 5), (0, 16)],
    "chunks after a context": [(32, 16), (7, 30), (0, 9)],
    "all kinds": [(40, 1), (0, 20), (33, 2), (0, 1), (16, 40), (63, 1)],
}


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 10, 500])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", SPANS)
def test_a_device_batch_attends_as_a_paged_one(
    name: str, kv_heads: int, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    free = Random(name).sample(range(BLOCKS), BLOCKS)
    spans = [
        Span(start, count, table_of([free.pop() for _ in range((start + count) // SIZE + 1)]))
        for start, count in SPANS[name]
    ]
    caches = [LayerCache(*(torch.randn(BLOCKS * SIZE, kv_heads, 8) for _ in range(2)))]
    copies = [LayerCache(*(plane.clone() for plane in cache)) for cache in caches]
    tokens = sum(span.count for span in spans)
    new = [torch.randn(tokens, heads, 8) for heads in (4, kv_heads, kv_heads)]
    batch = device_batch(caches, SIZE, spans)
    paged = PagedBatch(copies, SIZE, spans, lambda layer: None)
    found = batch.attend(0, *new, 0.3, window, softcap)
    assert torch.allclose(found, paged.attend(0, *new, 0.3, window, softcap), atol=1e-5)
    assert torch.equal(caches[0].key, copies[0].key)
    assert torch.equal(caches[0].value, copies[0].value)
    assert batch.end == paged.end


def test_ragged_kernels_are_for_half_precision_on_a_gpu() -> None:
    assert way_of(torch.empty(2, 4, 64)) == "by span"
    assert way_of(torch.empty(2, 4, 64, dtype=torch.bfloat16)) == "by span"  # not on a GPU


@pytest.mark.parametrize(
    ("rows", "kv_heads", "processors", "splits"),
    [
        (1, 8, 132, 32), (8, 8, 132, 4), (64, 8, 132, 1), (256, 8, 132, 1), (1, 1, 132, 64),
        (1, 1, 4, 8), (3, 8, 132, 8), (1, 40, 10, 1),
    ],
)  # fmt: skip
def test_shares_fill_the_device_once_or_twice(
    rows: int, kv_heads: int, processors: int, splits: int
) -> None:
    assert splits_of(rows, kv_heads, processors) == splits


@pytest.mark.parametrize(
    ("dim", "itemsize", "tile"),
    [(64, 2, 64), (128, 2, 64), (128, 4, 32), (256, 2, 32), (256, 4, 16)],
)
def test_two_stages_of_keys_and_values_fit(dim: int, itemsize: int, tile: int) -> None:
    assert tile_of(dim, itemsize) == tile
    assert 2 * 2 * tile * dim * itemsize <= 99 * 1024


# --- sampling --------------------------------------------------------------------------------


def wish(random: Random, vocab: int) -> Sampling:
    return Sampling(
        temperature=random.choice([0.0, 1e-6, 0.3, 1.0, 2.5]),
        top_k=random.choice([0, 0, 1, 5, 40, vocab, 2 * vocab]),
        top_p=random.choice([1.0, 1.0, 0.0, 0.1, 0.9, 0.9999]),
        min_p=random.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        seed=random.choice([None, 7, 8]),
    )


@pytest.mark.parametrize("vocab", [5, 300, 3000])
@pytest.mark.parametrize("seed", range(8))
def test_the_device_draws_what_the_sampler_draws(seed: int, vocab: int) -> None:
    random = Random(f"{seed} {vocab}")
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    logits[::7] = logits[::7].round()  # ties
    draws = [Draw(f"r{i % 5}", i, wish(random, vocab)) for i in range(64)]
    before = logits.clone()
    assert draw_on_device(logits, draws).tolist() == draw(logits, draws)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "same",
    [Sampling(), Sampling(temperature=0.7, top_p=0.8), Sampling(top_k=3), Sampling(min_p=0.3)],
)
def test_rows_that_all_ask_the_same(same: Sampling) -> None:
    logits = torch.randn(200, 400, generator=torch.Generator().manual_seed(1)) * 2
    draws = [Draw("r", i, same) for i in range(200)]
    assert draw_on_device(logits, draws).tolist() == draw(logits, draws)


# --- a runner --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp(request.param), request.param, context_max=256)


def runner_of(folder: Path, rehearse: bool, **options: Any) -> TorchRunner:
    return TorchRunner(folder, blocks_count=BLOCKS, block_size=SIZE, rehearse=rehearse, **options)


def prompt_of(length: int, seed: int) -> list[int]:
    return Random(seed).choices(range(250), k=length)


def jobs_of(samplings: list[Sampling | None], **options: Any) -> list[Job]:
    free = scattered(range(BLOCKS))
    return [
        Job(f"j{i}", prompt_of(5 + 9 * i, i), N - 2 * i, [free.pop() for _ in range(6)],
            sampling=sampling, **options)
        for i, sampling in enumerate(samplings)
    ]  # fmt: skip


GREEDY = Sampling(temperature=0.0, ignore_eos=True)
WARM = Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=4, ignore_eos=True)


@pytest.mark.parametrize("samplings", [[GREEDY] * 4, [WARM] * 3, [GREEDY, WARM, None, WARM]])
@pytest.mark.parametrize(("chunk", "steps"), [(512, 8), (7, 3), (512, 1)])
def test_the_same_tokens_as_on_a_cpu(
    folder: Path, samplings: list[Sampling | None], chunk: int, steps: int
) -> None:
    outputs = []
    for rehearse in (False, True):
        driver = Driver(runner_of(folder, rehearse))
        jobs = jobs_of(samplings)
        outputs.append(driver.run([driver.open(job) for job in jobs], chunk, steps))
    assert outputs[0] == outputs[1]
    decoding = driver.runner.path.decoding
    assert (decoding.ahead > 0) == (steps > 1)


def test_a_run_that_is_cut_goes_on_with_other_rows(folder: Path) -> None:
    """What was under way is dropped, and what it wrote does no harm."""
    expected, found = (run_with_cuts(runner_of(folder, rehearse)) for rehearse in (False, True))
    assert found == expected


def run_with_cuts(runner: TorchRunner) -> list[list[int]]:
    driver = Driver(runner)
    jobs = jobs_of([GREEDY, WARM, GREEDY, WARM])
    for job in jobs[:3]:
        driver.open(job)
    while live := [job for job in jobs[:3] if not job.end]:
        driver.step(live, steps=6, hooks=Hooks(cut_after=2))
        if len(jobs[0].output) >= 9 and not jobs[3].computed:
            driver.run([driver.open(jobs[3])], steps=6)
            close(runner, jobs[3:])
    return [job.output for job in jobs]


def test_a_token_that_ends_a_row_ends_the_run(folder: Path) -> None:
    whole = jobs_of([GREEDY])[0]
    driver = Driver(runner_of(folder, False))
    driver.run([driver.open(whole)])
    stop = Sampling(temperature=0.0, ignore_eos=True, stop_token_ids=(whole.output[10],))
    first = whole.output.index(whole.output[10])
    job = jobs_of([stop])[0]
    driver = Driver(runner_of(folder, True))
    driver.run([driver.open(job)], steps=30)
    assert job.output == whole.output[: first + 1] and job.end == "stop"


def test_guides_and_log_probabilities_take_the_hosts_way(folder: Path) -> None:
    strange = [
        Sampling(temperature=0.0, repetition_penalty=1.4, ignore_eos=True),
        Sampling(temperature=0.8, seed=1, logprobs=3, ignore_eos=True), GREEDY,
    ]  # fmt: skip
    told = []
    for rehearse in (False, True):
        driver = Driver(runner_of(folder, rehearse))
        jobs = jobs_of([*strange], steering=Steering(logit_bias=((7, 4.0),)))
        driver.run([driver.open(job) for job in jobs])
        told.append(
            [[(one.token, one.logprobs and one.logprobs.top[0][0]) for one in job.drawn]
             for job in jobs]
        )  # fmt: skip
    assert told[0] == told[1]
    assert driver.runner.path.decoding.ahead == 0


@dataclass
class Replayed:
    """Stands for a graph: what was captured runs again and writes its logits where they were."""

    decoding: Decoding
    rows: int
    logits: Any

    def replay(self) -> None:
        self.logits.copy_(self.decoding._step(self.rows))


def test_rows_that_fill_a_graph_up_harm_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(decoding: Decoding, rows: int) -> Captured:
        captured.append(rows)
        logits = torch.empty(rows, VOCAB)
        return Captured(Replayed(decoding, rows, logits), logits)

    captured: list[int] = []
    monkeypatch.setattr(Decoding, "_capture", capture)
    plain, padded = (Driver(runner_of(folder, rehearse)) for rehearse in (False, True))
    runner = padded.runner
    caches = runner.path._caches
    runner.path.decoding = Decoding(runner.decoder, caches, SIZE, BLOCKS, 256, graphs=True)
    outputs = []
    for driver in (plain, padded):
        jobs = jobs_of([GREEDY, WARM, GREEDY, WARM])  # the last one ends first
        outputs.append(driver.run([driver.open(job) for job in jobs], steps=20))
        # Blocks that are full when their row ends, where a longer one's stood in its table before.
        long = Job("long", prompt_of(60, 8), 4, [BLOCKS - at for at in range(3, 8)])
        full = Job("full", prompt_of(20, 9), 2 * SIZE + 1 - 20, [BLOCKS - 2, BLOCKS - 1])
        outputs.append(driver.run([driver.open(long)]))
        driver.step([driver.open(full)])
        step = Step(1, (driver.row(full, 1, steps=N),), 2 * N)  # more than it has left
        driver.runner.step(step, hooks := Hooks())
        outputs.append([[batch[0].token for batch in hooks.batches]])
    assert outputs[:3] == outputs[3:]
    assert captured == [4, 2, 1] and runner.path.decoding.replays >= N - 1
    for own, cache in zip(plain.runner._caches, caches, strict=True):
        for a, b in zip(own, cache, strict=True):
            assert torch.allclose(a, b[: BLOCKS * SIZE], atol=1e-5)
            assert b[BLOCKS * SIZE :].any()


def test_layers_are_told_in_order_once_a_step(folder: Path) -> None:
    driver = Driver(runner_of(folder, True))
    job = driver.open(jobs_of([GREEDY])[0])
    hooks = Hooks()
    driver.step([job], hooks=hooks)
    assert hooks.layers == [0, 1]
    driver.step([job], steps=5, hooks=(later := Hooks()))
    assert later.layers == [0, 1] and len(later.batches) == 5


def test_kv_on_a_device_is_refused_to_whoever_would_ship_it(folder: Path) -> None:
    runner = runner_of(folder, True)
    assert len(runner.planes()[0][0]) == BLOCKS  # the scratch block is nobody's
    runner._device = "cuda"
    with pytest.raises(ModelError, match="cannot leave it"):
        runner.planes()


# --- the bench -------------------------------------------------------------------------------


def test_the_bench_rehearses_every_part_on_a_cpu() -> None:
    from bench.engine_cuda import SHAPES, run

    found = run("cpu", "tiny")
    assert found["failed"] == []
    parts = found["parts"]
    for name in ("tokens qwen3, graphs", "tokens llama, no graphs"):
        assert parts[name]["same"] == parts[name]["of"] == len(SHAPES["tiny"].small)
    for case in SHAPES["tiny"].cases:
        assert parts[f"{case.name}, graphs"]["per_s"] > 0
    assert max(parts["kernel against torch"].values()) < 2e-3


def test_a_part_of_the_bench_that_fails_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import engine_cuda

    def broken(*_: Any) -> None:
        raise RuntimeError("no memory\nmore")

    monkeypatch.setattr(engine_cuda, "llama", broken)
    found = engine_cuda.run("cpu", "tiny")
    assert found["parts"]["model"] == {"failed": "RuntimeError: no memory"}
    cases = engine_cuda.SHAPES["tiny"].cases
    speeds = [f"{case.name}, {way}" for way in ("no graphs", "graphs") for case in cases]
    assert found["failed"] == ["model", *speeds]
    assert found["parts"]["tokens llama, graphs"]["same"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_bench_says_so() -> None:
    from bench.engine_cuda import run

    assert run() == {"bench": "engine", "skipped": "torch sees no CUDA device here"}
