"""Generated arrivals: the same for the same seed, and as their spec says."""

import statistics
from itertools import pairwise

import pytest

from kvasir.core.specs import LengthSpec, WorkloadSpec
from kvasir.traces.generators import generate
from kvasir.traces.record import Arrival

MANY = WorkloadSpec(
    rate=8.0,
    requests=20_000,
    input=LengthSpec(mean=500, sigma=0.5, min=1, max=100_000),
    output=LengthSpec(mean=100, sigma=1.0, min=10, max=300),
)


def test_the_same_seed_gives_the_same_trace() -> None:
    assert generate(MANY, 16, 7) == generate(MANY, 16, 7)
    assert generate(MANY, 16, 7) != generate(MANY, 16, 8)


def test_the_stream_of_numbers_is_pinned() -> None:
    """A change here changes every published figure that rests on a generator."""
    first, second = generate(WorkloadSpec(requests=2), 512, 0).arrivals
    assert (first.input_tokens, first.output_tokens) == (883, 104)
    assert (second.input_tokens, second.output_tokens) == (2845, 110)
    assert first.at_s == pytest.approx(0.17863800671390173, rel=1e-12)
    assert second.at_s == pytest.approx(0.44144310166764644, rel=1e-12)


def test_poisson_gaps() -> None:
    times = [a.at_s for a in generate(MANY, 16, 1).arrivals]
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 8, rel=0.03)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(1, abs=0.03)


def test_constant_gaps() -> None:
    spec = MANY.model_copy(update={"kind": "constant", "requests": 100})
    times = [a.at_s for a in generate(spec, 16, 1).arrivals]
    assert times == pytest.approx([(i + 1) / 8 for i in range(100)])


def test_lengths_are_lognormal_with_the_mean_asked_for_and_clipped() -> None:
    trace = generate(MANY, 16, 1)
    inputs = [a.input_tokens for a in trace.arrivals]
    outputs = [a.output_tokens for a in trace.arrivals]
    assert statistics.fmean(inputs) == pytest.approx(500, rel=0.02)
    assert statistics.median(inputs) == pytest.approx(500 * 2.71828 ** (-0.125), rel=0.02)
    assert min(outputs) == 10 and max(outputs) == 300


def test_sigma_zero_is_a_constant() -> None:
    spec = MANY.model_copy(update={"input": LengthSpec(mean=64, sigma=0), "requests": 9})
    assert {a.input_tokens for a in generate(spec, 16, 1).arrivals} == {64}


def test_prefix_sharing() -> None:
    sharing = {"prefix_share": 0.25, "prefix_groups": 4, "prefix_tokens": 200}
    spec = MANY.model_copy(update=sharing)
    trace = generate(spec, 16, 1)
    prefixes = {g * 12: tuple(range(g * 12, g * 12 + 12)) for g in range(4)}  # 200 // 16 blocks
    assert trace.block_size == 16
    seen: set[int] = set()
    groups = dict.fromkeys(prefixes, 0)
    for arrival in trace.arrivals:
        ids = arrival.hash_ids
        assert len(ids) == -(-arrival.input_tokens // 16)
        common = tuple(i for i in ids if i < 48)
        own = ids[len(common) :]
        assert not seen.intersection(own)
        seen.update(own)
        if common:
            assert common == prefixes[common[0]][: min(12, arrival.input_tokens // 16)]
            groups[common[0]] += 1
    shares = [n / len(trace.arrivals) for n in groups.values()]
    assert shares == pytest.approx([0.0625] * 4, abs=0.01)


def test_sharing_does_not_change_times_and_lengths() -> None:
    shared = generate(MANY.model_copy(update={"prefix_share": 0.9}), 16, 1)
    plain = generate(MANY, 16, 1)
    assert plain.block_size is None and not plain.arrivals[0].hash_ids
    for a, b in zip(plain.arrivals, shared.arrivals, strict=True):
        assert (a.at_s, a.input_tokens, a.output_tokens) == (
            b.at_s, b.input_tokens, b.output_tokens,
        )  # fmt: skip


# --- bursts, Zipf, sessions -------------------------------------------------------------------


def variation(times: list[float]) -> float:
    gaps = [b - a for a, b in pairwise(times)]
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps(burstiness: float) -> None:
    spec = MANY.model_copy(update={"kind": "gamma", "burstiness": burstiness})
    times = [a.at_s for a in generate(spec, 16, 1).arrivals]
    assert times[-1] / len(times) == pytest.approx(1 / 8, rel=0.05)
    assert variation(times) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_on_off_keeps_the_rate_and_falls_silent() -> None:
    spec = MANY.model_copy(update={"kind": "on_off", "on_s": 2.0, "off_s": 6.0})
    times = [a.at_s for a in generate(spec, 16, 1).arrivals]
    assert len(times) / times[-1] == pytest.approx(8, rel=0.15)
    filled = {int(t) for t in times}
    assert 0.25 < len(filled) / times[-1] < 0.55  # 2 of 8 s, and the seconds at the edges
    assert variation(times) > 2


@pytest.mark.parametrize("mean", [60.0, 200.0, 500.0])
def test_zipf_has_the_mean_asked_for(mean: float) -> None:
    law = LengthSpec(kind="zipf", mean=mean, min=10, max=1000)
    trace = generate(MANY.model_copy(update={"input": law}), 16, 1)
    drawn = [a.input_tokens for a in trace.arrivals]
    assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.05)
    assert min(drawn) >= 10 and max(drawn) <= 1000
    small, large = (sum(low <= n < low + 50 for n in drawn) for low in (10, 900))
    assert small > large


def test_fixed_lengths() -> None:
    law = LengthSpec(kind="fixed", mean=77, sigma=2.0)
    trace = generate(MANY.model_copy(update={"input": law, "requests": 5}), 16, 1)
    assert {a.input_tokens for a in trace.arrivals} == {77}


def test_sessions_grow_and_share_what_they_held() -> None:
    spec = MANY.model_copy(
        update={"requests": 3_000, "turns": 4.0, "think_s": 5.0, "context_max": 4_000}
    )
    trace = generate(spec, 16, 2)
    times = [a.at_s for a in trace.arrivals]
    assert times == sorted(times) and len(times) == 3_000
    by_session: dict[str, list[Arrival]] = {}
    for a in trace.arrivals:
        by_session.setdefault(a.session or "", []).append(a)
    assert "" not in by_session
    for turns in by_session.values():
        for before, after in pairwise(turns):
            assert after.input_tokens > before.input_tokens + before.output_tokens
            full = before.input_tokens // 16
            assert after.hash_ids[:full] == before.hash_ids[:full]
            assert not set(after.hash_ids[full:]) & set(before.hash_ids)
    assert max(a.input_tokens for a in trace.arrivals) <= 4_000
    assert 2 < 3_000 / len(by_session) <= 4
