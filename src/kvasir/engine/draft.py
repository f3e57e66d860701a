"""A smaller model that guesses for a larger one (Leviathan et al., arXiv 2211.17192; Chen et al.,
arXiv 2302.01318). Knows tensors, its own paged cache and token ids; must not know the larger model:
what it got wrong it sees in the attempt's tokens.

Its cache follows each attempt's tokens by itself, so that prefix hits, transferred KV, preemption
and other workers' tokens need no care: what is not there yet is computed, what was wrong is written
over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch

from kvasir.core.errors import ModelError
from kvasir.core.ids import BlockId, RequestId
from kvasir.engine.attention import PagedBatch, Span, make_caches
from kvasir.engine.decoder import decoder_of
from kvasir.engine.guide import needs_guide
from kvasir.engine.loader import Dtype, load
from kvasir.engine.native.kernel import Kernel, kernel_of
from kvasir.engine.rejection import GUESS, weighs
from kvasir.engine.sampler import Draw, draw, pick, probs, uniform
from kvasir.engine.steps import BlockTable, Guess, Wish

Key = tuple[RequestId, int]

BLOCK_TOKENS: Final = 16
CATCH_UP_TOKENS: Final = 512  # of one attempt in one iteration: others wait meanwhile
CONTEXT_TOKENS: Final = 8192  # room for each of the attempts that may guess at once


@dataclass(slots=True)
class Follower:
    """One attempt in the draft model's cache: KV of `computed` tokens stands in `table`. When it
    was asked last, `known` tokens were the attempt's; what was fed after them is `guessed`."""

    table: BlockTable = field(default_factory=BlockTable)
    computed: int = 0
    known: int = 0
    guessed: Sequence[int] = ()
    used: int = 0  # by the guess with this number last

    def roll_back(self, tokens: Sequence[int]) -> None:
        """To what the attempt's tokens have turned out to be; its last one is always computed."""
        right = 0
        for mine, its in zip(self.guessed, tokens[self.known :], strict=False):
            if mine != its:
                break
            right += 1
        self.computed = min(self.computed, self.known + right, len(tokens) - 1)
        self.known, self.guessed = len(tokens), ()


