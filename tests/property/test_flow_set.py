"""The flow set solves only what a change reaches: its rates are those of a whole solve."""

import math

from hypothesis import given
from hypothesis import strategies as st

from kvasir.net.maxmin import Flow, FlowSet, solve

REL = 1e-9
LINKS = 12

amounts = st.floats(min_value=0.01, max_value=1e11)
round_amounts = st.sampled_from([1.0, 2.0, 3.0, 4.0, 6.0, 12.0])  # ties: several links fill at once
networks = st.one_of(
    st.lists(st.one_of(amounts, st.just(0.0)), min_size=LINKS, max_size=LINKS),
    st.lists(round_amounts, min_size=LINKS, max_size=LINKS),
)
flows = st.builds(
    Flow,
    st.lists(st.integers(0, LINKS - 1), min_size=1, max_size=4, unique=True).map(tuple),
    st.integers(1, 8),
    st.one_of(st.none(), amounts, round_amounts),
)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("add"), flows),
        st.tuples(st.just("add"), flows),
        st.tuples(st.just("remove"), st.integers(0, 99)),
        st.tuples(st.just("capacity"), st.integers(0, LINKS - 1), st.one_of(amounts, st.just(0.0))),
        st.tuples(st.just("ask"), flows),
        st.tuples(st.just("settle")),
    ),
    max_size=40,
)


def play(capacities: list[float], changes: list[tuple]) -> list[dict[int, float]]:
    """Rates after each change; every one is checked against a whole solve."""
    shares: FlowSet[int] = FlowSet(capacities)
    there: dict[int, Flow] = {}
    history = []
    for number, change in enumerate(changes):
        match change:
            case ("add", flow):
                there[number] = flow
                shares.add(number, flow)
            case ("remove", which) if there:
                name = list(there)[which % len(there)]
                del there[name]
                shares.remove(name)
            case ("capacity", link, capacity):
                capacities[link] = capacity
                shares.changed([link])
            case ("ask", flow):
                before = dict(shares.rates())
                whole = solve(capacities, [*there.values(), flow])[-1]
                assert math.isclose(shares.rate_if(flow), whole, rel_tol=REL)
                assert shares.rates() == before
            case ("settle",):
                shares.check()
                expected = solve(capacities, there.values())
                rates = shares.rates()
                assert list(rates) == list(there)
                for rate, whole in zip(rates.values(), expected, strict=True):
                    assert math.isclose(rate, whole, rel_tol=REL), (rates, expected)
                history.append(dict(rates))
    return history


@given(networks, changes)
def test_rates_are_those_of_a_whole_solve(capacities: list[float], changes: list[tuple]) -> None:
    play(capacities, [part for change in changes for part in (change, ("settle",))])


@given(networks, changes)
def test_several_changes_may_be_solved_at_once(
    capacities: list[float], changes: list[tuple]
) -> None:
    play(capacities, [*changes, ("settle",)])


@given(networks, changes)
def test_the_same_changes_give_the_same_bits(capacities: list[float], changes: list[tuple]) -> None:
    changes = [part for change in changes for part in (change, ("settle",))]
    assert play(list(capacities), changes) == play(list(capacities), changes)
