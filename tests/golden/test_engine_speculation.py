"""Guessed tokens change no token: n-grams and a draft model, in every way that a sequence runs.

float32, where batching moves logits far less than the top two are apart (test_engine_tokens).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from kvasir.core.errors import ModelError  # noqa: E402
from kvasir.core.request import Grammar, Sampling, Steering  # noqa: E402
from kvasir.core.specs import Deployment  # noqa: E402
from kvasir.engine.draft import DraftModel  # noqa: E402
from kvasir.engine.rejection import GUESS, weighed  # noqa: E402
from kvasir.engine.sampler import Draw, draw, pick, uniform  # noqa: E402
from kvasir.engine.speculate import NgramGuesser  # noqa: E402
from kvasir.engine.steps import Choice, Guesser, verified  # noqa: E402
from kvasir.engine.tiny import VOCAB, make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from kvasir.runtime.runners import make_runner  # noqa: E402
from tests.engine_driver import SALT, Driver, Hooks, Job, copy_blocks  # noqa: E402

N: Final = 24
BLOCKS: Final = 96
NOISE: Final = 0.1  # of a weight's spread: a draft model that is right at times
PROMPT: Final = [5, 9, 17, 5, 9, 40, 5, 9, 17, 80, 81, 82, 80, 81, 200, 3, 5, 9]
KINDS: Final = ("ngram", "draft", "same")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny(tmp_path_factory.mktemp("target"), "qwen3")


@pytest.fixture(scope="module")
def noisy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, a little wrong."""
    other = tmp_path_factory.mktemp("draft") / "model"
    shutil.copytree(folder, other)
    weights = load_file(folder / "model.safetensors")
    rng = torch.Generator().manual_seed(3)
    for name, w in weights.items():
        if w.ndim > 1:
            weights[name] = w + NOISE * w.std() * torch.randn(w.shape, generator=rng)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchRunner:
    return TorchRunner(folder, blocks_count=BLOCKS)


@pytest.fixture(params=KINDS)
def guesser(request: pytest.FixtureRequest, folder: Path, noisy: Path) -> Guesser:
    if request.param == "ngram":
        return NgramGuesser(1, 3)
    return DraftModel(
        noisy if request.param == "draft" else folder, folder, vocab=VOCAB, rows_max=4
    )


def job(name: str = "r", prompt: list[int] = PROMPT, draft: int = 4, first: int = 0,
        **more: Any) -> Job:  # fmt: skip
    return Job(name, list(prompt), more.pop("n", N), list(range(first, first + 8)), draft=draft,
               **more)  # fmt: skip


def plain(runner: TorchRunner, **more: Any) -> list[int]:
    """The same without guesses, alone."""
    return run(runner, None, job("plain", draft=0, **more))[0]


def run(runner: TorchRunner, guesser: Guesser | None, *jobs: Job, chunk: int = 512,
        steps: int = 3) -> list[list[int]]:  # fmt: skip
    for layer in runner.planes():
        for plane in layer:
            plane.view("float32")[:] = 7.0
    runner.guesser = guesser
    drive = Driver(runner)
    for one in jobs:
        drive.open(one)
    outputs = drive.run(jobs, chunk, steps)
    for one in jobs:
        runner.close(one.name, one.attempt)
    return outputs


def test_alone_the_tokens_are_those_of_generate(
    runner: TorchRunner, guesser: Guesser, folder: Path
) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=N, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    one = job()
    assert run(runner, guesser, one) == [out[0, len(PROMPT) :].tolist()]
    assert one.drafted > 0


def test_guesses_are_accepted_and_rejected(runner: TorchRunner, noisy: Path, folder: Path) -> None:
    """Of the very model all are right; of one a little wrong, some."""
    counts = {}
    for name, model in (("same", folder), ("noisy", noisy)):
        one = job()
        run(runner, DraftModel(model, folder, vocab=VOCAB, rows_max=1), one)
        counts[name] = (one.accepted, one.drafted)
    assert counts["same"][0] == counts["same"][1] > 0
    assert 0 < counts["noisy"][0] < counts["noisy"][1]


