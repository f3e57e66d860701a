"""A live cluster gives the very tokens that its model gives alone: greedy, float32, everywhere.

Torch clusters are held against transformers' `generate`; where scheduling is the matter and not the
model, fake runners are held against `fake_tokens`, which knows what every KV byte must be.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvasir.core.events import Closed, Preempted, Retried  # noqa: E402
from kvasir.core.ids import CONDUCTOR  # noqa: E402
from kvasir.core.messages import Abort, Done, Finished, KvWant, Refused, Tokens  # noqa: E402
from kvasir.core.request import Sampling  # noqa: E402
from kvasir.core.specs import Deployment, PoolSpec  # noqa: E402
from kvasir.engine.fake import fake_tokens  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from kvasir.gateway.port import Pieces  # noqa: E402
from kvasir.node.work import Stage  # noqa: E402
from tests.live.cluster import (  # noqa: E402
    SIZE,
    Answer,
    Cluster,
    Layout,
    cluster,
    collect,
    deployment_of,
    run,
    take,
    wrong_blocks,
)

N = 24
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 100)

MIXED: Layout = {"mixed": 1}
SHM: Layout = {"transport": "shm"}
TCP: Layout = {"transport": "tcp"}
LAYOUTS = pytest.mark.parametrize("layout", [MIXED, SHM, TCP], ids=["mixed", "shm", "tcp"])
SPLIT = pytest.mark.parametrize("layout", [SHM, TCP], ids=["shm", "tcp"])
FIRST = pytest.mark.parametrize("first", ["prefill", "decode"])


class Golden:
    """A model folder, and what transformers' `generate` says to a prompt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model.generation_config.eos_token_id = None
        self._known: dict[tuple[int, ...], list[int]] = {}

    def text(self, prompt: Sequence[int], n: int) -> list[int]:
        known = self._known.get(tuple(prompt), [])
        if len(known) < n:
            known = self._known[tuple(prompt)] = self._generate(list(prompt), n)
        return known[:n]

    def _generate(self, prompt: list[int], n: int) -> list[int]:
        out = self._model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return [int(token) for token in out[0, len(prompt) :]]


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Golden]:
    torch.set_num_threads(1)
    return {
        kind: Golden(make_tiny(tmp_path_factory.mktemp(kind), kind, initializer_range=0.12))
        for kind in ("qwen3", "llama")
    }  # fmt: skip


@pytest.fixture
def golden(goldens: dict[str, Golden], request: pytest.FixtureRequest) -> Golden:
    return goldens[getattr(request, "param", "qwen3")]


@pytest.fixture
def folder(goldens: dict[str, Golden]) -> Path:
    """For fake engines, which need the shape only."""
    return goldens["qwen3"].folder


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{seed}:{length}")
    return [rng.randrange(256) for _ in range(length)]


PROMPTS = [prompt_of(length) for length in LENGTHS]


async def ask_all(c: Cluster, prompts: Sequence[Sequence[int]], n: int) -> list[Answer]:
    """All at once; the answers in order."""
    return list(await asyncio.gather(*(c.ask(prompt, n) for prompt in prompts)))


def attempts_of(c: Cluster, request_id: str) -> int:
    return next(e.attempts for e in c.events(Closed) if e.request_id == request_id)


# --- greedy text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden", "chunk"),
    [("qwen3", 1), ("qwen3", 7), ("qwen3", 16), ("qwen3", 512), ("llama", 7), ("llama", 512)],
    indirect=["golden"],
)  # fmt: skip
@LAYOUTS
@FIRST
def test_greedy_text_is_what_generate_gives(
    golden: Golden, layout: Layout, first: str, chunk: int
) -> None:
    async def main() -> None:
        deployment = deployment_of(golden.folder, first_token=first, chunk=chunk, **layout)
        async with cluster(deployment) as c:
            for prompt, answer in zip(PROMPTS, await ask_all(c, PROMPTS, N), strict=True):
                assert answer.tokens == golden.text(prompt, N), f"{len(prompt)} tokens of prompt"
                assert answer.end is not None and answer.reason == "length"
                assert answer.end.prompt_tokens == len(prompt)
                assert answer.end.output_tokens == N
                assert attempts_of(c, answer.request_id) == 1
                if "mixed" in layout:
                    assert (answer.path, answer.report.transport) == ("aggregated", "")
                else:
                    assert answer.path == "disaggregated"
                    assert answer.report.transport == layout["transport"]
            await c.at_rest()

    run(main())


