"""The gateway's request node by hand: no token is lost, none comes twice, and every life ends."""

from typing import Any

import msgspec
import pytest

from kvasir.core.effects import Refuse, Reply, Timer
from kvasir.core.events import Closed, Recomputed
from kvasir.core.messages import (
    Active,
    Alarm,
    AnyMessage,
    Arrive,
    Declined,
    Done,
    Drawn,
    Ended,
    GatewayBeat,
    Hangup,
    Lost,
    Placed,
    Prompt,
    Start,
    Submit,
    Tokens,
    Usage,
)
from kvasir.core.request import Request
from kvasir.node.request import Requests
from tests.nodes import GATEWAY, REPORT, Driven, Effects, request, tokens


def gateway(**limits: Any) -> Driven[Requests]:
    chosen = {"beat_s": 1.0, "grace_s": 3.0, "attempts_max": 4, "deaths_max": 3} | limits
    return Driven(Requests(GATEWAY, 1, **chosen))


def placed(g: Driven[Requests], attempt: int = 1, decode: str = "d", **more: Any) -> Effects:
    return g(Placed("r", attempt, "disaggregated", "p", decode), **more)


def begin(g: Driven[Requests], of: Request | None = None) -> Effects:
    """A request of 10 tokens for 5, placed on p and d."""
    effects = g(Arrive(of or request()))
    return Effects(effects + placed(g))


def done(g: Driven[Requests], count: int = 5, attempt: int = 1, **more: Any) -> Effects:
    return g(Done("r", attempt, "stop", count, REPORT), **more)


def ended(effects: Effects) -> Ended:
    """Exactly one word to the conductor, one to the client, one to whoever observes."""
    assert effects.told(Ended).to == ["conductor"]
    (closed,) = effects.noted(Closed)
    (last,) = [r for r in effects.of(Reply) if r.end]
    assert closed.reason == last.end == effects.told(Ended).one().reason
    return effects.told(Ended).one()


def replies(g: Driven[Requests]) -> list[tuple[int, int]]:
    """(first, count) of all tokens that the client saw."""
    return [(r.first, r.count) for r in g.heard.of(Reply) if r.count]


# --- the usual way --------------------------------------------------------------------------------


def test_a_request_from_arrival_to_end() -> None:
    g = gateway()
    effects = g(Arrive(request()), after=1.0)
    assert effects.told(Submit).pairs == [("conductor", Submit(request(), 1, 0))]

    effects = placed(g)
    assert effects.told(Prompt).pairs == [(w, Prompt("r", 1, 10)) for w in ("p", "d")]
    assert effects.of(Reply) == [Reply("r", 0, 0, path="disaggregated")], "known at the first byte"

    g(tokens("r", 0), after=0.5)
    g(tokens("r", 1), after=0.3)
    g(tokens("r", 2, 3), after=0.3)
    assert replies(g) == [(0, 1), (1, 1), (2, 3)]

    effects = done(g, after=0.1)
    end = ended(effects)
    assert end.reason == "stop" and end.usage == Usage(10, 4, 5)
    assert end.ttft_s == pytest.approx(0.5) and end.path == "disaggregated"
    closed = effects.noted(Closed)[0]
    assert closed.attempts == 1 and closed.duration_s == pytest.approx(1.2)
    assert closed.tpot_s == pytest.approx(0.6 / 4), "from the first token to the last"
    assert closed.second_token_delay_s == pytest.approx(0.3)
    assert not g.node.lives


def test_one_message_carries_tokens_of_many_requests() -> None:
    g = gateway()
    for name in ("a", "b"):
        g(Arrive(request(name)))
    effects = g(Tokens((Drawn("a", 1, 0, 1), Drawn("gone", 1, 0, 1), Drawn("b", 1, 0, 2))))
    assert [(r.request_id, r.count) for r in effects.of(Reply)] == [("a", 1), ("b", 2)]


