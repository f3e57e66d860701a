"""Live counters: what files of byte counts say of tiers, and when they say nothing."""

from pathlib import Path

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.specs import TopologySpec
from kvasir.net.topology import Topology
from kvasir.world.live.telemetry import UNKNOWN, Counters

MB = 1_000_000
RACK, POD = 1, 2


def topology() -> Topology:
    """a and b on leaf0, c on leaf1: three links of 10 MB/s (tier 1), a trunk of 5 (tier 2)."""
    hosts = [("a", "leaf0"), ("b", "leaf0"), ("c", "leaf1")]
    links = [{"between": ends, "bandwidth": 10 * MB} for ends in hosts]
    spec = {
        "preset": "explicit", "nodes": [{"name": n, "gpus": 1} for n, _ in hosts],
        "switches": ["leaf0", "leaf1"],
        "links": [*links, {"between": ("leaf0", "leaf1"), "bandwidth": 5 * MB}],
    }  # fmt: skip
    return Topology(TopologySpec.model_validate(spec))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """One for each link and way, at 0."""
    found = {link.name: tmp_path / f"{i}" for i, link in enumerate(topology().links)}
    for path in found.values():
        path.write_text("0\n")
    return found


def counters(files: dict[str, Path]) -> Counters:
    made = Counters(topology(), {name: str(path) for name, path in files.items()})
    made.read(100.0)
    return made


def test_utilisation_is_of_all_links_of_a_tier_both_ways(files: dict[str, Path]) -> None:
    seen = counters(files)
    files["leaf0>leaf1"].write_text(f"{8 * MB}\n")
    files["a>leaf0"].write_text(f"{6 * MB}\n")
    used = seen.read(102.0)
    assert used[POD] == pytest.approx(8 / (2 * 5 * 2))
    assert used[RACK] == pytest.approx(6 / (6 * 10 * 2))
    assert used[0] == used[3] == UNKNOWN  # no such links
    assert seen.read(103.0)[POD] == 0.0  # nothing since


def test_headers_on_the_wire_do_not_make_more_than_all(files: dict[str, Path]) -> None:
    seen = counters(files)
    for name in ("leaf0>leaf1", "leaf1>leaf0"):
        files[name].write_text(f"{6 * MB}\n")
    assert seen.read(101.0)[POD] == 1.0


def test_a_tier_with_a_link_that_nobody_counts_is_unknown(files: dict[str, Path]) -> None:
    del files["b>leaf0"]
    seen = counters(files)
    files["a>leaf0"].write_text(f"{6 * MB}\n")
    used = seen.read(101.0)
    assert used[RACK] == UNKNOWN and used[POD] == 0.0


def test_a_counter_that_is_gone_or_began_anew_is_unknown_until_the_next(
    files: dict[str, Path],
) -> None:
    seen = counters(files)
    trunk = files["leaf0>leaf1"]
    trunk.write_text(f"{MB}\n")
    assert seen.read(101.0)[POD] == pytest.approx(0.1)
    trunk.unlink()
    assert seen.read(102.0)[POD] == UNKNOWN
    trunk.write_text("7\n")
    assert seen.read(103.0)[POD] == UNKNOWN
    trunk.write_text("3\n")
    assert seen.read(104.0)[POD] == UNKNOWN
    trunk.write_text(f"{MB + 3}\n")
    assert seen.read(105.0)[POD] == pytest.approx(0.1)


def test_a_link_that_is_not_there_is_said(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        Counters(topology(), {"leaf0>leaf2": str(files["leaf0>leaf1"])})
    assert caught.value.nearest == "leaf0>leaf1"