class DraftModel:
    """Satisfies `engine.steps.Guesser`. Guesses are drawn as the larger model draws: greedily, or
    with the number that decides the draw of the same output token, so that two models that agree on
    the distribution agree on the token. Where guesses are weighed (engine.rejection), they are
    drawn with numbers of their own, and say from what.

    `rows_max` attempts have room for `CONTEXT_TOKENS` each, shared; the one that guessed longest
    ago makes room for others. `vocab` is the larger model's. Raises ModelError: the folder cannot
    be loaded, or names its tokens otherwise than `target`, the larger model's folder.
    """

    def __init__(
        self, folder: str | Path, target: str | Path, *, vocab: int, rows_max: int,
        dtype: Dtype | Literal["auto"] = "float32", native: Kernel | bool | None = None,
    ) -> None:  # fmt: skip
        check_vocabulary(Path(folder), Path(target))
        loaded = load(Path(folder), dtype)
        blocks = rows_max * -(-min(loaded.context_max, CONTEXT_TOKENS) // BLOCK_TOKENS)
        self._caches = make_caches(loaded.layers, blocks, BLOCK_TOKENS, loaded.model.dtype)
        self.decoder, self._kernel = decoder_of(loaded), kernel_of(native)
        self._embedded, self._vocab = loaded.vocab, min(vocab, loaded.vocab)
        self._context_max = loaded.context_max
        self._free: list[BlockId] = list(range(blocks))[::-1]
        self._followers: dict[Key, Follower] = {}
        self._calls = 0

    def forget(self, key: Key) -> None:
        follower = self._followers.pop(key, None)
        if follower is not None:
            self._free += reversed(follower.table.blocks)

    @torch.inference_mode()
    def guess(self, wishes: Sequence[Wish]) -> list[Guess]:
        """Nothing for attempts that have no room, or whose tokens are not computed yet."""
        self._calls += 1
        found: list[list[int]] = [[] for _ in wishes]
        odds: dict[int, list[torch.Tensor]] = {
            i: [] for i, wish in enumerate(wishes) if _is_weighed(wish)
        }
        followers = {i: f for i, wish in enumerate(wishes) if (f := self._follow(wish))}
        feed = {i: self._missing(wishes[i], f) for i, f in followers.items()}
        while feed:
            logits = self._feed([(followers[i], tokens) for i, tokens in feed.items()])
            rows = {i: row for row, i in enumerate(feed) if self._is_level(wishes[i], followers[i])}
            for i, row in rows.items():
                one = self._draw_of(wishes[i], len(found[i]))
                found[i].append(_drawn(logits[row : row + 1], one, odds.get(i)))
            feed = {i: found[i][-1:] for i in rows if len(found[i]) < wishes[i].count}
        for i, follower in followers.items():
            follower.guessed = found[i]
        return [Guess(found[i], torch.cat(odds[i]) if odds.get(i) else None)
                for i in range(len(wishes))]  # fmt: skip

    def _is_level(self, wish: Wish, follower: Follower) -> bool:
        return follower.computed >= len(wish.attempt.tokens)

    def _draw_of(self, wish: Wish, ahead: int) -> Draw:
        return Draw(wish.key[0], wish.index + ahead, wish.sampling)

    def _missing(self, wish: Wish, follower: Follower) -> list[int]:
        start = follower.computed
        return wish.attempt.tokens[start : start + CATCH_UP_TOKENS]

    def _follow(self, wish: Wish) -> Follower | None:
        """The attempt's follower, rolled back to what is right, with room for its guesses."""
        tokens = wish.attempt.tokens
        end = len(tokens) + wish.count
        if end > self._context_max:
            return None
        follower = self._followers.setdefault(wish.key, Follower())
        follower.used = self._calls
        follower.roll_back(tokens)
        if max(self._missing(wish, follower)) >= self._embedded:
            return None
        missing = -(-end // BLOCK_TOKENS) - len(follower.table.blocks)
        if missing > 0:
            if not self._make_room(missing):
                return None
            follower.table.extend([self._free.pop() for _ in range(missing)])
        return follower

    def _make_room(self, blocks: int) -> bool:
        """Forget attempts that do not guess now, longest ago first."""
        others = [(f.used, key) for key, f in self._followers.items() if f.used < self._calls]
        for _, key in sorted(others):
            if len(self._free) >= blocks:
                break
            self.forget(key)
        return len(self._free) >= blocks

    def _feed(self, fed: Sequence[tuple[Follower, Sequence[int]]]) -> torch.Tensor:
        """Compute tokens after those that were fed; logits after each one's last, [rows, vocab]."""
        spans = [Span(f.computed, len(tokens), f.table) for f, tokens in fed]
        batch = PagedBatch(self._caches, BLOCK_TOKENS, spans, _ignore, kernel=self._kernel)
        flat = [token for _, tokens in fed for token in tokens]
        positions = [p for span in spans for p in range(span.start, span.start + span.count)]
        hidden = self.decoder.forward(torch.tensor(flat), torch.tensor(positions), batch)
        lasts, at = [], 0
        for follower, tokens in fed:
            follower.computed += len(tokens)
            at += len(tokens)
            lasts.append(at - 1)
        return self.decoder.logits(hidden[lasts])[:, : self._vocab]


def _is_weighed(wish: Wish) -> bool:
    return weighs(wish.sampling) and not needs_guide(wish.sampling, wish.attempt.steering)


def _drawn(logits: torch.Tensor, one: Draw, odds: list[torch.Tensor] | None) -> int:
    """A token out of `logits`, [1, vocab]; what it was weighed by is added to `odds`."""
    if odds is None:
        return draw(logits, [one])[0]
    odds.append(probs(logits, [one.sampling]))
    return int(pick(odds[-1], [uniform(one, GUESS)]))


def check_vocabulary(draft: Path, target: Path) -> None:
    """Raises ModelError unless both folders give the same ids to the same tokens."""
    theirs, ours = _vocabulary(draft), _vocabulary(target)
    different = [token for token, i in ours.items() if theirs.get(token) != i]
    if different or len(theirs) != len(ours):
        what = f"token {min(different)!r}" if different else f"{len(theirs)} tokens"
        raise ModelError(
            f"a draft model of another vocabulary: {what} is not in it with the same id"
            if different else f"a draft model of another vocabulary: {what}, not {len(ours)}",
            where=str(draft),
            next_step="take a smaller model of the same family, or speculate with kind: ngram",
        )  # fmt: skip


def _vocabulary(folder: Path) -> dict[str, int]:
    """Raises ModelError when there is no tokenizer."""
    path = folder / "tokenizer.json"
    try:
        found = json.loads(path.read_bytes())
        vocab = found["model"]["vocab"]
        if isinstance(vocab, list):  # of pairs, token and score
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        added = {one["content"]: one["id"] for one in found.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"its tokenizer cannot be read: {error}", where=str(path)) from None
    return {**vocab, **added}


def _ignore(layer: int) -> None:
    """Nobody waits for this cache."""