def test_a_worker_that_is_chosen_later_gets_the_prompt_then() -> None:
    g = gateway()
    g(Arrive(request()))
    assert placed(g, decode="").told(Prompt).to == ["p"]
    second = placed(g)
    assert second.told(Prompt).to == ["d"] and not second.of(Reply)
    assert placed(g).told(Prompt).to == []


def test_its_prompt_is_the_attempts_not_what_was_emitted_since() -> None:
    """The prefill worker has drawn a token already: that one comes with the KV."""
    g = gateway()
    g(Arrive(request()))
    placed(g, decode="")
    g(tokens("r", 0))
    assert placed(g).told(Prompt).pairs == [("d", Prompt("r", 1, 10))]
    g(Lost("r", 1, "x"))
    placed(g, 2, decode="")
    g(tokens("r", 1, attempt=2))
    assert placed(g, 2).told(Prompt).one().count == 11


def test_one_worker_for_both_phases_gets_one_prompt() -> None:
    g = gateway()
    g(Arrive(request()))
    assert g(Placed("r", 1, "aggregated", "m", "m")).told(Prompt).to == ["m"]


@pytest.mark.parametrize(("cached", "told"), [(4, 4), (12, 10)])
def test_cached_tokens_are_a_part_of_the_prompt(cached: int, told: int) -> None:
    """A later attempt prefills prompt and emitted tokens, and may find more than the prompt."""
    prefill = msgspec.structs.replace(REPORT.prefill, cached_tokens=cached)
    g = gateway()
    begin(g)
    g(tokens("r", 0, 5))
    report = msgspec.structs.replace(REPORT, prefill=prefill)
    assert ended(g(Done("r", 1, "length", 5, report))).usage == Usage(10, told, 5)


@pytest.mark.parametrize(("count", "tpot_s"), [(0, None), (1, None), (2, 0.25)])
def test_tpot_needs_a_second_token(count: int, tpot_s: float | None) -> None:
    g = gateway()
    begin(g)
    for i in range(count):
        g(tokens("r", i), after=0.25)
    assert done(g, count).noted(Closed)[0].tpot_s == tpot_s


# --- tokens, in order and once --------------------------------------------------------------------


def test_tokens_that_came_before_are_dropped() -> None:
    g = gateway()
    begin(g)
    g(tokens("r", 0, 3))
    assert g(tokens("r", 0, 3)) == [] == g(tokens("r", 1, 1))
    g(tokens("r", 2, 2))
    assert replies(g) == [(0, 3), (3, 1)]


def test_a_hole_in_the_tokens_starts_the_next_attempt() -> None:
    g = gateway()
    begin(g)
    g(tokens("r", 0, 2))
    effects = g(tokens("r", 3))
    assert effects.told(Submit).one() == Submit(request(), 2, 2)
    assert effects.noted(Recomputed) == [Recomputed("r", 12, "lost")]
    assert g(tokens("r", 2)) == [], "the first attempt's tokens are void now"
    assert placed(g, 2).told(Prompt).messages == [Prompt("r", 2, 12)] * 2
    g(tokens("r", 2, 3, attempt=2))
    assert replies(g) == [(0, 2), (2, 3)]
    assert ended(done(g, attempt=2)).usage.output_tokens == 5


def test_an_end_that_overtook_its_tokens_starts_the_next_attempt() -> None:
    g = gateway()
    begin(g)
    g(tokens("r", 0, 2))
    assert done(g, 3).told(Submit).one().emitted == 2


