"""Figures by hand: percentiles, runs of gaps, goodput of requests that meet all limits jointly."""

import json
import math
import random
from collections import Counter
from typing import Any

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.core.specs import SloSpec
from kvasir.measure.distribution import distribution
from kvasir.measure.itl import ItlRuns
from kvasir.measure.results import canonical, read_summary, result
from kvasir.measure.summary import RequestOutcome, Summary, summarise, tpot


def outcome(
    ttft_s: float = 0.1, tpot_s: float | None = 0.01, output_tokens: int = 11, **more: Any
) -> RequestOutcome:
    e2e_s = ttft_s + (tpot_s or 0.0) * (output_tokens - 1)
    fields: dict[str, Any] = {"prompt_tokens": 100, "start_s": 0.0, "e2e_s": e2e_s} | more
    return RequestOutcome(
        ok=True, ttft_s=ttft_s, tpot_s=tpot_s, output_tokens=output_tokens, **fields
    )


def runs(*rows: tuple[int, float, float, int]) -> ItlRuns:
    itl = ItlRuns()
    for count, first_s, last_s, times in rows:
        itl.add(count, first_s, last_s, times)
    return itl


# --- distributions ----------------------------------------------------------------------------


def test_distribution_by_hand() -> None:
    dist = distribution([4.0, 1.0, 3.0, 2.0], (25.0, 90.0, 100.0))
    assert (dist.count, dist.mean_s, dist.median_s) == (4, 2.5, 2.5)
    assert dist.std_s == math.sqrt(1.25)  # divided by n
    assert dist.percentile(25.0) == 1.75  # rank 0.75 of 0..3
    assert dist.percentile(90.0) == pytest.approx(3.7)
    assert dist.percentile(100.0) == 4.0


def test_no_sample_is_all_zero() -> None:
    empty = distribution([], (99.0,))
    assert (empty.count, empty.mean_s, empty.percentile(99.0)) == (0, 0.0, 0.0)
    assert ItlRuns().distribution((99.0,)) == empty


def test_percentiles_equal_numpy_to_the_last_bit() -> None:
    numpy = pytest.importorskip("numpy")
    draw = random.Random(3)
    for count in (1, 2, 7, 1_000):
        samples = [draw.lognormvariate(-3, 1) for _ in range(count)]
        asked = (0.0, 1.0, 33.3, 50.0, 90.0, 99.0, 99.9, 100.0)
        expected = numpy.percentile(samples, asked)
        assert [v for _, v in distribution(samples, asked).percentiles] == list(expected)


def test_a_percentile_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="101"):
        distribution([1.0], (101.0,))


# --- runs -------------------------------------------------------------------------------------


def test_runs_by_hand() -> None:
    """0.01, 0.02, 0.03 twice each, and 0.05 four times."""
    itl = runs((3, 0.01, 0.03, 2), (1, 0.05, 0.05, 4))
    dist = itl.distribution((0.0, 20.0, 99.0))
    assert (len(itl), itl.samples, dist.count) == (2, 10, 10)
    assert dist.mean_s == pytest.approx(0.032)
    assert dist.median_s == pytest.approx(0.03)  # ranks 4 and 5: both 0.03
    assert dist.percentile(0.0) == 0.01
    assert dist.percentile(20.0) == pytest.approx(0.018)  # rank 1.8, between 0.01 and 0.02
    assert dist.percentile(99.0) == 0.05
    squares = 2 * (0.022**2 + 0.012**2 + 0.002**2) + 4 * 0.018**2
    assert dist.std_s == pytest.approx(math.sqrt(squares / 10))


@pytest.mark.parametrize("seed", range(40))
def test_runs_equal_their_expansion(seed: int) -> None:
    draw = random.Random(seed)
    itl, samples = ItlRuns(), []
    for _ in range(draw.choice((1, 3, 40, 1_500))):
        count, times = draw.choice((1, 1, 2, 3, 40)), draw.choice((1, 1, 25))
        first = draw.choice((0.0, 0.02, draw.random()))
        last = first if count == 1 else draw.choice((first, 0.02, 9 * draw.random()))
        itl.add(count, first, last, times)
        step = (last - first) / max(count - 1, 1)
        samples += [first + i * step for i in range(count) for _ in range(times)]
    asked = (0.0, 0.1, 25.0, 90.0, 99.0, 99.9, 100.0)
    got, expected = itl.distribution(asked), distribution(samples, asked)
    assert got.count == expected.count
    for a, b in zip(got.percentiles, expected.percentiles, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-15)
    assert got.mean_s == pytest.approx(expected.mean_s, rel=1e-9)
    assert got.std_s == pytest.approx(expected.std_s, rel=1e-9, abs=1e-9)


