"""KV that left the device and came back, live: the very same tokens, whatever happens to a tier.

Torch clusters are held against transformers' `generate`, crowds of fake ones against `fake_tokens`,
which a wrong, stale or misplaced block of KV cannot give. Counters say that it did leave.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvasir.core.events import (  # noqa: E402
    Preempted,
    Recomputed,
    TierHit,
    TierOff,
    TierPassed,
    TierStored,
)
from kvasir.engine.fake import fake_tokens  # noqa: E402
from kvasir.store.disk import LABEL_BYTES, PAGE  # noqa: E402
from tests.live.cluster import Cluster, Layout, cluster, deployment_of, run  # noqa: E402
from tests.live.test_tokens import (  # noqa: E402
    Golden,
    ask_all,
    crowd,
    folder,
    golden,
    goldens,
    prompt_of,
    wrong_blocks,
)

__all__ = ["folder", "golden", "goldens"]  # fixtures

N = 12
PROMPT = prompt_of(100)  # six full blocks
SLOTS = 256
HOST: Layout = {"host": {"blocks": SLOTS}}
DATA_AT = PAGE + SLOTS * LABEL_BYTES  # in a file of so many slots; a whole number of pages
LAYOUTS = pytest.mark.parametrize(
    "layout", [{"mixed": 1}, {"transport": "shm"}, {"transport": "tcp"}], ids=str
)


def tiers_of(name: str, path: Path) -> Layout:
    """Each tier alone, and a host too small for what the disk has. All that is there is loaded."""
    disk = {"disk": {"blocks": SLOTS, "path": str(path / "kv")}}
    both = {"host": {"blocks": 3}, **disk}
    return {"host": HOST, "disk": disk, "both": both}[name] | {"load": "always", "wait_s": 30.0}


async def spill(c: Cluster, count: int = 4) -> None:
    """Other prompts until the devices have forgotten PROMPT, and tiers have all of it."""
    for seed in range(1, count + 1):
        await c.ask(prompt_of(100, seed), 2)
    await c.at_rest()


def loaded(c: Cluster, tier: str) -> int:
    return sum(e.tokens for e in c.events(TierHit) if e.tier == tier)


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["host", "disk", "both"])
@LAYOUTS
def test_spilled_and_restored(golden: Golden, tmp_path: Path, layout: Layout, name: str) -> None:
    async def main() -> None:
        tiers = tiers_of(name, tmp_path)
        deployment = deployment_of(golden.folder, kv_blocks=14, tiers=tiers, **layout)
        longer = [*PROMPT, 5, 6, 7]
        async with cluster(deployment) as c:
            assert (await c.ask(PROMPT, N)).tokens == golden.text(PROMPT, N)
            await spill(c)
            again = await c.ask(longer, N)
            assert again.tokens == golden.text(longer, N)
            assert again.report.prefill.cached_tokens == 96
            expected = {"host": (96, 0), "disk": (0, 96)}
            if name == "both":
                assert loaded(c, "host") + loaded(c, "disk") == 96 and loaded(c, "disk") > 0
            else:
                assert (loaded(c, "host"), loaded(c, "disk")) == expected[name]
            assert not c.events(TierPassed) and not c.events(TierOff)
            await c.at_rest()

    run(main())


@pytest.mark.parametrize("tiered", [False, True], ids=["recompute", "swap"])
@LAYOUTS
def test_preempted_both_ways(golden: Golden, layout: Layout, tiered: bool) -> None:
    """Four sequences that outgrow the pool together. By swap, what they had comes out of the tier;
    by recomputing, it is made again; the tokens are those of sequences that nobody preempted."""

    async def main() -> None:
        tiers = tiers_of("host", Path()) if tiered else None
        deployment = deployment_of(
            golden.folder, kv_blocks=12, prefill_blocks=64, steps_max=4, tiers=tiers,
            route={"output_reserve_tokens": 0}, **layout,
        )  # fmt: skip
        prompts = [prompt_of(length) for length in (15, 16, 17, 33)]
        async with cluster(deployment) as c:
            answers = await ask_all(c, prompts, 60)
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens == golden.text(prompt, 60)
            lost = sum(e.tokens for e in c.events(Preempted))
            made_again = sum(e.tokens for e in c.events(Recomputed))
            swapped = [e for e in c.events(TierHit) if e.preempted]
            assert lost > 0
            assert sum(a.report.recomputed_tokens for a in answers) == made_again
            if tiered:
                assert sum(e.tokens for e in swapped) > 0 and made_again < lost
            else:
                assert not swapped and made_again == lost
            await c.at_rest()

    run(main())


def test_tiers_decide_by_what_they_measured(golden: Golden) -> None:
    """`auto` on a model this small: whichever way it goes is said, with both times."""

    async def main() -> None:
        deployment = deployment_of(golden.folder, kv_blocks=14, mixed=1, tiers=HOST)
        async with cluster(deployment) as c:
            for _ in range(3):
                assert (await c.ask(PROMPT, N)).tokens == golden.text(PROMPT, N)
                await spill(c)
            said = [e.why for e in c.events(TierHit)] + [e.detail for e in c.events(TierPassed)]
            assert said and all("to compute" in why for why in said)

    run(main())


# --- what goes wrong ------------------------------------------------------------------------------


def damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other byte of every block; labels stay."""
    file = path / "kv" / "mixed-0.kv"
    data = bytearray(file.read_bytes())
    data[DATA_AT::2] = bytes(len(data[DATA_AT::2]))
    file.write_bytes(data)


