"""Max-min rates against values worked out by hand."""

import pytest

from kvasir.net.maxmin import Flow, FlowSet, flow_of, solve
from kvasir.net.topology import Route

GOLDENS = {
    # One link of 12 shared by three: 12 / 3 each.
    "single link": ([12.0], [Flow((0,)), Flow((0,)), Flow((0,))], [4, 4, 4]),
    # A crosses links of 10 and 4, B only the first. Equal shares of link 0 would be 5, but link 1
    # stops A at 4; B takes the 6 that are left.
    "two links": ([10.0, 4.0], [Flow((0, 1)), Flow((0,))], [4, 6]),
    # A long flow over links of 10 and 4, one short flow on each. Link 1 fills first: 4 / 2 = 2 for
    # the long flow and its neighbour; link 0 leaves 10 - 2 = 8 to the other one.
    "line network": ([10.0, 4.0], [Flow((0, 1)), Flow((0,)), Flow((1,))], [2, 8, 2]),
    # Equal shares of 10 would be 3.33. One flow stops at its cap of 2; the others get (10 - 2) / 2.
    "capped flow": ([10.0], [Flow((0,), cap=2.0), Flow((0,)), Flow((0,), cap=9.0)], [2, 4, 4]),
    # Bundles of 4 and 2 shares on a link of 12: 12 / 6 = 2 a share, so 8 and 4. The second bundle's
    # own link of 3 allows 1.5 a share: then it gets 3 and the first (12 - 3) / 4 = 2.25 a share, 9.
    "weighted bundle": ([12.0, 3.0], [Flow((0,), 4), Flow((0, 1), 2)], [9, 3]),
    # Three senders (NICs 0 to 2, 10 each) to one receiver (NIC 4, 9). The first two share an uplink
    # of 4 (link 3): 2 each, less than the receiver's 9 / 3. The third gets the rest, 9 - 4 = 5.
    "incast and uplink": (
        [10.0, 10.0, 10.0, 4.0, 9.0], [Flow((0, 3, 4)), Flow((1, 3, 4)), Flow((2, 4))], [2, 2, 5],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str) -> None:
    capacities, flows, rates = GOLDENS[name]
    assert solve(capacities, flows) == pytest.approx(rates, rel=1e-12)


def test_no_flows() -> None:
    assert solve([1.0], []) == []


def test_a_dead_link_stops_its_flows_and_only_them() -> None:
    assert solve([0.0, 6.0], [Flow((0, 1)), Flow((1,)), Flow((0, 1), cap=1.0)]) == [0, 6, 0]


def test_a_flow_without_links_gets_its_cap() -> None:
    assert solve([], [Flow((), 3, 2.0)]) == [6]


def test_a_flow_without_any_bound_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="neither a link nor a cap"):
        solve([], [Flow(())])


def test_a_level_that_rises_twice_is_found() -> None:
    # Link 0 (6) holds A, B, C; links 1 and 2 stop A at 0.5 and B at 1 first. C gets 6 - 1.5 = 4.5,
    # though link 0 stood in the queue with 2, and link 3 (3.2, level 3.2) looks nearer than that.
    flows = [Flow((0, 1)), Flow((0, 2)), Flow((0,)), Flow((3,))]
    assert solve([6.0, 0.5, 1.0, 3.2], flows) == pytest.approx([0.5, 1, 4.5, 3.2], rel=1e-12)


def test_equal_paths_fold_without_changing_rates() -> None:
    one_by_one = solve([12.0, 5.0], [Flow((0,), 1)] * 6 + [Flow((0, 1), 3)])
    assert sum(one_by_one[:6]) == pytest.approx(
        solve([12.0, 5.0], [Flow((0,), 6), Flow((0, 1), 3)])[0]
    )


def test_flow_set_follows_arrivals_departures_and_capacities() -> None:
    capacities = [12.0]
    flows: FlowSet[str] = FlowSet(capacities)
    assert flows.rates() == {}
    flows.add("a", Flow((0,)))
    flows.add("b", Flow((0,), 2))
    assert flows.rates() == {"a": 4, "b": 8}
    assert flows.rate_if(Flow((0,))) == 3
    assert flows.rates() == {"a": 4, "b": 8}, "asking changes nothing"
    flows.remove("b")
    assert flows.rates() == {"a": 12} and len(flows) == 1 and "b" not in flows
    capacities[0] = 6.0
    flows.changed()
    assert flows.rates() == {"a": 6}


def test_a_route_is_a_flow() -> None:
    route = Route(links=(3, 1), multiplicity=4, flow_cap=2.5, latency_s=0.0, tier=1)
    assert flow_of(route) == Flow((3, 1), 4, 2.5)