def test_millions_of_equal_gaps_stay_small() -> None:
    itl = runs(*[(64, 0.02, 0.02, 1_000)] * 500)
    dist = itl.distribution((99.0,))
    assert dist.count == 32_000_000 and dist.percentile(99.0) == 0.02 and dist.std_s < 1e-9


def test_a_run_of_one_has_one_value() -> None:
    with pytest.raises(AssertionError):
        ItlRuns().add(1, 0.01, 0.02)
    itl = runs((1, 0.1 + 0.2, 0.3, 1))  # the same but for rounding
    assert itl.distribution((100.0,)).percentile(100.0) == itl.distribution(()).mean_s


def test_tokens_fall_into_their_second() -> None:
    """Gaps 1/4, 1/2, 3/4 after 10.0 s: tokens at 10.25, 10.75, 11.5, each in two rows."""
    itl = ItlRuns()
    itl.add(3, 0.25, 0.75, 2, 10.0)
    itl.add_each([0.75, 0.75], 10.5)  # 11.25, 12.0
    seconds: Counter[int] = Counter()
    assert itl.count_tokens(seconds, 10.0)
    assert seconds == {0: 4, 1: 3, 2: 1}
    itl.add(1, 0.1, 0.1)
    assert not itl.count_tokens(seconds, 10.0)


# --- summaries --------------------------------------------------------------------------------


def test_rates_and_lengths() -> None:
    done = [outcome(0.1, 0.01, 11, cached_tokens=40), outcome(0.3, None, 1)]
    failed = RequestOutcome(ok=False, prompt_tokens=999, error="timeout")
    summary = summarise([*done, failed], runs((10, 0.01, 0.01, 1)), 4.0)
    assert (summary.completed, summary.failed) == (2, 1)
    assert (summary.input_tokens, summary.output_tokens) == (200, 12)  # failed ones add nothing
    assert summary.per_second(summary.output_tokens) == 3.0
    assert summary.cache_hit_ratio == 0.2
    assert summary.ttft.mean_s == pytest.approx(0.2)
    assert summary.tpot.count == 1  # a single token has no TPOT
    assert summary.errors == {"timeout": 1}
    assert summary.goodput is None and summary.split is None


def test_tpot_is_per_token_after_the_first() -> None:
    assert tpot(0.5, 2.5, 11) == 0.2
    assert tpot(0.5, 0.5, 1) is None
    times_only = RequestOutcome(ok=True, ttft_s=0.5, e2e_s=2.5, output_tokens=11)
    assert summarise([times_only], ItlRuns(), 1.0).tpot.mean_s == 0.2


def test_goodput_is_joint_not_separate() -> None:
    """Three of four meet TTFT and three meet TPOT, but only two meet both; one failed."""
    slo = SloSpec(ttft_s=0.2, tpot_s=0.02)
    outcomes = [
        outcome(0.1, 0.01),
        outcome(0.2, 0.02),  # on the limit is within it
        outcome(0.3, 0.01),
        outcome(0.1, 0.03),
        RequestOutcome(ok=False),
    ]
    summary = summarise(outcomes, ItlRuns(), 10.0, slo, gpus=4)
    assert summary.slo is not None
    assert (summary.slo.ttft_met, summary.slo.tpot_met, summary.slo.good) == (3, 3, 2)
    assert summary.slo.attainment == 0.4  # failed ones count
    assert summary.goodput == 0.2 and summary.goodput_per_gpu == 0.05


def test_a_single_token_meets_any_tpot() -> None:
    summary = summarise([outcome(0.1, None, 1)], ItlRuns(), 1.0, Slo(0.2, 0.001))
    assert summary.slo is not None and summary.slo.good == 1


def test_an_slo_on_itl_counts_too() -> None:
    slo = SloSpec(ttft_s=1, tpot_s=1, itl_p99_s=0.05)
    outcomes = [outcome(itl_p99_s=0.04), outcome(itl_p99_s=0.06), outcome(0.1, None, 1)]
    summary = summarise(outcomes, ItlRuns(), 1.0, slo)
    assert summary.slo is not None and summary.slo.good == 2
    with pytest.raises(ValueError, match="itl_p99_s"):
        summarise([outcome()], ItlRuns(), 1.0, slo)


