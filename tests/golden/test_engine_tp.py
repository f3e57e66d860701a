"""Tensor parallel gives the tokens of transformers' `generate`, in float32: other ranks are
processes that hold their part of each layer and their heads of one cache.

What a rank gets wrong shows in the tokens; that it took part shows in its process time and in the
cache, of which each rank writes only its own heads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvasir.core.errors import ConfigError, KvasirError, ModelError, Unavailable  # noqa: E402
from kvasir.core.request import Grammar, Sampling, Steering  # noqa: E402
from kvasir.engine.draft import DraftModel  # noqa: E402
from kvasir.engine.layers import Matrix  # noqa: E402
from kvasir.engine.parallel import cut, team  # noqa: E402
from kvasir.engine.parallel.wire import EXCHANGED_BYTES_MAX  # noqa: E402
from kvasir.engine.speculate import NgramGuesser  # noqa: E402
from kvasir.engine.tiny import VOCAB, make_tiny  # noqa: E402
from kvasir.engine.torch_runner import TorchRunner  # noqa: E402
from kvasir.runtime.runners import make_runner  # noqa: E402
from kvasir.transfer.arena import Arena  # noqa: E402
from tests.engine_driver import Driver, Hooks, Job, close, copy_blocks, scattered  # noqa: E402
from tests.golden.test_engine_tokens import (  # noqa: E402
    BLOCKS,
    LENGTHS,
    MAKERS,
    SIZE,
    SMALL,
    Lab,
    N,
    finish,
    job_of,
    prompt_of,
    reference_of,
)
from tests.live.cluster import deployment_of  # noqa: E402
from tests.native import kernel  # noqa: E402

Team = team.Team


def make_biased(folder: Path) -> Path:
    """Biases everywhere, an odd number of the MLP's columns, and more than two KV heads."""
    import transformers

    from kvasir.engine.tiny import write_tokenizer

    sizes = {**SMALL, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 97}
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder, 1024)
    return folder


class Case:
    """A model, its degree, and a runner at it; `lab` has the answers of `generate`."""

    def __init__(self, name: str, tp: int, folder: Path) -> None:
        self.name, self.tp = name, tp
        self.folder = (MAKERS | {"biased": make_biased})[name](folder)
        self.runner = runner_of(self.folder, tp)
        self.lab = Lab(name, self.folder, reference_of(self.folder), self.runner)

    @property
    def team(self) -> Team:
        assert isinstance(self.runner.helpers, Team)
        return self.runner.helpers


def runner_of(folder: Path, tp: int, **values: Any) -> TorchRunner:
    arena = Arena()
    ranks = Team(tp, arena) if tp > 1 else None
    return TorchRunner(
        folder, blocks_count=BLOCKS, block_size=SIZE, allocate=arena.take, team=ranks, **values
    )