@pytest.mark.parametrize(
    "late",
    [
        Placed("r", 1, "aggregated", "m", "m"),
        tokens("r", 0),
        Done("r", 1, "stop", 0, REPORT),
        Lost("r", 1, "x"),
        Declined("r", 1, 503, "x"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_an_older_attempt_has_nothing_to_say(late: AnyMessage) -> None:
    g = gateway()
    begin(g)
    g(Lost("r", 1, "x"))
    assert g(late) == []
    hung_up = g(Hangup("r"))
    assert ended(hung_up).attempt == 2
    assert g(late) == []


# --- again, and when not --------------------------------------------------------------------------


def test_a_lost_attempt_is_tried_again_with_what_was_emitted() -> None:
    g = gateway()
    begin(g)
    g(tokens("r", 0, 2))
    assert g(Lost("r", 1, "d died", died=True)).told(Submit).one() == Submit(request(), 2, 2)
    assert not g.heard.of(Refuse)


def test_what_was_never_placed_is_not_computed_again() -> None:
    g = gateway()
    g(Arrive(request()))
    assert not g(Lost("r", 1, "not known")).noted(Recomputed)


def test_a_loss_after_the_last_token_is_an_end() -> None:
    g = gateway()
    begin(g)
    g(tokens("r", 0, 5))
    effects = g(Lost("r", 1, "d died"))
    assert ended(effects).reason == "length" and not effects.told(Submit)


def lose(g: Driven[Requests], count: int, *, died: bool = False) -> Effects:
    effects = Effects()
    for attempt in range(1, count + 1):
        effects = g(Lost("r", attempt, "something", died=died))
    return effects


def test_attempts_have_an_end() -> None:
    g = gateway(attempts_max=4)
    begin(g)
    assert lose(g, 3).told(Submit).one().attempt == 4
    effects = g(Lost("r", 4, "queue full"))
    refuse = effects.one(Refuse)
    assert refuse.status == 503 and refuse.retry_after_s is not None
    assert "4 attempts" in refuse.reason and "queue full" in refuse.reason
    assert ended(effects).reason == "failed"


def test_a_request_that_workers_die_of_is_refused() -> None:
    g = gateway(attempts_max=100, deaths_max=3)
    begin(g)
    assert lose(g, 2, died=True).told(Submit)
    assert g(Lost("r", 3, "queue full")).told(Submit), "this one was nobody's death"
    effects = g(Lost("r", 4, "d died", died=True))
    assert effects.one(Refuse).status == 503 and ended(effects).reason == "failed"


def test_a_refusal_is_passed_on() -> None:
    g = gateway()
    g(Arrive(request()))
    effects = g(Declined("r", 1, 429, "the queue is full", 2.5))
    assert effects.one(Refuse) == Refuse("r", 429, "the queue is full", 2.5)
    assert ended(effects).reason == "failed"


# --- ends from outside ----------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["cancelled", "stop"])
def test_a_client_that_leaves_ends_it(reason: Any) -> None:
    g = gateway()
    begin(g)
    g(tokens("r", 0, 2))
    end = ended(g(Hangup("r", reason)))
    assert end.reason == reason and end.usage.output_tokens == 2
    assert g(Hangup("r", reason)) == [], "once"


def test_a_deadline_ends_it() -> None:
    g = gateway()
    effects = g(Arrive(request(deadline_s=7.5)))
    timer = effects.one(Timer)
    assert timer.at == 7.5
    placed(g)
    effects = g(Alarm(timer.name), after=7.5)
    assert effects.one(Refuse).status == 504 and ended(effects).reason == "deadline"
    assert g(Alarm(timer.name)) == []


def test_a_deadline_after_the_end_is_nothing() -> None:
    g = gateway()
    timer = g(Arrive(request(deadline_s=7.5))).one(Timer)
    placed(g)
    done(g, 0)
    assert g(Alarm(timer.name)) == []


# --- the beat -------------------------------------------------------------------------------------


def test_the_beat_names_what_has_waited_for_a_while() -> None:
    """A fresh attempt may not be known to the conductor yet."""
    g = gateway(grace_s=3.0)
    assert g(Start()).one(Timer) == Timer("beat", 1.0)
    begin(g)
    g(tokens("r", 0, 2))
    effects = g(Alarm("beat"), after=3.0)
    assert effects.told(GatewayBeat).one().active == ()
    assert effects.one(Timer).at == 4.0
    beat = g(Alarm("beat"), after=0.1).told(GatewayBeat).one()
    assert beat == GatewayBeat(GATEWAY, 1, (Active("r", 1, 2),))
    g(Lost("r", 1, "x"))
    assert g(Alarm("beat")).told(GatewayBeat).one().active == ()
