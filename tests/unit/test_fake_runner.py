"""The fake runner keeps the Runner contract, and shows every broken byte as a wrong token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.effects import Row, Step
from kvasir.core.keys import block_keys
from kvasir.core.request import Sampling
from kvasir.engine.base import Runner
from kvasir.engine.fake import KV_TOKEN_BYTES, FakeRunner, fake_tokens
from tests.engine_driver import SALT, Driver, Hooks, Job, close, copy_blocks, row_of, scattered

PROMPT = [7, 1, 200, 3, 3, 3, 90, 14, 255, 0, 66]


def driver(block_size: int = 4, blocks_count: int = 64, **values: object) -> Driver:
    runner: Runner = FakeRunner(blocks_count=blocks_count, block_size=block_size, **values)
    return Driver(runner)


def job(name: str = "a", prompt: Sequence[int] = PROMPT, n: int = 12, free: object = None) -> Job:
    return Job(name, list(prompt), n, list(range(40) if free is None else free))


def run_one(drive: Driver, one: Job, **values: int) -> list[int]:
    drive.open(one)
    return drive.run([one], **values)[0]


# --- tokens ----------------------------------------------------------------------------------


@given(
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    chunk=st.integers(1, 17),
    steps=st.integers(1, 9),
    block_size=st.sampled_from([1, 4, 16]),
    mix=st.booleans(),
)
def test_tokens_are_foretold(
    prompt: list[int], chunk: int, steps: int, block_size: int, mix: bool
) -> None:
    blocks = scattered(range(64)) if mix else range(64)
    one = job(prompt=prompt, n=10, free=blocks)
    got = run_one(driver(block_size), one, chunk=chunk, steps=steps)
    assert got == fake_tokens(prompt, 10)


def test_foretelling_resumes_after_emitted_tokens() -> None:
    whole = fake_tokens(PROMPT, 9)
    assert fake_tokens(PROMPT + whole[:4], 5, index=4) == whole[4:]


def test_tokens_spread_over_the_vocabulary() -> None:
    counts = np.bincount(fake_tokens([1], 4096, vocab=16), minlength=16)
    assert counts.min() > 200 and counts.max() < 320


def test_vocabulary_and_eos() -> None:
    assert set(fake_tokens(PROMPT, 200, vocab=8, eos_token_ids=(5,))) == {0, 1, 2, 3, 4, 6, 7}
    one = job(n=500, free=range(200))
    one.sampling = None
    got = run_one(driver(blocks_count=200, eos_token_ids=(5,), draw_eos=True), one)
    assert one.end == "stop" and got[-1] == 5 and 5 not in got[:-1]
    assert got == fake_tokens(PROMPT, len(got), eos_token_ids=(5,), draw_eos=True)


def test_batch_neighbours_do_not_matter() -> None:
    jobs = [job(f"r{i}", PROMPT[: i + 1], 8, range(i * 8, i * 8 + 8)) for i in range(8)]
    drive = driver()
    for one in jobs:
        drive.open(one)
    assert drive.run(jobs, chunk=3) == [fake_tokens(one.prompt, 8) for one in jobs]


# --- transfers and tables --------------------------------------------------------------------


def handed_over(damage: object = None, **values: object) -> list[int]:
    """Prefill on one runner, ship blocks, go on with token 0 from there on another one."""
    p, d = driver(**values), driver(**values)
    source = p.open(job(free=[9, 3, 4, 20]))
    p.step([source])
    target = Job("a", list(PROMPT), 12, list(range(30, 40)), output=list(source.output))
    table = [11, 2, 17]
    copy_blocks(p.runner, d.runner, zip([9, 3, 4], table, strict=True))
    if callable(damage):
        table = damage(d.runner.planes(), table) or table
    d.runner.adopt("a", 1, table)
    d.runner.append("a", 1, source.output[0])  # the first token may overtake the prompt
    d.runner.open("a", 1, PROMPT, 2, SALT)
    target.computed, target.held = len(PROMPT), 3
    return d.run([target])[0]


def test_hand_over_keeps_the_text() -> None:
    assert handed_over() == fake_tokens(PROMPT, 12)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("plane", [0, 1])
@pytest.mark.parametrize("block", [11, 2, 17])
def test_one_flipped_bit_shows(layer: int, plane: int, block: int) -> None:
    def flip(planes: list[list[np.ndarray]], table: list[int]) -> None:
        planes[layer][plane][block][5] ^= 0x10

    assert handed_over(flip) != fake_tokens(PROMPT, 12)


def test_wrong_table_order_and_swapped_planes_show() -> None:
    def swap(planes: list[list[np.ndarray]], table: list[int]) -> None:
        k, v = planes[0]
        k[:], v[:] = v.copy(), k.copy()

    assert handed_over(lambda planes, table: [2, 11, 17]) != fake_tokens(PROMPT, 12)
    assert handed_over(swap) != fake_tokens(PROMPT, 12)


WIDE = 8 * KV_TOKEN_BYTES  # for links that are to be loaded as a model would load them


def test_more_kv_a_token_gives_the_same_tokens() -> None:
    runner = driver(kv_token_bytes=WIDE).runner
    assert sum(p.nbytes for layer in runner.planes() for p in layer) == 64 * 4 * WIDE
    assert sum(layer.token_bytes for layer in runner.spec.layers) == runner.spec.kv_token_bytes
    assert runner.spec.kv_token_bytes == WIDE
    assert handed_over(kv_token_bytes=WIDE) == fake_tokens(PROMPT, 12)


@pytest.mark.parametrize("byte", [0, 7, 8, 63, 64, 255])
def test_every_byte_of_more_kv_counts(byte: int) -> None:
    def flip(planes: list[list[np.ndarray]], table: list[int]) -> None:
        planes[1][0][2][byte] ^= 0x10

    assert handed_over(flip, kv_token_bytes=WIDE) != fake_tokens(PROMPT, 12)


def test_planes_are_the_cache_itself() -> None:
    drive = driver()
    planes = drive.runner.planes()
    assert [[p.shape for p in layer] for layer in planes] == [[(64, 32)] * 2] * 2
    assert sum(p.nbytes for layer in planes for p in layer) == 64 * 4 * KV_TOKEN_BYTES
    assert drive.runner.spec.kv_token_bytes == KV_TOKEN_BYTES
    assert sum(layer.token_bytes for layer in drive.runner.spec.layers) == KV_TOKEN_BYTES
    drive.prefill(drive.open(job(free=[5, 6, 7])))
    assert all(p[5].any() and not p[8].any() for layer in planes for p in layer)


def test_prefix_hit_reuses_blocks_of_another_attempt() -> None:
    drive = driver()
    first = job(free=range(10))
    run_one(drive, first)
    again = Job("b", PROMPT, 12, list(range(20, 30)), computed=8, held=2)
    drive.open(again)
    drive.runner.adopt("b", 1, [0, 1])
    assert drive.run([again])[0] == fake_tokens(PROMPT, 12)


def test_fresh_row_starts_a_new_table() -> None:
    drive = driver()
    one = drive.open(job(free=range(10)))
    drive.step([one])
    drive.step([one], steps=4)
    one.computed, one.held, one.fresh, one.free = 0, 0, True, list(range(30, 40))  # preempted
    for layer in drive.runner.planes():
        for plane in layer:
            plane[:10] = 0xFF
    assert drive.run([one], chunk=5)[0] == fake_tokens(PROMPT, 12)
    assert all((p[:10] == 0xFF).all() for layer in drive.runner.planes() for p in layer)


# --- steps -----------------------------------------------------------------------------------


def test_layers_are_told_once_and_tokens_each_iteration() -> None:
    drive, hooks = driver(), Hooks()
    one = drive.open(job())
    drive.step([one], hooks=hooks)
    assert hooks.layers == [0, 1]
    hooks = Hooks()
    result = drive.step([one], steps=5, hooks=hooks)
    assert result.steps_done == 5 and hooks.layers == [0, 1]
    assert [[s.index for s in batch] for batch in hooks.batches] == [[1], [2], [3], [4], [5]]
    assert {s.gateway for batch in hooks.batches for s in batch} == {"gateway-0"}
    assert row_of(result).sampled == 5 and row_of(result).end == ""


def test_prefill_without_sampling_draws_nothing() -> None:
    drive, hooks = driver(), Hooks()
    one = drive.open(job())
    result = drive.step([one], chunk=5, hooks=hooks)
    assert row_of(result).sampled == 0 and hooks.batches == [[]]


def test_cut_ends_a_step_between_iterations() -> None:
    drive = driver()
    one = drive.open(job())
    drive.step([one])
    assert drive.step([one], steps=6, hooks=Hooks(cut_after=2)).steps_done == 2
    assert drive.run([one])[0] == fake_tokens(PROMPT, 12)


def test_a_step_ends_with_its_first_row() -> None:
    drive = driver()
    short = drive.open(job("short", n=4, free=range(8)))
    long = drive.open(job("long", n=9, free=range(20, 30)))
    drive.step([short, long])
    rows = tuple(drive.row(one, 1, 8) for one in (short, long))
    result = drive.runner.step(Step(1000, rows, 8), Hooks())
    assert result.steps_done == 3
    assert [(row.sampled, row.end) for row in result.rows] == [(3, "length"), (3, "")]


DRAWN = fake_tokens(PROMPT, 1)[0]


@pytest.mark.parametrize(
    ("sampling", "end"),
    [
        (None, "stop"),
        (Sampling(), "stop"),
        (Sampling(ignore_eos=True), "length"),
        (Sampling(ignore_eos=True, stop_token_ids=(DRAWN,)), "stop"),
    ],
)
def test_stop_goes_before_length(sampling: Sampling | None, end: str) -> None:
    """The last token that the length allows is EOS as well."""
    drive = driver(eos_token_ids=(DRAWN,), draw_eos=True)
    one = job(n=1)
    one.sampling = sampling
    assert row_of(drive.step([drive.open(one)])).end == end


def test_keys_of_filled_blocks() -> None:
    drive = driver()
    one = drive.open(job(n=12))
    first = drive.step([one])  # 11 prompt tokens: blocks 0 and 1 are the prompt's own
    assert row_of(first).keys == ()
    one.keys.clear()
    drive.run([one], steps=3)
    known = PROMPT + one.output
    assert tuple(one.keys) == block_keys(known, 4, SALT)[2 : (len(known) - 1) // 4]


def test_keys_of_emitted_tokens_come_from_prefill() -> None:
    """A later attempt computes emitted tokens as prompt; their blocks are news to the scheduler."""
    drive = driver()
    one = Job("a", PROMPT, 12, list(range(20)), attempt=2, output=fake_tokens(PROMPT, 6))
    drive.open(one)
    for _ in range(3):
        drive.step([one], chunk=6)
    assert tuple(one.keys) == block_keys(PROMPT + one.output, 4, SALT)[2:4]


def test_blocks_that_came_from_elsewhere_are_named_too() -> None:
    drive = driver()
    run_one(drive, job(free=range(10)))
    again = Job("b", PROMPT, 1, [20], computed=8, held=2)
    drive.open(again, keys_count=0)
    drive.runner.adopt("b", 1, [0, 1])
    assert row_of(drive.step([again])).keys == block_keys(PROMPT, 4, SALT)


def test_a_block_that_is_filled_again_is_named_once() -> None:
    """A preempted sequence runs from its start again; the scheduler kept its keys."""
    drive = driver()
    one = drive.open(job(n=12))
    drive.run([one], steps=3)
    assert one.keys
    again = Job("a", PROMPT, 13, list(range(20, 40)), output=one.output, fresh=True)
    drive.step([again])
    assert again.keys == []


def test_time_is_a_parameter() -> None:
    slept: list[float] = []
    asked: list[tuple[int, int]] = []

    def seconds(rows: Sequence[tuple[int, int]]) -> float:
        asked.extend(rows)
        return 0.5

    drive = driver(seconds=seconds, sleep=slept.append)
    one = drive.open(job(n=4))
    drive.run([one])
    assert asked == [(11, 0), (1, 11), (1, 12), (1, 13)]
    assert sum(slept) == pytest.approx(4 * 0.5)


def test_closing_forgets() -> None:
    drive = driver()
    drive.runner.close("never", 1)
    run_one(drive, job())
    close(drive.runner, [job()])
    with pytest.raises(AssertionError, match="a/1 is not open"):
        drive.step([job()])
    assert run_one(drive, job()) == fake_tokens(PROMPT, 12)


def test_fingerprints_differ_where_tokens_differ() -> None:
    prints = {
        driver(**values).runner.spec.fingerprint
        for values in ({}, {"vocab": 300}, {"eos_token_ids": (1,)}, {"block_size": 8})
    }
    assert len(prints) == 3  # the block size changes no KV


# --- misuse ----------------------------------------------------------------------------------


def row(**values: object) -> Row:
    usual = {"request_id": "a", "attempt": 1, "start": 0, "count": 2, "blocks": (0,)}
    return Row(**{**usual, **values})


@pytest.mark.parametrize(
    ("rows", "steps", "said"),
    [
        ((), 1, "asks for nothing"),
        ((row(),), 2, "only decode rows"),
        ((row(), row()), 1, "an attempt in two rows"),
        ((row(attempt=2),), 1, "a/2 is not open"),
        ((row(blocks=(64,)),), 1, r"a block not in \[0, 64\)"),
        ((row(count=12, blocks=(0, 1, 2)),), 1, "only 11 tokens are known"),
        ((row(count=5),), 1, "its blocks end at 4"),
        ((row(sample=True),), 1, "samples at 2 of 11"),
        ((row(count=0),), 1, "nothing to compute"),
    ],
)
def test_misuse_is_an_assertion(rows: tuple[Row, ...], steps: int, said: str) -> None:
    drive = driver()
    drive.open(job())
    with pytest.raises(AssertionError, match=said):
        drive.runner.step(Step(1, rows, steps), Hooks())


def test_a_prompt_that_comes_twice_does_no_harm() -> None:
    drive = driver()
    one = drive.open(job())
    drive.step([one])
    drive.open(job())
    assert drive.run([one])[0] == fake_tokens(PROMPT, 12)


def test_tokens_beyond_the_vocabulary_are_assertions() -> None:
    runner = FakeRunner(blocks_count=4, vocab=10)
    with pytest.raises(AssertionError, match=r"a token not in \[0, 10\)"):
        runner.open("a", 1, [10], 0, SALT)
    with pytest.raises(AssertionError, match=r"a token not in \[0, 10\)"):
        runner.append("a", 1, -1)
