"""A report page: it stands alone, is small, reads without eyes, and shows what the summary says."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from kvasir.core.events import Closed, Retried, Routed
from kvasir.core.specs import SloSpec
from kvasir.measure import svg
from kvasir.measure.detail import ITL_EDGES_S, Detail, LinkUse, hottest, itl_counts
from kvasir.measure.html import page
from kvasir.measure.itl import ItlRuns
from kvasir.measure.summary import RequestOutcome, Summary, summarise
from kvasir.world.sim.record import Recorder

VOID = {"meta", "rect", "line", "polyline", "path"}  # meta has no end, the others end themselves
CHARTS = ["parts", "ttft", "slo", "itl", "links", "cache"]


class Tags(HTMLParser):
    """Opened and closed tags; a report's own markup must nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.svgs: list[dict[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag == "svg":
            self.svgs.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def shown(self) -> str:
        return "".join(self.text)


def outcomes() -> list[RequestOutcome]:
    return [
        RequestOutcome(
            ok=True, request_id=f"r{i}", why=f"prefill-0 -> decode-{i % 2}: <cost> {i}",
            prefill_worker=f"prefill-{i % 3}", prompt_tokens=100, cached_tokens=25 * (i % 3),
            output_tokens=10, start_s=float(i), ttft_s=0.1 * (i % 9), e2e_s=2.0,
            queue_s=0.01, prefill_s=0.05, transfer_s=0.02, first_step_s=0.02,
        )
        for i in range(200)
    ]  # fmt: skip


def itl() -> ItlRuns:
    runs = ItlRuns()
    runs.add(30, 0.010, 0.020, 3)
    runs.add(1, 2.0, 2.0)
    return runs


def detail() -> Detail:
    links = [
        LinkUse("cold", "core", 10.0, (0.0, 1.0, 0.0)),
        LinkUse("hot & <near>", "rack", 10.0, (5.0, 10.0, 0.0)),
    ]
    return Detail(1.0, hottest(links), itl_counts(itl()))


