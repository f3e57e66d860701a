"""A prefix out of a peer's cache, live: the same tokens, and KV that its keys name."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from kvasir.core.events import Prefilled, Shipped  # noqa: E402
from kvasir.engine.tiny import make_tiny  # noqa: E402
from kvasir.policy.route import ROUTES, Choice, RouteMemory, RouteView  # noqa: E402
from tests.live.cluster import cluster, deployment_of, run, wrong_blocks  # noqa: E402

PROMPT = [(7 * j) % 200 for j in range(100)]


def elsewhere(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Prefill where the prefix is not; take it from where it is."""
    if view.stage == "decode":
        return Choice(view.candidates[0].id, "first"), memory
    holders = [w.id for w in view.candidates if view.hits.get(w.id)]
    others = [w.id for w in view.candidates if w.id not in holders]
    if not holders or not others:
        return Choice(view.candidates[0].id, "first"), memory
    blocks = view.hits[holders[0]]
    return Choice(others[0], "else", fetch_from=holders[0], fetch_blocks=blocks), memory


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("engine", ["torch", "fake"])
def test_a_prefix_from_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, kind: str
) -> None:
    monkeypatch.setitem(ROUTES, "round_robin", elsewhere)

    async def main() -> None:
        make_tiny(tmp_path)
        spec = deployment_of(
            tmp_path, engine=engine, transport=kind, prefill=2, route={"name": "round_robin"}
        )
        async with cluster(spec) as c:
            longer = [*PROMPT, 5, 6, 7]
            alone = (await c.ask(PROMPT, 12)).tokens
            await c.until(lambda: c.conductor.index.blocks_of("prefill-0"))
            again = (await c.ask(longer, 12)).tokens
            await c.at_rest()
            fetched = [e for e in c.events(Shipped) if e.request_id.endswith("/prefix")]
            assert [(e.source, e.target) for e in fetched] == [("prefill-0", "prefill-1")]
            assert fetched[0].bytes == 6 * 16 * c.threads.runners["prefill-0"].spec.kv_token_bytes
            assert [e.cached_tokens for e in c.events(Prefilled)] == [0, 96]
            if engine == "fake":
                assert wrong_blocks(c, [PROMPT + alone, longer + again]) == []
            assert again == (await c.ask(longer, 12)).tokens

    run(main())
