"""A run as a frame and as plots: the figures are the outcomes', and what is missing is said."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.specs import SloSpec
from kvasir.world.sim.run import Result, simulate
from tests.sims import cluster, trace

SLO = SloSpec(ttft_s=0.01, tpot_s=1.0)


@pytest.fixture(scope="module")
def result() -> Result:
    return simulate(cluster(slo=SLO), trace(60), detail=True)


def test_a_frame_has_a_row_a_request(result: Result) -> None:
    pandas = pytest.importorskip("pandas")
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == [o.request_id for o in result.outcomes]
    assert frame.ttft_s.mean() == pytest.approx(result.summary.ttft.mean_s)
    assert frame.prompt_tokens.sum() == result.summary.input_tokens
    assert result.summary.slo is not None and 0 < result.summary.slo.good < 60
    assert frame.good.sum() == result.summary.slo.good
    assert set(frame.prefill_worker) == {"prefill-0", "prefill-1"}
    one_token = frame[frame.output_tokens == 1]
    assert len(one_token) and all(math.isnan(value) for value in one_token.tpot_s)


def test_a_frame_without_pandas_names_the_extra(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvasir-llm\[frames\]'") as caught:
        result.to_pandas()
    assert len(str(caught.value).splitlines()) <= LINES_MAX


def test_plots_are_files_that_stand_alone(result: Result, tmp_path: Path) -> None:
    plots = result.plot()
    assert [c.name for c in plots.charts] == ["parts", "ttft", "slo", "itl", "links", "cache"]
    for path, chart in zip(plots.save(tmp_path / "made"), plots.charts, strict=True):
        text = path.read_text("utf-8")
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert path.stem == chart.name and chart.rows
        assert text.count("http") == 1  # the name space, and nothing fetched
    assert plots._repr_html_().count("<svg") == 6


def test_plots_are_deterministic(result: Result) -> None:
    again = simulate(cluster(slo=SLO), trace(60), detail=True)
    assert again.plot() == result.plot()


def test_detail_does_not_change_the_result(result: Result) -> None:
    assert simulate(cluster(slo=SLO), trace(60)).to_json() == result.to_json()


def test_one_plot_by_name_or_the_nearest(result: Result) -> None:
    (chart,) = result.plot("links").charts
    assert chart.title == "Link heat"
    with pytest.raises(ConfigError, match="nearest: links"):
        result.plot("linsk")
    with pytest.raises(ConfigError, match="detail=True"):
        simulate(cluster(), trace(5)).plot("links")
