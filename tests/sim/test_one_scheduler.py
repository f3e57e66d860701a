"""The simulator decides nothing: it runs the scheduler that serves, or it does not run."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvasir.policy.admit import ADMITS
from kvasir.policy.batch import BATCHES
from kvasir.policy.evict import EVICTS
from kvasir.policy.route import ROUTES
from kvasir.world.sim.run import simulate
from tests.sims import cluster, trace

WORLD = Path(__file__).parents[2] / "src" / "kvasir" / "world"
POLICIES: dict[str, tuple[dict[str, Any], str]] = {
    "batch": (BATCHES, "token_budget"),
    "route": (ROUTES, "netkv"),
    "admit": (ADMITS, "bounded"),
    "evict": (EVICTS, "lru"),
}


class Asked(Exception):
    pass


def refuse(*args: object) -> None:
    raise Asked


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_that_cannot_answer_stops_the_simulation(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is scarce, so that all of them are asked."""
    d, t = cluster(count=1, pool={"kv_blocks": 60}), trace(40)
    assert simulate(d, t).summary.completed == 40
    policies, name = POLICIES[kind]
    monkeypatch.setitem(policies, name, refuse)
    with pytest.raises(Asked):
        simulate(d, t)


def test_a_changed_policy_changes_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time is much slower."""
    d, t = cluster(), trace(40)
    before = simulate(d, t).summary.duration_s
    one_token = BATCHES["token_budget"]

    def slow(view: Any) -> Any:
        plan = one_token(view)
        if plan.counts is None:
            plan = plan._replace(counts=(1,) * len(view.running))
        first = next((i for i, c in enumerate(plan.counts) if c), None)
        if first is None:
            return plan._replace(admitted=plan.admitted[:1])
        counts = tuple(c if i == first else 0 for i, c in enumerate(plan.counts))
        return plan._replace(counts=counts, admitted=(), steps=1)

    monkeypatch.setitem(BATCHES, "token_budget", slow)
    assert simulate(d, t).summary.duration_s > 1.5 * before


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("world", ["sim", "live"])
def test_a_world_imports_no_policy(world: str) -> None:
    found = {p.name: list(imported(p)) for p in sorted((WORLD / world).glob("*.py"))}
    assert any("kvasir.node.worker.Worker" in names for names in found.values())
    offences = [(file, name) for file, names in found.items() for name in names
                if name.startswith("kvasir.policy")]  # fmt: skip
    assert not offences
