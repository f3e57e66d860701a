"""Prometheus metrics: core's events folded into counters, gauges and histograms. Knows no node.

Values are plain dicts and lists, updated from one event loop, and shown to `prometheus_client`
only when somebody asks: a token costs one bisection. Labels are bounded: models are those that are
served, and every other label keeps its first `LABELS_MAX` values; what comes later is `other`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvasir.core.events import (
    AnyEvent,
    BlocksCopied,
    CacheChanged,
    Closed,
    CopiesUsed,
    CopyFailed,
    KvCoded,
    Preempted,
    Prefilled,
    PrefixUsed,
    Recomputed,
    Rejected,
    Retried,
    Shipped,
    Speculated,
    TierHit,
    TierOff,
    TierPassed,
    TierStored,
    TransferFailed,
    TransportFellBack,
    WorkerJoined,
    WorkerLeft,
)
from kvasir.core.ids import Incarnation, WorkerId

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
LABELS_MAX: Final = 64
OTHER: Final = "other"

# Seconds. Half a millisecond to a hundred seconds, three a decade.
SECONDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0,
)  # fmt: skip

Key = tuple[str, ...]


class Counter:
    """A family of growing numbers, one for each tuple of label values."""

    __slots__ = ("_seen", "_values", "help", "labels", "name")

    def __init__(self, name: str, help_text: str, labels: Key = ()) -> None:
        self.name, self.help, self.labels = name, help_text, labels
        self._values: dict[Key, float] = {} if labels else {(): 0}
        self._seen: list[set[str]] = [set() for _ in labels]

    def add(self, amount: float, *values: str) -> None:
        key = tuple(map(_bounded, self._seen, values))
        self._values[key] = self._values.get(key, 0) + amount

    def family(self) -> Metric:
        shown = CounterMetricFamily(self.name, self.help, labels=self.labels)
        for key, value in self._values.items():
            shown.add_metric(key, value)
        return shown


class Histogram:
    """A family of distributions of seconds over the bounds in `SECONDS`."""

    __slots__ = ("_seen", "_series", "help", "labels", "name")

    def __init__(self, name: str, help_text: str, labels: Key = ()) -> None:
        self.name, self.help, self.labels = name, help_text, labels
        self._series: dict[Key, Series] = {} if labels else {(): Series()}
        self._seen: list[set[str]] = [set() for _ in labels]

    def of(self, *values: str) -> Series:
        key = tuple(map(_bounded, self._seen, values))
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = Series()
        return found

    def family(self) -> Metric:
        shown = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        for key, series in self._series.items():
            shown.add_metric(key, list(series.cumulative()), series.sum)
        return shown


class Series:
    """Counts by bucket, and a sum."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def cumulative(self) -> Iterator[tuple[str, float]]:
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            total += count
            yield bound, total


def _bounded(seen: set[str], value: str) -> str:
    if value in seen:
        return value
    if len(seen) >= LABELS_MAX:
        return OTHER
    seen.add(value)
    return value


class Holding(NamedTuple):
    """What one worker holds now; all zero when nothing is asked of it."""

    kv_blocks: int
    leases: int
    quarantined: int
    reservations: int
    pinned: int = 0


# name, meaning: in the order of Holding's fields
HOLDINGS: Final = (
    ("kvasir_kv_blocks_held", "KV blocks of living sequences; cached ones are not counted."),
    ("kvasir_leases", "Prefilled sequences whose KV is kept for a decode worker."),
    ("kvasir_quarantined", "Dead sequences whose blocks a step or a transfer still touches."),
    ("kvasir_reservations", "Attempts that the conductor counts on the worker for."),
    ("kvasir_pinned_blocks", "KV blocks that are kept for caches."),
)


