"""Events become Prometheus series: names, values, bounded labels, and a format promtool accepts."""

import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvasir.core import events as ev
from kvasir.observe.metrics import LABELS_MAX, OTHER, SECONDS, Holding, Metrics

NAMES = {
    "kvasir_requests_total": {"path", "model", "outcome"},
    "kvasir_requests_queued": set(),
    "kvasir_requests_running": set(),
    "kvasir_kv_transfer_bytes_total": {"transport"},
    "kvasir_kv_transfer_seconds_bucket": {"le"},
    "kvasir_kv_recomputed_tokens_total": {"reason"},
    "kvasir_kv_cache_usage_ratio": {"worker"},
    "kvasir_kv_blocks_held": {"worker"},
    "kvasir_leases": {"worker"},
    "kvasir_quarantined": {"worker"},
    "kvasir_reservations": {"worker"},
    "kvasir_time_to_first_token_seconds_bucket": {"le", "path", "model"},
    "kvasir_inter_token_latency_seconds_bucket": {"le"},
    "kvasir_prefix_cache_queries_tokens_total": set(),
    "kvasir_prefix_cache_hit_tokens_total": set(),
    "kvasir_prefix_cache_attainable_tokens_total": set(),
    "kvasir_prefix_index_blocks": set(),
    "kvasir_prefix_index_refused_total": set(),
    "kvasir_preemptions_total": set(),
    "kvasir_tier_loaded_tokens_total": {"tier"},
    "kvasir_tier_bytes_total": {"tier", "way"},
    "kvasir_tier_passed_tokens_total": {"why"},
    "kvasir_tier_failures_total": {"tier"},
    "kvasir_caches_total": {"state"},
    "kvasir_pinned_blocks": {"worker"},
    "kvasir_copied_blocks_total": {"purpose"},
    "kvasir_copied_blocks_used_total": {"purpose"},
    "kvasir_copied_blocks_wasted_total": {"purpose"},
    "kvasir_copies_failed_total": {"purpose", "reason"},
    "kvasir_retries_total": {"reason"},
    "kvasir_transport_fallbacks_total": {"wanted", "used"},
    "kvasir_workers_up": set(),
    "kvasir_worker_up": {"worker"},
}


def closed(model: str = "tiny", reason: str = "stop", path: str = "disaggregated") -> ev.Closed:
    return ev.Closed("r", model, path, reason, 1, 100, 64, 16)


def full() -> Metrics:
    """One of everything."""
    metrics = Metrics(["tiny"])
    for event in (
        ev.WorkerJoined("prefill-0", 1, ("prefill",)),
        ev.WorkerJoined("decode-0", 1, ("decode",)),
        ev.Queued("r", 3),
        ev.Routed("r", 1, "disaggregated", "prefill-0", "decode-0", "why"),
        ev.Prefilled("prefill-0", "r", 0.01, 0.2, 64, 36),
        ev.PrefixUsed("prefill-0", "r", 100, 64, 80),
        ev.Shipped("r", "prefill-0", "decode-0", 4096, 0.03, "shm"),
        ev.Shipped("r", "prefill-0", "decode-0", 1000, 0.04, "tcp"),
        ev.TransferFailed("r", "decode-0", "checksum"),
        ev.TransportFellBack("r", "prefill-0", "decode-0", "nixl", "tcp", "connection lost"),
        ev.Preempted("decode-0", "r", 40),
        ev.Recomputed("r", 40, "preempted"),
        ev.TierHit("decode-0", "r", "host", 32, 4096, 0.01),
        ev.TierStored("decode-0", "disk", 2, 4096, 0.01),
        ev.TierPassed("decode-0", "r", 16, "sooner"),
        ev.TierOff("decode-0", "disk", "No space left on device"),
        ev.CacheChanged("ready", 10),
        ev.BlocksCopied("prefill-1", "prefill-0", "hot", 9, 4096, 0.01, "nixl"),
        ev.CopiesUsed("prefill-1", "hot", 5, 2),
        ev.CopyFailed("prefill-1", "prefill-0", "hot", "no room"),
        ev.Retried("r", 2, "worker gone"),
        ev.Rejected("q", 429, "full"),
        closed(),
    ):
        metrics.see(event)
    metrics.first_token(0.2, "disaggregated", "tiny")
    metrics.token_gap(0.02)
    metrics.gauges(2, 5, {"prefill-0": 0.25, "decode-0": 0.5})
    metrics.holdings({"prefill-0": Holding(9, 1, 2, 3, 4)})
    metrics.prefix_index(1200, 7)
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def test_holdings_have_a_gauge_each() -> None:
    metrics = full()
    names = ("kv_blocks_held", "leases", "quarantined", "reservations")
    assert [value(metrics, f"kvasir_{n}", worker="prefill-0") for n in names] == [9, 1, 2, 3]
    metrics.holdings({})
    assert not any(name == "kvasir_leases" for name, _ in samples(metrics))


def test_blocks_that_were_copied_are_used_or_wasted() -> None:
    metrics = full()
    names = ("copied_blocks", "copied_blocks_used", "copied_blocks_wasted")
    assert [value(metrics, f"kvasir_{n}_total", purpose="hot") for n in names] == [9, 5, 2]