def summary(found: list[RequestOutcome]) -> Summary:
    return summarise(
        found, itl(), 200.0, SloSpec(ttft_s=0.5, tpot_s=1), first_token="decode",
        bytes_by_tier={"pod": 5_000_000, "core": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def text() -> str:
    found = outcomes()
    return page("a <b> run", summary(found), found, ["a note"], detail())


def test_it_stands_alone_and_is_small(text: str) -> None:
    assert len(text.encode()) < 300_000
    assert not re.search(r"(src|href)=|https?://|<script|@import|url\(", text)
    assert "prefers-color-scheme:dark" in text and "color-scheme:light dark" in text


def test_it_says_what_the_summary_says(text: str) -> None:
    shown = Tags(text).shown
    assert "a <b> run" in shown and "a note" in shown and "5.0 MB" in shown
    assert "67.0 %" in shown  # 134 of 200 have a TTFT of at most 0.5 s
    assert "25.0 %" in shown  # of the prompt tokens
    assert "&lt;cost&gt;" in text and "<cost>" not in text


def test_every_chart_reads_without_eyes(text: str) -> None:
    tags = Tags(text)
    assert len(tags.ids) == len(set(tags.ids))
    for name, drawing in zip(CHARTS, tags.svgs, strict=True):
        assert drawing["role"] == "img"
        assert drawing["aria-labelledby"] == f"{name}-t {name}-d"
        assert f"{name}-t" in tags.ids and f"{name}-d" in tags.ids
    assert text.count("<details>") == len(CHARTS)
    assert text.count('role="region" tabindex="0"') == 2 * len(CHARTS) + 2  # drawings and tables


def test_link_heat_names_the_hottest(text: str) -> None:
    shown = Tags(text).shown
    assert "The hottest is hot & <near>: 50.0 % on average, 100.0 % in its fullest" in shown
    assert shown.index("tier rack (1 links)") < shown.index("tier core (1 links)")
    assert 'fill-opacity="1"' in text and 'class="t"' in text  # full, and nothing at all


def test_cache_is_shown_by_tier_and_worker(text: str) -> None:
    assert "One tier, device memory: 4,975 tokens hit, 15,025 missed" in text
    cells = r"<tr><td>device</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>"
    rows = re.findall(cells, text)
    assert rows == [
        ("all", "4,975", "15,025"), ("prefill-0", "0", "6,700"), ("prefill-1", "1,675", "5,025"),
        ("prefill-2", "3,300", "3,300"),
    ]  # fmt: skip


def test_itl_bins_hold_every_gap() -> None:
    counts = itl_counts(itl())
    assert sum(counts) == 91 and len(counts) == len(ITL_EDGES_S) + 1
    for index, count in enumerate(counts):
        low, high = ITL_EDGES_S[index - 1] if index else 0.0, ITL_EDGES_S[min(index, 500)]
        inside = sum(low <= 0.010 + 0.010 * i / 29 < high for i in range(30)) * 3
        assert abs(count - inside - (low <= 2.0 < high)) <= 3, (low, high)  # an edge may round


def test_the_longest_waits_come_with_their_why(text: str) -> None:
    worst = re.findall(r'<th scope="row">(r\d+)</th><td>[\d.]+</td><td>([\d.]+)</td>', text)
    assert len(worst) == 10 and {seconds for _, seconds in worst} == {"0.80"}
    assert f"<cost> {worst[0][0][1:]}" in Tags(text).shown


def test_a_lost_attempt_is_part_of_the_why() -> None:
    recorder = Recorder()
    recorder.event(1.0, Routed("r1", 1, "disaggregated", "p0", "d0", "cheapest"))
    recorder.event(2.0, Retried("r1", 1, "p0 died"))
    recorder.event(2.0, Routed("r1", 2, "disaggregated", "p1", "d0", "second"))
    recorder.event(9.0, Closed("r1", "m", "disaggregated", "stop", 2, 5, 0, 3, ttft_s=7.0))
    (found,) = recorder.outcomes
    assert found.attempts == 2
    assert found.why == "p0 -> d0: cheapest; attempt 1 lost, p0 died; p1 -> d0: second"
    shown = Tags(page("x", summarise([found], ItlRuns(), 9.0), [found])).shown
    assert "attempt 1 lost, p0 died" in shown


def test_prefill_makes_the_first_token_without_the_hand_over() -> None:
    found = outcomes()
    text = page("x", summarise(found, ItlRuns(), 200.0, first_token="prefill"), found)
    rows = re.findall(r"<tr><td>all requests</td>(.*?)</tr>", text)
    cells = re.findall(r"<td>(.*?)</td>", rows[0])
    assert cells[:4] == ["10.0 ms", "50.0 ms", "0.0 ms", "0.0 ms"]


def test_an_empty_run_has_a_page() -> None:
    tags = Tags(page("x", summarise([], ItlRuns(), 0.0), []))
    assert "0 failed" in tags.shown and not tags.svgs


def test_a_wide_cluster_stays_small() -> None:
    """Charts and tables are bounded, whatever the number of links, workers and windows."""
    many = [LinkUse(f"link-{i}", "rack", 1.0, (0.5 * (i % 3),) * 120) for i in range(5_000)]
    found = [
        RequestOutcome(
            ok=True, request_id=f"r{i}", prefill_worker=f"prefill-{i}", prompt_tokens=9,
            start_s=float(i), why="w" * 9_000, attempts=3,
        )
        for i in range(3_000)
    ]  # fmt: skip
    text = page("x", summary(found), found, [], Detail(1.0, hottest(many), itl_counts(itl())))
    assert len(text.encode()) < 300_000
    assert "The 24 hottest are drawn" in text and "The 24 busiest are drawn" in text


@pytest.mark.parametrize("top", [1e-9, 0.3, 1.0, 7.0, 99.9, 100.0, 12_345.0])
def test_axes_are_round_and_hold_the_data(top: float) -> None:
    at = svg.ticks(top)
    assert at[0] == 0 and at[-1] >= top * (1 - 1e-9) and at[-2] < top
    assert 2 <= len(at) <= 7
    assert f"{at[1]:e}"[0] in "125"