@pytest.mark.parametrize(
    ("layout", "first"), [(MIXED, "prefill"), (SHM, "prefill"), (TCP, "decode")],
    ids=["mixed", "shm", "tcp"],
)  # fmt: skip
def test_a_hundred_requests_in_a_row(golden: Golden, layout: Layout, first: str) -> None:
    """One after another, some prompts again and again: hits and misses."""

    async def main() -> None:
        rng = random.Random(1)
        async with cluster(deployment_of(golden.folder, first_token=first, **layout)) as c:
            for turn in range(110):
                prompt, n = rng.choice(PROMPTS), rng.randint(1, 8)
                answer = await c.ask(prompt, n)
                assert answer.tokens == golden.text(prompt, n), f"turn {turn}"
                assert attempts_of(c, answer.request_id) == 1
            await c.at_rest()

    run(main())


@FIRST
def test_several_workers_of_each_role(golden: Golden, first: str) -> None:
    async def main() -> None:
        deployment = deployment_of(
            golden.folder, prefill=2, decode=2, first_token=first, transport="tcp", chunk=16,
            route={"name": "round_robin"},
        )  # fmt: skip
        async with cluster(deployment) as c:
            answers = await ask_all(c, PROMPTS * 2, N)
            for prompt, answer in zip(PROMPTS * 2, answers, strict=True):
                assert answer.tokens == golden.text(prompt, N)
            assert {a.prefill for a in answers} == {"prefill-0", "prefill-1"}
            assert {a.report.decode_worker for a in answers} == {"decode-0", "decode-1"}
            await c.at_rest()

    run(main())


@SPLIT
@FIRST
def test_the_decode_worker_may_be_chosen_when_prefill_ends(
    golden: Golden, layout: Layout, first: str
) -> None:
    async def main() -> None:
        deployment = deployment_of(
            golden.folder, decode=2, first_token=first, chunk=16,
            route={"decode_choice": "prefill_end"}, **layout,
        )  # fmt: skip
        async with cluster(deployment) as c:
            for prompt, answer in zip(PROMPTS, await ask_all(c, PROMPTS, N), strict=True):
                assert answer.tokens == golden.text(prompt, N)
                assert answer.path == "disaggregated"
                assert answer.report.decode_worker.startswith("decode")
            await c.at_rest()

    run(main())


# --- prefix hits ----------------------------------------------------------------------------------


@LAYOUTS
@FIRST
@pytest.mark.parametrize("length", [47, 48, 49])
def test_a_prompt_that_is_cached(golden: Golden, layout: Layout, first: str, length: int) -> None:
    """The last prompt token is always computed; what the decode side holds is not shipped."""

    async def main() -> None:
        async with cluster(deployment_of(golden.folder, first_token=first, **layout)) as c:
            prompt = prompt_of(length)
            cold = await c.ask(prompt, N)
            warm = await c.ask(prompt, N)
            assert cold.tokens == warm.tokens == golden.text(prompt, N)
            assert cold.end is not None and cold.end.cached_tokens == 0
            assert warm.end is not None and warm.end.cached_tokens == (length - 1) // SIZE * SIZE
            if "mixed" not in layout:
                assert warm.report.transfer_bytes < cold.report.transfer_bytes
            await c.at_rest()

    run(main())


@LAYOUTS
@FIRST
def test_prompts_that_share_a_prefix(golden: Golden, layout: Layout, first: str) -> None:
    async def main() -> None:
        async with cluster(deployment_of(golden.folder, first_token=first, **layout)) as c:
            shared = prompt_of(40)
            await c.ask(shared, 1)
            prompts = [shared[:keep] + prompt_of(30, keep) for keep in (15, 16, 31, 32, 33, 40)]
            answers = await ask_all(c, prompts, N)
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens == golden.text(prompt, N)
            hits = [answer.end.cached_tokens for answer in answers if answer.end]
            assert hits == [0, 16, 16, 32, 32, 32]
            await c.at_rest()

    run(main())


