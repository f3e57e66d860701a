"""The oracle's formulas, its fallbacks, its counters, and NetKV's propositions on it."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError
from kvasir.core.messages import Location, NetReading
from kvasir.core.specs import TierSpec, TopologySpec
from kvasir.net.oracle import UTILISATION_MAX, Estimate, InFlight, Oracle
from kvasir.net.topology import Topology

L = 10e-6
BANDWIDTH = (450e9, 12.5e9, 6.25e9, 3.125e9)  # of one shard pair, by tier
PLACES = {
    "src": 0, "node": 4, "rack": 8, "rack2": 12, "pod": 16, "pod2": 20, "core": 32, "core2": 36,
    "other": 48,
}  # fmt: skip
BY_TIER = ("node", "rack", "pod", "core")
GB = 10**9


def oracle(latency_s: float = L, **topology) -> Oracle:
    """Four GPUs at each place; `src` is 0 to 3 tiers away from BY_TIER."""
    tiers = tuple(TierSpec(flow_bandwidth=b, latency_s=latency_s) for b in BANDWIDTH)
    made = Oracle(Topology(TopologySpec(**{"tiers": tiers} | topology)))
    for name, first in PLACES.items():
        made.add_worker(name, Location(tuple(range(first, first + 4))))
    return made


def seconds(
    o: Oracle, dst: str, nbytes: int, arm: str, now: float = 0.0, src: str = "src"
) -> float:
    return o.estimate(src, dst, nbytes, now, arm).seconds


def read(o: Oracle, *utilisation: float, at: float = 0.0) -> None:
    o.reading(NetReading(measured_at=at, utilisation=utilisation))


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", range(4))
def test_static_is_latency_plus_bytes_over_the_tiers_bandwidth(tier: int) -> None:
    """10 GB over 4 shard pairs: 2.5 GB each."""
    o = oracle()
    assert o.tier("src", BY_TIER[tier]) == tier
    expected = L + 2.5 * GB / BANDWIDTH[tier]
    assert seconds(o, BY_TIER[tier], 10 * GB, "static") == pytest.approx(expected, rel=1e-12)


def test_without_caps_the_narrowest_link_decides() -> None:
    """fabric, cross-pod: NICs of 50 GB/s for 4 pairs; with pods 64:1 an uplink of 6.25 GB/s."""
    fabric = oracle(tiers=None, preset="fabric")
    assert seconds(fabric, "core", 10 * GB, "static") == pytest.approx(L + 10 / 50)
    narrow = oracle(tiers=None, preset="fabric", pod_oversubscription=64)
    assert seconds(narrow, "core", 10 * GB, "static") == pytest.approx(L + 10 / 6.25)


def test_self_divides_by_own_transfers_of_source_and_tier() -> None:
    o = oracle()
    o.begin("a", "src", "pod", GB, 0.0)
    o.begin("b", "src", "pod2", GB, 0.0)
    o.begin("c", "src", "core", GB, 0.0)  # another tier
    o.begin("d", "other", "node", GB, 0.0)  # another source
    assert seconds(o, "pod", 4 * GB, "self") == pytest.approx(L + 3 * GB / 6.25e9)
    assert seconds(o, "core2", 4 * GB, "self") == pytest.approx(L + 2 * GB / 3.125e9)
    assert seconds(o, "rack", 4 * GB, "self") == pytest.approx(L + GB / 12.5e9)
    assert seconds(o, "pod", 4 * GB, "static") == pytest.approx(L + GB / 6.25e9)


def test_incast_counts_at_the_destination() -> None:
    """Three others send to `core`; NVLink into it is another wire."""
    o = oracle()
    for i, src in enumerate(("rack", "pod", "pod2")):
        o.begin(str(i), src, "core", GB, 0.0)
    assert seconds(o, "core", 4 * GB, "self") == pytest.approx(L + 4 * GB / 3.125e9)
    assert seconds(o, "core2", 4 * GB, "self") == pytest.approx(L + GB / 3.125e9)
    assert seconds(o, "core", 4 * GB, "self", src="core2") == pytest.approx(L + GB / 450e9)


def test_tier_scales_by_what_others_leave() -> None:
    o = oracle()
    read(o, 0.0, 0.1, 0.5, 0.75)
    assert seconds(o, "core", 4 * GB, "tier", 1.0) == pytest.approx(L + GB / (3.125e9 * 0.25))
    assert seconds(o, "pod", 4 * GB, "tier", 1.0) == pytest.approx(L + GB / (6.25e9 * 0.5))
    o.begin("a", "src", "core", GB, 0.5)
    assert seconds(o, "core", 4 * GB, "tier", 1.0) == pytest.approx(L + 2 * GB / (3.125e9 * 0.25))
    assert o.estimate("src", "core", GB, 1.0, "tier").source == "tier"


@pytest.mark.parametrize("c", [0.95, 0.99, 1.0, 1.3])
def test_a_saturated_tier_still_moves(c: float) -> None:
    o = oracle()
    read(o, c, c, c, c)
    slowest = L + GB / (3.125e9 * (1 - UTILISATION_MAX))
    assert seconds(o, "core", 4 * GB, "tier") == pytest.approx(slowest)


def test_own_bytes_are_taken_off_the_reading() -> None:
    """10 GB over the core for 1 s: all of it can have gone (4 pairs * 3.125 GB/s = 12.5 GB/s). Pod
    uplinks have 200 GB/s up and as much down, so own share is 0.05; rack uplinks 400 GB/s: 0.025.
    """
    o = oracle()
    o.begin("a", "src", "core", 10 * GB, 0.0)
    read(o, 0.0, 0.0, 0.3, 0.3, at=1.0)
    assert seconds(o, "core2", 4 * GB, "tier", 1.0) == pytest.approx(L + 2 * GB / (3.125e9 * 0.75))
    assert seconds(o, "pod", 4 * GB, "tier", 1.0) == pytest.approx(L + GB / (6.25e9 * 0.725))


def test_own_share_counts_only_what_can_have_moved_and_never_goes_below_nothing() -> None:
    o = oracle()
    o.begin("late", "src", "core", 10**13, 3.0)
    read(o, 0.0, 0.0, 0.0, 0.3, at=2.0)  # begun after it was measured
    assert seconds(o, "core2", 4 * GB, "tier", 3.0) == pytest.approx(L + 2 * GB / (3.125e9 * 0.7))
    read(o, 0.0, 0.0, 0.0, 0.3, at=9.0)  # moved at most 12.5 GB in the last second: 0.0625
    share = 0.7 + 0.0625
    assert seconds(o, "core2", 4 * GB, "tier", 9.0) == pytest.approx(L + 2 * GB / (3.125e9 * share))
    read(o, 0.0, 0.0, 0.0, 0.01, at=9.5)
    assert seconds(o, "core2", 4 * GB, "tier", 9.5) == pytest.approx(L + 2 * GB / 3.125e9)


@pytest.mark.parametrize("arm", ["static", "self", "tier"])
def test_no_bytes_take_the_latency(arm: str) -> None:
    o = oracle()
    o.begin("a", "src", "core", GB, 0.0)
    read(o, 0.5, 0.5, 0.5, 0.5)
    o.report("src", "core", GB, 9.0)
    assert o.estimate("src", "core", 0, 0.0, arm) == Estimate(L, L, L, arm)


# --- what is not known ----------------------------------------------------------------------------


def test_without_a_reading_the_tier_arm_is_static_and_says_so() -> None:
    o = oracle()
    estimate = o.estimate("src", "core", 4 * GB, 0.0, "tier")
    assert estimate.source == "static(unknown)"
    assert estimate.seconds == seconds(o, "core", 4 * GB, "static")


def test_a_stale_reading_falls_back_and_says_so() -> None:
    o = oracle(telemetry={"ttl_s": 5.0})
    read(o, 0.5, 0.5, 0.5, 0.5, at=10.0)
    assert o.estimate("src", "core", GB, 15.0, "tier").source == "tier"
    stale = o.estimate("src", "core", GB, 15.001, "tier")
    assert stale.source == "static(stale)"
    assert stale.seconds == seconds(o, "core", GB, "static")
    o.begin("a", "src", "core", GB, 15.0)
    crowded = o.estimate("src", "core", GB, 15.001, "tier")
    assert crowded.seconds == seconds(o, "core", GB, "self"), "own transfers are never stale"


@pytest.mark.parametrize("utilisation", [(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5, float("nan"))])
def test_a_tier_that_is_not_read_is_unknown_not_idle(utilisation: tuple[float, ...]) -> None:
    o = oracle()
    read(o, *utilisation)
    assert o.estimate("src", "core", GB, 0.0, "tier").source == "static(unknown)"


def test_a_reading_that_comes_late_changes_nothing() -> None:
    o = oracle()
    read(o, 0.0, 0.0, 0.0, 0.5, at=2.0)
    read(o, 0.0, 0.0, 0.0, 0.9, at=1.0)
    assert seconds(o, "core", 4 * GB, "tier", 2.0) == pytest.approx(L + GB / (3.125e9 * 0.5))


def test_unknown_workers() -> None:
    o = oracle()
    o.begin("a", "src", "nobody", GB, 0.0)
    o.report("nobody", "src", GB, 1.0)
    o.remove_worker("nobody")
    o.check()
    with pytest.raises(KeyError):
        o.estimate("src", "nobody", GB, 0.0, "static")
    with pytest.raises(ConfigError):
        o.add_worker("far", Location((64,)))


# --- counters -------------------------------------------------------------------------------------


def test_counters_count_and_return_to_zero() -> None:
    o = oracle()
    o.begin("a", "src", "core", 5, 0.0)
    o.begin("b", "src", "core2", 7, 0.0)
    o.begin("b", "src", "core2", 9, 0.0)  # the same id again replaces it
    assert o.in_flight("src", 3) == InFlight(2, 14)
    assert o.inbound("core2") == InFlight(1, 9)
    o.check()
    for name in ("a", "a", "b", "never"):
        o.end(name)
        o.check()
    assert o.in_flight("src", 3) == InFlight() == o.inbound("core2")


def test_check_sees_a_leak() -> None:
    o = oracle()
    o.begin("a", "src", "core", 5, 0.0)
    o._from["src", 3].transfers += 1
    with pytest.raises(AssertionError, match="counted from sources"):
        o.check()


def test_a_worker_that_leaves_or_restarts_takes_its_transfers_along() -> None:
    o = oracle()
    o.begin("a", "src", "core", 5, 0.0)
    o.begin("b", "src", "pod", 5, 0.0)
    o.remove_worker("core")
    o.check()
    assert o.in_flight("src", 3) == InFlight() and o.in_flight("src", 2) == InFlight(1, 5)
    o.end("a")
    assert o.tier("src", "other") == 3
    o.add_worker("src", Location((56, 57, 58, 59)))
    assert o.in_flight("src", 2) == InFlight() == o.inbound("pod")
    assert o.tier("src", "other") == 1, "its new place counts"
    o.check()


names = st.sampled_from(sorted(PLACES))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, 9), names, names, st.integers(0, 10**10)),
        st.tuples(st.just("end"), st.integers(0, 9)),
        st.tuples(st.just("leave"), names),
        st.tuples(st.just("join"), names),
        st.tuples(st.just("reading"), st.floats(0, 1.2)),
    ),
    max_size=40,
)


@given(steps)
def test_nothing_leaks_whatever_happens(steps: list[tuple]) -> None:
    o = oracle()
    for now, step in enumerate(steps):
        match step:
            case ("begin", name, src, dst, nbytes):
                o.begin(str(name), src, dst, nbytes, float(now))
            case ("end", name):
                o.end(str(name))
            case ("leave", worker):
                o.remove_worker(worker)
            case ("join", worker):
                first = PLACES[worker]
                o.add_worker(worker, Location(tuple(range(first, first + 4))))
            case ("reading", c):
                read(o, c, c, c, c, at=float(now))
        o.check()
    for name in range(10):
        o.end(str(name))
    o.check()
    assert all(o.in_flight(w, t) == InFlight() for w in PLACES for t in range(4))
    assert all(o.inbound(w) == InFlight() for w in PLACES)


# --- intervals ------------------------------------------------------------------------------------


def test_reports_widen_the_interval_and_leave_the_answer() -> None:
    o = oracle()
    before = o.estimate("src", "core", 4 * GB, 0.0, "self")
    assert before.lo == before.seconds == before.hi
    for _ in range(100):
        o.report("src", "core", 4 * GB, 3 * before.seconds)
    after = o.estimate("src", "core", 4 * GB, 0.0, "self")
    assert after.seconds == after.lo == before.seconds
    assert after.hi == pytest.approx(3 * before.seconds, rel=1e-6)
    assert o.estimate("src", "pod", GB, 0.0, "self").hi == seconds(o, "pod", GB, "self")


@pytest.mark.parametrize(("measured", "ratio"), [(1e9, 10.0), (0.0, 0.1)])
def test_ratios_are_bounded(measured: float, ratio: float) -> None:
    o = oracle()
    for _ in range(200):
        o.report("src", "core", GB, measured)
        o.check()
    assert o.ratio(3) == pytest.approx(ratio)


@given(
    nbytes=st.integers(0, 10**12), more=st.integers(0, 10**12), n=st.integers(0, 5),
    c=st.floats(0, 1), dc=st.floats(0, 1), tier=st.integers(0, 3),
)  # fmt: skip
def test_more_bytes_more_transfers_more_traffic_never_help(
    nbytes: int, more: int, n: int, c: float, dc: float, tier: int
) -> None:
    dst = BY_TIER[tier]
    o = oracle()
    read(o, c, c, c, c)
    for i in range(n):
        o.begin(str(i), "src", dst, GB, 0.0)
    base = o.estimate("src", dst, nbytes, 0.0, "tier")
    assert base.lo <= base.seconds <= base.hi
    assert seconds(o, dst, nbytes + more, "tier") >= base.seconds
    static, own = seconds(o, dst, nbytes, "static"), seconds(o, dst, nbytes, "self")
    assert static <= own <= base.seconds
    o.begin("one more", "src", dst, GB, 0.0)
    assert seconds(o, dst, nbytes, "tier") >= base.seconds
    o.end("one more")
    busier = oracle()
    read(busier, *[c + dc] * 4)
    for i in range(n):
        busier.begin(str(i), "src", dst, GB, 0.0)
    assert seconds(busier, dst, nbytes, "tier") >= base.seconds


# --- NetKV's propositions (netkv reference, 2.4) --------------------------------------------------

KAPPA = 4 * 80 * 1024  # KV bytes per token of Llama-3-70B: 80 KiB for each of 4 shard pairs


def regret(o: Oracle, length: int, hit: float, arm: str = "static") -> float:
    """Seconds that a network-blind choice loses: it picks the far worker for its `hit`."""
    near = seconds(o, "rack", KAPPA * length, arm)
    far = seconds(o, "core", round(KAPPA * length * (1 - hit)), arm)
    return far - near


def test_p1_regret_of_a_network_blind_choice_has_no_bound() -> None:
    o = oracle(latency_s=0.0)
    lengths = [2**i * 1024 for i in range(11)]
    losses = [regret(o, length, 0.1) for length in lengths]
    assert losses == sorted(losses)
    published = {1024: 0.017, 16 * 1024: 0.279, 128 * 1024: 2.23, 1024 * 1024: 17.9}
    for length, loss in published.items():
        assert regret(o, length, 0.1) == pytest.approx(loss, rel=0.03)
    for bound in (1.0, 100.0, 10_000.0):
        assert regret(o, int(bound * 60_000), 0.1) > bound


@pytest.mark.parametrize(("c", "ratio"), [(0.0, 3.6), (0.5, 7.2), (0.9, 36.0)])
def test_p1_ratio_of_times_is_bounded_on_a_network_and_grows_with_its_congestion(
    c: float, ratio: float
) -> None:
    for length in (1024, 1024 * 1024):
        o = oracle(latency_s=0.0)
        read(o, 0.0, 0.0, 0.0, c)
        far = seconds(o, "core", round(KAPPA * length * 0.9), "tier")
        assert far / seconds(o, "rack", KAPPA * length, "tier") == pytest.approx(ratio, rel=1e-4)


def test_p1_the_threshold_is_one_minus_the_ratio_of_bandwidths() -> None:
    o = oracle(latency_s=0.0)
    threshold = 1 - BANDWIDTH[3] / BANDWIDTH[1]
    for length in (1024, 65536):
        assert regret(o, length, threshold - 0.001) > 0 > regret(o, length, threshold + 0.001)


@given(
    pair=st.sampled_from([("rack", "pod"), ("rack", "core"), ("pod", "core"), ("node", "core")]),
    ca=st.floats(0, 0.9), cb=st.floats(0, 0.9), na=st.integers(0, 4), nb=st.integers(0, 4),
    k=st.one_of(st.floats(0, 0.999), st.floats(1.001, 3)),
)  # fmt: skip
def test_p2_order_of_tiers_survives_errors_below_epsilon_and_not_above(
    pair: tuple[str, str], ca: float, cb: float, na: int, nb: int, k: float
) -> None:
    """w = B / (1 + n); eps* = (w_a (1 - c_a) - w_b (1 - c_b)) / (w_a + w_b). Errors of opposite
    sign and size k eps* keep the order iff k < 1."""
    a, b = (BY_TIER.index(dst) for dst in pair)
    wa, wb = BANDWIDTH[a] / (1 + na), BANDWIDTH[b] / (1 + nb)
    margin = (wa * (1 - ca) - wb * (1 - cb)) / (wa + wb)
    assume(margin > 1e-4)
    told = [0.0] * 4
    told[a], told[b] = ca + k * margin, cb - k * margin
    assume(told[a] <= UTILISATION_MAX and told[b] >= 0)
    o = oracle(latency_s=0.0)
    read(o, *told)
    for tier, n in ((a, na), (b, nb)):
        for i in range(n):
            o.begin(f"{tier}-{i}", "src", BY_TIER[tier], GB, 1.0)
    first, second = (seconds(o, dst, 8 * GB, "tier", 1.0) for dst in pair)
    assert (first < second) == (k < 1)


@pytest.mark.parametrize(("error", "kept"), [(0.419, True), (0.421, False)])
def test_p2_epsilon_at_four_to_one_is_42_points(error: float, kept: bool) -> None:
    """12.5 and 3.125 GB/s, c = 0.3 on both: (4 * 0.7 - 0.7) / 5 = 0.42. The far one cannot be read
    as 0.3 - 0.42, so the near one errs for both: by 5 / 4 of it."""
    o = oracle(latency_s=0.0)
    read(o, 0.0, 0.3 + error * 5 / 4, 0.0, 0.3)
    assert (seconds(o, "rack", GB, "tier") < seconds(o, "core", GB, "tier")) == kept
