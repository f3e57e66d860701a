"""What makes an allocation max-min fair, over random networks."""

import math

from hypothesis import given
from hypothesis import strategies as st

from kvasir.net.maxmin import Flow, solve

REL = 1e-9
LINKS = 6

amounts = st.floats(min_value=0.01, max_value=1e11)
capacities = st.lists(st.one_of(amounts, st.just(0.0)), min_size=LINKS, max_size=LINKS)
flows = st.lists(
    st.builds(
        Flow,
        st.lists(st.integers(0, LINKS - 1), min_size=1, max_size=4, unique=True).map(tuple),
        st.integers(1, 8),
        st.one_of(st.none(), amounts),
    ),
    max_size=24,
)


def used(link: int, flows: list[Flow], rates: list[float]) -> float:
    return math.fsum(r for f, r in zip(flows, rates, strict=True) if link in f.links)


@given(capacities, flows)
def test_no_link_carries_more_than_it_has_and_no_flow_more_than_its_cap(
    capacities: list[float], flows: list[Flow]
) -> None:
    rates = solve(capacities, flows)
    for link, capacity in enumerate(capacities):
        assert used(link, flows, rates) <= capacity * (1 + REL)
    for flow, rate in zip(flows, rates, strict=True):
        assert 0 <= rate <= (math.inf if flow.cap is None else flow.cap * flow.multiplicity)


@given(capacities, flows)
def test_every_flow_is_at_its_cap_or_has_a_bottleneck(
    capacities: list[float], flows: list[Flow]
) -> None:
    """A bottleneck: a full link on which no share is larger. This is max-min fairness itself."""
    rates = solve(capacities, flows)
    shares = [r / f.multiplicity for f, r in zip(flows, rates, strict=True)]
    for flow, share in zip(flows, shares, strict=True):
        if flow.cap is not None and share >= flow.cap * (1 - REL):
            continue
        assert any(
            used(link, flows, rates) >= capacities[link] * (1 - REL)
            and all(
                other <= share * (1 + REL)
                for f, other in zip(flows, shares, strict=True)
                if link in f.links
            )
            for link in flow.links
        ), (flow, share)


@given(capacities, flows, st.randoms(use_true_random=False))
def test_order_does_not_matter(capacities: list[float], flows: list[Flow], random) -> None:
    order = list(range(len(flows)))
    random.shuffle(order)
    rates = solve(capacities, flows)
    permuted = solve(capacities, [flows[i] for i in order])
    for i, rate in zip(order, permuted, strict=True):
        assert math.isclose(rate, rates[i], rel_tol=REL)


@given(capacities, flows.filter(bool), st.integers(0, LINKS - 1), amounts)
def test_more_capacity_never_lowers_the_least_share(
    capacities: list[float], flows: list[Flow], link: int, extra: float
) -> None:
    def least(capacities: list[float]) -> float:
        rates = solve(capacities, flows)
        return min(r / f.multiplicity for f, r in zip(flows, rates, strict=True))

    wider = [c + extra if i == link else c for i, c in enumerate(capacities)]
    assert least(wider) >= least(capacities) * (1 - REL)


@given(capacities, flows, st.integers(1, 5))
def test_a_bundle_is_that_many_flows(capacities: list[float], flows: list[Flow], m: int) -> None:
    bundle = Flow((0, 1), m, None)
    singles = solve(capacities, [*flows, *[Flow((0, 1))] * m])
    bundled = solve(capacities, [*flows, bundle])
    assert math.isclose(math.fsum(singles[len(flows) :]), bundled[-1], rel_tol=REL)