@pytest.mark.parametrize(
    ("first_token", "other_s"), [("decode", 0.05), ("", 0.05), ("prefill", 0.3)]
)
def test_split_adds_up_to_ttft(first_token: str, other_s: float) -> None:
    parts: dict[str, Any] = {"queue_s": 0.1, "prefill_s": 0.2, "first_step_s": 0.05}
    split = summarise(
        [
            outcome(0.8, transfer_s=0.4, second_token_delay_s=0.3, **parts),
            outcome(0.4, **parts),
            outcome(9.0),  # did not report
        ],
        ItlRuns(),
        1.0,
        first_token=first_token,
    ).split
    assert split is not None and split.count == 2
    assert split.transfer_s == pytest.approx(0.2)
    assert split.other_s == pytest.approx(other_s)
    assert split.second_token_delay_s == 0.3  # only of those that were handed over


def test_peak_concurrency_is_of_half_open_spans() -> None:
    def span(start_s: float, e2e_s: float) -> RequestOutcome:
        return RequestOutcome(ok=True, start_s=start_s, e2e_s=e2e_s, output_tokens=1)

    summary = summarise([span(0, 2), span(1, 1), span(2, 5), span(2, 1)], ItlRuns(), 7.0)
    assert summary.peak_concurrency == 2
    assert summarise([outcome(start_s=None)], ItlRuns(), 1.0).peak_concurrency is None


def test_peak_output_throughput_counts_first_tokens_too() -> None:
    itl = ItlRuns()
    itl.add_each([0.125] * 10, 5.5)  # 3 in the first second, 7 in the next
    requests = [outcome(0.5, 0.125, 11, start_s=5.0), outcome(1.6, None, 1, start_s=5.0)]
    summary = summarise(requests, itl, 3.0)
    assert summary.peak_output_tokens_per_s == 8
    assert summarise(requests, runs((1, 0.1, 0.1, 1)), 3.0).peak_output_tokens_per_s is None


def test_nothing_at_all() -> None:
    summary = summarise([], ItlRuns(), 0.0, SloSpec(), gpus=2)
    assert summary.goodput == 0.0 and summary.slo is not None and summary.slo.attainment == 0.0
    canonical(result(summary))


# --- result files -----------------------------------------------------------------------------


def whole() -> Summary:
    return summarise(
        [outcome(0.1, 0.01), outcome(0.3, 0.03, queue_s=0.1, path="disaggregated")],
        runs((10, 0.01, 0.03, 1)),
        2.0,
        SloSpec(ttft_s=0.2, tpot_s=0.02),
        percentiles=(50.0, 99.0, 99.9),
        gpus=2,
        first_token="prefill",
        bytes_by_tier={"rack": 10**12, "node": 7},
        request_rate=math.inf,
        notes=("spread",),
    )


def test_result_has_the_keys_of_vllm() -> None:
    content = result(whole())
    assert content["duration"] == 2.0 and content["completed"] == 2
    assert content["total_input_tokens"] == 200 and content["total_output_tokens"] == 22
    assert content["request_throughput"] == 1.0 and content["request_goodput"] == 0.5
    assert content["output_throughput"] == 11.0 and content["total_token_throughput"] == 111.0
    assert content["request_rate"] == "inf"
    for name in ("ttft", "tpot", "itl", "e2el"):
        for key in ("mean", "median", "std", "p50", "p99", "p99.9"):
            assert isinstance(content[f"{key}_{name}_ms"], float)
    assert content["mean_ttft_ms"] == pytest.approx(200.0)
    assert content["slo_attainment"] == 0.5 and content["goodput_per_gpu"] == 0.25


def test_result_bytes_depend_on_the_summary_alone() -> None:
    first, second = canonical(result(whole())), canonical(result(whole()))
    assert first == second
    content = json.loads(first)
    keys = list(content)
    assert keys == sorted(keys)
    reordered = dict(reversed(content.items()))
    assert canonical(reordered) == first
    assert first.endswith(b"}\n")


def test_result_file_gives_the_summary_back() -> None:
    assert read_summary(canonical(result(whole()))) == whole()


@pytest.mark.parametrize("data", [b"", b"{}", b'{"summary": 3}', b"\xff"])
def test_what_is_no_result_file_says_so(data: bytes) -> None:
    with pytest.raises(ConfigError, match="not a result file"):
        read_summary(data, where="x.json")


def test_a_result_is_finite() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"x": math.inf})
