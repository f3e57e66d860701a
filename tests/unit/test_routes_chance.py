"""Draws: uniform, the same on every asking, and two are better than one."""

from tests.route_views import FakeView, choose, counts, workers

POOL = workers(a={}, b={}, c={}, d={})


def views(count: int, pool=POOL, **fields) -> list[FakeView]:
    return [FakeView(pool, request_id=f"r{i}", **fields) for i in range(count)]


def test_random_is_uniform() -> None:
    found = counts("random", views(4000))
    assert set(found) == {"a", "b", "c", "d"}
    assert all(900 < count < 1100 for count in found.values()), found


def test_a_draw_is_a_function_of_seed_request_attempt_and_stage() -> None:
    def drawn(**fields) -> list[str]:
        return [choose("random", view).worker for view in views(50, **fields)]

    assert drawn() == drawn()
    for other in ({"seed": 1}, {"seed": -1}, {"attempt": 2}, {"stage": "decode"}):
        assert drawn(**other) != drawn()


def test_power_of_two_never_takes_the_heaviest_and_draws_two_distinct_ones() -> None:
    pool = workers(
        a={"prefill_s": 1.0}, b={"prefill_s": 2.0}, c={"prefill_s": 3.0}, d={"prefill_s": 4.0}
    )
    found = counts("power_of_two", views(6000, pool))
    assert "d" not in found, "of two distinct ones d is never the lighter"
    assert 2800 < found["a"] < 3200 and 1800 < found["b"] < 2200 and 850 < found["c"] < 1150


def test_power_of_two_of_one() -> None:
    assert choose("power_of_two", FakeView(workers(a={}))).worker == "a"
