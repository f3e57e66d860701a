"""`faults:` as written: what is refused, what a name stands for, and what it does to a run."""

import math
from pathlib import Path

import pytest

from kvasir.cli import main
from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.messages import KvEvents, Load
from kvasir.core.specs import Deployment
from kvasir.core.specs.faults import FaultSpec, LinkFault
from kvasir.core.specs.parse import parse_deployment, resolved
from kvasir.measure.recovery import Span, Window, recovery
from kvasir.measure.summary import RequestOutcome
from kvasir.world.sim.faults import Death, Faults, check, resolve, turns, windows

YAML = """\
models: [{name: m, shape: llama-3-8b}]
topology: {preset: fabric, pods: 1}
pools:
  - {name: p, role: prefill, count: 2, tp: 4}
  - {name: d, role: decode, count: 2, tp: 4}
faults:
"""


def parse(faults: str) -> Deployment:
    return parse_deployment(YAML + faults, "x.yaml")


def spec(faults: str) -> FaultSpec:
    found = resolve(parse(faults))
    assert found is not None
    return found


# --- what is refused, with its line ---------------------------------------------------------------

REFUSED = {
    "  loss: 1.5": "faults.loss is 1.5",
    "  loss: 1": "less than 1",
    "  deaths: 2": "random deaths are spread from 0 to until_s",
    "  links: [{link: rack-0-up, at_s: 1, scale: 1.5}]": "faults.links[0].scale is 1.5",
    "  links: [{link: rack-0-up, at_s: 1, scale: -1}]": "faults.links[0].scale is -1",
    "  links: [{at_s: 1}]": "give one of link and worker",
    "  links: [{link: rack-0-up, worker: d-0, at_s: 1}]": "give one of link and worker",
    "  links: [{link: rack-0-up, at_s: 1, times: 2, every_s: 3}]": "comes again before it is over",
    "  links: [{link: rack-0-up, at_s: 1, for_s: 4, times: 2, every_s: 3}]": "times > 1 needs",
    "  outages: [{worker: d-0, node: node-0, at_s: 1}]": "give one of worker and node",
    "  outages: [{worker: d-0, at_s: -1}]": "faults.outages[0].at_s is -1",
    "  traffic: [{sources: [3], target: 3, bandwidth: 1}]": "accelerator 3 is source and target",
    "  traffic: [{sources: [], target: 3, bandwidth: 1}]": "faults.traffic[0].sources",
    "  traffic: [{sources: [1], target: 3, bandwidth: 0}]": "faults.traffic[0].bandwidth is 0",
    "  traffic: [{sources: [1], target: 3, bandwidth: 1, off_s: 2}]": "on between its pauses",
    "  traffic: [{sources: [1], target: 3, bandwidth: 1, from_s: 5, until_s: 4}]": "it ends at 4 s",
    "  lnks: []": "faults.lnks is not a known key",
}


