"""The prefix index at the size of a large cluster: memory, updates, matches.

    python bench/kv.py --index [--workers 1000] [--blocks 10000] [--matches 1000] [--distinct]

Each worker holds `--blocks` blocks of 16 tokens: one of eight system prompts that all share, the
head of some long prompt (6,250 blocks, each on five workers, to a depth of its own), and
chats of its own. `--distinct`: only chats, so that no block is held twice (the most memory). Events
come as a worker sends them: prefill 512 blocks at a time, decoding one block each of eight
sequences, evictions tail first. Keys are fresh objects, as a decoder makes them; prompts come in
an order that has nothing to do with memory's.

Times are CPU seconds of one thread. Memory is what the process grew by, keys included. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import resource
import time
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any, NamedTuple

from kvasir.core.ids import BlockKey
from kvasir.kv.prefix import PrefixIndex

SYSTEMS, SYSTEM_BLOCKS = 8, 64
LONG_BLOCKS, LONG_HOLDERS = 6_250, 5
CHAT_BLOCKS = 80
PREFILL_BLOCKS, DECODING, EVICTED = 512, 8, 32
GOAL_MS = 0.5

Chain = tuple[int, int]  # its number, and how many blocks


def key(chain: int, at: int) -> BlockKey:
    """A new object each time; spread like a hash."""
    mixed = (chain << 24 | at) * 0x9E3779B97F4A7C15F39CC0605CEDC835
    return (mixed & (1 << 128) - 1).to_bytes(16, "big")


def keys(chains: list[Chain]) -> tuple[BlockKey, ...]:
    return tuple(key(chain, at) for chain, count in chains for at in range(count))


class Plan(NamedTuple):
    """What each worker holds: lists of chains that follow one another."""

    workers: list[list[list[Chain]]]
    prompts: list[list[Chain]]  # 6,250 blocks or a little more, all of it on some worker


def plan(workers: int, blocks: int, distinct: bool, rng: random.Random) -> Plan:
    systems = [(i, SYSTEM_BLOCKS) for i in range(SYSTEMS)]
    held: list[list[list[Chain]]] = []
    prompts = [
        [systems[i % SYSTEMS], (1_000 + i, LONG_BLOCKS - SYSTEM_BLOCKS)]
        for i in range(workers // LONG_HOLDERS)
    ]
    chats = 1_000_000
    for worker in range(workers):
        own: list[list[Chain]] = []
        left = blocks
        if not distinct:
            long = prompts[worker % len(prompts)]
            whole = worker < len(prompts)  # the first of its holders has all of it
            depth = long[1][1] if whole else rng.randrange(LONG_BLOCKS // 4, long[1][1])
            own = [[system] for system in systems] + [[long[0], (long[1][0], depth)]]
            left -= SYSTEMS * SYSTEM_BLOCKS + depth
        while left > 0:
            size = min(left, rng.randrange(1, 2 * CHAT_BLOCKS))
            own.append([(chats, size)])
            chats, left = chats + 1, left - size
        held.append(own)
    return Plan(held, prompts)


def messages(chains: list[list[Chain]]) -> Iterator[tuple[BlockKey, ...]]:
    """The adds of one worker's life: prompts in chunks, then eight chats' last blocks at a time."""
    for chain in chains:
        found = keys(chain)
        for at in range(0, len(found), PREFILL_BLOCKS):
            yield found[at : at + PREFILL_BLOCKS]


class Timing:
    """CPU milliseconds of single calls."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.blocks = 0

    def call(self, what: Any, *arguments: Any, blocks: int = 0, **named: Any) -> Any:
        began = time.thread_time()
        result = what(*arguments, **named)
        self.ms.append((time.thread_time() - began) * 1e3)
        self.blocks += blocks
        return result

    def at(self, share: float) -> float:
        found = sorted(self.ms)
        return round(found[min(int(share * len(found)), len(found) - 1)], 4)

    def figures(self) -> dict[str, Any]:
        shown = {
            "calls": len(self.ms), "p50_ms": self.at(0.5), "p99_ms": self.at(0.99),
            "max_ms": self.at(1.0),
        }  # fmt: skip
        if self.blocks:
            shown["blocks"] = self.blocks
            shown["blocks_per_s"] = round(self.blocks / sum(self.ms) * 1e3)
        return shown


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


