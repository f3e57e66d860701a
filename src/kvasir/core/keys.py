"""Block keys: one 128-bit name for a block *and everything before it*. Knows tokens, not text.

    key_i = BLAKE2b-128(key = salt digest, key_{i-1} || tokens_i as little-endian uint32)

The salt names model fingerprint, adapter and tenant group, so equal keys mean equal KV. Only full
blocks have a key (Mooncake, arXiv 2407.00079 section 3; vLLM's block hash).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from kvasir.core.ids import BlockKey

KEY_BYTES = 16
ROOT: BlockKey = b"\x00" * KEY_BYTES


def salt_of(fingerprint: str, adapter: str | None, tenant_group: str) -> bytes:
    """A 32-byte salt; distinct for distinct (model fingerprint, adapter, tenant group)."""
    parts = (fingerprint, adapter or "", tenant_group)
    text = "\x00".join(f"{len(p)}:{p}" for p in parts)
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def block_key(parent: BlockKey, tokens: Sequence[int], salt: bytes) -> BlockKey:
    """The key of one full block that follows `parent`."""
    data = parent + array("I", tokens).tobytes()
    return hashlib.blake2b(data, digest_size=KEY_BYTES, key=salt).digest()


def block_keys(tokens: Sequence[int], block_size: int, salt: bytes) -> tuple[BlockKey, ...]:
    """Keys of all full blocks of `tokens`, first to last; the partial tail has none."""
    keys: list[BlockKey] = []
    extend_keys(keys, tokens, block_size, salt)
    return tuple(keys)


def extend_keys(
    keys: list[BlockKey], tokens: Sequence[int], block_size: int, salt: bytes
) -> list[BlockKey]:
    """Append the keys of full blocks of `tokens` that `keys` lacks; returns the new ones."""
    assert block_size > 0
    parent = keys[-1] if keys else ROOT
    new: list[BlockKey] = []
    for i in range(len(keys), len(tokens) // block_size):
        parent = block_key(parent, tokens[i * block_size : (i + 1) * block_size], salt)
        new.append(parent)
    keys.extend(new)
    return new


def trace_key(hash_id: int) -> BlockKey:
    """A trace's own block id as a key (an id stands for the block and all before it)."""
    return hash_id.to_bytes(KEY_BYTES, "big")


def trace_keys(hash_ids: Iterable[int], adapter: str | None) -> tuple[BlockKey, ...]:
    """Keys of a trace's block ids; other keys under each adapter."""
    plain = map(trace_key, hash_ids)
    if adapter is None:
        return tuple(plain)
    salt = salt_of("", adapter, "")
    return tuple(block_key(key, (), salt) for key in plain)
