"""The same tokens whatever the way: one table of ways against transformers' `generate`, in float32.

Each way runs in one mixed worker and over both transports, and each brings evidence that it was
taken: counters, not timing. Families, adapters and bits have tests of their own beside these.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from kvasir.core.events import Preempted, Recomputed, Shipped, Speculated, TierHit  # noqa: E402
from kvasir.core.specs import Deployment  # noqa: E402
from kvasir.core.specs.speculate import SpeculateSpec  # noqa: E402
from tests.live.cluster import Cluster, Layout, cluster, deployment_of, run  # noqa: E402
from tests.live.test_tiers import (  # noqa: E402
    LAYOUTS,
    Golden,
    ask_all,
    folder,
    golden,
    goldens,
    prompt_of,
    spill,
    tiers_of,
)

__all__ = ["folder", "golden", "goldens"]  # fixtures

N = 40
PROMPTS = [prompt_of(length) for length in (15, 16, 33, 100)]
LOOPS = [[*range(40, 52)] * 4, [7, 8, 9] * 9, prompt_of(70)]  # n-grams find something, and nothing
SMALL: Layout = {
    "kv_blocks": 12, "prefill_blocks": 64, "steps_max": 4, "route": {"output_reserve_tokens": 0},
}  # fmt: skip
GUESS = SpeculateSpec(tokens=5, rows_max=8)


async def each_alone(c: Cluster, prompts: list[list[int]]) -> list[Any]:
    return [await c.ask(prompt, N) for prompt in prompts]


async def together(c: Cluster, prompts: list[list[int]]) -> list[Any]:
    return await ask_all(c, prompts, N)


async def twice(c: Cluster, prompts: list[list[int]]) -> list[Any]:
    await each_alone(c, prompts)
    return await each_alone(c, prompts)


async def after_others(c: Cluster, prompts: list[list[int]]) -> list[Any]:
    await each_alone(c, prompts)
    await spill(c)
    return await each_alone(c, prompts)


def nothing(c: Cluster, answers: list[Any]) -> bool:
    return True


def hit(c: Cluster, answers: list[Any]) -> bool:
    return [a.report.prefill.cached_tokens for a in answers] == [0, 0, 32, 96]  # whole blocks


def recomputed(c: Cluster, answers: list[Any]) -> bool:
    return bool(c.events(Preempted)) and sum(e.tokens for e in c.events(Recomputed)) > 0


def swapped(c: Cluster, answers: list[Any]) -> bool:
    return any(e.preempted for e in c.events(TierHit))


def loaded(c: Cluster, answers: list[Any]) -> bool:
    return any(e.tier == "host" and not e.preempted for e in c.events(TierHit))


def guessed(c: Cluster, answers: list[Any]) -> bool:
    events = c.events(Speculated)
    accepted, drafted = sum(e.accepted for e in events), sum(e.drafted for e in events)
    return 0 < accepted < drafted


def on_two_ranks(c: Cluster, answers: list[Any]) -> bool:
    """Each worker has one more process, without which it could not have gone on."""
    teams = [runner.helpers.processes for runner in c.threads.runners.values()]
    return all(len(team) == 1 and team[0].poll() is None for team in teams)


class Way(NamedTuple):
    """How it is asked, what it needs, and what shows that it happened."""

    ask: Callable[[Cluster, list[list[int]]], Awaitable[list[Any]]]
    happened: Callable[[Cluster, list[Any]], bool]
    layout: Layout
    prompts: list[list[int]] = PROMPTS
    tiered: bool = False
    guesses: bool = False


WAYS = {
    "alone": Way(each_alone, nothing, {}),
    "batched": Way(together, nothing, {}),
    "in chunks of 7": Way(together, nothing, {"chunk": 7}),
    "in chunks of 16": Way(together, nothing, {"chunk": 16}),
    "on cached prefixes": Way(twice, hit, {}),
    "preempted, recomputed": Way(together, recomputed, SMALL),
    "preempted, swapped": Way(together, swapped, SMALL, tiered=True),
    "spilled and restored": Way(after_others, loaded, {"kv_blocks": 14}, tiered=True),
    "guessing": Way(together, guessed, {}, LOOPS, guesses=True),
    "all at once": Way(together, guessed, SMALL | {"chunk": 7}, [*LOOPS, *PROMPTS[:3]],
                       tiered=True, guesses=True),
    "tensor parallel": Way(together, on_two_ranks, {"tp": 2}),
    "tensor parallel, all at once": Way(
        together, lambda c, answers: on_two_ranks(c, answers) and guessed(c, answers),
        SMALL | {"chunk": 7, "tp": 2}, [*LOOPS, *PROMPTS[:3]], tiered=True, guesses=True,
    ),
}  # fmt: skip


def deployed(golden: Golden, way: Way, layout: Layout, path: Path) -> Deployment:
    tiers = tiers_of("host", path) if way.tiered else None
    deployment = deployment_of(golden.folder, tiers=tiers, **(way.layout | layout))
    if not way.guesses:
        return deployment
    model = deployment.models[0].model_copy(update={"speculate": GUESS})
    return deployment.model_copy(update={"models": (model,)})


@LAYOUTS
@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_the_tokens_of_generate(
    golden: Golden, tmp_path: Path, name: str, layout: Layout
) -> None:
    way = WAYS[name]

    async def main() -> None:
        async with cluster(deployed(golden, way, layout, tmp_path)) as c:
            answers = await way.ask(c, way.prompts)
            for prompt, answer in zip(way.prompts, answers, strict=True):
                assert answer.tokens == golden.text(prompt, N)
            assert way.happened(c, answers), "the way was not taken"
            assert bool(c.events(Shipped)) == ("mixed" not in layout), "KV moved, or did not"
            await c.at_rest()

    run(main())
