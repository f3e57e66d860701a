"""When streams decode together, and what the probe asks."""

import asyncio

import pytest

from kvasir.core.errors import ConfigError
from kvasir.measure.loadgen import Target
from kvasir.measure.server_probe import Ask, Extent, asks, checks, probe_server, together


def test_gaps_count_while_all_streams_decode() -> None:
    """From 3.0, the second one's first token, to 6.0, the first one's last."""
    first = [0.0, 1.0, 2.0, 3.5, 4.0, 5.0, 6.0]
    second = [3.0, 4.0, 5.25, 6.0, 7.0]
    found = together([first, second])
    assert sorted(found.gaps) == [0.5, 0.75, 1.0, 1.0, 1.25]
    assert found.output == round((3 + 4 + 5 + 1 + 2) / 5)


def test_streams_that_never_meet_have_no_gaps() -> None:
    assert together([[0.0, 1.0, 2.0], [5.0, 6.0, 7.0]]).gaps == []
    assert together([[0.0], [0.0]]).gaps == []


def test_the_first_gap_of_a_stream_is_left_out() -> None:
    """A hand-over may lie in it."""
    assert together([[0.0, 9.0, 10.0, 11.0]]).gaps == [1.0, 1.0]


def test_prompts_are_asked_one_at_a_time_and_decodes_in_batches() -> None:
    extent = Extent(tokens=200, batch=8, context=400)
    grid = asks(extent)
    assert {a.streams for a in grid if a.output == 1} == {1}
    assert {a.prompt for a in grid if a.output == 1} >= {8, 200}
    assert {1, 8} <= {a.streams for a in grid if a.output > 1}
    assert all(a.prompt <= 200 and a.prompt + a.output <= 400 for a in (*grid, *checks(extent, 0)))
    assert len(set(grid)) == len(grid)
    assert isinstance(grid[0], Ask)


def test_an_extent_without_sense_is_said_before_anything_is_asked() -> None:
    target = Target(base_url="http://127.0.0.1:1", model="m")
    with pytest.raises(ConfigError, match="nothing to ask"):
        asyncio.run(probe_server(target, Extent(64, 4, 32), rounds=1, seconds_max=1.0))
