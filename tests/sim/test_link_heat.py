"""Link heat counts every byte once, wherever windows begin and end."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.world.sim.heat import WINDOW_S, WINDOWS_MAX, LinkHeat
from kvasir.world.sim.run import simulate
from tests.sims import cluster, trace

Flow = tuple[float, float, float]
flows = st.lists(
    st.tuples(st.floats(0, 50), st.floats(0, 50), st.floats(0, 1e9)), min_size=1, max_size=30
)


@given(flows)
def test_no_byte_is_lost_or_doubled(sent: list[Flow]) -> None:
    heat = LinkHeat()
    for start, seconds, nbytes in sent:
        heat.add((3, 5), start, start + seconds, nbytes)
    total = math.fsum(nbytes for _, _, nbytes in sent)
    for link in (3, 5):
        row = heat.moved[link]
        assert len(row) == WINDOWS_MAX
        assert min(row) >= -1e-3
        assert math.fsum(row) == pytest.approx(total, rel=1e-9, abs=1e-3)
    assert set(heat.moved) == {3, 5}


def test_bytes_lie_where_they_were_sent() -> None:
    heat = LinkHeat()
    heat.add((0,), 0.5 * WINDOW_S, 2.5 * WINDOW_S, 200.0)
    assert heat.moved[0][:4] == pytest.approx([50.0, 100.0, 50.0, 0.0])
    heat.add((0,), 0.0, WINDOW_S * WINDOWS_MAX, 0.0)  # beyond the last window: twice as long
    assert heat.width_s == 2 * WINDOW_S
    assert heat.moved[0][:2] == pytest.approx([150.0, 50.0])


@pytest.mark.parametrize("gpus_per_node", [1, 8])
def test_links_of_a_run_carry_what_was_sent(gpus_per_node: int) -> None:
    """Each transfer leaves through one port and comes in through another, NIC or NVLink."""
    run = simulate(cluster(topology={"gpus_per_node": gpus_per_node}), trace(80), detail=True)
    assert run.detail is not None
    total = sum(run.summary.bytes_by_tier.values())
    assert total > 0
    for way in ("-out", "-in"):
        ports = [u for u in run.detail.links if u.name.endswith(way)]
        assert math.fsum(b for u in ports for b in u.moved) == pytest.approx(total, rel=1e-9)
    for use in run.detail.links:
        assert max(use.shares(run.detail.window_s)) <= 1 + 1e-9, use.name
    means = [math.fsum(u.moved) / u.capacity for u in run.detail.links]
    assert means == sorted(means, reverse=True)
