"""CacheGen's streaming adaptation in virtual time, decided by the real policy (SIGCOMM'24, 5.3).

A context's KV stands coded at every level at the sender, as in the paper. Chunk after chunk goes
over a link of 0.1 to 10 Gb/s, drawn anew for each chunk or for each context; decoding a chunk
overlaps with the next one's way. `known`: the policy is told the rate that the next chunk gets, as
in the released simulation; `measured`: the rate of the last chunk, all that a sender really knows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kvasir.core.codec import RAW, Offer
from kvasir.cost.codec import KNOWN
from kvasir.policy.codec import RECOMPUTE, Task, choose
from kvasir.transfer.codec.levels import LEVELS

TOKEN_BYTES = 128 * 1024  # Mistral 7B and Llama 3 8B in bfloat16
CHUNK_TOKENS = 1_500
CHUNKS = (4, 5, 6, 7)  # of a context, drawn: 6,000 to 10,500 tokens
RECOMPUTE_TOKEN_S = 0.2e-3  # the released simulation: 0.2 s for 1,000 tokens
GBIT_S = (0.1, 10.0)
SETTINGS = (
    ("chunk", math.inf, "decoding takes no time: a GPU's, as in the paper"),
    ("context", math.inf, "decoding takes no time"),
    ("chunk", 4.8e9, "decoding at 4.8 GB/s: 16 cores"),
    ("chunk", 0.3e9, "decoding at 0.3 GB/s: one core"),
)
LEVELLED = tuple(f"cachegen-{level}" for level in LEVELS)


class Link(NamedTuple):
    """Rates of one context's chunks, bytes a second."""

    rates: tuple[float, ...]


class Arm(NamedTuple):
    """`fixed`: one way for every chunk; else the policy chooses among the `offers`."""

    name: str
    offers: tuple[Offer, ...]
    fixed: str = ""
    known: bool = True
    recompute: bool = True
    hurried: bool = False  # no budget is told


class Run(NamedTuple):
    seconds: float
    ways: tuple[str, ...]


def adapt(contexts: int, slo_s: float, seed: int) -> dict[str, Any]:
    print(f"SLO {slo_s:g} s, {contexts} contexts of {CHUNKS[0] * CHUNK_TOKENS:,} to "
          f"{CHUNKS[-1] * CHUNK_TOKENS:,} tokens, {GBIT_S[0]:g} to {GBIT_S[1]:g} Gb/s")  # fmt: skip
    found: dict[str, Any] = {}
    for drawn, decode_bytes_s, words in SETTINGS:
        links = list(links_of(contexts, seed, drawn))
        print(f"\na rate for each {drawn}; {words}")
        print("{:<36}{:>9}{:>10}{:>10}  chunks by way".format("", "misses", "mean s", "loss"))
        for arm in arms(decode_bytes_s):
            runs = [run_of(arm, link, slo_s) for link in links]
            found[f"{arm.name}, {drawn}, {words}"] = _row(arm, runs, slo_s)
    return found


def _row(arm: Arm, runs: list[Run], slo_s: float) -> dict[str, Any]:
    misses = sum(run.seconds > slo_s for run in runs) / len(runs)
    mean_s = sum(run.seconds for run in runs) / len(runs)
    ways = Counter(way for run in runs for way in run.ways)
    losses = {offer.name: offer.loss for offer in arm.offers}
    loss = sum(losses.get(way, 0.0) * n for way, n in ways.items()) / ways.total()
    shares = {way: round(n / ways.total(), 3) for way, n in ways.most_common()}
    shown = ", ".join(f"{way} {share:.0%}" for way, share in shares.items())
    print(f"{arm.name:<36}{misses:>9.1%}{mean_s:>10.2f}{loss:>10.2%}  {shown}")
    return {"misses": misses, "mean_s": round(mean_s, 4), "loss": round(loss, 5), "ways": shares}


def arms(decode_bytes_s: float) -> Iterator[Arm]:
    offers = (Offer(RAW, 0.0), *(
        Offer(name, known.loss, known.ratio, decode_bytes_s=decode_bytes_s)
        for name, known in KNOWN.items() if name in ("lossless", "int8", *LEVELLED)
    ))  # fmt: skip
    for name in (RAW, "int8", *LEVELLED, RECOMPUTE):
        yield Arm(f"always {name}", offers, fixed=name)
    yield Arm("adapt, as soon as possible", offers, hurried=True)
    for recompute in (False, True):
        for known in (True, False):
            words = "rate known" if known else "rate measured"
            words += ", recompute too" if recompute else ", levels only"
            yield Arm(f"adapt, {words}", offers, known=known, recompute=recompute)


def links_of(contexts: int, seed: int, drawn: str) -> Iterator[Link]:
    rng = np.random.default_rng(seed)
    for _ in range(contexts):
        chunks = int(rng.choice(CHUNKS))
        rates = rng.uniform(*GBIT_S, chunks if drawn == "chunk" else 1) * 1e9 / 8
        yield Link(tuple(map(float, np.broadcast_to(rates, chunks))))


def run_of(arm: Arm, link: Link, slo_s: float) -> Run:
    """Seconds until the last chunk stands decoded at the receiver."""
    nbytes, recompute_s = CHUNK_TOKENS * TOKEN_BYTES, CHUNK_TOKENS * RECOMPUTE_TOKEN_S
    by_name = {offer.name: offer for offer in arm.offers}
    count = len(link.rates)
    now = ready_s = 0.0  # when the wire is free; when all so far is decoded
    told = sum(GBIT_S) / 2 * 1e9 / 8  # nothing was measured yet
    ways = []
    for at, rate in enumerate(link.rates):
        left = count - at
        task = Task(
            left * nbytes, rate if arm.known else told, left,
            recompute_s=left * recompute_s if arm.recompute else None,
            budget_s=None if arm.hurried else slo_s - now,
        )  # fmt: skip
        way = arm.fixed or choose(arm.offers, task).name
        ways.append(way)
        if way == RECOMPUTE:
            now = ready_s = max(now, ready_s) + recompute_s
            continue
        offer = by_name[way]
        now += nbytes * offer.ratio / rate
        ready_s = max(now, ready_s) + nbytes / offer.decode_bytes_s
        told = rate
    return Run(ready_s, tuple(ways))
