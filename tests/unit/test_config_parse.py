"""A wrong `kvasir.yaml` gives one error of at most five lines: what, line, nearest, next step."""

import json
from itertools import pairwise

import pytest

from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.specs import Deployment
from kvasir.core.specs.parse import json_schema, parse_deployment, resolved

GOOD = """\
name: small
models:
  - name: tiny
    shape: llama-3-8b
pools:
  - name: p
    role: prefill
    count: 1
  - name: d
    role: decode
    count: 2
policy:
  route:
    name: netkv
    decode_choice: arrival
limits:
  beat_s: 1
"""
KNOWN = {
    "known_routes": ("netkv", "round_robin", "least_loaded"),
    "known_batches": ("token_budget",),
    "known_admits": ("bounded",),
    "known_evicts": ("lru",),
    "known_shapes": ("llama-3-8b", "llama-3-70b"),
}


def parse(text: str) -> Deployment:
    return parse_deployment(text, "x.yaml", **KNOWN)  # type: ignore[arg-type]


def replaced(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


# id: (text, line, part of what, nearest)
BAD: dict[str, tuple[str, int, str, str]] = {
    "unknown key at the top": (replaced("pools:", "pool:"), 5, "pool is not a known key", "pools"),
    "unknown key in a list": (
        replaced("    count: 2", "    cuont: 2"), 11, "pools[1].cuont is not a known key", "count",
    ),
    "key of another section": (
        replaced("  route:\n", "  oracle: tier\n  route:\n"), 13, "policy.oracle",
        "policy.route.oracle",
    ),
    "far from every key": (
        GOOD + "zzz: 1\n", 18, "zzz is not a known key", "block_size, caches",
    ),
    "wrong choice": (
        replaced("role: decode", "role: decoder"), 10,
        "pools[1].role is 'decoder', not one of prefill, decode, mixed", "decode",
    ),
    "wrong nested choice": (
        replaced("decode_choice: arrival", "decode_choice: prefil_end"), 15,
        "policy.route.decode_choice", "prefill_end",
    ),
    "unknown route": (
        replaced("name: netkv", "name: netvk"), 14, "policy.route.name: no 'netvk'", "netkv",
    ),
    "unknown admit": (
        replaced("  route:\n", "  admit: bound\n  route:\n"), 13, "policy.admit", "bounded",
    ),
    "unknown shape": (
        replaced("llama-3-8b", "llama-3-80b"), 4, "models[0].shape", "llama-3-8b",
    ),
    "unknown hardware": (
        replaced("    count: 1\n", "    count: 1\n    hardware: h10\n"), 9,
        "hardware 'h10' unknown", "h100",
    ),
    "unknown model of a pool": (
        replaced("    count: 2\n", "    count: 2\n    model: tin\n"), 12,
        "model 'tin' unknown", "tiny",
    ),
    "only one role": (replaced("role: decode", "role: prefill"), 5, "only prefill workers", ""),
    "names not distinct": (replaced("name: d\n", "name: p\n"), 5, "not distinct", ""),
    "missing key": (replaced("    count: 2\n", ""), 9, "pools[1].count is missing", ""),
    "missing section": (
        replaced("models:\n  - name: tiny\n    shape: llama-3-8b\n", ""), 1,
        "models is missing", "",
    ),
    "not a number": (replaced("count: 2", "count: two"), 11, "pools[1].count is 'two'", ""),
    "out of range": (
        replaced("count: 2", "count: 0"), 11, "pools[1].count is 0: should be greater than 0", "",
    ),
    "a yes for a number": (replaced("count: 2", "count: yes"), 11, "pools[1].count is true", ""),
    "a bare word that YAML reads as false": (
        replaced("name: tiny", "name: off"), 3, "put it in quotes", "",
    ),
    "not finite": (replaced("beat_s: 1", "beat_s: .inf"), 17, "limits.beat_s is inf", ""),
    "empty section": (
        replaced("limits:\n  beat_s: 1\n", "limits:\n"), 16, "limits is empty", "",
    ),
    "list for a section": (
        replaced("  beat_s: 1", "  - beat_s"), 16, "limits is ['beat_s'], not a set of", "",
    ),
    "unknown unit": (
        replaced("beat_s: 1", "beat_s: 1 parsec"), 17, "limits.beat_s: '1 parsec' is not", "",
    ),
    "shape without its sizes": (
        replaced("shape: llama-3-8b", "shape:\n      hidden: 64"), 4,
        "models[0].shape.layers is missing", "",
    ),
    "duplicate key": (GOOD + "name: again\n", 18, "name is given twice, first on line 1", ""),
    "duplicate inner key": (
        replaced("    count: 2", "    count: 2\n    count: 3"), 12,
        "pools[1].count is given twice, first on line 11", "",
    ),
    "key that is not text": (GOOD + "7: x\n", 18, "the key '7' is not text", ""),
    "tab": (replaced("  beat_s", "\tbeat_s"), 17, "found character '\\t'", ""),
    "no colon": (replaced("count: 2", "count 2"), 11, "could not find expected ':'", ""),
    "open bracket": (GOOD + "hardware: [\n", 19, "not valid YAML", ""),
    "bad indent": (replaced("    role: decode", "   role: decode"), 10, "not valid YAML", ""),
    "control character": (replaced("small", "sm\x00all"), 1, "control character", ""),
    "object tag": (GOOD + "seed: !!python/object:os.system {}\n", 18, "not valid YAML", ""),
    "two documents": (GOOD + "---\nname: b\n", 18, "not valid YAML", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_error_names_line_and_nearest(case: str) -> None:
    text, line, what, near = BAD[case]
    with pytest.raises(ConfigError) as caught:
        parse(text)
    error = caught.value
    assert error.where == f"x.yaml:{line}", str(error)
    assert what in error.what
    assert error.nearest.startswith(near) if near else error.nearest == ""
    assert len(str(error).splitlines()) <= LINES_MAX


# Nothing here has a line of its own.
WHOLE = {
    "empty": "",
    "only a comment": "# nothing\n",
    "a list": "- a\n- b\n",
    "a word": "hello\n",
    "no such date": "name: 2024-13-45\n",
    "too deep for the parser": "[" * 100_000,
    "too deep": "a: " + "[" * 40 + "]" * 40,
    "holds itself": "name: &a [*a]\n",
    "alias bomb": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in pairwise("abcdefgh")),
    "too long": "# " + "x" * 2_000_000,
}


@pytest.mark.parametrize("case", WHOLE)
def test_unusable_text_is_one_short_error(case: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(WHOLE[case])
    assert caught.value.where == "x.yaml"
    assert len(str(caught.value).splitlines()) <= LINES_MAX


def test_several_faults_show_the_first_and_count_the_rest() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(replaced("count: 1", "count: 0").replace("count: 2", "count: -1"))
    assert caught.value.what.endswith("(and 1 more)")
    assert caught.value.where == "x.yaml:8"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("limits: {beat_s: 250 ms}", "limits.beat_s", 0.25),
        ("limits: {lease_s: 10min}", "limits.lease_s", 600.0),
        ("limits: {body_bytes_max: 4 MiB}", "limits.body_bytes_max", 4 * 1024**2),
        ("transport: {bytes_per_s_max: 1.5 GB/s}", "transport.bytes_per_s_max", 1.5e9),
        ("transport: {bytes_per_s_max: 200 Mbit/s}", "transport.bytes_per_s_max", 25e6),
        ("topology: {nic_bandwidth: 100 Gb/s}", "topology.nic_bandwidth", 12.5e9),
        ("topology: {nic_bandwidth: 100Gbps}", "topology.nic_bandwidth", 12.5e9),
        ("topology: {nic_bandwidth: 12.5GB/s}", "topology.nic_bandwidth", 12.5e9),
        ("topology: {nic_bandwidth: 12.5e9}", "topology.nic_bandwidth", 12.5e9),
        ("slo: {ttft_s: 200 ms}", "slo.ttft_s", 0.2),
    ],
)
def test_units(text: str, path: str, value: float) -> None:
    deployment = parse(GOOD.replace("limits:\n  beat_s: 1\n", "") + text)
    found: object = deployment
    for step in path.split("."):
        found = getattr(found, step)
    assert found == pytest.approx(value, rel=1e-12)


def test_anchors_and_merges_work_and_keep_their_lines() -> None:
    text = "models:\n  - name: tiny\npools:\n  - &base\n    name: p\n    role: mixed\n"
    text += "    count: 1\n  - <<: *base\n    name: q\n    count: none\n"
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.where == "x.yaml:10"
    assert [p.role for p in parse(text.replace("none", "2")).pools] == ["mixed", "mixed"]


def test_names_are_unchecked_unless_given() -> None:
    text = replaced("name: netkv", "name: my_own")
    assert parse_deployment(text, "x").policy.route.name == "my_own"


def test_resolved_reads_back_equal_and_shows_defaults() -> None:
    deployment = parse(GOOD)
    text = resolved(deployment)
    assert parse(text) == deployment
    assert "queue_max: 4096" in text


def test_schema_names_every_section_and_allows_units() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(Deployment.model_fields)
    kinds = [b.get("type") for b in schema["$defs"]["LimitsSpec"]["properties"]["beat_s"]["anyOf"]]
    assert kinds == ["number", "string"]