class Metrics(Collector):
    """All metrics of one process. `models` are the served ones; any other is counted as `other`."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        self._models = frozenset(models)
        self._requests = Counter(
            "kvasir_requests", "Requests that ended, by how.", ("path", "model", "outcome")
        )
        self._rejected = Counter("kvasir_requests_rejected", "Requests declined.", ("status",))
        self._retries = Counter("kvasir_retries", "Attempts after the first one.", ("reason",))
        self._preemptions = Counter("kvasir_preemptions", "Sequences put back to wait.")
        self._prompt = Counter("kvasir_prompt_tokens", "Prompt tokens of ended requests.")
        self._output = Counter("kvasir_output_tokens", "Output tokens of ended requests.")
        self._queries = Counter(
            "kvasir_prefix_cache_queries_tokens", "Prompt tokens that were prefilled, or found."
        )
        self._hits = Counter(
            "kvasir_prefix_cache_hit_tokens", "Prompt tokens whose KV was in the prefill's cache."
        )
        self._attainable = Counter(
            "kvasir_prefix_cache_attainable_tokens",
            "Prompt tokens of the longest prefix that any worker had when the request was routed.",
        )
        self._computed = Counter("kvasir_prefill_tokens", "Prompt tokens that prefill computed.")
        self._bytes = Counter(
            "kvasir_kv_transfer_bytes", "KV bytes received, by transport.", ("transport",)
        )
        self._wire = Counter(
            "kvasir_kv_wire_bytes", "Bytes on the wire of KV that was coded.", ("codec",)
        )
        self._codecs = Counter(
            "kvasir_kv_codec_choices", "Forms chosen for parts of KV transfers.", ("codec",)
        )
        self._failed = Counter(
            "kvasir_kv_transfer_failures", "KV transfers that went wrong.", ("reason",)
        )
        self._fell_back = Counter(
            "kvasir_transport_fallbacks", "Changes to a second transport.", ("wanted", "used")
        )
        self._recomputed = Counter(
            "kvasir_kv_recomputed_tokens", "Tokens whose KV was made again.", ("reason",)
        )
        self._drafted = Counter("kvasir_draft_tokens", "Tokens that were guessed, and verified.")
        self._accepted = Counter("kvasir_draft_tokens_accepted", "Guessed tokens that were right.")
        self._count_kept()
        self._transfer = Histogram("kvasir_kv_transfer_seconds", "Time of one KV transfer.")
        self._queue = Histogram("kvasir_prefill_queue_seconds", "Wait before prefill.")
        self._prefill = Histogram("kvasir_prefill_seconds", "Time of prefill itself.")
        self._ttft = Histogram(
            "kvasir_time_to_first_token_seconds",
            "From a request's arrival to its first token at the gateway.",
            ("path", "model"),
        )
        self._itl = Histogram(
            "kvasir_inter_token_latency_seconds", "Between two tokens of an answer at the gateway."
        )
        self._gap = self._itl.of()
        self._tpot = Histogram(
            "kvasir_time_per_output_token_seconds", "Mean time per token after an answer's first."
        )
        self._second = Histogram(
            "kvasir_second_token_delay_seconds", "From first to second token, the hand-over in it."
        )
        self._duration = Histogram("kvasir_request_seconds", "From a request's arrival to its end.")
        self._queued = self._running = self._indexed = self._unindexed = 0
        self._kv_usage: dict[WorkerId, float] = {}
        self._holdings: dict[WorkerId, Holding] = {}
        self._up: dict[WorkerId, tuple[Incarnation, bool]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def _count_kept(self) -> None:
        """What is kept beyond a request: tiers and caches."""
        self._tier_hits = Counter(
            "kvasir_tier_loaded_tokens", "Tokens whose KV came out of a tier.", ("tier",)
        )
        self._tier_bytes = Counter(
            "kvasir_tier_bytes", "KV bytes copied to and from tiers.", ("tier", "way")
        )
        self._tier_passed = Counter(
            "kvasir_tier_passed_tokens", "Tokens that a tier held and that were computed.", ("why",)
        )
        self._tiers_off = Counter("kvasir_tier_failures", "Tiers that failed.", ("tier",))
        self._copied = Counter(
            "kvasir_copied_blocks", "Cached blocks copied before a request asked.", ("purpose",)
        )
        self._copies_used = Counter(
            "kvasir_copied_blocks_used", "Copied blocks that a prompt began with.", ("purpose",)
        )
        self._copies_wasted = Counter(
            "kvasir_copied_blocks_wasted", "Copied blocks evicted before any use.", ("purpose",)
        )
        self._copies_failed = Counter(
            "kvasir_copies_failed", "Copies that came to nothing.", ("purpose", "reason")
        )
        self._caches = Counter("kvasir_caches", "Changes of kept prefixes.", ("state",))

    # --- in ---------------------------------------------------------------------------------------

    def see(self, event: AnyEvent) -> None:
        """Fold one event; those that count nothing are ignored."""
        match event:
            case Closed():
                path, model = event.path or "none", self._model(event.model)
                self._requests.add(1, path, model, event.reason)
                self._prompt.add(event.prompt_tokens)
                self._output.add(event.output_tokens)
                self._duration.of().observe(event.duration_s)
                if event.tpot_s is not None:
                    self._tpot.of().observe(event.tpot_s)
                if event.second_token_delay_s is not None:
                    self._second.of().observe(event.second_token_delay_s)
            case Prefilled():
                self._computed.add(event.computed_tokens)
                self._queue.of().observe(event.queue_s)
                self._prefill.of().observe(event.prefill_s)
            case PrefixUsed():
                self._queries.add(event.input_tokens)
                self._hits.add(event.hit_tokens)
                self._attainable.add(event.attainable_tokens)
            case Shipped():
                self._bytes.add(event.bytes, event.transport)
                self._transfer.of().observe(event.seconds)
                if event.codec:
                    self._wire.add(event.wire_bytes, event.codec)
            case KvCoded():
                self._codecs.add(1, event.codec)
            case TransferFailed():
                self._failed.add(1, event.reason)
            case TransportFellBack():
                self._fell_back.add(1, event.wanted, event.used)
            case Recomputed():
                self._recomputed.add(event.tokens, event.reason)
            case Preempted():
                self._preemptions.add(1)
            case Speculated():
                self._drafted.add(event.drafted)
                self._accepted.add(event.accepted)
            case TierHit():
                self._tier_hits.add(event.tokens, event.tier)
                self._tier_bytes.add(event.bytes, event.tier, "from")
            case TierStored():
                self._tier_bytes.add(event.bytes, event.tier, "to")
            case TierPassed():
                self._tier_passed.add(event.tokens, event.why)
            case TierOff():
                self._tiers_off.add(1, event.tier)
            case BlocksCopied():
                self._bytes.add(event.bytes, event.transport)
                self._transfer.of().observe(event.seconds)
                self._copied.add(event.blocks, event.purpose)
            case CopiesUsed():
                self._copies_used.add(event.used, event.purpose)
                self._copies_wasted.add(event.wasted, event.purpose)
            case CopyFailed():
                self._copies_failed.add(1, event.purpose, event.reason)
            case CacheChanged():
                self._caches.add(1, event.state)
            case Retried():
                self._retries.add(1, event.reason)
            case Rejected():
                self._rejected.add(1, str(event.status))
            case WorkerJoined():
                self._up[event.worker] = (event.incarnation, True)
            case WorkerLeft():
                self._left(event)

    def first_token(self, seconds: float, path: str, model: str) -> None:
        self._ttft.of(path or "none", self._model(model)).observe(seconds)

    def token_gap(self, seconds: float, extra: int = 0) -> None:
        """One gap between tokens; `extra` more tokens came together with the later one."""
        gap = self._gap
        gap.sum += seconds
        gap.counts[bisect_left(SECONDS, seconds)] += 1
        if extra:
            gap.counts[0] += extra

    def gauges(self, queued: int, running: int, kv_usage: Mapping[WorkerId, float]) -> None:
        """The state now; `kv_usage` is each worker's share of KV blocks in use, 0 to 1."""
        self._queued, self._running, self._kv_usage = queued, running, dict(kv_usage)

    def prefix_index(self, blocks: int, refused: int) -> None:
        """Distinct blocks in the index now, and how often one did not fit until now."""
        self._indexed, self._unindexed = blocks, refused

    def holdings(self, held: Mapping[WorkerId, Holding]) -> None:
        """The state now, of each worker that has been heard."""
        self._holdings = dict(held)

    def _model(self, name: str) -> str:
        return name if name in self._models else OTHER

    def _left(self, event: WorkerLeft) -> None:
        """A later incarnation may already be up."""
        known, _ = self._up.get(event.worker, (0, False))
        if event.incarnation >= known:
            self._up[event.worker] = (event.incarnation, False)

    # --- out --------------------------------------------------------------------------------------

    def render(self) -> bytes:
        """Prometheus' text format, for `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        counters = (
            self._requests, self._rejected, self._retries, self._preemptions, self._prompt,
            self._output, self._queries, self._hits, self._attainable, self._computed, self._bytes,
            self._wire, self._codecs, self._failed, self._fell_back, self._recomputed,
            self._drafted, self._accepted, self._tier_hits, self._tier_bytes, self._tier_passed,
            self._tiers_off,
        )  # fmt: skip
        for counter in counters:
            yield counter.family()
        yield self._caches.family()
        for counter in (
            self._copied, self._copies_used, self._copies_wasted, self._copies_failed
        ):
            yield counter.family()
        histograms = (
            self._transfer, self._queue, self._prefill, self._ttft, self._itl, self._tpot,
            self._second, self._duration,
        )  # fmt: skip
        for histogram in histograms:
            yield histogram.family()
        yield _gauge("kvasir_requests_queued", "Requests waiting for a place.", self._queued)
        yield _gauge("kvasir_requests_running", "Requests being served.", self._running)
        yield _gauge("kvasir_prefix_index_blocks", "Blocks in the index.", self._indexed)
        yield CounterMetricFamily(
            "kvasir_prefix_index_refused", "Blocks that did not fit in.", value=self._unindexed
        )
        yield _by_worker(
            "kvasir_kv_cache_usage_ratio", "KV blocks in use, 0 to 1.", self._kv_usage
        )
        for i, (name, help_text) in enumerate(HOLDINGS):
            yield _by_worker(name, help_text, {w: held[i] for w, held in self._holdings.items()})
        up = {worker: float(is_up) for worker, (_, is_up) in self._up.items()}
        yield _by_worker("kvasir_worker_up", "1 while the worker is there.", up)
        yield _gauge("kvasir_workers_up", "Workers that are there.", sum(up.values()))


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=value)


def _by_worker(name: str, help_text: str, values: Mapping[WorkerId, float]) -> Metric:
    shown = GaugeMetricFamily(name, help_text, labels=("worker",))
    for worker, value in values.items():
        shown.add_metric((worker,), value)
    return shown
