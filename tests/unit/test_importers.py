"""Cluster descriptions become a `topology:` section that parses; a broken line is named."""

import json
from pathlib import Path

import pytest

from kvasir.cli import main
from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.messages import Location
from kvasir.core.specs import TopologySpec
from kvasir.core.specs.parse import parse_deployment
from kvasir.net.importers import IMPORTERS, Options
from kvasir.net.topology import Topology

DATA = Path(__file__).parents[1] / "data" / "topology"
FILES = {"slurm": "topology.conf", "nvidia-smi": "topo-m.txt", "k8s": "nodes.json"}
REST = """\
models: [{name: m, shape: llama-3-8b}]
pools: [{name: w, role: mixed, count: 1}]
"""


def imported(source: str, text: str | None = None, **options: object) -> TopologySpec:
    text = (DATA / FILES[source]).read_text() if text is None else text
    return IMPORTERS[source](text, "x", Options()._replace(**options)).spec


def rates(spec: TopologySpec) -> dict[str, float]:
    return {"-".join(link.between): link.bandwidth / 1e9 for link in spec.links}


@pytest.mark.parametrize("source", FILES)
def test_what_is_printed_is_a_section_that_reads_back_equal(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "import-topology", "--from", source, str(DATA / FILES[source])]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# ")
    assert parse_deployment(REST + printed, "x.yaml").topology == imported(source)


# --- Slurm ----------------------------------------------------------------------------------------


def test_slurm_switches_hostlists_and_speeds() -> None:
    """8 accelerators of 12.5 GB/s a node; 800 Gb/s between leaf and spine, as its line says."""
    spec = imported("slurm")
    assert [n.name for n in spec.nodes] == [f"gpu{n:02}" for n in range(8)]
    assert spec.switches == ("leaf0", "leaf1", "spine")
    assert rates(spec) == {
        **{f"gpu{n:02}-leaf{n // 4}": 100.0 for n in range(8)},
        "leaf0-spine": 100.0, "leaf1-spine": 100.0,
    }  # fmt: skip
    topology = Topology(spec)
    assert [topology.tier(Location((0,)), Location((g,))) for g in (1, 8, 32)] == [0, 1, 2]


def test_slurm_uplinks_without_a_speed_have_their_members_rates() -> None:
    text = "SwitchName=s0 Nodes=a[1-2]\nswitchname=s1 nodes=b\nSwitchName=top Switches=s[0-1]\n"
    spec = imported("slurm", text, gpus_per_node=4, nic_bandwidth=50e9, oversubscription=2.0)
    assert rates(spec) == {
        "a1-s0": 200.0, "a2-s0": 200.0, "b-s1": 200.0, "s0-top": 200.0, "s1-top": 100.0,
    }  # fmt: skip


def test_slurm_nodes_on_two_switches_share_their_nics_between_them() -> None:
    text = "SwitchName=s0 Nodes=r[1-2]n[08-10]\nSwitchName=s1 Nodes=r[1-2]n[08-10]\n"
    spec = imported("slurm", text)
    assert [n.name for n in spec.nodes] == [f"r{r}n{n:02}" for r in (1, 2) for n in (8, 9, 10)]
    assert set(rates(spec).values()) == {50.0}


SLURM_BAD = {
    "SwitchName=s Nodes=a\nBlockName=b Nodes=c": (2, "BlockName=b"),
    "SwitchName=s Nodes=a\n\nSwitchName=s Nodes=b": (3, "first on line 1"),
    "# all\nSwitchName=s Nodes=a[3-1]": (2, "'3-1' is not a range"),
    "SwitchName=s Nodes=a[1-2": (1, "bracket"),
    "SwitchName=s Nodes=a[1-2] LinkSpeed=fast": (1, "LinkSpeed 'fast'"),
    "SwitchName=s": (1, "neither Nodes nor Switches"),
    "Nodes=a": (1, "without SwitchName"),
    "SwitchName=s0 Nodes=a\nSwitchName=top Switches=s0,s2": (2, "no switch 's2' under 'top'"),
    "SwitchName=s Nodes=a[0-999999]": (1, "names more than"),
}


@pytest.mark.parametrize("text", SLURM_BAD)
def test_a_broken_line_of_slurm_is_named(text: str) -> None:
    line, what = SLURM_BAD[text]
    with pytest.raises(ConfigError) as error:
        imported("slurm", text)
    assert f"at: x:{line}\n" in f"{error.value}\n" and what in str(error.value)
    assert len(str(error.value).splitlines()) <= LINES_MAX