@pytest.mark.parametrize("faults", REFUSED)
def test_what_cannot_be_is_refused_with_its_line(faults: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(faults)
    assert "at: x.yaml:7" in str(error.value) and REFUSED[faults] in str(error.value)
    assert len(str(error.value).splitlines()) <= LINES_MAX


NOT_THERE = {
    "  links: [{link: rack-9-up, at_s: 1}]": ("no link 'rack-9-up'", "nearest: rack-"),
    "  links: [{worker: d-7, at_s: 1}]": ("no worker 'd-7'", "nearest: d-"),
    "  outages: [{worker: q-0, at_s: 1}]": ("no worker 'q-0'", "at: faults.outages[0]"),
    "  outages: [{node: node-9, at_s: 1}]": ("no node 'node-9'", "nearest: node-"),
    "  traffic: [{sources: [1], target: 32, bandwidth: 1}]": ("accelerator 32", "use 0 to 31"),
}


@pytest.mark.parametrize("faults", NOT_THERE)
def test_what_is_not_there_is_named_with_the_nearest(faults: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(parse(faults))
    for part in NOT_THERE[faults]:
        assert part in str(error.value)
    assert len(str(error.value).splitlines()) <= LINES_MAX


def test_validate_checks_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    for name, code in (("rack-0-up", 0), ("rack-9-up", 1)):
        file.write_text(YAML + f"  links: [{{link: {name}, at_s: 1}}]")
        assert (main(["config", "validate", str(file)]) != 0) == bool(code)
    assert "no link 'rack-9-up'" in capsys.readouterr().err


def test_a_check_without_faults_still_sees_that_pools_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="wants 20 x 4"):
        check(parse_deployment(YAML.replace("faults:", "").replace("prefill, count: 2",
                                                                   "prefill, count: 20"), "x"))


def test_units_and_yes_and_no_and_reading_back() -> None:
    text = (
        "  delay_s_max: 5 ms\n"
        "  traffic: [{sources: [8], target: 16, bandwidth: 40 Gb/s, on_s: 10ms, off_s: 1, "
        "random: true}]\n"
    )
    d = parse(text)
    assert d.faults is not None and d.faults.delay_s_max == 0.005
    assert d.faults.traffic[0].bandwidth == 5e9 and d.faults.traffic[0].random
    assert parse_deployment(resolved(d), "y.yaml") == d


# --- what names stand for -------------------------------------------------------------------------


def test_a_workers_nics_are_its_links_both_ways() -> None:
    found = spec("  links: [{worker: d-1, at_s: 1, scale: 0.1}]")
    assert [(f.link, f.worker, f.scale) for f in found.links] == [
        ("gpus-12..15-nic-out", "", 0.1), ("gpus-12..15-nic-in", "", 0.1),
    ]  # fmt: skip


def test_on_rails_they_are_the_nodes_nics_that_it_uses() -> None:
    text = YAML.replace("preset: fabric", "preset: fabric, rails: 8")
    found = resolve(parse_deployment(text + "  links: [{worker: d-1, at_s: 1}]", "x.yaml"))
    assert found is not None
    assert [f.link for f in found.links] == [
        f"node-1-nic-{rail}-{way}" for rail in (4, 5, 6, 7) for way in ("out", "in")
    ]


def test_a_node_takes_all_its_workers_down() -> None:
    found = spec("  outages: [{node: node-1, at_s: 5, for_s: 2}, {worker: p-0, at_s: 1}]")
    assert Faults(found, 0).deaths(["p-0", "d-0"], None) == [
        Death(1.0, "p-0", math.inf), Death(5.0, "d-0", 7.0), Death(5.0, "d-1", 7.0),
    ]  # fmt: skip


def test_flapping_comes_in_turns() -> None:
    fault = LinkFault(link="x", at_s=1, for_s=2, times=3, every_s=5)
    assert turns(fault) == [(1, 3), (6, 8), (11, 13)]
    assert turns(LinkFault(link="x", at_s=1)) == [(1, math.inf)]


def test_news_lag_by_kind_and_only_until_its_end() -> None:
    faults = Faults(FaultSpec(kv_event_lag_s=2.0, load_lag_s=0.5, until_s=10.0), 0)
    load = Load("w", 1, 0, 0, 9)
    assert faults.delay(1.0, KvEvents("w", 1, 1)) == 2.0
    assert faults.delay(1.0, load) == 0.5 and faults.delay(10.0, load) == 0.0
    assert faults.delay(1.0) == 0.0


# --- what they cost -------------------------------------------------------------------------------


def outcome(start_s: float, e2e_s: float, *, ttft_s: float = 1.0, **more: object) -> RequestOutcome:
    given = {"ok": True, "output_tokens": 1} | more
    return RequestOutcome(start_s=start_s, e2e_s=e2e_s, ttft_s=ttft_s, **given)  # type: ignore[arg-type]


def test_requests_are_told_by_the_faults_that_they_met() -> None:
    """Two windows, 2-4 and 3-6 s: 4 s in all. The SLO is 5 s to the first token."""
    slo = parse("  loss: 0").slo
    outcomes = [
        outcome(0, 2), outcome(0, 2.5, ttft_s=9.0), outcome(3.5, 1, attempts=3),
        outcome(5, 3, ok=False), outcome(6, 1),
    ]  # fmt: skip
    found = recovery(
        outcomes, [Window("a", (Span(2, 4),)), Window("b", (Span(3, 6), Span(9, 99)))], 8.0, 77, slo
    )
    a, b = found.windows
    assert (a.name, a.bad_s, a.requests, a.good, a.attempts) == ("a", 2, 2, 1, 4)
    assert (b.name, b.bad_s, b.requests, b.good, b.attempts) == ("b", 3, 2, 1, 4)
    assert (found.calm.bad_s, found.calm.requests, found.calm.good) == (4, 2, 2)
    assert (found.requests, found.retried, found.attempts) == (5, 1, 7)
    assert found.recomputed_tokens == 77
    lines = list(found.lines())
    assert "1 of 5 requests needed another attempt" in lines[0]
    assert lines[1] == "a (2.0 s): 1 of 2 requests good" and len(lines) == 4


def test_every_entry_of_the_file_has_a_window() -> None:
    found = parse(
        "  outages: [{node: node-1, at_s: 5}]\n"
        "  links: [{worker: d-0, at_s: 1, scale: 0.1, for_s: 1, times: 2, every_s: 4}]\n"
        "  traffic: [{sources: [1], target: 9, bandwidth: 1, from_s: 2, until_s: 3}]\n"
    ).faults
    assert found is not None
    assert windows(found) == [
        Window("node-1 down", (Span(5, math.inf),)),
        Window("NICs of d-0 at 0.1 of capacity", (Span(1, 2), Span(5, 6))),
        Window("traffic to accelerator 9", (Span(2, 3),)),
    ]


def test_what_the_documentation_shows_can_be_run() -> None:
    """Each whole YAML block of docs/network.md, on a deployment that has what it names."""
    page = (Path(__file__).parents[2] / "docs" / "network.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in page.split("```yaml\n")[1:]]
    blocks = [block for block in blocks if not block.startswith(" ")]
    head = "models: [{name: m, shape: llama-3-8b}]\npools:\n"
    for block in blocks:
        count = 2 if "faults:" in block else 1
        pools = [f"  - {{name: {n}, role: {n}, count: {count}}}\n" for n in ("prefill", "decode")]
        tcp = "transport: {kind: tcp}\n" if "endpoints:" in block else ""
        check(parse_deployment(head + "".join(pools) + tcp + block, "docs/network.md"))
    assert len(blocks) == 3
