"""Block keys: a published construction, chained, salted, for full blocks only."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.keys import (
    KEY_BYTES,
    ROOT,
    block_key,
    block_keys,
    extend_keys,
    salt_of,
    trace_key,
)

SALT = salt_of("model", None, "default")
tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)
sizes = st.integers(1, 9)


def test_a_key_is_keyed_blake2b_over_parent_and_little_endian_tokens() -> None:
    tokens = [1, 128_000, 2**32 - 1]
    data = bytes(16) + struct.pack("<3I", *tokens)
    expected = hashlib.blake2b(data, digest_size=16, key=SALT).digest()
    assert block_key(ROOT, tokens, SALT) == expected
    assert len(expected) == KEY_BYTES == 16


def test_salt_and_key_are_written_down() -> None:
    """A key means the same in every process, version and gateway."""
    text = b"5:model\x000:\x007:default"
    assert hashlib.blake2b(text, digest_size=32).digest() == SALT
    assert block_keys(range(16), 16, SALT)[0].hex() == "02af5545c649a72f08d6c9be7b9db2b7"


@given(tokens_lists, sizes)
def test_only_full_blocks_have_keys_and_each_follows_its_parent(
    tokens: list[int], size: int
) -> None:
    keys = block_keys(tokens, size, SALT)
    assert len(keys) == len(tokens) // size
    parent = ROOT
    for i, key in enumerate(keys):
        parent = block_key(parent, tokens[i * size : (i + 1) * size], SALT)
        assert key == parent


@given(tokens_lists, tokens_lists, tokens_lists, sizes)
def test_keys_agree_exactly_as_far_as_the_tokens_do(
    common: list[int], one: list[int], other: list[int], size: int
) -> None:
    a, b = common + one, common + other
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    pairs = list(zip(block_keys(a, size, SALT), block_keys(b, size, SALT), strict=False))
    assert [x == y for x, y in pairs] == [i < same // size for i in range(len(pairs))]


@given(tokens_lists, sizes, st.lists(st.integers(0, 40), max_size=5))
def test_extending_gives_what_one_pass_gives(tokens: list[int], size: int, cuts: list[int]) -> None:
    keys: list[bytes] = []
    told: list[bytes] = []
    for cut in [*sorted(cuts), len(tokens)]:
        told += extend_keys(keys, tokens[:cut], size, SALT)
    assert tuple(keys) == tuple(told) == block_keys(tokens, size, SALT)


@pytest.mark.parametrize(
    "other",
    [
        ("model2", None, "default"),
        ("model", "lora", "default"),
        ("model", None, "tenant"),
        ("mode", "l", "default"),  # the same letters, parted elsewhere
        ("model", "default", ""),
    ],
)
def test_another_model_adapter_or_tenant_shares_nothing(
    other: tuple[str, str | None, str],
) -> None:
    tokens = range(64)
    mine, theirs = block_keys(tokens, 16, SALT), block_keys(tokens, 16, salt_of(*other))
    assert not set(mine) & set(theirs)


def test_salts_are_distinct_wherever_the_parts_are() -> None:
    parts = ["", "a", "aa", "1:a", "a\x00", "\x001:a"]
    salts = {salt_of(x, y, z) for x in parts for y in parts for z in parts}
    assert len(salts) == len(parts) ** 3


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_trace_ids_keep_their_identity(one: int, other: int) -> None:
    assert (trace_key(one) == trace_key(other)) == (one == other)
    assert len(trace_key(one)) == KEY_BYTES