def cut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(path / "kv" / "mixed-0.kv", DATA_AT)


def deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path / "kv" / "mixed-0.kv").unlink()


def fails(number: int, *calls: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """The disk answers this from now on."""

    def wrong(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    def begin(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for call in calls:
            monkeypatch.setattr(os, call, wrong)

    return begin


FAULTS = {  # what happens: what is said of the tier afterwards, if anything
    "damaged": (damaged, ""),
    "cut": (cut, ""),
    "deleted": (deleted, "deleted"),
    "full": (fails(errno.ENOSPC, "pwrite"), "No space left"),
    "read-only": (fails(errno.EROFS, "pwrite"), "Read-only"),
    "broken": (fails(errno.EIO, "preadv", "pwrite"), "Input/output"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fails_costs_time_only(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    begin, said = FAULTS[fault]

    async def main() -> None:
        tiers = tiers_of("disk", tmp_path)
        async with cluster(deployment_of(golden.folder, kv_blocks=14, mixed=1, tiers=tiers)) as c:
            assert (await c.ask(PROMPT, N)).tokens == golden.text(PROMPT, N)
            await spill(c)
            with monkeypatch.context() as patch:
                begin(tmp_path, patch)
                for prompt in (PROMPT, prompt_of(100, 9), [*PROMPT, 1]):
                    assert (await c.ask(prompt, N)).tokens == golden.text(prompt, N)
                await c.at_rest()
            alarms = [e.reason for e in c.events(TierOff)]
            assert len(alarms) == bool(said) and all(said in reason for reason in alarms)
            if fault in ("damaged", "cut"):
                assert [e.why for e in c.events(TierPassed)][:1] == ["damaged"]
            rendered = c.platform.metrics.render().decode()
            assert ('kvasir_tier_failures_total{tier="disk"} 1.0' in rendered) == bool(said)

    run(main())


# --- real disks that are full or read-only --------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder))
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)


def remount(folder: Path, mode: str) -> None:
    """The file that is open for writing keeps a live system from going read-only by a remount; a
    read-only bind over it does it for who opens anew."""
    assert mount("--bind", str(folder), str(folder)).returncode == 0
    assert mount("-o", f"remount,bind,{mode}", str(folder)).returncode == 0


@pytest.mark.real
def test_real_a_disk_that_is_full(golden: Golden, small_disk: Path) -> None:
    async def main() -> None:
        tiers = tiers_of("disk", small_disk)
        async with cluster(deployment_of(golden.folder, kv_blocks=14, mixed=1, tiers=tiers)) as c:
            assert (await c.ask(PROMPT, N)).tokens == golden.text(PROMPT, N)
            for seed in range(1, 60):
                prompt = prompt_of(100, seed)
                assert (await c.ask(prompt, N)).tokens == golden.text(prompt, N)
                if c.events(TierOff):
                    break
            assert [e.reason for e in c.events(TierOff)] == ["No space left on device"]
            assert c.events(TierStored), "it was of use before"
            for prompt in (PROMPT, [*PROMPT, 1]):
                assert (await c.ask(prompt, N)).tokens == golden.text(prompt, N)
            await c.at_rest()
            rendered = c.platform.metrics.render().decode()
            assert 'kvasir_tier_failures_total{tier="disk"} 1.0' in rendered

    run(main())


@pytest.mark.real
def test_real_a_disk_that_is_read_only(golden: Golden, small_disk: Path) -> None:
    async def main() -> None:
        remount(small_disk, "ro")
        tiers = tiers_of("disk", small_disk)
        async with cluster(deployment_of(golden.folder, kv_blocks=14, mixed=1, tiers=tiers)) as c:
            await c.until(lambda: c.events(TierOff))
            assert [e.reason for e in c.events(TierOff)] == ["Read-only file system"]
            assert (await c.ask(PROMPT, N)).tokens == golden.text(PROMPT, N)
            assert not c.events(TierStored)
            await c.at_rest()

    try:
        run(main())
    finally:
        subprocess.run(["umount", "--lazy", str(small_disk)], check=True)


# --- tenants --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("evict", "cached"), [("lru", 0), ("fair", 96)])
@pytest.mark.parametrize("name", ["none", "host"])
def test_a_flood_of_one_tenant(golden: Golden, name: str, evict: str, cached: int) -> None:
    """Unlike prompts of one tenant, more than device and tier hold, between two like ones of
    another: with fair shares the second finds its prefix, without it does not."""

    async def main() -> None:
        tiers = {"host": {"blocks": 20}, "load": "always", "wait_s": 30.0}
        deployment = deployment_of(
            golden.folder, kv_blocks=20 if name == "none" else 14, mixed=1,
            tiers=tiers if name == "host" else None,
        )  # fmt: skip
        policy = deployment.policy.model_copy(update={"evict": evict})
        async with cluster(deployment.model_copy(update={"policy": policy})) as c:
            first = await c.ask(PROMPT, N, tenant="hot")
            for seed in range(1, 12):
                await c.ask(prompt_of(100, seed), 2, tenant="flood")
                await c.at_rest()
            again = await c.ask([*PROMPT, 1], N, tenant="hot")
            assert first.tokens == golden.text(PROMPT, N)
            assert again.tokens == golden.text([*PROMPT, 1], N)
            assert again.report.prefill.cached_tokens == cached

    run(main())


def test_a_disk_that_cannot_be_opened(golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("not a folder")

    async def main() -> None:
        tiers = tiers_of("disk", tmp_path)
        async with cluster(deployment_of(golden.folder, kv_blocks=14, mixed=1, tiers=tiers)) as c:
            assert (await c.ask(PROMPT, N)).tokens == golden.text(PROMPT, N)
            await c.until(lambda: c.events(TierOff))
            assert not c.events(TierStored)

    run(main())


def test_a_restart_finds_its_disk_again(golden: Golden, tmp_path: Path) -> None:
    deployment = deployment_of(
        golden.folder, kv_blocks=64, mixed=1, tiers=tiers_of("disk", tmp_path)
    )

    async def once(cached: int) -> None:
        async with cluster(deployment) as c:
            await c.until(lambda: c.node("mixed-0").tiers.states)
            answer = await c.ask(PROMPT, N)
            assert answer.tokens == golden.text(PROMPT, N)
            assert answer.report.prefill.cached_tokens == cached == loaded(c, "disk")
            await c.at_rest()

    run(once(0))
    run(once(96))


def test_another_model_does_not_find_it(goldens: dict[str, Golden], tmp_path: Path) -> None:
    async def once(golden: Golden) -> None:
        tiers = tiers_of("disk", tmp_path)
        async with cluster(deployment_of(golden.folder, mixed=1, tiers=tiers)) as c:
            await c.until(lambda: c.node("mixed-0").tiers.states)
            assert c.conductor.index.blocks_of("mixed-0", "disk") == 0
            assert (await c.ask(PROMPT, N)).tokens == golden.text(PROMPT, N)
            await c.at_rest()

    run(once(goldens["qwen3"]))
    run(once(goldens["llama"]))


async def crowd_seed(seed: int, folder: Path, path: Path) -> int:
    """A crowd in too little memory, with a disk that may fail meanwhile. Returns tokens loaded."""
    rng = random.Random(seed)
    name = rng.choice(["host", "disk", "both"])
    tiers = tiers_of(name, path) | {"load": rng.choice(["always", "auto"])}
    deployment = deployment_of(
        folder, engine="fake", first_token=rng.choice(["prefill", "decode"]),
        chunk=rng.choice([7, 16, 512]), kv_blocks=rng.choice([10, 12, 16]), prefill_blocks=24,
        steps_max=rng.choice([1, 4, 256]), route={"output_reserve_tokens": 0}, tiers=tiers,
        **rng.choice([{"mixed": 1}, {"decode": 2}]),
    )  # fmt: skip
    async with cluster(deployment) as c:
        asked = crowd(rng)

        async def one(prompt: list[int], n: int) -> None:
            answer = await c.ask(prompt, n)
            assert answer.tokens == fake_tokens(prompt, n)
            if rng.random() < 0.05:
                for file in path.glob("kv/*"):
                    os.truncate(file, rng.randint(0, file.stat().st_size))

        await asyncio.gather(*(one(prompt, n) for prompt, n in asked))
        await c.at_rest()
        assert wrong_blocks(c, [prompt + fake_tokens(prompt, n) for prompt, n in asked]) == []
        return sum(e.tokens for e in c.events(TierHit))


@pytest.mark.parametrize("seeds", [range(0, 6), range(6, 12)], ids=str)
def test_a_crowd_spills_and_nothing_wrong_is_loaded(
    folder: Path, tmp_path: Path, seeds: range
) -> None:
    assert sum(run(crowd_seed(seed, folder, tmp_path / str(seed))) for seed in seeds) > 0