@LAYOUTS
@FIRST
def test_an_answer_is_a_prefix_of_the_next_prompt(
    golden: Golden, layout: Layout, first: str
) -> None:
    """A conversation: blocks that generated tokens filled are found again."""

    async def main() -> None:
        async with cluster(deployment_of(golden.folder, first_token=first, **layout)) as c:
            told = prompt_of(20)
            for turn in range(3):
                answer = await c.ask(told, N)
                assert answer.tokens == golden.text(told, N), f"turn {turn}"
                told = told + answer.tokens + prompt_of(5, turn)
            await c.at_rest()

    run(main())


def test_a_decode_worker_runs_what_little_is_left(golden: Golden) -> None:
    """`local_prefill_tokens`: with the prompt cached there, nothing is worth shipping."""

    async def main() -> None:
        deployment = deployment_of(golden.folder, route={"local_prefill_tokens": 20})
        async with cluster(deployment) as c:
            prompt = prompt_of(100)
            away, stays = await c.ask(prompt, N), await c.ask(prompt, N)
            assert away.tokens == stays.tokens == golden.text(prompt, N)
            assert (away.path, stays.path) == ("disaggregated", "aggregated")
            assert stays.prefill == "decode-0" and stays.report.transfer_bytes == 0
            assert stays.end is not None and stays.end.cached_tokens == 96
            short = await c.ask(prompt_of(17), N)
            assert short.tokens == golden.text(prompt_of(17), N) and short.path == "aggregated"
            await c.at_rest()

    run(main())


# --- preemption -----------------------------------------------------------------------------------


@LAYOUTS
@FIRST
def test_preempted_and_resumed(golden: Golden, layout: Layout, first: str) -> None:
    """Four sequences that outgrow the pool together: the youngest wait and run again."""

    async def main() -> None:
        deployment = deployment_of(
            golden.folder, first_token=first, kv_blocks=12, prefill_blocks=64,
            route={"output_reserve_tokens": 0}, **layout,
        )  # fmt: skip
        prompts = [prompt_of(length) for length in (15, 16, 17, 33)]
        async with cluster(deployment) as c:
            answers = await ask_all(c, prompts, 60)
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens == golden.text(prompt, 60)
                assert attempts_of(c, answer.request_id) == 1
            told = [answer.report.preemptions for answer in answers]
            assert sum(told) == len(c.events(Preempted)) > 0
            assert sum(answer.report.recomputed_tokens for answer in answers) > 0
            await c.at_rest()

    run(main())


def test_a_seeded_text_is_the_same_everywhere(folder: Path) -> None:
    """Alone, disaggregated, chunked, preempted: (seed, position) decides, not the surroundings."""
    sampling = [Sampling(temperature=0.9, top_p=0.95, seed=s, ignore_eos=True) for s in range(4)]
    prompts = [prompt_of(length) for length in (15, 16, 17, 33)]

    async def texts(**values: Any) -> list[list[int]]:
        deployment = deployment_of(folder, route={"output_reserve_tokens": 0}, **values)
        async with cluster(deployment) as c:
            asked = [c.ask(p, 60, sampling=s) for p, s in zip(prompts, sampling, strict=True)]
            found = [answer.tokens for answer in await asyncio.gather(*asked)]
            if "kv_blocks" in values:
                assert c.events(Preempted)
            await c.at_rest()
            return found

    async def main() -> None:
        whole = await texts(mixed=1)
        assert len({tuple(text[:8]) for text in whole}) == len(whole)
        assert await texts(transport="shm", first_token="prefill", chunk=7) == whole
        assert await texts(transport="tcp", first_token="decode") == whole
        assert await texts(mixed=1, kv_blocks=12) == whole
        assert await texts(transport="shm", kv_blocks=12, prefill_blocks=64) == whole

    run(main())


# --- ends -----------------------------------------------------------------------------------------


@LAYOUTS
@FIRST
def test_one_token(golden: Golden, layout: Layout, first: str) -> None:
    """Under `first_token: prefill` it ends where it was prefilled, and nothing needs to travel."""

    async def main() -> None:
        async with cluster(deployment_of(golden.folder, first_token=first, **layout)) as c:
            for prompt, answer in zip(PROMPTS, await ask_all(c, PROMPTS, 1), strict=True):
                assert (answer.tokens, answer.reason) == (golden.text(prompt, 1), "length")
                if "mixed" not in layout:
                    where = "prefill-0" if first == "prefill" else "decode-0"
                    assert answer.report.decode_worker == where
            await c.at_rest()

    run(main())