CASES = [("qwen3", 2), ("biased", 4), ("mistral-window", 2), ("qwen2-yarn", 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda one: f"{one[0]} on {one[1]}")
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """4 query heads on 2 KV heads; 8 on 4 with biases; sliding windows; 4 on 4 with biases."""
    one = Case(*request.param, tmp_path_factory.mktemp("model"))
    yield one
    one.runner.stop()


@pytest.fixture(scope="module")
def golden(case: Case) -> dict[int, list[int]]:
    return {length: case.lab.expected(prompt_of(length)) for length in LENGTHS}


ONE = pytest.mark.parametrize("case", [("qwen3", 2)], indirect=True, ids=["qwen3 on 2"])


def seconds(pid: int) -> float:
    """What a process has computed."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


# --- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 512])
def test_alone_and_batched(case: Case, golden: dict[int, list[int]], chunk: int) -> None:
    before = [seconds(process.pid) for process in case.team.processes]
    assert len(before) == case.tp - 1
    for length in (1, 33):
        assert finish(case.lab.driver(), [job_of(length)], chunk) == [golden[length]]
    jobs = [job_of(length, first=6 * i) for i, length in enumerate(LENGTHS)]
    assert finish(case.lab.driver(), jobs, chunk) == [golden[length] for length in LENGTHS]
    after = [seconds(process.pid) for process in case.team.processes]
    assert all(b > a for a, b in zip(before, after, strict=True)), "a rank computed nothing"


def test_scattered_blocks_and_a_prefix_hit(case: Case, golden: dict[int, list[int]]) -> None:
    drive, free = case.lab.driver(), scattered(range(BLOCKS))
    jobs = [job_of(length) for length in LENGTHS]
    for i, job in enumerate(jobs):
        job.free = free[i * 6 : i * 6 + 6]
    held = jobs[-1].free[:2]
    assert finish(drive, jobs, 7) == [golden[length] for length in LENGTHS]
    again = job_of(33, "again", first=0)
    again.free, again.computed, again.held = free[60:66], 2 * SIZE, 2
    drive.runner.adopt("again", 1, held)
    assert finish(drive, [again]) == [golden[33]]


@ONE
def test_by_the_compiled_kernel(case: Case, golden: dict[int, list[int]]) -> None:
    """Each rank's heads are a part of the cache's, so tokens lie further apart than heads fill."""
    runner = runner_of(case.folder, case.tp, native=kernel())
    try:
        free = scattered(range(BLOCKS))
        jobs = [job_of(length) for length in LENGTHS]
        for i, job in enumerate(jobs):
            job.free = free[i * 6 : i * 6 + 6]
        assert finish(Driver(runner), jobs, 20) == [golden[length] for length in LENGTHS]
    finally:
        runner.stop()


def test_a_long_prefix_in_common(case: Case) -> None:
    """Rows that read it once do so in each rank, for its heads."""
    drive, prefix = case.lab.driver(), prompt_of(17 * SIZE, seed=9)
    first = Job("first", prefix + prompt_of(20), N, list(range(20)))
    jobs = [Job(f"j{i}", prefix + prompt_of(5 + 7 * i, seed=i), N, []) for i in range(4)]
    expected = [case.lab.expected(job.prompt) for job in [first, *jobs]]
    drive.step([drive.open(first)])
    for i, job in enumerate(jobs):
        job.computed, job.held, job.free = 17 * SIZE, 17, list(range(20 + 3 * i, 23 + 3 * i))
        drive.runner.adopt(job.name, 1, list(range(17)))
        drive.step([drive.open(job)], chunk=64)
    before = case.runner.rows_shared
    assert drive.run([first, *jobs]) == expected
    assert (case.runner.rows_shared > before) == (case.name != "mistral-window")
    close(drive.runner, [first, *jobs])


def test_guesses(case: Case) -> None:
    """Several rows of the head for one sequence."""
    prompt = [*range(40, 52)] * 4
    one = Job("guessing", prompt, 40, list(range(10)), draft=5)
    case.runner.guesser = NgramGuesser(2, 4)
    try:
        assert finish(case.lab.driver(), [one]) == [case.lab.expected(prompt, 40)]
    finally:
        case.runner.guesser = None
    assert one.drafted > 0


@ONE
def test_guesses_of_a_draft_model(case: Case) -> None:
    """It computes on rank 0 alone; that it is the same model shows in what is accepted."""
    one = Job("drafting", prompt_of(17), N, list(range(6)), draft=3)
    case.runner.guesser = DraftModel(case.folder, case.folder, vocab=VOCAB, rows_max=4)
    try:
        assert finish(case.lab.driver(), [one]) == [case.lab.expected(prompt_of(17))]
    finally:
        case.runner.guesser = None
    assert one.accepted > 0


@ONE
def test_a_prompt_so_long_that_its_sums_go_round_in_a_ring(case: Case) -> None:
    prompt = prompt_of(1100)
    assert len(prompt) * 64 * 4 > EXCHANGED_BYTES_MAX
    whole = case.lab.expected(prompt)
    for chunk in (2000, 550):
        job = Job("long", prompt, N, list(range(BLOCKS)))
        assert finish(case.lab.driver(), [job], chunk) == [whole]


@ONE
def test_sampled_steered_and_explained(case: Case) -> None:
    """Seeds, penalties, a grammar and log-probabilities: as on one rank."""
    steering = Steering(grammar=Grammar("regex", "[a-f]{4}[0-9]{6}"))
    ways = [
        (Sampling(temperature=0.9, top_p=0.9, seed=7, ignore_eos=True, logprobs=2), None),
        (Sampling(temperature=0.7, seed=3, frequency_penalty=0.5, ignore_eos=True), None),
        (Sampling(temperature=1.0, seed=5), steering),
    ]
    alone = case.lab.another()

    def drawn(runner: TorchRunner) -> list[Job]:
        drive = Driver(runner)
        jobs = [job_of(17 + i, f"j{i}", first=6 * i) for i in range(len(ways))]
        for job, (job.sampling, job.steering) in zip(jobs, ways, strict=True):
            drive.open(job)
        drive.run(jobs)
        close(runner, jobs)
        return jobs

    ones, twos = drawn(alone), drawn(case.runner)
    assert [job.output for job in ones] == [job.output for job in twos]
    assert bytes(twos[2].output[:10]).decode()[:4].isalpha() and twos[2].end == "stop"
    for a, b in zip(ones[0].drawn, twos[0].drawn, strict=True):
        assert a.logprobs is not None and b.logprobs is not None
        assert a.logprobs.drawn == pytest.approx(b.logprobs.drawn, abs=1e-4)


@ONE
def test_kv_of_one_byte_a_value(case: Case) -> None:
    """Scales are a head's own, so they are cut with it."""
    jobs = lambda: [job_of(length, first=6 * i) for i, length in enumerate(LENGTHS)]  # noqa: E731
    two = runner_of(case.folder, 2, kv="int8")
    try:
        assert finish(Driver(two), jobs()) == finish(Driver(case.lab.another(kv="int8")), jobs())
    finally:
        two.stop()


@ONE
def test_bfloat16_is_as_near_as_rounding_allows(case: Case) -> None:
    """Sums of two rounded parts: logits move by less than bfloat16 itself moves them."""
    two, one = (runner_of(case.folder, tp, dtype="bfloat16") for tp in (2, 1))
    exact = case.lab.another()
    try:
        logits = [first_logits(runner, prompt_of(33)) for runner in (exact, one, two)]
    finally:
        two.stop()
    assert 0 < (logits[2] - logits[1]).abs().max() < 2 * (logits[1] - logits[0]).abs().max()


def first_logits(runner: TorchRunner, prompt: list[int]) -> Any:
    seen: list[Any] = []
    logits = runner.decoder.logits
    runner.decoder.logits = lambda hidden: seen.append(logits(hidden)) or seen[-1]  # type: ignore[func-returns-value, method-assign]
    job = Job("one", prompt, 1, list(range(8)))
    finish(Driver(runner), [job])
    return seen[0]


# --- one cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["one", "ranks"])
def test_handed_over_between_degrees(
    case: Case, golden: dict[int, list[int]], source: str
) -> None:
    """Blocks of all heads go from ranks to one, and back; who made them cannot be told."""
    alone = case.lab.another()
    p, d = Driver(case.runner), Driver(alone)
    if source == "one":
        p, d = d, p
    assert p.runner.spec.fingerprint == d.runner.spec.fingerprint
    one, other = p.open(job_of(33)), job_of(33, first=40)
    p.step([one])
    copy_blocks(p.runner, d.runner, zip(range(3), (70, 60, 65), strict=True))
    close(p.runner, [one])
    d.runner.adopt(other.name, 1, [70, 60, 65])
    other.computed, other.held, other.output = 33, 3, list(one.output)
    assert d.run([d.open(other)])[0] == golden[33]
    close(d.runner, [other])


@ONE
def test_a_layer_is_told_when_every_rank_has_written_it(
    case: Case, golden: dict[int, list[int]]
) -> None:
    """While one rank stands still, no layer may leave. Afterwards each leaves whole."""
    drive, alone = case.lab.driver(), Driver(case.lab.another())
    (process,) = case.team.processes
    source, target = job_of(33), job_of(33, first=40)
    told: list[int] = []

    def ship(layer: int) -> None:
        told.append(layer)
        planes = zip(case.runner.planes()[layer], alone.runner.planes()[layer], strict=True)
        for plane, to in planes:
            to[70:73] = plane[0:3]

    drive.open(source)
    os.kill(process.pid, signal.SIGSTOP)
    wake = Timer(0.5, lambda: (early.extend(told), os.kill(process.pid, signal.SIGCONT)))
    early: list[int] = []
    wake.start()
    drive.step([source], hooks=Hooks(on_layer=ship))
    wake.join()
    assert not early and told == [0, 1]
    close(drive.runner, [source])
    alone.runner.adopt(target.name, 1, [70, 71, 72])
    target.computed, target.held, target.output = 33, 3, list(source.output)
    assert alone.run([alone.open(target)])[0] == golden[33]


# --- ranks that end, and what is refused ----------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[TorchRunner]:
    """A runner of two ranks that one test may break; patient for a second."""
    arena = Arena()
    runner = TorchRunner(
        make_tiny(tmp_path), blocks_count=8, allocate=arena.take, team=Team(2, arena, stuck_s=1.0)
    )
    yield runner
    runner.stop()


def process_of(runner: TorchRunner) -> subprocess.Popen[bytes]:
    assert isinstance(runner.helpers, Team)
    (process,) = runner.helpers.processes
    return process


def test_a_rank_that_was_killed_is_named(fresh: TorchRunner) -> None:
    drive, job = Driver(fresh), job_of(17)
    fresh.check()
    drive.step([drive.open(job)])
    process_of(fresh).kill()
    process_of(fresh).wait()
    for call in (fresh.check, lambda: drive.step([job])):
        with pytest.raises(Unavailable, match=r"rank 1 of 2 \(process \d+\) was killed by SIGKILL"):
            call()


def test_a_rank_that_hangs_ends_the_step_and_is_ended(fresh: TorchRunner) -> None:
    drive, job = Driver(fresh), job_of(17)
    drive.step([drive.open(job)])
    os.kill(process_of(fresh).pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="a rank of 2 does not answer"):
        drive.step([job])
    assert time.monotonic() - began < 20
    fresh.stop()
    assert process_of(fresh).returncode == -signal.SIGKILL


def test_nothing_is_left_after_stop(fresh: TorchRunner) -> None:
    process = process_of(fresh)
    assert f"{process.pid}" in children()
    fresh.stop()
    fresh.stop()
    assert process.returncode == 0 and f"{process.pid}" not in children()


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """However it ends: here it is killed before it could say anything."""
    code = (
        "import sys, os, signal\n"
        "from kvasir.engine.parallel.team import Team\n"
        "from kvasir.transfer.arena import Arena\n"
        "team = Team(2, Arena(1 << 20))\n"
        "team._wait()\n"
        "print(*[process.pid for process in team.processes], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 1 and done.returncode == -signal.SIGKILL
    end = time.monotonic() + 20
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < end, f"still there: {alive}"
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_rank_that_cannot_start_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "MODULE", "kvasir.engine.no_such_rank")
    arena = Arena()
    ranks = Team(2, arena)
    with pytest.raises(Unavailable, match=r"rank 1 of 2 \(process \d+\) ended \(1\)") as error:
        TorchRunner(make_tiny(tmp_path), blocks_count=8, allocate=arena.take, team=ranks)
    ranks.stop()
    assert len(str(error.value).splitlines()) == 1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "three ranks": ({"tp": 3}, {}, "tp 3 does not divide 2 KV heads"),
    "more ranks than heads": ({"tp": 4}, {}, "tp 4 does not divide 2 KV heads"),
    "pipeline": ({"pp": 2}, {}, "engine torch has no pipeline parallel"),
    "int8": ({"tp": 2}, {"weights": "int8", "dtype": "bfloat16"},
             "weights is not supported with tp 2"),
    "adapters": ({"tp": 2}, {"adapters": {"a": "nowhere"}}, "adapters is not supported with tp 2"),
    "adapters later": ({"tp": 2}, {"allow_runtime_adapters": True, "adapters_folder": "a"},
                       "allow_runtime_adapters is not supported with tp 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    """By name, before a weight is read: there is none."""
    folder = make_tiny(tmp_path)
    (folder / "model.safetensors").unlink()
    of_pool, of_model, words = REFUSED[name]
    d = deployment_of(folder, mixed=1)
    model = d.models[0].model_copy(update=of_model)
    pool = d.pools[0].model_copy(update=of_pool)
    d = d.model_copy(update={"models": (model,), "pools": (pool,)})
    with pytest.raises(KvasirError, match=words) as error:
        make_runner(d, pool)
    assert isinstance(error.value, ConfigError | ModelError)
    lines = str(error.value).splitlines()
    assert 2 < len(lines) <= 5 and "pools.mixed" in lines[1]


@pytest.mark.parametrize("values", [
    {"architectures": ["Qwen3MoeForCausalLM"]}, {"architectures": ["DeepseekV3ForCausalLM"]},
    {"architectures": ["Gemma2ForCausalLM"]}, {"hidden_act": "gelu"},
], ids=str)  # fmt: skip
def test_families_that_are_not_cut(tmp_path: Path, values: dict[str, Any]) -> None:
    config = json.loads((make_tiny(tmp_path) / "config.json").read_bytes())
    cut.check(config, 2, "here")
    with pytest.raises(ModelError, match=f"tensor parallel .*{next(iter(values.values()))[0]}"):
        cut.check(config | values, 2, "here")


def test_parts_of_a_matrix_are_all_of_it() -> None:
    whole = Matrix(torch.randn(7, 5), torch.randn(7))
    x = torch.randn(3, 5)
    expected = x @ whole.weight.T + whole.bias
    rows = [x @ part.weight.T + part.bias for part in (whole.outputs(r, 3) for r in range(3))]
    torch.testing.assert_close(torch.cat(rows, 1), expected)
    parts = [whole.inputs(r, 2) for r in range(2)]
    sums = [a @ part.weight.T for a, part in zip(x.tensor_split(2, dim=1), parts, strict=True)]
    assert [part.bias is None for part in parts] == [False, True]
    torch.testing.assert_close(sum(sums) + parts[0].bias, expected)
