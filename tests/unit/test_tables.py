"""The tables to the byte: vLLM's own part, Kvasir's sections after it, and runs side by side."""

from typing import Any

from msgspec.structs import replace

from kvasir.core.specs import SloSpec
from kvasir.measure.itl import ItlRuns
from kvasir.measure.summary import RequestOutcome, Summary, summarise
from kvasir.measure.tables import compare_table, table, vllm_table

# `|` stands where spaces end a line.
VLLM = """\
============ Serving Benchmark Result ============
Successful requests:                     2         |
Failed requests:                         1         |
Maximum request concurrency:             8         |
Request rate configured (RPS):           1.50      |
Benchmark duration (s):                  4.00      |
Total input tokens:                      3000      |
Total generated tokens:                  12        |
Request throughput (req/s):              0.50      |
Request goodput (req/s):                 0.25      |
Output token throughput (tok/s):         3.00      |
Peak output token throughput (tok/s):    12.00     |
Peak concurrent requests:                2.00      |
Total token throughput (tok/s):          753.00    |
---------------Time to First Token----------------
Mean TTFT (ms):                          400.00    |
Median TTFT (ms):                        400.00    |
P99 TTFT (ms):                           596.00    |
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          20.00     |
Median TPOT (ms):                        20.00     |
P99 TPOT (ms):                           20.00     |
---------------Inter-token Latency----------------
Mean ITL (ms):                           20.00     |
Median ITL (ms):                         20.00     |
P99 ITL (ms):                            20.00     |
----------------End-to-end Latency----------------
Mean E2EL (ms):                          500.00    |
Median E2EL (ms):                        500.00    |
P99 E2EL (ms):                           598.00    |
=================================================="""

OWN = """\
---------------------Goodput----------------------
SLO TTFT / TPOT (ms):                    500 / 25  |
Good requests (all limits met):          1         |
SLO attainment (%):                      33.33     |
TTFT attainment (%):                     33.33     |
TPOT attainment (%):                     66.67     |
GPUs:                                    4         |
Goodput per GPU (req/s):                 0.0625    |
------------Time to First Token, Parts------------
First token made by:                     decode    |
Mean queue (ms):                         50.00     |
Mean prefill (ms):                       200.00    |
Mean transfer (ms):                      100.00    |
Mean first step (ms):                    20.00     |
Mean other (ms):                         30.00     |
--------------Prefix Cache and Paths--------------
Cached input tokens:                     600       |
Cache hit ratio (%):                     20.00     |
Requests aggregated:                     1         |
Requests disaggregated:                  1         |
------------------KV Bytes Moved------------------
node:                                    7 B       |
rack:                                    1.5 GB    |
----------------------Errors----------------------
timeout:                                 1         |
----------------------Notes-----------------------
* a note that is so long that it needs a second
  line
=================================================="""


def run() -> Summary:
    parts: dict[str, Any] = {"prefill_s": 0.2, "first_step_s": 0.02}
    itl = ItlRuns()
    itl.add(10, 0.02, 0.02, 1, 0.2)
    first = RequestOutcome(
        ok=True, start_s=0.0, ttft_s=0.2, tpot_s=0.02, e2e_s=0.4, prompt_tokens=1000,
        output_tokens=11, cached_tokens=600, path="aggregated",
        queue_s=0.0, transfer_s=0.0, **parts,
    )  # fmt: skip
    second = RequestOutcome(
        ok=True, start_s=0.0, ttft_s=0.6, e2e_s=0.6, prompt_tokens=2000, output_tokens=1,
        path="disaggregated", queue_s=0.1, transfer_s=0.2, **parts,
    )  # fmt: skip
    return summarise(
        [first, second, RequestOutcome(ok=False, error="timeout")],
        itl,
        4.0,
        SloSpec(ttft_s=0.5, tpot_s=0.025),
        gpus=4,
        first_token="decode",
        bytes_by_tier={"node": 7, "rack": 1_500_000_000},
        request_rate=1.5,
        max_concurrency=8,
        notes=["a note that is so long that it needs a second line"],
    )


def test_vllm_table_to_the_byte() -> None:
    assert vllm_table(run()) == VLLM.replace("|", "")


def test_own_sections_follow_in_the_same_layout() -> None:
    *vllm_rows, closing = VLLM.replace("|", "").splitlines()
    assert table(run()).splitlines() == [*vllm_rows, *OWN.replace("|", "").splitlines()]
    assert closing == "=" * 50


def test_rows_that_do_not_apply_are_left_out() -> None:
    """No SLO, no limit on concurrency, no rate, no known times: as vLLM leaves its rows out."""
    text = table(summarise([RequestOutcome(ok=True, output_tokens=1)], ItlRuns(), 1.0))
    for label in ("goodput", "concurrency", "RPS", "Peak", "Errors", "Notes", "Parts", "Moved"):
        assert label not in text


def test_under_first_token_prefill_the_transfer_is_after_ttft() -> None:
    outcome = RequestOutcome(
        ok=True, ttft_s=0.3, e2e_s=0.3, output_tokens=1, queue_s=0.1, prefill_s=0.2,
        transfer_s=0.25, second_token_delay_s=0.26,
    )  # fmt: skip
    text = table(summarise([outcome], ItlRuns(), 1.0, first_token="prefill"))
    assert "Mean transfer (ms):" not in text
    assert f"{'Mean transfer, after it (ms):':<40} {'250.00':<10}" in text
    assert f"{'Mean second token delay (ms):':<40} {'260.00':<10}" in text
    assert f"{'Mean other (ms):':<40} {'0.00':<10}" in text
    assert "second token" not in table(summarise([outcome], ItlRuns(), 1.0, first_token="decode"))


def test_compare_says_how_many_times_the_first_run() -> None:
    other = replace(run(), completed=4, gpus=8, failed=0, notes=("mine",))
    lines = compare_table([("base", run()), ("other", other)]).splitlines()
    assert lines[0] == " " * 34 + f"{'base':>22}{'other':>22}"
    assert lines[1] == "-" * 78
    assert lines[2] == f"{'Successful requests':<34}{'2':>22}{'4 (x2.00)':>22}"
    assert lines[3] == f"{'Failed requests':<34}{'1':>22}{'0 (x0.00)':>22}"
    assert f"{'Goodput per GPU (req/s)':<34}{'0.0625':>22}{'0.0312 (x0.50)':>22}" in lines
    assert f"{'P99 TTFT (ms)':<34}{'596.00':>22}{'596.00 (x1.00)':>22}" in lines
    assert lines[-1] == "* other: mine"


def test_compare_of_one_without_goals() -> None:
    bare = summarise([RequestOutcome(ok=True, output_tokens=1)], ItlRuns(), 1.0)
    text = compare_table([("alone", bare)])
    assert "x1" not in text and "goodput" not in text and "GPUs" not in text
    mixed = compare_table([("alone", bare), ("b", run())]).splitlines()
    assert f"{'Request goodput (req/s)':<34}{'-':>22}{'0.25':>22}" in mixed
