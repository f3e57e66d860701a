"""What a runner holds of adapters, what they change in keys and traces, what a file may say."""

from __future__ import annotations

import pytest

from kvasir.core.errors import ConfigError, ModelError
from kvasir.core.keys import trace_keys
from kvasir.core.messages import Prompt, bare
from kvasir.core.request import Adapter
from kvasir.core.specs import Deployment, LengthSpec, WorkloadSpec
from kvasir.core.specs.parse import parse_deployment
from kvasir.engine.adapters import Adapters
from kvasir.traces.generators import generate
from kvasir.traces.record import Arrival, Trace
from kvasir.traces.statistics import hit_table, shared_tokens

A, B, C = (Adapter(name, f"folder/{name}", f"digest-{name}") for name in "abc")


class Reader:
    """Reads digests; remembers which."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, adapter: Adapter) -> str:
        if adapter.name == "bad":
            raise ModelError("no such folder")
        self.read.append(adapter.name)
        return adapter.digest


def test_read_once_and_used_by_several() -> None:
    reader = Reader()
    held = Adapters(reader, 2)
    assert not held.take(("r1", 1), A)
    held.load(A, ("r1", 1))
    assert held.take(("r2", 1), A) and held.of(("r2", 1)) == held.of(("r1", 1)) == A.digest
    held.load(A, ("r3", 1))
    assert reader.read == ["a"] and held.of(("r4", 1)) is None
    held.check()


def test_the_longest_unused_makes_room() -> None:
    reader = Reader()
    held = Adapters(reader, 2)
    for name, adapter in (("ra", A), ("rb", B)):
        held.load(adapter, (name, 1))
        held.give_back((name, 1))
    assert held.take(("again", 1), A)
    held.give_back(("again", 1))
    held.load(C)  # in the place of B
    assert held.take(("x", 1), A) and held.take(("y", 1), C) and not held.take(("z", 1), B)
    held.check()


def test_one_in_use_is_never_evicted() -> None:
    held = Adapters(Reader(), 1)
    held.load(A, ("r1", 1))
    with pytest.raises(ModelError, match="1 adapters are in use"):
        held.load(B, ("r2", 1))
    assert held.of(("r1", 1)) == A.digest and held.of(("r2", 1)) is None
    held.give_back(("r1", 1))
    held.give_back(("r1", 1))
    held.give_back(("never", 1))
    held.load(B, ("r2", 1))
    assert not held.take(("r3", 1), A)
    held.check()


def test_one_that_cannot_be_read_leaves_nothing_behind() -> None:
    held = Adapters(Reader(), 2)
    bad = Adapter("bad", "nowhere", "digest-bad")
    for _ in range(3):
        with pytest.raises(ModelError, match="no such folder"):
            held.load(bad, ("r1", 1))
    assert held.of(("r1", 1)) is None
    held.load(A, ("r1", 1))
    held.check()


def test_a_name_is_not_what_is_held() -> None:
    """Other files under the same name are another adapter."""
    held = Adapters(Reader(), 2)
    held.load(A)
    assert not held.take(("r1", 1), Adapter("a", A.path, "digest-new"))
    assert held.take(("r2", 1), Adapter("z", "elsewhere", A.digest))


# --- nodes, keys, traces --------------------------------------------------------------------------


def test_nodes_and_journals_see_no_folder() -> None:
    seen = bare(Prompt("r1", 1, 3, b"123456789012", None, A, "why"))
    assert seen == Prompt("r1", 1, 3, fault="why")


def test_a_traces_blocks_are_others_under_another_adapter() -> None:
    ids = (1, 2, 3)
    every = [trace_keys(ids, adapter) for adapter in (None, "a", "b")]
    assert len({key for keys in every for key in keys}) == 9
    assert trace_keys(ids, "a") == every[1]
    assert Arrival(0.0, 20, 1, ids, adapter="a").keys(8) == trace_keys(ids[:2], "a")


def test_nothing_is_shared_across_adapters_in_a_trace() -> None:
    def trace(*adapters: str | None) -> Trace:
        rows = [Arrival(float(i), 33, 1, (1, 2, 3), adapter=a) for i, a in enumerate(adapters)]
        return Trace("t", 16, tuple(rows))

    assert shared_tokens(trace(None, None)) == 32 == shared_tokens(trace("a", "b", "a"))
    assert shared_tokens(trace(None, "a")) == 0 == shared_tokens(trace("b", "a"))
    (row,) = hit_table(trace("a", "b", None, "a"), [None])
    assert row.hit_blocks == 3


def test_generated_load_spreads_over_adapters_and_else_stays_as_it_was() -> None:
    spec = WorkloadSpec(requests=200, prefix_share=0.5, input=LengthSpec(mean=300, max=600))
    plain = generate(spec, 16, seed=3).arrivals
    spread = generate(spec.model_copy(update={"adapters": 4}), 16, seed=3).arrivals
    assert {a.adapter for a in plain} == {None}
    counts = [sum(a.adapter == f"adapter-{i}" for a in spread) for i in range(4)]
    assert sum(counts) == 200 and min(counts) > 25
    assert [(a.at_s, a.hash_ids) for a in plain] == [(a.at_s, a.hash_ids) for a in spread]
    turns = spec.model_copy(update={"adapters": 4, "turns": 4.0})
    whose: dict[str | None, set[str | None]] = {}
    for arrival in generate(turns, 16, seed=3).arrivals:
        whose.setdefault(arrival.session, set()).add(arrival.adapter)
    assert all(len(one) == 1 for one in whose.values())


# --- the deployment -------------------------------------------------------------------------------

HEAD = """
pools: [{name: both, role: mixed, count: 1}]
models:
"""


def parsed(*models: str) -> Deployment:
    return parse_deployment(HEAD + "".join(f"- {{{m}}}\n" for m in models), "kvasir.yaml")


def test_adapters_have_anybodys_names() -> None:
    """One that looks like a unit too."""
    (model,) = parsed("name: m, adapters: {time_s: folder, bytes: 8 GB}").models
    assert model.adapters == {"time_s": "folder", "bytes": "8 GB"}
    assert (model.adapters_max, model.allow_runtime_adapters) == (8, False)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["name: m, adapters: {a: x, b: y}, adapters_max: 1"], "2 adapters, but adapters_max is 1"),
        (["name: m, adapters: {m: x}"], "'m' is the name of two models"),
        (["name: m, adapters: {a: x}", "name: n, adapters: {a: y}"], "'a' is the name of two"),
        (["name: m", "name: m"], "'m' is the name of two models"),
        (['name: m, adapters: {"": x}'], "an adapter needs a name"),
        (["name: m, allow_runtime_adapters: true"], "needs adapters_folder"),
        (["name: m, adapters: [x]"], "adapters"),
        (["name: m, adapters_max: 0"], "adapters_max"),
        (["name: m, adapter: {a: x}"], "adapter is not a known key"),
    ],
)
def test_what_a_deployment_may_not_say(models: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*models)
    assert said in str(caught.value) and "kvasir.yaml:" in caught.value.where
