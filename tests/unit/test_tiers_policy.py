"""Load or compute, and what a pool's tiers may say."""

from typing import get_args

import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.messages import Location
from kvasir.core.specs.parse import parse_deployment
from kvasir.core.specs.tiers import HostTier
from kvasir.cost.pools import step_model
from kvasir.node.build import worker_config
from kvasir.policy.evict import RANKS
from kvasir.policy.tiers import Offer, PrefillCost, asks, assumed, choose, retry_s

FAST, SLOW = Offer("host", 100, 0.01, 0.1), Offer("disk", 100, 0.5, 0.1)
BARGAIN = Offer("disk", 900, 0.5, 1.0)


@pytest.mark.parametrize(
    ("offers", "wait_s", "taken"),
    [
        ([FAST], 0.0, 1), ([SLOW], 0.0, 0), ([FAST, SLOW], 0.0, 1), ([SLOW, FAST], 0.0, 0),
        ([SLOW, BARGAIN], 0.0, 2),  # a dear beginning may be worth what follows
        ([FAST], 0.2, 0),  # the step that runs takes longer than all of it
        ([FAST, BARGAIN], 0.2, 2), ([], 0.0, 0),
    ],
)  # fmt: skip
def test_as_many_offers_as_pay(offers: list[Offer], wait_s: float, taken: int) -> None:
    assert choose(offers, wait_s).offers == taken
    assert choose(offers, wait_s, always=True).offers == len(offers)


@pytest.mark.parametrize(("behind", "taken"), [(0, 0), (3, 0), (5, 1)])
def test_who_waits_behind_counts(behind: int, taken: int) -> None:
    """Half a second of loading, a tenth of computing: once five others would wait for the engine,
    loading costs less waiting. The time that a load is worth grows with them."""
    choice = choose([SLOW], 0.0, behind=behind)
    assert choice.offers == taken and choice.worth_s == pytest.approx(0.1 * (1 + behind))
    assert ("behind" in choice.why) == bool(behind)


@pytest.mark.parametrize(
    ("gain_s", "share", "asked"),
    [(1.0, 1.0, True), (0.005, 1.0, False), (1.0, 0.0, True), (0.4, 0.0, False),
     (0.4, 0.1, True), (-1.0, 1.0, False)],
)  # fmt: skip
def test_asking_costs_at_most_a_little_of_what_it_may_save(
    gain_s: float, share: float, asked: bool
) -> None:
    assert asks(gain_s, 0.01, share) == asked


def test_a_failed_tier_is_left_alone_ever_longer() -> None:
    assert [retry_s(n) for n in (1, 2, 3, 7, 500)] == [1, 2, 4, 60, 60]


def test_a_choice_says_what_it_compared() -> None:
    loaded = choose([FAST, SLOW], 0.0)
    assert (loaded.load_s, loaded.compute_s) == (0.01, 0.1)
    assert loaded.why == "100 tokens: 10 ms from host, 100 ms to compute"
    passed = choose([SLOW], 0.05)
    assert passed.why == "100 tokens: 550 ms from disk, 100 ms to compute"


def test_a_pace_follows_what_is_measured_and_forgives() -> None:
    pace = assumed(1e9)
    for _ in range(20):
        pace = pace.measured(1e6, 1.0)
    assert pace.per_s == pytest.approx(1e6, rel=0.1), "twenty slow ones"
    one = pace.measured(1.0, 1e-9)
    assert one.per_s < 1.3e6, "one byte tells little of a rate"
    turns = 0
    while pace.per_s < 3e6:
        pace, turns = pace.forgiven(1e9), turns + 1
    assert 40 < turns < 70


def test_the_line_of_prefill_is_the_cost_models() -> None:
    d = parse_deployment(
        "models: [{name: m, shape: llama-3.1-8b}]\n"
        "pools: [{name: a, role: mixed, count: 1, tiers: {host: {bytes: 1 GiB}}}]\n", "x.yaml",
    )  # fmt: skip
    rules = worker_config(d, "a-0", 1, Location()).tiers
    assert rules is not None
    model, cost = step_model(d, d.pools[0]), rules.cost
    for start, count in ((0, 1000), (0, 8000), (8000, 2000), (30_000, 500)):
        seconds = model.batch(((count, start),))
        assert cost.overhead_s + cost.more(start, count) == pytest.approx(seconds, rel=0.02)
    assert PrefillCost(0, 1, 0).more(5, 7) == 7


def test_the_names_of_rules_are_those_that_there_are() -> None:
    assert set(get_args(HostTier.model_fields["evict"].annotation)) == RANKS.keys()


@pytest.mark.parametrize(
    ("tiers", "said"),
    [
        ("host: {}", "host.bytes: give its size, either as blocks or as bytes"),
        ("host: {bytes: 1 GB, blocks: 3}", "give its size"),
        ("host: {blocks: 3, evict: lri}", "nearest: lru"),
        ("host: {blocks: 3, path: x}", "host.path is not a known key"),
        ("disk: {blocks: 0}", "greater than 0"),
        ("tape: {blocks: 1}", "tape is not a known key"),
        ("host: {bytes: 100}", "hold no block of"),
        ("cluster: {url: \"redis://h:1/0\"}", "give its size"),
        ("cluster: {blocks: 3, url: \"memcached://h:1\"}", "begins with one of redis"),
        ("cluster: {blocks: 3, evict: lru}", "cluster.evict is not a known key"),
    ],
)
def test_a_wrong_tier_is_told(tiers: str, said: str) -> None:
    text = (
        "models: [{name: m, shape: tiny}]\n"
        f"pools: [{{name: a, role: mixed, count: 1, tiers: {{{tiers}}}}}]\n"
    )
    with pytest.raises(ConfigError) as error:
        worker_config(parse_deployment(text, "x.yaml"), "a-0", 1, Location())
    assert said in str(error.value) and "pools" in str(error.value)
    assert len(str(error.value).splitlines()) <= 5
