"""Which block is held by whom, as runs: stretches of blocks that the same holders have.

Knows keys and bit masks of holders; must not know what a holder is, nor trust in what order keys
came. Blocks that came together are kept together, so one step of a walk serves up to `RUN_MAX` of
them; that prompts come in chains makes it fast, not right: each key of a prompt is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from kvasir.core.ids import BlockKey
from kvasir.core.keys import KEY_BYTES

RUN_MAX: Final = 128  # blocks: what one step of a walk may cover, and one change may touch
SHARDS: Final = 256  # one dict of 10 M keys would stand still for most of a second when it grows


class Run(msgspec.Struct, eq=False, gc=False):
    """Blocks of equal holders: their keys, one after another. Off the cyclic collector, which would
    else walk the whole index; nothing here points back, so counting references frees it."""

    data: bytes
    mask: int

    @property
    def blocks(self) -> int:
        return len(self.data) // KEY_BYTES


class Holders(msgspec.Struct, eq=False, gc=False):
    """A set of holders, kept once, and the runs that exactly these have."""

    mask: int
    runs: dict[Run, None]


class Runs:
    """At most `blocks_max` distinct blocks. Adding to a full table is refused and counted: what it
    says is held is held, but it may not know of all that is."""

    def __init__(self, blocks_max: int) -> None:
        assert blocks_max > 0
        self.blocks_max = blocks_max
        self.blocks = 0
        self.refused = 0
        self._shards: list[dict[BlockKey, Run]] = [{} for _ in range(SHARDS)]
        self._holders: dict[int, Holders] = {}

    # --- reading ----------------------------------------------------------------------------------

    def walk(self, keys: Sequence[BlockKey]) -> Iterator[tuple[int, int]]:
        """Parts of `keys` from the first one on, until a block that nobody holds: where each ends,
        and the mask of those who hold it.

        Small runs that turn out to be neighbours become one, so that a prompt whose blocks came one
        by one, as decoding makes them, is slow to walk once.
        """
        shards, data, at, count = self._shards, b"", 0, len(keys)
        before: Run | None = None  # whose blocks end where the next one's start
        while at < count:
            key = keys[at]
            run = shards[key[-1]].get(key)
            if run is None:
                return
            data = data or b"".join(keys)
            if not data.startswith(run.data, at * KEY_BYTES):  # a fork, or never were one chain
                run = self._cut(run, data, at)
            at += len(run.data) // KEY_BYTES
            if (
                before is not None
                and before is not run  # no prompt names a block twice, but keys come from outside
                and before.mask is run.mask
                and len(before.data) + len(run.data) <= RUN_MAX * KEY_BYTES
            ):
                self._join(before, run)
                run = before
            yield at, run.mask
            before = run

    # --- changing ---------------------------------------------------------------------------------

    def add(self, holder: int, keys: Sequence[BlockKey]) -> int:
        """`holder` (one bit) has `keys`. Returns how many of them are news."""
        shards, data, at, gained = self._shards, b"".join(keys), 0, 0
        assert len(data) == KEY_BYTES * len(keys), "a key of another length"
        while at < len(keys):
            key = keys[at]
            run = shards[key[-1]].get(key)
            if run is None:
                start, stop = at, min(len(keys), at + RUN_MAX)
                at += 1
                while at < stop and keys[at] not in shards[keys[at][-1]]:
                    at += 1
                gained += self._new(holder, keys[start:at])
            else:
                if not data.startswith(run.data, at * KEY_BYTES):
                    run = self._cut(run, data, at)
                if not run.mask & holder:
                    self._hand(run, run.mask | holder)
                    gained += run.blocks
                at += run.blocks
        return gained

    def remove(self, holder: int, keys: Sequence[BlockKey]) -> int:
        """`holder` (one bit) has `keys` no more. Returns how many of them it had."""
        keys = keys[::-1]  # chains lose their tail first
        shards, data, at, lost = self._shards, b"".join(keys), 0, 0
        while at < len(keys):
            key = keys[at]
            run = shards[key[-1]].get(key)
            if run is None:
                at += 1
                continue
            if not data.startswith(run.data, at * KEY_BYTES):
                run = self._cut(run, data, at)
            at += run.blocks
            if run.mask & holder:
                lost += run.blocks
                self._hand(run, run.mask & ~holder)
        return lost

    def drop(self, holders: int) -> None:
        """None of `holders` has anything any more."""
        for mask in [m for m in self._holders if m & holders]:
            for run in list(self._holders[mask].runs):
                self._hand(run, mask & ~holders)

    def _new(self, holder: int, keys: Sequence[BlockKey]) -> int:
        own = list(dict.fromkeys(keys))
        fit = own[: self.blocks_max - self.blocks]
        self.refused += len(own) - len(fit)
        if fit:
            run = Run(b"".join(fit), 0)
            self._enter(run, fit)
            self._file(run, holder)
            self.blocks += len(fit)
        return len(fit)

    def _cut(self, run: Run, data: bytes, at: int) -> Run:
        """Of `run`, which has block `at` of `data`: the run of just those blocks that follow in
        both from there on."""
        key = data[at * KEY_BYTES : (at + 1) * KEY_BYTES]
        start = run.data.find(key)
        while start % KEY_BYTES:  # its bytes, spelt by the end of one key and the start of the next
            start = run.data.find(key, start + 1)
        if start:
            run = self._split(run, start // KEY_BYTES)
        same = _same(run.data, data, at)
        if same < run.blocks:
            self._split(run, same)
        return run

    def _split(self, run: Run, at: int) -> Run:
        """`run` keeps its first `at` keys; the new run has the others."""
        rest = Run(run.data[at * KEY_BYTES :], 0)
        run.data = run.data[: at * KEY_BYTES]
        self._enter(rest, _keys(rest.data))
        self._file(rest, run.mask)
        return rest

    def _join(self, run: Run, after: Run) -> None:
        del self._holders[run.mask].runs[after]
        self._enter(run, _keys(after.data))
        run.data += after.data

    def _enter(self, run: Run, keys: Sequence[BlockKey]) -> None:
        shards = self._shards
        for key in keys:
            shards[key[-1]][key] = run

    def _hand(self, run: Run, mask: int) -> None:
        """`run` to other holders; to none: forgotten."""
        runs = self._holders[run.mask].runs
        del runs[run]
        if not runs:
            del self._holders[run.mask]
        if mask:
            self._file(run, mask)
            return
        shards = self._shards
        for key in _keys(run.data):
            del shards[key[-1]][key]
        self.blocks -= run.blocks

    def _file(self, run: Run, mask: int) -> None:
        holders = self._holders.get(mask)
        if holders is None:
            holders = self._holders[mask] = Holders(mask, {})
        run.mask = holders.mask
        holders.runs[run] = None

    def check(self) -> int:
        """Every block in one run, every run with its holders. Returns (holder, block) pairs."""
        known = [(key, run) for shard in self._shards for key, run in shard.items()]
        assert len(known) == self.blocks <= self.blocks_max
        assert all(key in _keys(run.data) for key, run in known)
        pairs = blocks = 0
        for mask, holders in self._holders.items():
            assert mask and mask == holders.mask and holders.runs
            for run in holders.runs:
                assert run.mask is holders.mask
                assert 0 < run.blocks <= RUN_MAX and len(run.data) % KEY_BYTES == 0
                blocks += run.blocks
                pairs += run.blocks * mask.bit_count()
        assert blocks == self.blocks
        return pairs


def _keys(data: bytes) -> list[BlockKey]:
    return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]


def _same(own: bytes, data: bytes, at: int) -> int:
    """How many blocks of `own` are those of `data` from `at` on; the first one is."""
    offset = at * KEY_BYTES
    if data.startswith(own, offset):
        return len(own) // KEY_BYTES
    same, other = 1, min(len(own), len(data) - offset) // KEY_BYTES + 1
    while other - same > 1:
        middle = (same + other) // 2
        if data.startswith(own[: middle * KEY_BYTES], offset):
            same = middle
        else:
            other = middle
    return same
