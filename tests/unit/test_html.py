"""A report page: it stands alone, is small, and shows what the summary says."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from kvasir.core.specs import SloSpec
from kvasir.measure.html import page
from kvasir.measure.itl import ItlRuns
from kvasir.measure.summary import RequestOutcome, summarise

VOID = {"meta", "rect", "line", "polyline"}  # meta has no end, the others end themselves


class Tags(HTMLParser):
    """Opened and closed tags; a report's own markup must nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID | {"html", "th"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"html", "th"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outcomes() -> list[RequestOutcome]:
    return [
        RequestOutcome(
            ok=True, request_id=f"r{i}", why=f"prefill-0 -> decode-{i % 2}: <cost> {i}",
            prompt_tokens=100, output_tokens=10, start_s=float(i), ttft_s=0.1 * (i % 9), e2e_s=2.0,
            queue_s=0.01, prefill_s=0.05, transfer_s=0.02, first_step_s=0.02,
        )
        for i in range(200)
    ]  # fmt: skip


def test_page() -> None:
    found = outcomes()
    summary = summarise(
        found, ItlRuns(), 200.0, SloSpec(ttft_s=0.5, tpot_s=1), first_token="decode",
        bytes_by_tier={"pod": 5_000_000, "core": 0},
    )  # fmt: skip
    text = page("a <b> run", summary, found, ["a note"])
    assert len(text.encode()) < 300_000
    assert not re.search(r"(src|href)=|https?://|<script", text)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    shown = "".join(tags.text)
    assert "a <b> run" in shown and "a note" in shown and "5.0 MB" in shown
    assert text.count("<polyline") == 3
    worst = re.findall(r"<td>(r\d+)</td><td class=\"n\">([\d.]+) s", text)
    assert len(worst) == 10 and {seconds for _, seconds in worst} == {"0.80"}
    assert "&lt;cost&gt;" in text


def test_an_empty_run_has_a_page() -> None:
    assert "0 requests served" in page("x", summarise([], ItlRuns(), 0.0), [])
