"""Simulated requests under adapters: the live block pools, and no prefix across adapters."""

from __future__ import annotations

import msgspec

from kvasir.core.specs import LengthSpec, WorkloadSpec
from kvasir.traces.generators import generate
from kvasir.traces.record import Arrival, Trace
from kvasir.world.sim.run import Result, simulate
from tests.sims import BLOCK, cluster

PROMPT = tuple(range(10, 20))  # ten blocks


def run(*adapters: str | None) -> Result:
    """The same prompt every ten seconds."""
    arrivals = [
        Arrival(10.0 * i, 10 * BLOCK + 3, 4, (*PROMPT, 100 + i), adapter=one)
        for i, one in enumerate(adapters)
    ]
    return simulate(cluster("mixed", count=1), Trace("t", BLOCK, tuple(arrivals)))


def cached(result: Result) -> int:
    assert result.summary.prefix is not None
    return result.summary.prefix.hits_tokens


def test_a_prefix_is_shared_under_one_adapter_and_not_across() -> None:
    assert cached(run(None, None)) == 10 * BLOCK == cached(run("a", "a"))
    assert cached(run(None, "a")) == 0 == cached(run("a", "b"))
    assert cached(run("a", "b", "a", "b", None)) == 2 * 10 * BLOCK


def test_more_adapters_more_misses_and_the_same_bytes_again() -> None:
    spec = WorkloadSpec(
        requests=200, rate=20.0, prefix_share=1.0, prefix_groups=2, prefix_tokens=20 * BLOCK,
        input=LengthSpec(mean=400, max=600), output=LengthSpec(mean=8, max=16),
    )  # fmt: skip
    results = [
        simulate(cluster("mixed", count=1),
                 generate(spec.model_copy(update={"adapters": n}), BLOCK, seed=1))
        for n in (0, 1, 8, 8)
    ]  # fmt: skip
    hits = [cached(result) for result in results]
    assert hits[0] == hits[1] > 1.1 * hits[2] and hits[2] == hits[3]
    assert results[2].to_json() == results[3].to_json()


def test_a_trace_without_adapters_has_the_bytes_that_it_had() -> None:
    """Its digest, and so its name in a result, is as before adapters were known."""
    plain = Arrival(1.0, 33, 2, (1, 2, 3))
    assert b"adapter" not in msgspec.msgpack.encode(plain)
