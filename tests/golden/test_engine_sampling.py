"""What the engine draws and says of its draws, against transformers: log-probabilities, penalties,
bias, filters. float32, tiny random models.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvasir.core.messages import Logprobs  # noqa: E402
from kvasir.core.request import Sampling, Steering  # noqa: E402
from kvasir.engine import sampler  # noqa: E402
from kvasir.engine.guide import Guide  # noqa: E402
from kvasir.engine.tiny import EOS_TOKEN_ID, VOCAB, make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from tests.engine_driver import Driver, Job, close, copy_blocks  # noqa: E402

N = 20
CLOSE = {"rtol": 0.0, "atol": 1e-4}
GREEDY = Sampling(temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchRunner:
    return TorchRunner(folder, blocks_count=64)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    found.generation_config.eos_token_id = None
    return found


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randint(0, 256, (length,), generator=rng).tolist()


def job_of(prompt: list[int], sampling: Sampling, name: str = "r", first: int = 0) -> Job:
    free = list(range(first, first + 8))
    return Job(name, prompt, N, free, sampling=sampling)


def logs_of(reference: Any, job: Job) -> torch.Tensor:
    """transformers' log-probabilities where the job's output tokens were drawn, [output, vocab]."""
    known = [*job.prompt, *job.output]
    with torch.inference_mode():
        logits = reference(torch.tensor([known])).logits[0]
    return logits[len(job.prompt) - 1 : len(known) - 1].log_softmax(-1)


def assert_told(reference: Any, job: Job, top: int) -> None:
    logs = logs_of(reference, job)
    assert len(job.drawn) == len(job.output) == N
    for row, one in zip(logs, job.drawn, strict=True):
        told = one.logprobs
        assert isinstance(told, Logprobs)
        torch.testing.assert_close(torch.tensor(told.drawn), row[one.token], **CLOSE)
        best = row.topk(top)
        assert len(told.top) == top
        values = torch.tensor([value for _, value in told.top])
        torch.testing.assert_close(values, best.values, **CLOSE)
        ids = torch.tensor([token for token, _ in told.top], dtype=torch.long)
        torch.testing.assert_close(row[ids], best.values, **CLOSE)


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.0, ignore_eos=True, logprobs=5),
    Sampling(seed=3, ignore_eos=True, logprobs=0),
    Sampling(temperature=0.3, top_p=0.5, top_k=9, seed=4, ignore_eos=True, logprobs=20),
    Sampling(repetition_penalty=1.8, presence_penalty=1.0, seed=5, ignore_eos=True, logprobs=2),
], ids=["greedy", "warm", "filtered", "penalised"])  # fmt: skip
def test_logprobs_are_those_of_transformers(
    runner: TorchRunner, reference: Any, sampling: Sampling, chunk: int
) -> None:
    """Of the model's own distribution, whatever is done to it before the draw."""
    drive = Driver(runner)
    asks = job_of(prompt_of(33), sampling)
    silent = job_of(prompt_of(20), Sampling(seed=1, ignore_eos=True), "silent", first=10)
    jobs = [drive.open(asks), drive.open(silent)]
    drive.run(jobs, chunk)
    assert sampling.logprobs is not None
    assert_told(reference, asks, sampling.logprobs)
    assert all(one.logprobs is None for one in silent.drawn)
    close(runner, jobs)


def test_no_more_than_the_vocabulary(runner: TorchRunner) -> None:
    drive = Driver(runner)
    job = job_of(prompt_of(5), Sampling(temperature=0.0, ignore_eos=True, logprobs=10_000))
    drive.step([drive.open(job)])
    (one,) = job.drawn
    assert one.logprobs is not None and len(one.logprobs.top) == VOCAB
    assert sum(2.718281828459045**value for _, value in one.logprobs.top) == pytest.approx(1)
    close(runner, [job])


# --- against generate -----------------------------------------------------------------------------


def generated(reference: Any, prompt: list[int], **options: Any) -> list[int]:
    out = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=N, do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    return [int(token) for token in out[0, len(prompt) :]]


def drawn(runner: TorchRunner, job: Job, chunk: int = 512, steps: int = 8) -> list[int]:
    drive = Driver(runner)
    try:
        return drive.run([drive.open(job)], chunk, steps)[0]
    finally:
        close(runner, [job])


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.5])
@pytest.mark.parametrize("length", [1, 17, 33])
def test_repetition_penalty_gives_what_generate_gives(
    runner: TorchRunner, reference: Any, penalty: float, length: int
) -> None:
    prompt = prompt_of(length)
    whole = generated(reference, prompt, repetition_penalty=penalty)
    assert whole != generated(reference, prompt), "it changes something"
    sampling = Sampling(temperature=0.0, ignore_eos=True, repetition_penalty=penalty)
    for chunk, steps in ((512, 64), (7, 1)):
        assert drawn(runner, job_of(prompt, sampling), chunk, steps) == whole