def test_ngrams_are_accepted_where_a_text_repeats_itself(tmp_path: Path) -> None:
    """A model with small weights and a tied head says one token again and again."""
    dull = TorchRunner(make_tiny(tmp_path, tied=True, initializer_range=0.02), blocks_count=BLOCKS)
    one = job(n=60)
    assert run(dull, NgramGuesser(2, 4), one) == [plain(dull, n=60)]
    assert one.accepted > 20


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_batched_with_others_and_chunked(
    runner: TorchRunner, guesser: Guesser, chunk: int
) -> None:
    """Two that guess, of which one ends early, and two that do not."""
    shapes = [(PROMPT, N, 4), (PROMPT[3:], 9, 2), (PROMPT[:5], N, 0), ([7] * 40, 12, 0)]
    jobs = [
        job(f"r{i}", prompt, n=n, draft=draft, first=8 * i)
        for i, (prompt, n, draft) in enumerate(shapes)
    ]
    expected = [plain(runner, prompt=prompt, n=n) for prompt, n, _ in shapes]
    assert run(runner, guesser, *jobs, chunk=chunk) == expected


def test_after_a_prefix_hit(runner: TorchRunner, guesser: Guesser) -> None:
    """The first block was computed for somebody else."""
    expected = plain(runner)
    other = job("other", [*PROMPT[:16], 1, 2, 3])
    run(runner, None, other)
    runner.guesser = guesser
    drive = Driver(runner)
    one = job(first=20)
    one.free, one.computed, one.held = list(range(20, 28)), 16, 1
    runner.adopt(one.name, 1, [0])
    drive.open(one)
    assert drive.run([one]) == [expected]
    runner.close(one.name, 1)


def test_after_a_transfer(runner: TorchRunner, guesser: Guesser, folder: Path) -> None:
    expected = plain(runner)
    there = TorchRunner(folder, blocks_count=BLOCKS)
    drive = Driver(there)
    source = drive.open(job())
    drive.step([source])
    runner.guesser = guesser
    copy_blocks(there, runner, [(0, 50), (1, 40)])
    runner.adopt("r", 1, [50, 40])
    runner.append("r", 1, source.output[0])
    runner.open("r", 1, PROMPT, 1, SALT)
    target = job(first=60)
    target.output, target.computed, target.held = list(source.output), len(PROMPT), 2
    assert Driver(runner).run([target]) == [expected]
    assert target.drafted > 0
    runner.close("r", 1)


def test_after_recomputation_in_the_middle(runner: TorchRunner, guesser: Guesser) -> None:
    """Preempted: its blocks are gone, its tokens are known, and it goes on guessing."""
    expected = plain(runner)
    runner.guesser = guesser
    drive, one = Driver(runner), job()
    drive.open(one)
    for _ in range(4):
        drive.step([one])
    assert len(one.output) < N
    one.computed = one.held = 0
    one.fresh, one.free = True, list(range(30, 40))
    assert drive.run([one], chunk=5) == [expected]
    runner.close("r", 1)


@pytest.mark.parametrize("at", [3, 5, 8])
def test_a_stop_token_among_right_guesses(runner: TorchRunner, folder: Path, at: int) -> None:
    text = plain(runner)
    stop = text[at]
    end = text.index(stop) + 1
    one = job(sampling=Sampling(temperature=0.0, stop_token_ids=(stop,)))
    guesser = DraftModel(folder, folder, vocab=VOCAB, rows_max=1)
    assert run(runner, guesser, one) == [text[:end]]
    assert one.end == "stop"


# --- sampled --------------------------------------------------------------------------------------