def test_slurm_trees_that_are_none() -> None:
    with pytest.raises(ConfigError, match="is above itself"):
        imported("slurm", "SwitchName=a Switches=b Nodes=n\nSwitchName=b Switches=a")
    with pytest.raises(ConfigError, match="no path between 'm' and 'n'"):
        imported("slurm", "SwitchName=a Nodes=m\nSwitchName=b Nodes=n")
    with pytest.raises(ConfigError, match="no switch in it"):
        imported("slurm", "# nothing\n")


# --- nvidia-smi -----------------------------------------------------------------------------------


def test_the_matrix_gives_nvlink_and_rails() -> None:
    """NV18 is 450 GB/s; NIC 1 is nobody's nearest, so two rails for four accelerators."""
    spec = imported("nvidia-smi", nic_bandwidth=50e9, nodes=4)
    assert (spec.gpus_per_node, spec.nodes_per_rack, spec.rails) == (4, 4, 2)
    assert (spec.nvlink_bandwidth, spec.nic_bandwidth) == (450e9, 50e9)


def test_a_node_without_nics_or_with_nvlink_between_some_only() -> None:
    text = "      GPU0 GPU1 GPU2 CPU Affinity\nGPU0 X NV4 SYS 0-7\nGPU1 NV4 X SYS\nGPU2 SYS SYS X\n"
    found = IMPORTERS["nvidia-smi"](text, "x", Options())
    assert found.spec.nvlink_bandwidth == 25e9 and found.spec.rails is None
    assert any("some pairs have no NVLink" in note for note in found.notes)


MATRIX_BAD = {
    "\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNVX\t X \n": ("x:3", "GPU1 to GPU0 is 'NVX'"),
    "\tGPU0\tGPU1\nGPU0\t X \n": ("x:2", "GPU0 has 1 of 2 columns"),
    "\tGPU0\tGPU1\nGPU0\t X \tNV18\n": ("x", "the row of GPU1 is missing"),
    "GPU 0: NVIDIA H100 (UUID: GPU-1)\n": ("x", "no line of the matrix"),
}


@pytest.mark.parametrize("text", MATRIX_BAD)
def test_a_broken_row_of_the_matrix_is_named(text: str) -> None:
    where, what = MATRIX_BAD[text]
    with pytest.raises(ConfigError) as error:
        imported("nvidia-smi", text)
    assert f"at: {where}\n" in f"{error.value}\n" and what in str(error.value)


# --- Kubernetes -----------------------------------------------------------------------------------


def test_labels_become_switches_and_equal_names_of_two_zones_stay_two() -> None:
    spec = imported("k8s")
    assert [(n.name, n.gpus) for n in spec.nodes] == [
        ("gpu-a0", 8), ("gpu-a1", 8), ("gpu-a2", 4), ("gpu-b0", 8),
    ]  # fmt: skip
    links = rates(spec)
    assert links["gpu-a2-rack-r2"] == 50.0 and links["zone-a-region-north"] == 250.0
    topology = Topology(spec)
    tiers = [topology.tier(Location((0,)), Location((g,))) for g in (8, 16, 20)]
    assert tiers == [1, 2, 3], "a rack, a zone, a region; rack r1 of zone b is another"


def test_nodes_without_labels_hang_together_by_one_switch_and_it_is_said() -> None:
    found = IMPORTERS["k8s"](
        (DATA / "nodes.json").read_text(), "x", Options(labels=("example.com/rack",))
    )
    assert {link.between[1] for link in found.spec.links} == {"core"}
    assert any("no node has label example.com/rack" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{\n  items: 1\n}", "at: x:2"),
        ("[]", "no `items`"),
        (json.dumps({"items": [{"kind": "Node"}]}), "items[0]"),
        (json.dumps({"items": [{"metadata": {"name": "a"}, "status": {}}]}), "ends in /gpu"),
    ],
)
def test_what_is_not_a_list_of_nodes_is_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        imported("k8s", text)
    assert what in str(error.value)


def test_a_rate_that_is_none_and_a_file_that_is_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    conf = str(DATA / "topology.conf")
    line = ["config", "import-topology", "--from", "slurm"]
    assert main([*line, conf, "--nic-bandwidth", "fast"]) != 0
    assert "--nic-bandwidth: 'fast'" in capsys.readouterr().err
    assert main([*line, "nowhere.conf"]) != 0
    assert "at: nowhere.conf" in capsys.readouterr().err