def test_a_penalised_text_goes_on_alike_after_each_kind_of_break(
    runner: TorchRunner, folder: Path, reference: Any
) -> None:
    """Preempted; lost and resumed as the next attempt; handed over to another engine."""
    prompt = prompt_of(33)
    sampling = Sampling(
        temperature=0.0, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.4,
        presence_penalty=0.7, min_tokens=4,
    )  # fmt: skip
    whole = drawn(runner, job_of(prompt, sampling))
    assert whole != generated(reference, prompt, repetition_penalty=1.3)
    drive = Driver(runner)

    job = drive.open(job_of(prompt, sampling))
    drive.step([job])
    drive.step([job], steps=6)
    job.computed, job.held, job.fresh, job.free = 0, 0, True, list(range(20, 28))
    assert drive.run([job], chunk=7) == [whole]
    close(runner, [job])

    lost = drive.open(job_of(prompt, sampling))
    drive.step([lost])
    drive.step([lost], steps=6)
    close(runner, [lost])
    again = job_of(prompt, sampling, first=30)
    again.attempt, again.output = 2, list(lost.output)
    assert drive.run([drive.open(again)]) == [whole]
    close(runner, [again])

    source = drive.open(job_of(prompt, sampling))
    drive.step([source])
    other = Driver(TorchRunner(folder, blocks_count=64))
    copy_blocks(runner, other.runner, ((block, block) for block in range(3)))
    target = job_of(prompt, sampling)
    other.runner.adopt(target.name, 1, [0, 1, 2])
    target.computed, target.held, target.free = 33, 3, list(range(3, 8))
    other.open(target)
    other.runner.append(target.name, 1, source.output[0])
    target.output = list(source.output)
    assert other.run([target]) == [whole]
    close(runner, [source])


@pytest.mark.parametrize("bias", [{10: 100.0}, {10: 3.0, 77: 4.5, 200: -100.0}])
def test_logit_bias_is_sequence_bias(
    runner: TorchRunner, reference: Any, bias: dict[int, float]
) -> None:
    prompt = prompt_of(20)
    whole = generated(reference, prompt, sequence_bias={(k,): v for k, v in bias.items()})
    job = job_of(prompt, GREEDY)
    job.steering = Steering(tuple(bias.items()))
    assert drawn(runner, job) == whole
    assert (set(whole) == {10}) == (bias == {10: 100.0})


def test_no_stop_before_min_tokens(runner: TorchRunner, reference: Any) -> None:
    """generate's `min_new_tokens` on a text that would end at once."""
    prompt = prompt_of(20)
    plain = generated(reference, prompt)
    stop = plain[2]
    short = Sampling(temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    assert drawn(runner, job_of(prompt, short)) == plain[: plain.index(stop) + 1]
    for least in (1, 5, 12):
        whole = generated(reference, prompt, min_new_tokens=least, eos_token_id=stop)
        sampling = Sampling(
            temperature=0.0, ignore_eos=True, stop_token_ids=(stop,), min_tokens=least
        )
        job = job_of(prompt, sampling)
        assert drawn(runner, job) == whole
        assert len(whole) > min(least, 2)


def test_end_of_sequence_is_no_token_before_min_tokens(runner: TorchRunner) -> None:
    job = job_of(prompt_of(9), Sampling(temperature=0.0, min_tokens=N))
    job.steering = Steering(((EOS_TOKEN_ID, 100.0),))
    output = drawn(runner, job)
    assert len(output) == N and EOS_TOKEN_ID not in output
    job = job_of(prompt_of(9), Sampling(temperature=0.0, min_tokens=6))
    job.steering = Steering(((EOS_TOKEN_ID, 100.0),))
    output = drawn(runner, job)
    assert (len(output), output[-1], job.end) == (7, EOS_TOKEN_ID, "stop")


# --- single rows, against transformers' processors ------------------------------------------------


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def shaped(
    logits: torch.Tensor, sampling: Sampling, prompt: list[int], output: list[int]
) -> torch.Tensor:
    guide = Guide(sampling, (), VOCAB)
    guide.follow([*prompt, *output[:2]], min(2, len(output)))
    guide.follow([*prompt, *output], len(output))
    row = logits.clone()
    guide.shape(row)
    return row


@pytest.mark.parametrize("seed", range(4))
def test_penalties_are_those_of_their_definitions(seed: int) -> None:
    """Repetition as transformers' processor; frequency and presence as OpenAI's page has them:
    mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    prompt, output = prompt_of(30, seed), prompt_of(40, seed + 50)[:12] * 2
    logits = noise(1, seed)[0]
    sampling = Sampling(repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=-0.8)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.4)
    expected = processor(torch.tensor([[*prompt, *output]]), logits[None].clone())[0]
    for token in range(VOCAB):
        count = output.count(token)
        expected[token] -= 0.3 * count + (-0.8 if count else 0.0)
    torch.testing.assert_close(shaped(logits, sampling, prompt, output), expected)


def kept(probs: torch.Tensor) -> list[int]:
    return probs.nonzero().squeeze(-1).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 5, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (0.7, 10_000, 1.0, 0.0), (1.0, 0, 1.0, 0.1),
        (2.0, 0, 1.0, 0.02), (1.0, 0, 1.0, 1.0), (0.8, 40, 0.9, 0.05), (1.5, 12, 0.6, 0.2),
    ],
)  # fmt: skip
def test_filters_keep_what_transformers_keeps(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = noise(16, seed=top_k)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    scores = logits.clone()
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(-1)
    probs = sampler.probs(logits, [sampling] * len(logits))
    for mine, theirs in zip(probs, expected, strict=True):
        assert kept(mine) == kept(theirs)
    torch.testing.assert_close(probs / probs.sum(-1, keepdim=True), expected)


def test_each_row_has_its_own_filters() -> None:
    logits = noise(4)
    each = [Sampling(top_k=2), Sampling(), Sampling(min_p=0.5), Sampling(top_p=0.2)]
    together = sampler.probs(logits, each)
    for i, one in enumerate(each):
        assert torch.equal(together[i], sampler.probs(logits[i : i + 1], [one])[0])


def test_drawing_leaves_the_logits_as_they_are() -> None:
    """Log-probabilities are taken from them afterwards."""
    logits = noise(2)
    before = logits.clone()
    guide = Guide(Sampling(), (), VOCAB, bias=((3, 50.0),))
    draws = [sampler.Draw("a", 0, Sampling(top_k=1), guide), sampler.Draw("b", 0, Sampling())]
    assert sampler.draw(logits, draws)[0] == 3
    assert torch.equal(logits, before)


