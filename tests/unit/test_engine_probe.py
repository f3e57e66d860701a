"""The probe against an engine of made-up tokens whose steps take what a known cost says."""

import pytest

from kvasir.core.errors import LINES_MAX, ConfigError
from kvasir.core.specs.deployment import FittedCost
from kvasir.cost.step import Fitted
from kvasir.engine.fake import FakeRunner
from kvasir.measure.engine_probe import Extent, Probed, checks, grid, probe, room
from kvasir.measure.fit import choose
from kvasir.measure.rounds import Rounds

COST = FittedCost(overhead_s=0.004, per_token_s=5e-5, per_context_s=2e-7, per_row_s=1e-4)
EXTENT = Extent(tokens=64, batch=4, context=128)


class Bench:
    """A runner, and the clock on which its steps take what they cost."""

    def __init__(self, blocks: int = 64, context_max: int = 4096) -> None:
        self.now = 0.0
        model = Fitted(COST)

        self.runner = FakeRunner(
            blocks_count=blocks, context_max=context_max, seconds=model.batch, sleep=self.sleep
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def clock(self) -> float:
        return self.now

    def probe(self, extent: Extent = EXTENT, **more: float) -> Probed:
        asked = {"rounds": 3, "seconds_max": 1e9} | more
        return probe(self.runner, extent, clock=self.clock, **asked)  # type: ignore[arg-type]


def test_the_engines_constants_come_back() -> None:
    found = Bench().probe()
    assert found.rounds == 3
    choice = choose(found.samples, found.held_out)
    assert not choice.curved and choice.errors.worst < 0.002
    cost = choice.best.cost.model_dump(exclude={"curve"})
    assert cost == pytest.approx(COST.model_dump(exclude={"curve"}), rel=1e-2, abs=1e-9)


def test_each_sample_is_the_step_that_it_names() -> None:
    model = Fitted(COST)
    found = Bench().probe(rounds=1)
    for sample in (*found.samples, *found.held_out):
        # a decode run whose first row has no token before it cannot begin one earlier
        assert sample.seconds == pytest.approx(model.batch(sample.rows), rel=1e-3), sample.rows


def test_a_slow_stretch_spoils_one_round_only() -> None:
    bench = Bench()
    times = iter([1.0] * 60 + [3.0] * 60)

    def slow(seconds: float) -> None:
        bench.now += seconds * next(times, 1.0)

    bench.runner._sleep = slow
    found = bench.probe(rounds=5)
    assert found.steady is not None and found.steady[1] > found.steady[0]
    assert choose(found.samples, found.held_out).errors.worst < 0.002


def test_the_probe_leaves_no_attempt_behind() -> None:
    bench = Bench()
    bench.probe(rounds=1)
    assert not bench.runner._attempts


def test_time_is_bounded() -> None:
    once = Bench()
    once.probe(rounds=1)
    two_and_a_half = Bench()
    assert two_and_a_half.probe(rounds=99, seconds_max=2.5 * once.now).rounds == 2
    with pytest.raises(ConfigError, match="not enough") as raised:
        Bench().probe(seconds_max=once.now / 2)
    assert len(str(raised.value).splitlines()) <= LINES_MAX


@pytest.mark.parametrize(
    ("extent", "what"),
    [
        (Extent(64, 4, 5000), "too long for a model of 4096"),
        (Extent(64, 8, 128), "blocks of KV"),
        (Extent(1, 4, 128), "nothing to time"),
        (Extent(256, 4, 128), "nothing to time"),
    ],
)
def test_what_cannot_be_timed_is_said_at_once(extent: Extent, what: str) -> None:
    bench = Bench()
    with pytest.raises(ConfigError, match=what):
        bench.probe(extent)
    assert bench.now == 0


def test_the_room_is_enough_for_every_shape() -> None:
    blocks = room(EXTENT, 16)
    Bench(blocks=blocks).probe(rounds=1)
    shapes = (*grid(EXTENT), *checks(EXTENT, 0))
    needed = max(sum(-(-(new + before + 3) // 16) for new, before in s) for s in shapes)
    assert needed <= blocks


def test_the_checks_are_off_the_grid() -> None:
    assert not set(grid(EXTENT)) & set(checks(EXTENT, 0))
    assert checks(EXTENT, 0) == checks(EXTENT, 0) != checks(EXTENT, 1)


def test_rounds_give_everything_as_often_in_another_order() -> None:
    visits = Rounds("abcdefgh", 3, 1.0, seed=1, clock=lambda: 0.0, progress=lambda share: None)
    seen = "".join(visits)
    orders = {seen[i : i + 8] for i in (0, 8, 16)}
    assert visits.done == 3 and len(orders) == 3
    assert {"".join(sorted(order)) for order in orders} == {"abcdefgh"}