class Bench:
    """One index, filled step by step."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.rng = random.Random(flags.seed)
        self.flags = flags
        self.plan = plan(flags.workers, flags.blocks, flags.distinct, self.rng)
        self.index = PrefixIndex()
        self.names = [f"worker-{i}" for i in range(flags.workers)]
        self.seq = dict.fromkeys(self.names, 0)
        self.found: dict[str, Any] = {}

    def tell(self, timing: Timing, worker: str, added: Any, removed: Any = ()) -> None:
        self.seq[worker] += 1
        whole = timing.call(
            self.index.apply, worker, 1, self.seq[worker], added, removed,
            blocks=len(added) + len(removed),
        )  # fmt: skip
        assert whole

    def fill(self) -> None:
        gc.collect()
        before = resident_mib()
        timing = Timing()
        for worker in self.names:
            self.index.join(worker, 1)
        held = zip(self.names, self.plan.workers, strict=True)
        lives = [(worker, messages(chains)) for worker, chains in held]
        while lives:  # one message of each in turn, as they work side by side
            self.rng.shuffle(lives)
            lives = [life for life in lives if self.told(timing, *life)]
        self.found["prefill"] = timing.figures()
        self.memory(before)

    def told(self, timing: Timing, worker: str, life: Iterator[Any]) -> bool:
        added = next(life, None)
        if added is not None:
            self.tell(timing, worker, added)
        return added is not None

    def memory(self, before: float) -> None:
        gc.collect()
        mib = resident_mib() - before
        pairs = sum(self.index.blocks_of(w) for w in self.names)
        chains: dict[int, int] = {}
        for chain, count in (c for own in self.plan.workers for cs in own for c in cs):
            chains[chain] = max(chains.get(chain, 0), count)
        distinct = sum(chains.values())
        assert getattr(self.index, "blocks", distinct) == distinct
        self.found["memory"] = {
            "mib": round(mib), "pairs": pairs, "distinct": distinct,
            "bytes_per_pair": round(mib * 2**20 / pairs, 1),
            "bytes_per_distinct_block": round(mib * 2**20 / distinct, 1),
        }  # fmt: skip

    def match(self, name: str, prompts: Iterable[tuple[BlockKey, ...]], least: int = 0) -> None:
        """Each prompt is made right before it is looked up, as one that comes from the wire."""
        timing = Timing()
        gc.disable()
        for prompt in prompts:
            hits = timing.call(self.index.match, prompt)
            assert max(hits.values(), default=0) >= least, name
        gc.enable()
        self.found[name] = timing.figures()

    def prompts(self, tail: int = 0) -> Iterator[tuple[BlockKey, ...]]:
        for i in range(self.flags.matches):
            chosen = self.rng.choice(self.plan.prompts)
            yield keys([*chosen, (2_000_000_000 + i, tail)])

    def matches(self) -> None:
        if self.flags.distinct:
            chats = [c for own in self.plan.workers for c in own]
            self.match("chats", (keys(self.rng.choice(chats)) for _ in range(self.flags.matches)))
            return
        self.long_whole()
        self.match("long_and_250_new", self.prompts(250), LONG_BLOCKS)
        cold = (keys([(3_000_000_000 + i, LONG_BLOCKS)]) for i in range(self.flags.matches))
        self.match("nobody_has_it", cold)
        shared = (keys([(i % SYSTEMS, SYSTEM_BLOCKS)]) for i in range(self.flags.matches))
        self.match("everybody_has_it", shared, SYSTEM_BLOCKS)

    def long_whole(self) -> None:
        """Each long prompt several times, far apart; beside it, what touching its keys costs. The
        median of a prompt's visits leaves out what a busy machine did in one of them."""
        floor, timing, steady = Timing(), Timing(), Timing()
        visits: list[list[float]] = [[] for _ in self.plan.prompts]
        gc.disable()
        for _ in range(max(self.flags.matches // len(visits), 3)):
            for i in self.rng.sample(range(len(visits)), len(visits)):
                prompt = keys(self.plan.prompts[i])
                floor.call(b"".join, prompt)
                prompt = keys(self.plan.prompts[i])
                hits = timing.call(self.index.match, prompt)
                assert max(hits.values()) == LONG_BLOCKS
                visits[i].append(timing.ms[-1])
        gc.enable()
        steady.ms = [median(ms) for ms in visits]
        self.found["only_reading_its_keys"] = floor.figures()
        self.found["long_whole"] = timing.figures()
        self.found["long_whole, median visit"] = steady.figures()

    def decode(self) -> None:
        """Blocks that come one by one, of eight sequences at a time; and a prompt made of them."""
        count = LONG_BLOCKS
        timing, worker = Timing(), self.names[0]
        for at in range(count):
            self.tell(timing, worker, tuple(key(4_000_000_000 + s, at) for s in range(DECODING)))
        self.found["decode"] = timing.figures()
        for name in ("came_one_by_one_first", "came_one_by_one_again"):
            self.match(name, (keys([(4_000_000_000 + s, count)]) for s in range(DECODING)), count)

    def staircase(self) -> None:
        """One prompt that each worker holds to a depth of its own: a thousand answers."""
        prompt = keys([(5_000_000_000, LONG_BLOCKS)])
        timing = Timing()
        step = LONG_BLOCKS // len(self.names)
        for i, worker in enumerate(self.names):
            self.tell(timing, worker, keys([(5_000_000_000, (i + 1) * step)]))
        self.found["staircase_add"] = timing.figures()
        assert len(self.index.match(prompt)) == len(self.names)
        self.match("staircase", (keys([(5_000_000_000, LONG_BLOCKS)]) for _ in range(50)))

    def evict(self) -> None:
        timing = Timing()
        some = self.rng.sample(range(len(self.names)), min(200, len(self.names) // 2))
        for i in some:
            for chain in self.plan.workers[i]:
                told = keys(chain)[::-1]
                for at in range(0, min(len(told), 8 * EVICTED), EVICTED):
                    self.tell(timing, self.names[i], (), told[at : at + EVICTED])
        self.found["evict"] = timing.figures()
        self.hot()
        leave = Timing()
        for i in sorted(set(range(len(self.names))) - set(some))[:200]:
            leave.call(self.index.leave, self.names[i])
        self.found["leave"] = leave.figures()

    def hot(self) -> None:
        """Evictions, a block at a time, of what a thousand workers share."""
        timing = Timing()
        told = [] if self.flags.distinct else list(keys([(0, SYSTEM_BLOCKS)]))[::-1]
        for worker in self.names[:50]:
            for block in told:
                self.tell(timing, worker, (), (block,))
        if told:
            self.found["evict_shared_one_by_one"] = timing.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", action="store_true", required=True)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--blocks", type=int, default=10_000, help="of each worker")
    parser.add_argument("--matches", type=int, default=1_000)
    parser.add_argument("--distinct", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    bench = Bench(parser.parse_args())
    bench.fill()
    bench.matches()
    bench.decode()
    if not bench.flags.distinct:
        bench.staircase()
    bench.evict()
    found = bench.found
    print(f"prefix index, Python {platform.python_version()}, {platform.machine()}, one thread")
    print("  ".join(f"{name} {value}" for name, value in found["memory"].items()))
    row = "{:<26}{:>8}{:>10}{:>10}{:>10}{:>14}"
    print(row.format("", "calls", "p50 ms", "p99 ms", "max ms", "blocks/s"))
    for name, of in found.items():
        if name != "memory":
            print(
                row.format(
                    name, of["calls"], of["p50_ms"], of["p99_ms"], of["max_ms"],
                    of.get("blocks_per_s", ""),
                )
            )  # fmt: skip
    print(f"goal: p99 of a match of {LONG_BLOCKS} blocks at most {GOAL_MS} ms")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