SAMPLINGS: dict[str, tuple[Sampling, Steering | None]] = {
    "seeded": (Sampling(temperature=0.8, seed=7, ignore_eos=True), None),
    "filters": (Sampling(temperature=1.1, seed=1, top_k=20, top_p=0.8, ignore_eos=True), None),
    "penalties": (
        Sampling(temperature=0.7, seed=3, presence_penalty=0.7, frequency_penalty=0.4,
                 repetition_penalty=1.2, ignore_eos=True), None),
    "bias": (Sampling(temperature=0.9, seed=3, ignore_eos=True), Steering(((65, 4.0), (66, 3.0)))),
    "min_tokens": (Sampling(temperature=0.0, min_tokens=20, stop_token_ids=(65,)), None),
    "logprobs": (Sampling(temperature=0.0, logprobs=3, ignore_eos=True), None),
    "grammar": (Sampling(temperature=0.9, seed=5), Steering((), Grammar("regex", "[a-c]{6,9}"))),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_same_seed_gives_the_same_text(
    runner: TorchRunner, guesser: Guesser, name: str
) -> None:
    sampling, steering = SAMPLINGS[name]
    straight = job("r", draft=0, sampling=sampling, steering=steering)
    run(runner, None, straight)
    one = job("r", sampling=sampling, steering=steering)
    run(runner, guesser, one)
    assert (one.output, one.end) == (straight.output, straight.end)
    for a, b in zip(one.drawn, straight.drawn, strict=True):
        assert (a.index, a.token) == (b.index, b.token)
        assert (a.logprobs is None) == (b.logprobs is None) == (sampling.logprobs is None)
        if a.logprobs is not None and b.logprobs is not None:
            assert a.logprobs.drawn == pytest.approx(b.logprobs.drawn, abs=1e-4)
    if name == "grammar":
        assert set(one.output[:6]) <= {97, 98, 99}


@pytest.mark.parametrize("seeded", [True, False], ids=["compared", "weighed"])
def test_the_distribution_is_the_model_s(
    runner: TorchRunner, noisy: Path, folder: Path, seeded: bool
) -> None:
    """Chi-square of 1,200 texts of three tokens, the last two of them guessed first, against their
    exact probabilities; 8 texts are possible, so 24.3 is exceeded once in a thousand."""
    sampling = {"temperature": 1.0, "top_k": 2, "ignore_eos": True}
    runner.guesser = DraftModel(noisy, folder, vocab=VOCAB, rows_max=8)
    drive, seen, guessed = Driver(runner), {}, [0, 0]
    for batch in range(24):
        jobs = [
            Job(f"b{batch}-{i}", PROMPT[:9], 3, [i], draft=2,
                sampling=Sampling(seed=50 * batch + i if seeded else None, **sampling))
            for i in range(50)
        ]  # fmt: skip
        for one in jobs:
            drive.open(one)
        for text in drive.run(jobs):
            seen[tuple(text)] = seen.get(tuple(text), 0) + 1
        for one in jobs:
            runner.close(one.name, 1)
            guessed = [guessed[0] + one.accepted, guessed[1] + one.drafted]
    assert 0 < guessed[0] < guessed[1]
    exact = texts(folder)
    assert set(seen) <= set(exact)
    total = sum(seen.values())
    chi_square = sum((seen.get(t, 0) - total * p) ** 2 / (total * p) for t, p in exact.items())
    assert chi_square < 24.3, (chi_square, seen, exact)


P, Q, COUNT = (0.5, 0.3, 0.2, 0.0), (0.1, 0.1, 0.3, 0.5), 20_000


def test_a_seed_names_one_text_of_two_known_distributions() -> None:
    """The comparison keeps a guess where both cumulative distributions name the same token for the
    same number, [0, .1) here. What is drawn is p's."""
    draws = [Draw("r", i, Sampling(temperature=1.0, seed=9)) for i in range(COUNT)]
    drawn, guesses = (draw(torch.tensor(of).log().expand(COUNT, 4), draws) for of in (P, Q))
    kept = [
        [one.token for one in verified([guess], lambda i, token=token: Choice((token, 99)[i]))]
        for token, guess in zip(drawn, guesses, strict=True)
    ]
    assert accepted_of(kept) == pytest.approx(0.1, abs=0.01)


def test_the_rejection_rule_on_two_known_distributions() -> None:
    """It accepts the sum of min(p, q) = 0.4 of the guesses, and what is drawn is p's."""
    draws = [Draw(f"r{i}", 0, Sampling(temperature=1.0)) for i in range(COUNT)]
    q = torch.tensor([Q])
    p = torch.tensor([P, (0.0, 0.0, 0.0, 7.0)])
    guesses = pick(q.expand(COUNT, 4), [uniform(one, GUESS) for one in draws]).tolist()
    kept = [
        weighed(p, q, [guess], [one, Draw(one.request_id, 1, one.sampling)])
        for guess, one in zip(guesses, draws, strict=True)
    ]
    assert all(text[1:] in ([], [3]) for text in kept)
    assert all(text[0] == guess for guess, text in zip(guesses, kept, strict=True) if text[1:])
    assert accepted_of(kept) == pytest.approx(0.4, abs=0.011)


def test_two_equal_distributions_keep_every_guess() -> None:
    p = torch.rand(7, 50, generator=torch.Generator().manual_seed(1)) ** 9
    for i in range(300):
        draws = [Draw(f"r{i}", k, Sampling(temperature=1.0)) for k in range(7)]
        guess = pick(p[:6], [uniform(one, GUESS) for one in draws[:6]]).tolist()
        assert weighed(p, 3 * p[:6], guess, draws)[:6] == guess


def accepted_of(kept: list[list[int]]) -> float:
    """Share of first guesses that were kept; that the first tokens are p's is checked."""
    seen = [sum(text[0] == t for text in kept) for t in range(4)]
    chi_square = sum((n - COUNT * s) ** 2 / (COUNT * s) for n, s in zip(seen, P, strict=True) if s)
    assert chi_square < 13.8 and seen[3] == 0, "exceeded once in a thousand"
    return sum(len(text) == 2 for text in kept) / COUNT


def texts(folder: Path) -> dict[tuple[int, ...], float]:
    """Probabilities of all texts of three tokens, two at each place."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, p in found.items():
            with torch.inference_mode():
                logits = reference(torch.tensor([[*PROMPT[:9], *text]])).logits[0, -1]
            top = logits.topk(2)
            for token, share in zip(top.indices.tolist(), top.values.softmax(-1).tolist(),
                                    strict=True):  # fmt: skip
                longer[*text, token] = p * share
        found = longer
    assert len(found) == 8
    return found


# --- the draft model ------------------------------------------------------------------------------


def test_a_draft_model_makes_room_by_forgetting(
    runner: TorchRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one text of 64 tokens, and three that take turns."""
    monkeypatch.setattr("kvasir.engine.draft.CONTEXT_TOKENS", 64)
    draft = DraftModel(folder, folder, vocab=VOCAB, rows_max=1)
    runner.guesser = draft
    drive = Driver(runner)
    jobs = [drive.open(job(f"r{i}", [*PROMPT, i], first=10 * i)) for i in range(3)]
    while live := [one for one in jobs if not one.end]:
        for one in live:
            drive.step([one])
    assert [one.output for one in jobs] == [plain(runner, prompt=[*PROMPT, i]) for i in range(3)]
    assert all(one.accepted > 0 for one in jobs)
    for one in jobs:
        draft.forget((one.name, 1))
    assert sorted(draft._free) == list(range(4))


def test_a_long_prompt_is_caught_up_with_in_parts(
    runner: TorchRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.engine.draft.CATCH_UP_TOKENS", 8)
    one, hooks = job(n=12), Hooks()
    drive = Driver(runner)
    runner.guesser = DraftModel(folder, folder, vocab=VOCAB, rows_max=1)
    drive.open(one)
    drive.step([one])
    drive.step([one], hooks=hooks)
    assert one.drafted == 0, "19 tokens take three rounds"
    drive.step([one])
    drive.step([one])
    assert one.drafted == one.accepted > 0
    runner.close("r", 1)


def other_names(folder: Path) -> Path:
    make_tiny(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("im_start", "im_begin"))
    return folder


@pytest.mark.parametrize("make", [other_names, lambda folder: folder / "nowhere"])
def test_a_model_of_other_tokens_is_refused(
    folder: Path, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    with pytest.raises(ModelError) as error:
        DraftModel(make(tmp_path), folder, vocab=VOCAB, rows_max=1)
    assert len(str(error.value).splitlines()) <= 5 and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_a_deployment_says_who_guesses(kind: str, folder: Path, noisy: Path) -> None:
    """Decode workers guess; prefill workers have nothing to guess."""
    guess = {"kind": kind} | ({"draft": str(noisy)} if kind == "draft" else {})
    pools = [{"name": role, "role": role, "count": 1, "hardware": "cpu", "kv_blocks": 16}
             for role in ("prefill", "decode")]  # fmt: skip
    d = Deployment.model_validate(
        {"models": [{"name": "m", "path": str(folder), "shape": "tiny", "speculate": guess}],
         "pools": pools}
    )
    prefill, decode = (make_runner(d, pool) for pool in d.pools)
    assert isinstance(prefill, TorchRunner) and prefill.guesser is None
    assert isinstance(decode, TorchRunner)
    assert isinstance(decode.guesser, DraftModel if kind == "draft" else NgramGuesser)


def test_rows_that_share_a_prefix_and_guess(runner: TorchRunner, folder: Path) -> None:
    """A row that guesses reads the common blocks for itself: reading them once for all
    (engine.shared) is for rows of one token."""
    prefix = [(7 * i) % 250 for i in range(256)]
    tails = [[i, 5, 9 + i] for i in range(4)]
    alone = []
    for tail in tails:
        one = job("alone", prefix + tail, 0)
        one.free = list(range(20))
        alone += run(runner, None, one)
    run(runner, None, Job("first", prefix, 1, list(range(17))))
    drive, jobs = Driver(runner), []
    runner.guesser = DraftModel(folder, folder, vocab=VOCAB, rows_max=4)
    for i, tail in enumerate(tails):
        one = job(f"s{i}", prefix + tail, first=20 + 8 * i)
        one.computed, one.held = 256, 16
        runner.adopt(one.name, 1, list(range(16)))
        jobs.append(drive.open(one))
    assert drive.run(jobs) == alone
    assert all(one.accepted > 0 for one in jobs)
    for one in jobs:
        runner.close(one.name, 1)
