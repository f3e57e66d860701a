"""Session affinity: stays, falls back when it must, and remembers a bounded number."""

import pytest
from pydantic import ValidationError

from kvasir.core.specs import RouteSpec
from kvasir.policy.route import ROUTES, RouteMemory
from kvasir.policy.route.session import pin, pinned
from kvasir.policy.route.view import SESSION_SETS, SESSIONS_PER_SET
from tests.route_views import FakeView, workers

SPEC = RouteSpec(name="session", fallback="round_robin")
POOL = workers(a={}, b={}, c={})


def run(*views: FakeView) -> list[str]:
    memory, found = RouteMemory(), []
    for view in views:
        choice, memory = ROUTES["session"](view, memory)
        found.append(choice.worker)
    return found


def of(session: str | None, pool=POOL, stage="prefill") -> FakeView:
    return FakeView(pool, session=session, stage=stage, spec=SPEC)


def test_a_session_stays_and_others_take_turns() -> None:
    assert run(of("x"), of("y"), of("x"), of("y"), of(None), of("x")) == list("ababca")


def test_each_stage_has_its_own_worker() -> None:
    views = [of("w"), of("x"), of("x", stage="decode"), of("x"), of("x", stage="decode")]
    assert run(*views) == list("ababa")


def test_a_worker_that_is_gone_is_replaced_for_good() -> None:
    without_a = POOL[1:]
    assert run(of("x"), of("x", without_a), of("x"), of("x")) == ["a", "c", "c", "c"]


def test_a_full_worker_is_replaced() -> None:
    """Bound: ceil(1.25 * (5 + 1) / 3) = 3 requests."""
    full = workers(a={"requests": 3}, b={"requests": 1}, c={"requests": 1})
    busy = workers(a={"requests": 2}, b={"requests": 2}, c={"requests": 1})
    assert run(of("x"), of("x", busy), of("x", full), of("x")) == ["a", "a", "b", "b"]


def test_the_memory_is_bounded_and_frozen() -> None:
    memory = RouteMemory()
    for i in range(3 * SESSION_SETS * SESSIONS_PER_SET):
        before = memory
        memory = pin(memory, str(i), "a")
        assert pinned(memory, str(i)) == "a" and pinned(before, str(i)) == ""
    assert all(len(pins) == SESSIONS_PER_SET for pins in memory.sessions)


def test_the_least_recent_of_a_set_goes_first() -> None:
    def set_of(name: str) -> int:
        return next(i for i, p in enumerate(pin(RouteMemory(), name, "a").sessions) if p)

    same = [n for n in map(str, range(20_000)) if set_of(n) == set_of("kept")][:40]
    memory = pin(RouteMemory(), "kept", "a")
    for i, name in enumerate(same):
        memory = pin(memory, name, "b")
        if i % 10 == 9:
            memory = pin(memory, "kept", "a")
    assert pinned(memory, "kept") == "a"
    assert [n for n in same if pinned(memory, n)] == same[-SESSIONS_PER_SET + 1 :]


def test_it_cannot_fall_back_to_itself() -> None:
    with pytest.raises(ValidationError, match="session cannot fall back to itself"):
        RouteSpec(fallback="session")