@LAYOUTS
@FIRST
@pytest.mark.parametrize("at", [0, 1, 9])
def test_a_stop_token_ends_the_text(golden: Golden, layout: Layout, first: str, at: int) -> None:
    async def main() -> None:
        async with cluster(deployment_of(golden.folder, first_token=first, **layout)) as c:
            prompt = prompt_of(33)
            text = golden.text(prompt, N)
            end = text.index(text[at]) + 1
            stops = Sampling(temperature=0.0, ignore_eos=True, stop_token_ids=(text[at],))
            answer = await c.ask(prompt, N, sampling=stops)
            assert (answer.tokens, answer.reason) == (text[:end], "stop")
            assert answer.end is not None and answer.end.output_tokens == end
            await c.at_rest()

    run(main())


@LAYOUTS
def test_the_gateway_has_enough(golden: Golden, layout: Layout) -> None:
    """A stop string matched at the gateway: it asks for the end and gets it."""

    async def main() -> None:
        async with cluster(deployment_of(golden.folder, **layout)) as c:
            prompt = prompt_of(33)
            request_id, pieces = c.submit(prompt, 4000)
            answer = Answer(request_id)
            async for piece in pieces:
                take(answer, piece)
                if len(answer.tokens) >= 5 and answer.end is None:
                    c.desk.stop(request_id)
            assert answer.reason == "stop" and 5 <= len(answer.tokens) < 4000
            assert answer.tokens[:N] == golden.text(prompt, N)[: len(answer.tokens)]
            await c.at_rest()

    run(main())


# --- clients that leave ---------------------------------------------------------------------------

OTHER = prompt_of(40, seed=7)
LEFT = prompt_of(70, seed=8)
Stage_ = Callable[[Cluster], Awaitable[Pieces]]
SLOW = 40.0  # bytes per second: a block of one plane takes seconds, a prompt longer than a test may
NO_BEATS = {"beat_s": 1000.0, "dead_after_s": 5000.0}  # beats would repair what was forgotten


async def before_it_has_a_place(c: Cluster) -> Pieces:
    c.gates["decode-0"].shut()
    c.submit(OTHER, 40, name="other")
    await c.until(lambda: c.works("decode-0"))
    _, pieces = c.submit(LEFT, 120, name="left")
    await c.until(lambda: c.conductor.queue)
    return pieces


async def waiting_for_its_prefill(c: Cluster) -> Pieces:
    c.gates["prefill-0"].shut()
    c.submit(OTHER, 40, name="other")
    await c.until(lambda: c.gates["prefill-0"].stopped)
    _, pieces = c.submit(LEFT, 40, name="left")
    await c.until(lambda: c.node("prefill-0").steps.waiting)
    return pieces


async def in_its_prefill(c: Cluster) -> Pieces:
    gate = c.gates["prefill-0"]
    gate.shut()
    _, pieces = c.submit(LEFT, 40, name="left")
    gate.let(5)  # two chunks of two layers, and one layer more
    await c.until(lambda: gate.stopped and "left" in c.works("prefill-0"))
    await c.until(lambda: gate.stopped and c.works("prefill-0")["left"].computed > 0)
    assert c.works("prefill-0")["left"].computed < len(LEFT)
    return pieces


async def prefilled_and_not_asked_for(c: Cluster) -> Pieces:
    c.tap("decode-0", lambda src, dst, message: not isinstance(message, KvWant))
    _, pieces = c.submit(LEFT, 40, name="left")
    await c.until(lambda: "left" in c.works("prefill-0"))
    await c.until(lambda: c.works("prefill-0")["left"].stage is Stage.HOLD)
    return pieces


async def on_its_way(c: Cluster) -> Pieces:
    _, pieces = c.submit(LEFT, 40, name="left")

    def leaving() -> bool:
        timeline = c.workers["prefill-0"].sender.timeline("left", 1)
        return timeline is not None and timeline.first_frame_s is not None

    await c.until(leaving)
    assert c.works("decode-0")["left"].inbound
    return pieces


async def in_its_decode(c: Cluster) -> Pieces:
    gate = c.gates["decode-0"]
    gate.shut()
    _, pieces = c.submit(LEFT, 100, name="left")
    gate.let(2)
    await c.until(lambda: gate.stopped and "left" in c.works("decode-0"))
    await c.until(lambda: gate.stopped and c.node("decode-0").steps.cohort.ticks > 0)
    return pieces


