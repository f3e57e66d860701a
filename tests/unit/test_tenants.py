"""`tenants` and `caches` in kvasir.yaml: what is wrong is named, with its line."""

from __future__ import annotations

import hashlib

import pytest

from kvasir.core.errors import LINES_MAX, ConfigError, Unauthorised
from kvasir.core.specs.parse import parse_deployment
from kvasir.gateway.tenants import ANYBODY, Tenants

A, B = (hashlib.sha256(key).hexdigest() for key in (b"key-a", b"key-b"))
BASE = "models: [{name: m, shape: tiny}]\npools: [{name: p, role: mixed, count: 1}]\n"
BAD = {
    "a name twice": ("tenants: [{name: a}, {name: a}]", "'a' is the name of two tenants", ""),
    "a key twice": (
        f"tenants: [{{name: a, keys_sha256: ['{A}']}}, {{name: b, keys_sha256: ['{A}']}}]",
        "this key is given twice", "",
    ),
    "a key itself": ("tenants: [{name: a, keys_sha256: [key-a]}]", "keys_sha256", ""),
    "a group of one": (
        "tenants: [{name: a, cache_group: lab}, {name: b, cache_group: lab},"
        " {name: c, cache_group: lap}]",
        "no other tenant is of the group 'lap'", "lab",
    ),
    "a share over one": ("caches: {pool_share_max: 1.5}", "pool_share_max", ""),
    "no name": ("tenants: [{name: ''}]", "name", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str) -> None:
    text, what, near = BAD[case]
    with pytest.raises(ConfigError) as caught:
        parse_deployment(BASE + text + "\n", "x.yaml")
    assert what in caught.value.what and caught.value.where == "x.yaml:3"
    assert caught.value.nearest == near
    assert len(str(caught.value).splitlines()) <= LINES_MAX


def test_a_good_one_reads_back() -> None:
    text = f"tenants: [{{name: a, keys_sha256: ['{A}'], cache_group: g, pinned_blocks_max: 0}},"
    d = parse_deployment(BASE + text + f" {{name: b, keys_sha256: ['{B}'], cache_group: g}}]", "x")
    assert [t.name for t in d.tenants] == ["a", "b"]
    assert Tenants(d.tenants).who("Bearer key-b") == "b"
    assert Tenants(d.tenants).who("bearer  key-a ") == "a"


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer ", "Bearer key-c", "key-a", "é" * 9])
def test_no_key_no_tenant(given: str | None) -> None:
    d = parse_deployment(BASE + f"tenants: [{{name: a, keys_sha256: ['{A}']}}]", "x")
    with pytest.raises(Unauthorised, match="API key"):
        Tenants(d.tenants).who(given)
    assert Tenants().who(given) == ANYBODY


def test_a_tenant_without_keys_cannot_be_claimed_with_nothing() -> None:
    d = parse_deployment(BASE + "tenants: [{name: a}]", "x")
    for given in (None, "Bearer ", f"Bearer {hashlib.sha256(b'').hexdigest()}"):
        with pytest.raises(Unauthorised):
            Tenants(d.tenants).who(given)