def test_names_and_labels() -> None:
    seen: dict[str, set[str]] = {}
    for name, labels in samples(full()):
        seen.setdefault(name, set()).update(label for label, _ in labels)
    assert {name: seen.get(name) for name in NAMES} == NAMES


def test_every_series_is_ours_and_none_tells_when_it_was_made() -> None:
    names = {name for name, _ in samples(full())}
    assert all(name.startswith("kvasir_") for name in names)
    assert not any(name.endswith("_created") for name in names)


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("requests_total", {"path": "disaggregated", "model": "tiny", "outcome": "stop"}, 1),
        ("requests_queued", {}, 2),
        ("requests_running", {}, 5),
        ("requests_rejected_total", {"status": "429"}, 1),
        ("kv_transfer_bytes_total", {"transport": "shm"}, 4096),
        ("kv_transfer_bytes_total", {"transport": "tcp"}, 1000),
        ("kv_transfer_seconds_count", {}, 3),
        ("kv_transfer_failures_total", {"reason": "checksum"}, 1),
        ("kv_recomputed_tokens_total", {"reason": "preempted"}, 40),
        ("kv_cache_usage_ratio", {"worker": "decode-0"}, 0.5),
        ("prefix_cache_queries_tokens_total", {}, 100),
        ("prefix_cache_hit_tokens_total", {}, 64),
        ("prefix_cache_attainable_tokens_total", {}, 80),
        ("prefix_index_blocks", {}, 1200),
        ("prefix_index_refused_total", {}, 7),
        ("prefill_tokens_total", {}, 36),
        ("prompt_tokens_total", {}, 100),
        ("output_tokens_total", {}, 16),
        ("preemptions_total", {}, 1),
        ("retries_total", {"reason": "worker gone"}, 1),
        ("workers_up", {}, 2),
        ("time_to_first_token_seconds_sum", {"path": "disaggregated", "model": "tiny"}, 0.2),
        ("inter_token_latency_seconds_count", {}, 1),
    ],
)
def test_values(name: str, labels: dict[str, str], expected: float) -> None:
    assert value(full(), f"kvasir_{name}", **labels) == pytest.approx(expected)


def test_counters_without_labels_start_at_zero() -> None:
    assert value(Metrics(), "kvasir_preemptions_total") == 0
    assert value(Metrics(), "kvasir_kv_transfer_seconds_count") == 0


def test_a_gap_counts_in_its_bucket_and_tokens_that_came_along_as_none() -> None:
    metrics = Metrics()
    metrics.token_gap(0.005, 3)
    metrics.token_gap(1e6)

    def count(le: str) -> float:
        return value(metrics, "kvasir_inter_token_latency_seconds_bucket", le=le)

    assert [count("0.0005"), count("0.0025"), count("0.005"), count("100.0"), count("+Inf")] == [
        3, 3, 4, 4, 5,
    ]  # fmt: skip
    assert value(metrics, "kvasir_inter_token_latency_seconds_sum") == pytest.approx(1e6 + 0.005)


def test_buckets_reach_from_half_a_millisecond_to_a_hundred_seconds() -> None:
    assert (SECONDS[0], SECONDS[-1]) == (0.0005, 100.0)
    assert list(SECONDS) == sorted(SECONDS)


def test_models_nobody_serves_share_one_label() -> None:
    metrics = Metrics(["tiny"])
    for i in range(100):
        metrics.see(closed(model=f"made-up-{i}"))
        metrics.first_token(0.1, "", f"made-up-{i}")
    labels = {"path": "disaggregated", "model": OTHER, "outcome": "stop"}
    assert value(metrics, "kvasir_requests_total", **labels) == 100
    count = "kvasir_time_to_first_token_seconds_count"
    assert value(metrics, count, path="none", model=OTHER) == 100


def test_reasons_are_bounded_and_none_is_lost() -> None:
    metrics = Metrics()
    for i in range(LABELS_MAX + 50):
        metrics.see(ev.Retried("r", 2, f"reason {i}"))
    series = {k: v for k, v in samples(metrics).items() if k[0] == "kvasir_retries_total"}
    assert len(series) == LABELS_MAX + 1
    assert sum(series.values()) == LABELS_MAX + 50
    assert value(metrics, "kvasir_retries_total", reason=OTHER) == 50


def test_label_values_are_escaped() -> None:
    metrics = Metrics()
    metrics.see(ev.Retried("r", 2, 'a "b"\n\\c'))
    assert value(metrics, "kvasir_retries_total", reason='a "b"\n\\c') == 1


def test_the_leave_of_an_old_incarnation_does_not_take_the_new_one_down() -> None:
    metrics = Metrics()
    metrics.see(ev.WorkerJoined("d", 1, ("decode",)))
    metrics.see(ev.WorkerJoined("d", 2, ("decode",)))
    metrics.see(ev.WorkerLeft("d", 1, "lost"))
    assert value(metrics, "kvasir_worker_up", worker="d") == 1
    metrics.see(ev.WorkerLeft("d", 2, "lost"))
    assert value(metrics, "kvasir_worker_up", worker="d") == 0
    assert value(metrics, "kvasir_workers_up") == 0


@pytest.mark.real
def test_promtool_finds_nothing_wrong() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    for metrics in (Metrics(), full()):
        checked = subprocess.run(
            [promtool, "check", "metrics"],
            input=metrics.render(), capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