STAGES = (
    before_it_has_a_place, waiting_for_its_prefill, in_its_prefill, prefilled_and_not_asked_for,
    on_its_way, in_its_decode,
)  # fmt: skip


@SPLIT
@FIRST
@pytest.mark.parametrize("stage", STAGES, ids=[stage.__name__ for stage in STAGES])
def test_a_client_leaves(folder: Path, layout: Layout, first: str, stage: Stage_) -> None:
    """Whatever it held is free again, without a beat; the others get theirs, so does the next."""

    async def main() -> None:
        slow = SLOW if stage is on_its_way else None
        deployment = deployment_of(
            folder, engine="fake", first_token=first, chunk=7, kv_blocks=12, prefill_blocks=64,
            steps_max=1, bytes_per_s_max=slow, limits=NO_BEATS, **layout,
        )  # fmt: skip
        async with cluster(deployment) as c:
            pieces = await stage(c)
            await pieces.aclose()
            for worker, gate in c.gates.items():
                gate.open()
                c.tap(worker, lambda src, dst, message: True)
            await c.at_rest()
            assert {e.reason for e in c.events(Closed) if e.request_id == "left"} == {"cancelled"}
            assert {e.reason for e in c.events(Closed) if e.request_id == "other"} <= {"length"}
            assert not c.events(Retried)
            if slow is None:
                answer = await c.ask(LEFT, 40)
                assert answer.tokens == fake_tokens(LEFT, 40)
                await c.at_rest()

    run(main())


@SPLIT
@pytest.mark.parametrize("deaf", ["prefill-0", "decode-0"])
def test_each_side_of_a_transfer_lets_go_by_itself(
    folder: Path, layout: Layout, deaf: str
) -> None:
    """The client leaves, and one worker does not hear of it for now: the other one is free."""
    told = {"prefill-0": "decode-0", "decode-0": "prefill-0"}[deaf]

    async def main() -> None:
        deployment = deployment_of(folder, engine="fake", bytes_per_s_max=SLOW, **layout)
        async with cluster(deployment) as c:
            pieces = await on_its_way(c)
            c.tap(CONDUCTOR, lambda src, dst, m: not (isinstance(m, Abort) and dst == deaf))
            await pieces.aclose()
            await c.until(lambda: not c.node(told).pool.held and not c.node(told).quarantine)
            c.tap(CONDUCTOR, lambda src, dst, message: True)
            await c.at_rest()

    run(main())


@pytest.mark.parametrize("stage", [in_its_prefill, in_its_decode])
def test_blocks_in_a_step_are_held_until_it_ends(folder: Path, stage: Stage_) -> None:
    async def main() -> None:
        deployment = deployment_of(folder, engine="fake", chunk=7, steps_max=1, limits=NO_BEATS)
        async with cluster(deployment) as c:
            pieces = await stage(c)
            worker = "prefill-0" if stage is in_its_prefill else "decode-0"
            held = c.node(worker).pool.held
            assert held > 0
            await pieces.aclose()
            await c.until(lambda: "left" not in c.works(worker))
            assert c.node(worker).pool.held == held and c.node(worker).quarantine
            c.gates[worker].open()
            await c.at_rest()

    run(main())


@SPLIT
@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_blocks_in_a_transfer_are_held_until_it_is_over(
    folder: Path, layout: Layout, worker: str
) -> None:
    """Over is what the transport says: here it takes its time to say it."""
    unsaid: list[tuple[Any, ...]] = []

    async def main() -> None:
        deployment = deployment_of(
            folder, engine="fake", bytes_per_s_max=SLOW, limits=NO_BEATS, **layout
        )
        async with cluster(deployment) as c:
            pieces = await on_its_way(c)
            live: Any = c.workers[worker]
            name = "_over" if worker == "prefill-0" else "_received"
            say = getattr(live, name)
            setattr(live, name, lambda *said: unsaid.append(said))
            held = c.node(worker).pool.held
            await pieces.aclose()
            await c.until(lambda: unsaid and "left" not in c.works(worker))
            assert c.node(worker).pool.held == held == 5 and c.node(worker).quarantine
            say(*unsaid[0])
            await c.at_rest()

    run(main())


# --- attempts that are lost -----------------------------------------------------------------------


