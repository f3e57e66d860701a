"""In which order waiting prompts enter. Knows keys and how much is cached; no budgets, no time."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.core.ids import BlockKey


def longest_prefix(cached: Sequence[int]) -> tuple[int, ...]:
    """Indices by cached tokens, most first; equal ones keep their order (SGLang's `lpm`,
    arXiv 2312.07104)."""
    return tuple(sorted(range(len(cached)), key=lambda i: -cached[i]))


def depth_first(
    prompts: Sequence[Sequence[BlockKey]], cached_blocks: Sequence[int]
) -> tuple[int, ...]:
    """Indices in the order of a walk through the tree of all prompts' prefixes (SGLang's
    `dfs-weight`). `prompts[i]` names blocks, the first `cached_blocks[i]` of them are cached.

    Where the tree parts, a branch that is in the cache comes first, so that a walk goes on where
    the step before left it; then the branch under which more prompts wait; then the one that came
    first. If the cache holds the longest prompt, each shared block is computed once, which is the
    best possible (RadixAttention, arXiv 2312.07104, theorem 3.1).
    """
    waiting: dict[BlockKey, int] = {}
    first: dict[BlockKey, int] = {}
    cached: set[BlockKey] = set()
    for index, keys in enumerate(prompts):
        cached.update(keys[: cached_blocks[index]])
        for key in keys:
            waiting[key] = waiting.get(key, 0) + 1
            first.setdefault(key, index)

    def path(index: int) -> list[tuple[bool, int, int]]:
        return [(key not in cached, -waiting[key], first[key]) for key in prompts[index]]

    return tuple(sorted(range(len(prompts)), key=path))
