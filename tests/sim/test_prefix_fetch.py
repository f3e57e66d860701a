"""Prefixes taken from a peer's cache, in whole simulated clusters."""

from kvasir.core.events import Prefilled, Routed, Shipped
from kvasir.core.specs import TopologySpec
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.run import simulate
from tests.sim.test_policies import deployment, heard

BLOCKS = 100
PROMPT = 16 * BLOCKS + 5


def crowd(fetch: bool, name: str = "mooncake"):
    """Two prefill workers; one has a long prefix that ten requests want at once."""
    route = {"fetch_prefix": fetch, "decode_choice": "arrival"}
    d = deployment(name, ("prefill", "decode"), route=route, kv_blocks=4000)
    links = TopologySpec(preset="fabric", gpus_per_node=1, nic_bandwidth=2e9)
    d = d.model_copy(update={"topology": links})
    shared = tuple(range(BLOCKS))
    first = Arrival(0.0, PROMPT, 2, (*shared, 10**6))
    rest = [Arrival(2.0, PROMPT + 400, 2, (*shared, *range(10**6 * i, 10**6 * i + 26)))
            for i in range(2, 12)]  # fmt: skip
    return d, Trace("crowd", 16, (first, *rest))


def test_a_hot_prefix_is_replicated_instead_of_computed_again() -> None:
    d, t = crowd(fetch=True)
    fetched = [e for e in heard(d, t, Shipped) if e.request_id.endswith("/prefix")]
    assert fetched and {e.source for e in fetched} == {"prefill-0"}
    assert {e.target for e in fetched} == {"prefill-1"}
    assert all("100 blocks from prefill-0" in e.why
               for e in heard(d, t, Routed) if "from" in e.why)  # fmt: skip
    cached = [e.cached_tokens for e in heard(d, t, Prefilled) if e.worker == "prefill-1"]
    assert cached and min(cached) == 16 * BLOCKS, "nobody on prefill-1 computed it"


def test_it_pays() -> None:
    with_it, without = (simulate(*crowd(fetch)).summary for fetch in (True, False))
    assert with_it.ttft.mean_s < 0.8 * without.ttft.mean_s
    assert with_it.completed == without.completed == 11


def test_the_joint_policy_fetches_where_that_is_sooner() -> None:
    d, t = crowd(fetch=True, name="netkv_joint")
    whys = [e.why for e in heard(d, t, Routed)]
    assert any("blocks from" in why for why in whys)
    slow = TopologySpec(preset="fabric", gpus_per_node=1, nic_bandwidth=1e4)
    slow = d.model_copy(update={"topology": slow})
    assert not any("blocks from" in e.why for e in heard(slow, t, Routed)), "computing is sooner"