@SPLIT
@FIRST
@pytest.mark.parametrize("at", [1, 20])
def test_an_attempt_is_lost_in_its_decode(
    golden: Golden, layout: Layout, first: str, at: int
) -> None:
    """The next attempt goes on where the text stood: no token twice, none missing. Generated blocks
    of the second attempt are found under their right names."""

    async def main() -> None:
        deployment = deployment_of(golden.folder, first_token=first, steps_max=1, **layout)
        async with cluster(deployment) as c:
            prompt = prompt_of(20)
            c.gates["decode-0"].shut()
            request_id, pieces = c.submit(prompt, 60)
            asked = asyncio.create_task(collect(request_id, pieces))
            life = c.platform.requests.lives[request_id]
            while life.emitted < at:
                seen = life.emitted
                c.gates["decode-0"].let(2)  # one step
                await c.until(lambda seen=seen: life.emitted > seen)  # type: ignore[misc]
            c.feed_conductor(Refused("decode-0", request_id, 1, "as the test wants it"))
            c.gates["decode-0"].open()
            answer = await asked
            assert answer.tokens == golden.text(prompt, 60)
            assert attempts_of(c, request_id) == 2 == len(c.events(Retried)) + 1
            whole = prompt + answer.tokens
            for end in (50, 65, 79):
                again = await c.ask(whole[:end], N)
                assert again.tokens == golden.text(whole[:end], N), f"{end} tokens of the same text"
            await c.at_rest()

    run(main())


@SPLIT
def test_a_token_is_lost_on_the_way(folder: Path, layout: Layout) -> None:
    """The gateway sees the gap and asks again."""
    lost: list[int] = []

    def lose_one(src: str, dst: str, message: Any) -> bool:
        if isinstance(message, Tokens) and message.drawn[0].index == 5 and not lost:
            lost.append(5)
            return False
        return True

    async def main() -> None:
        async with cluster(deployment_of(folder, engine="fake", **layout)) as c:
            c.tap("decode-0", lose_one)
            answer = await c.ask(LEFT, 40)
            assert lost == [5] and answer.tokens == fake_tokens(LEFT, 40)
            assert attempts_of(c, answer.request_id) == 2
            await c.at_rest()

    run(main())


@SPLIT
def test_a_later_token_overtakes_the_first_one(folder: Path, layout: Layout) -> None:
    """They come from two workers over two connections: that is no loss, and no new attempt."""
    late: list[Tokens] = []

    def hold(src: str, dst: str, message: Any) -> bool:
        if isinstance(message, Tokens):
            late.append(message)
        return not isinstance(message, Tokens)

    async def main() -> None:
        deployment = deployment_of(folder, engine="fake", first_token="prefill", **layout)
        async with cluster(deployment) as c:
            c.tap("prefill-0", hold)
            answer = await c.ask(LEFT, 40)
            assert answer.tokens == fake_tokens(LEFT, 40)
            assert attempts_of(c, answer.request_id) == len(late) == 1
            await c.at_rest()

    run(main())


@SPLIT
def test_a_text_that_has_ended_is_not_continued(folder: Path, layout: Layout) -> None:
    """The worker dies after the last token and before it can say that it was the last."""

    async def main() -> None:
        async with cluster(deployment_of(folder, engine="fake", **layout)) as c:
            text = fake_tokens(LEFT, 40)
            stops = Sampling(ignore_eos=True, stop_token_ids=(text[9],))
            end = text.index(text[9]) + 1
            c.tap("decode-0", lambda src, dst, message: not isinstance(message, (Done, Finished)))
            request_id, pieces = c.submit(LEFT, 40, sampling=stops)
            asked = asyncio.create_task(collect(request_id, pieces))
            await c.until(lambda: c.platform.requests.lives[request_id].emitted == end)
            c.tap("decode-0", lambda src, dst, message: True)
            c.feed_conductor(Refused("decode-0", request_id, 1, "as the test wants it"))
            answer = await asked
            assert (answer.tokens, answer.reason) == (text[:end], "stop")
            await c.at_rest()

    run(main())


# --- the caches, byte by byte ---------------------------------------------------------------------


