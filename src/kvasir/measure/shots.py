"""What a load generator sends and when. Knows lengths, times and random tokens; sends nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Final

import msgspec

VOCAB: Final = range(10, 1000)  # in nearly every vocabulary, and above most special tokens
WORDS: Final = ("time", "water", "stone", "light", "house", "river", "green", "paper", "north")


class Shot(msgspec.Struct, frozen=True, gc=False):
    """One request: `at_s` after the start, its prompt as token ids or text, the length wanted."""

    at_s: float
    prompt: tuple[int, ...] | str
    prompt_tokens: int
    output_tokens: int


def random_shots(
    count: int,
    *,
    input_tokens: int,
    output_tokens: int,
    rate: float = math.inf,
    burstiness: float = 1.0,
    range_ratio: float = 0.0,
    prefix_tokens: int = 0,
    vocab: range = VOCAB,
    text: bool = False,
    seed: int = 0,
) -> list[Shot]:
    """Prompts of random tokens after one common prefix, at `rate` requests per second.

    Lengths are uniform within `range_ratio` of those given. `burstiness` is the shape of the gamma
    distribution of gaps: 1 is Poisson, less comes in bursts, inf is even. With `text`, prompts are
    random words and their token counts only near the ones given. Raises ValueError.
    """
    if count < 1 or rate <= 0 or burstiness <= 0 or not 0 <= range_ratio < 1 or not vocab:
        raise ValueError(
            "count, rate, burstiness and vocab must be positive, range_ratio in [0, 1)"
        )
    random = Random(seed)

    def length(mean: int) -> int:
        low, high = math.ceil(mean * (1 - range_ratio)), math.floor(mean * (1 + range_ratio))
        return max(1, random.randint(low, high))

    prefix = random.choices(vocab, k=prefix_tokens)
    shots = []
    for at_s in arrival_times(count, rate, burstiness, random):
        ids = (*prefix, *random.choices(vocab, k=length(input_tokens)))
        prompt = " ".join(WORDS[i % len(WORDS)] for i in ids) if text else ids
        shots.append(Shot(at_s, prompt, len(ids), length(output_tokens)))
    return shots


def arrival_times(count: int, rate: float, burstiness: float, random: Random) -> list[float]:
    """Seconds of `count` arrivals, all 0 at an infinite rate.

    Scaled so that the last comes at count / rate, as `vllm bench serve` does: runs with different
    seeds then offer the same load.
    """
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        return [(i + 1) / rate for i in range(count)]
    times = list(accumulate(random.gammavariate(burstiness, 1.0) for _ in range(count)))
    return [t * count / (rate * times[-1]) for t in times]


def prompt_of_blocks(
    hash_ids: Sequence[int], block_size: int, tokens: int, vocab: range = VOCAB
) -> tuple[int, ...]:
    """A prompt of `tokens` ids for a trace's block ids: the same block id gives the same tokens."""
    ids: list[int] = []
    for hash_id in hash_ids:
        ids += Random(hash_id).choices(vocab, k=block_size)
    return tuple(ids[:tokens])
