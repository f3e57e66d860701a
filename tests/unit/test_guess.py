"""A worker that sends no KV events: what the conductor takes it to have, and for how long."""

from typing import Any

from kvasir.core.messages import Ended, Usage
from kvasir.kv.guess import Guess, GuessedCache
from tests.nodes import Driven, keys, request
from tests.unit.test_conductor_node import beat, conductor, join, submit

TTL_S = 120.0


def silent(**more: Any) -> Driven[Any]:
    """One prefill and one decode worker that tell nothing."""
    c = conductor(**more)
    for worker in ("p", "d"):
        join(c, worker, kv_events=False, incarnation=2)
    c.heard.clear()
    return c


def test_what_was_sent_to_a_silent_worker_is_a_hit_until_it_is_too_old() -> None:
    c = silent(limits={"dead_after_s": 1e6})
    of = request(group=7)
    assert c.node.index.match(of.keys) == {}
    submit(c, of)
    assert c.node.index.match(of.keys) == {"p": 2, "d": 2}
    c(Ended("r", 1, "stop", Usage(10, 0, 5)))
    assert c.node.index.match(of.keys) == {"p": 2, "d": 2}, "a cache outlives the request"
    beat(c, after=TTL_S - 1.0)
    assert c.node.index.match(of.keys) == {"p": 2, "d": 2}
    beat(c, after=2.0)
    assert c.node.index.match(of.keys) == {}


def test_a_silent_worker_that_starts_again_has_nothing() -> None:
    c = silent()
    of = request(group=7)
    submit(c, of)
    assert "p" in c.node.index.match(of.keys)
    join(c, "p", kv_events=False, incarnation=3)
    assert "p" not in c.node.index.match(of.keys)


def test_of_a_worker_that_tells_nothing_is_guessed() -> None:
    c = conductor()
    of = request(group=7)
    submit(c, of)
    assert c.node.index.match(of.keys) == {}


def test_the_least_recently_sent_goes_first_and_tails_before_heads() -> None:
    cache = GuessedCache(Guess(4, 10.0))
    first, second = keys(3, 1), keys(2, 2)
    assert cache.use(first, 0.0) == (list(first), [])
    assert cache.use(second, 1.0) == (list(second), [first[2]])
    assert cache.use(first[:1], 2.0) == ([], [])
    assert cache.use(keys(2, 3), 3.0) == (list(keys(2, 3)), [first[1], second[1]])
    assert cache.expire(10.5) == []
    assert cache.expire(11.0) == [second[0]]
    assert cache.expire(13.0) == [first[0], *reversed(keys(2, 3))]


def test_a_prompt_larger_than_the_cache_leaves_its_head() -> None:
    cache = GuessedCache(Guess(2, 10.0))
    assert cache.use(keys(5, 1), 0.0) == (list(keys(2, 1)), [])
    assert cache.use(keys(5, 1), 0.0) == ([], [])