def crowded(rng: random.Random, folder: Path) -> Deployment:
    """A cluster with too few blocks for what it is asked: hits, evictions, preemptions, retries."""
    layout = rng.choice([{"mixed": 1}, {"mixed": 2}, {"decode": 2}, {"prefill": 2}])
    return deployment_of(
        folder, engine="fake", transport=rng.choice(["shm", "tcp"]),
        first_token=rng.choice(["prefill", "decode"]), chunk=rng.choice([1, 7, 16, 512]),
        kv_blocks=rng.choice([10, 12, 16]), prefill_blocks=rng.choice([12, 64]),
        steps_max=rng.choice([1, 4, 256]),
        route={
            "output_reserve_tokens": rng.choice([0, 32]),
            "decode_choice": rng.choice(["arrival", "prefill_end"]),
            "local_prefill_tokens": rng.choice([0, 20]),
        },
        **layout,
    )  # fmt: skip


def crowd(rng: random.Random) -> list[tuple[list[int], int]]:
    heads = [prompt_of(48, rng.randrange(1 << 30)) for _ in range(3)]
    found = []
    for _ in range(24):
        head = rng.choice(heads)[: rng.choice([0, 16, 33, 48])]
        tail = prompt_of(rng.randint(1, 20), rng.randrange(1 << 30))
        found.append((head + tail, rng.randint(1, 90)))
    return found


async def crowd_seed(seed: int, folder: Path) -> int:
    """Returns how often something was preempted."""
    rng = random.Random(seed)
    async with cluster(crowded(rng, folder)) as c:
        asked = crowd(rng)

        async def one(prompt: list[int], n: int) -> None:
            request_id, pieces = c.submit(prompt, n)
            if rng.random() < 0.2:  # somebody leaves
                answer, some = Answer(request_id), rng.randint(0, n)
                async for piece in pieces:
                    take(answer, piece)
                    if len(answer.tokens) >= some:
                        break
                await pieces.aclose()
            else:
                answer = await collect(request_id, pieces)
                assert answer.fail is None, answer
                assert len(answer.tokens) == n
            assert answer.tokens == fake_tokens(prompt, len(answer.tokens))

        await asyncio.gather(*(one(prompt, n) for prompt, n in asked))
        await c.at_rest()
        assert wrong_blocks(c, [prompt + fake_tokens(prompt, n) for prompt, n in asked]) == []
        return len(c.events(Preempted))


@pytest.mark.parametrize("seeds", [range(0, 8), range(8, 16), range(16, 24)], ids=str)
def test_every_cached_block_holds_what_its_key_names(folder: Path, seeds: range) -> None:
    """However crowded, no answer has a wrong token, and no cache a block under a wrong name."""
    assert sum(run(crowd_seed(seed, folder)) for seed in seeds) > 0


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first_seed", range(1000, 1500, 50))
def test_every_cached_block_over_many_seeds(folder: Path, first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 50):
        run(crowd_seed(seed, folder))


# --- requests that do not fit ---------------------------------------------------------------------


def test_a_request_that_no_decode_worker_could_end(folder: Path) -> None:
    async def main() -> None:
        deployment = deployment_of(folder, engine="fake", kv_blocks=4, prefill_blocks=64)
        async with cluster(deployment) as c:
            answer = await c.ask(prompt_of(20), 80)
            assert answer.fail is not None and answer.fail.status == 400
            assert "7 KV blocks" in answer.fail.reason and "has 4" in answer.fail.reason
            assert (await c.ask(prompt_of(20), 44)).tokens == fake_tokens(prompt_of(20), 44)
            await c.at_rest()

    run(main())


def test_a_request_goes_where_it_fits_at_its_longest(folder: Path) -> None:
    async def main() -> None:
        small = PoolSpec(name="a-small", role="decode", count=1, hardware="cpu", kv_blocks=4)
        deployment = deployment_of(
            folder, engine="fake", kv_blocks=64, route={"name": "round_robin"}
        )
        deployment = deployment.model_copy(update={"pools": (small, *deployment.pools)})
        async with cluster(deployment) as c:
            for turn in range(8):
                answer = await c.ask(prompt_of(20, turn), 80)
                assert answer.tokens == fake_tokens(prompt_of(20, turn), 80)
                assert answer.report.decode_worker == "decode-0"
            short = [await c.ask(prompt_of(20, turn), 10) for turn in (8, 9)]
            assert {a.report.decode_worker for a in short} == {"a-small-0", "decode-0"}
            await c.at_rest()

    run(main())
